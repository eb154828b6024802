"""FSDP2 (``torch.distributed.fsdp.fully_shard``), and Lightning's ``ModelParallelStrategy`` with a user's own sharding.

Both shard the model in ``setup`` while it is still recorded, and then fill each rank's shards.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning.fabric.strategies as lightning_strategies
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor.placement_types import Shard

from fabric_init.checkpoints import Box
from fabric_init.checkpoints.fingerprint import file_digest
from fabric_init.errors import FabricInitError
from fabric_init.planning.placement import Placement, WholeTensors
from fabric_init.planning.tensors import named_modules
from fabric_init.sharding.dtensor import shard_box
from fabric_init.sharding.whole_state_dicts import accept_whole_tensors, has_shards, load_parts
from fabric_init.strategies.mixin import DeferredInitMixin
from fabric_init.strategies.registry import register_strategy

Units = Literal["blocks"] | int | type[nn.Module] | Sequence[type[nn.Module]] | Callable[[nn.Module], bool]


class ModelParallelStrategy(DeferredInitMixin, lightning_strategies.ModelParallelStrategy):
    """Lightning's strategy of the same name; models built without values are filled shard by shard in ``setup``."""

    fills_in_setup = True

    def placement(self, model: nn.Module) -> Placement:
        return WholeTensors(self._shards_on(), moves=False)

    def setup_module(self, module: nn.Module) -> nn.Module:
        sharded = super().setup_module(module)
        accept_whole_tensors(sharded)
        return sharded

    def load_checkpoint(self, path: Any, state: Any = None, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As Lightning's, but of a file that is loaded into a model alone, each rank reads its part.

        In both ways that is the file which rank 0 sees at its ``path``.
        """
        if not (isinstance(state, nn.Module) and has_shards(state)):
            return super().load_checkpoint(path, state, *args, **kwargs)
        file = Path(self.broadcast(path))
        if not self.agreement.alike(file_digest(file) if file.is_file() else None):
            return super().load_checkpoint(file, state, *args, **kwargs)
        strict = args[0] if args else kwargs.get("strict", True)

        def load() -> None:
            load_parts(state, torch.load(file, mmap=True, map_location="cpu"), strict=strict)

        with self.loading_into(state):
            self.agreement.run_together("load_raw", load)
        return {}

    def _shards_on(self) -> torch.device:
        return self.root_device

    def shard(self, model: nn.Module) -> nn.Module:
        sharded = self._parallelize_fn(model, self.device_mesh)  # type: ignore[arg-type]
        if not isinstance(sharded, nn.Module):
            raise TypeError(
                f"The `parallelize_fn` must return a `nn.Module` instance, but got: {type(sharded).__name__}"
            )
        return sharded


class FSDP2Strategy(ModelParallelStrategy):
    """Fully sharded data parallel over all ranks, with ``torch.distributed.fsdp.fully_shard``.

    Args:
        units: The modules that are gathered as a unit. ``"blocks"``: the entries of the model's lists of layers
            (``nn.ModuleList`` and ``nn.Sequential`` with at least two entries of one class). A number: modules of at
            least so many parameters, innermost first. A class, or several: their instances. A callable: the modules
            for which it is true. The model itself is always the outermost unit.
        mp_policy: ``fully_shard``'s mixed precision.
        cpu_offload: keep shards in host memory between uses.
        reshard_after_forward: free a unit's gathered parameters between forward and backward.
        **kwargs: as for Lightning's ``ModelParallelStrategy`` (``save_distributed_checkpoint``, ``timeout``, …).
    """

    def __init__(
        self,
        units: Units = "blocks",
        mp_policy: MixedPrecisionPolicy | None = None,
        cpu_offload: bool = False,
        reshard_after_forward: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            parallelize_fn=self._fully_shard,
            tensor_parallel_size=1,
            **kwargs,
        )
        self._units = units
        self._mp_policy = mp_policy or MixedPrecisionPolicy()
        self._offload_policy = (
            CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if cpu_offload else OffloadPolicy()
        )
        self._reshard_after_forward = reshard_after_forward

    def setup_environment(self) -> None:
        if self._data_parallel_size == "auto":
            assert self.cluster_environment is not None
            self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def _shards_on(self) -> torch.device:
        return torch.device("cpu") if isinstance(self._offload_policy, CPUOffloadPolicy) else self.root_device

    def _fully_shard(self, model: nn.Module, mesh: DeviceMesh) -> nn.Module:
        options: dict[str, Any] = {
            "mesh": mesh["data_parallel"],
            "mp_policy": self._mp_policy,
            "offload_policy": self._offload_policy,
            "reshard_after_forward": self._reshard_after_forward,
        }
        for module in units_of(model, self._units):
            fully_shard(module, **options)
        fully_shard(model, **options)
        return model


def region_on(shape: torch.Size, rank: int, world_size: int) -> Box:
    """Return the rows of a parameter of ``shape`` that ``rank`` keeps under :class:`FSDP2Strategy`.

    A parameter without dimensions counts as full: ``fully_shard`` raises for it.
    """
    if not shape:
        return Box((), ())
    return shard_box(shape, (world_size,), (rank,), (Shard(0),))


def units_of(model: nn.Module, units: Units) -> list[nn.Module]:
    """Return the modules of ``model`` that ``units`` selects, inner before outer, without ``model`` itself.

    A module that shares a parameter, or a module, with another part of the model is left to the unit around both: FSDP2
    would untie them, and shards no module twice.
    """
    chosen: Callable[[nn.Module], bool]
    if units == "blocks":
        blocks = {
            id(child)
            for module in model.modules()
            if isinstance(module, (nn.ModuleList, nn.Sequential))
            for kinds in [Counter(map(type, module))]
            for child in module
            if kinds[type(child)] > 1 and len(list(child.children())) > 0
        }
        chosen = lambda module: id(module) in blocks  # noqa: E731
    elif isinstance(units, int) and not isinstance(units, bool):
        return _without_split_ties(model, _units_by_size(model, units))
    elif isinstance(units, type) and issubclass(units, nn.Module):
        kind = units
        chosen = lambda module: isinstance(module, kind)  # noqa: E731
    elif isinstance(units, (list, tuple)):
        kinds = tuple(units)
        chosen = lambda module: isinstance(module, kinds)  # noqa: E731
    elif callable(units):
        chosen = units  # type: ignore[assignment]
    else:
        raise FabricInitError(
            f"units={units!r}: give 'blocks', a number of parameters, one or more module classes, or a callable"
        )
    named = [module for module in reversed(list(model.modules())) if module is not model and chosen(module)]
    return _without_split_ties(model, named)


def _without_split_ties(model: nn.Module, units: list[nn.Module]) -> list[nn.Module]:
    places = Counter(id(module) for _, module in named_modules(model))
    uses = _uses(model)

    def holds_all_uses(unit: nn.Module) -> bool:
        return all(uses[parameter] == count * places[id(unit)] for parameter, count in _uses(unit).items())

    return [unit for unit in units if holds_all_uses(unit)]


def _uses(model: nn.Module) -> Counter[int]:
    """Return the number of names of each parameter, by id, in ``model``; modules may be shared, too."""
    return Counter(id(p) for _, module in named_modules(model) for p in module._parameters.values() if p is not None)


def _units_by_size(model: nn.Module, least: int) -> list[nn.Module]:
    units: list[nn.Module] = []
    for child in model.children():
        _append_units(child, least, units)
    return units


def _append_units(module: nn.Module, least: int, units: list[nn.Module]) -> int:
    """Append the units in ``module``, and return the number of its parameters that are in none of them."""
    left = sum(p.numel() for p in module.parameters(recurse=False))
    left += sum(_append_units(child, least, units) for child in module.children())
    if left >= least and not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        units.append(module)
        return 0
    return left


register_strategy(ModelParallelStrategy, instead_of=lightning_strategies.ModelParallelStrategy)
