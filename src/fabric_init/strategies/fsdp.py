"""FSDP, the first version (``torch.distributed.fsdp.FullyShardedDataParallel``), as in Lightning's ``"fsdp"``.

It flattens the parameters of a unit into one tensor, of which each rank keeps a part. So a unit is
allocated in full for a moment: it is filled when FSDP wraps it, and FSDP shards it before it goes on to the next.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import lightning.fabric.strategies.fsdp as lightning_fsdp
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import CustomPolicy, enable_wrap
from torch.optim import Optimizer

from fabric_init._lightning_internals import WrapPolicy
from fabric_init.errors import FabricInitError
from fabric_init.filling.in_setup import choose_own_init, is_bound, planned_for
from fabric_init.filling.incremental import IncrementalFill, plain_meta
from fabric_init.guard.before_forward import release_forward
from fabric_init.guard.loads import unwatch_loads
from fabric_init.planning.placement import Placement, WholeTensors
from fabric_init.planning.tensors import named_modules
from fabric_init.reports.registry import FillRecord, keep_record
from fabric_init.strategies.mixin import DeferredInitMixin
from fabric_init.strategies.registry import register_strategy

_Marks = WeakKeyDictionary[nn.Module, dict[str, Any]]


class FSDPStrategy(DeferredInitMixin, lightning_fsdp.FSDPStrategy):
    """Lightning's strategy of the same name; models built without values are filled unit by unit in ``setup``.

    What no declared checkpoint brings gets the model's own init there; no tensor is left to a later load.

    Units are those of ``auto_wrap_policy``, or what the constructor marked with ``torch.distributed.fsdp.wrap.wrap``.
    The model itself is the outermost unit; without a policy it is the only one, so each rank has all of it in memory
    for a moment. Parameters stay the same objects (``use_orig_params=True``, Lightning's default), so optimizers may be
    made before ``setup``.

    In an instance of this class FSDP also runs on the CPU, with gloo and without ``cpu_offload``: to try things out.
    """

    fills_in_setup = True

    def placement(self, model: nn.Module) -> Placement:
        return WholeTensors(self.root_device, moves=False)  # FSDP moves what has memory when it wraps it

    def setup_module(self, module: nn.Module) -> nn.Module:
        if any(isinstance(part, FullyShardedDataParallel) for part in module.modules()):
            if is_bound(module):
                raise FabricInitError(
                    "parts of this recorded model are already in FullyShardedDataParallel, by hand or by a setup that "
                    "failed. Build it anew, and leave the wrapping to setup: name the units with "
                    "FSDPStrategy(auto_wrap_policy=…), or mark them with torch.distributed.fsdp.wrap.wrap in the "
                    "constructor."
                )
            return super().setup_module(module)
        wrapped = self._wrap_and_fill(module) if is_bound(module) else self._wrap(module, **self._fsdp_kwargs)
        options, self._fsdp_kwargs = self._fsdp_kwargs, {}
        try:
            return super().setup_module(wrapped)  # activation checkpointing, metrics
        finally:
            self._fsdp_kwargs = options

    def setup_module_and_optimizers(
        self, module: nn.Module, optimizers: list[Optimizer], scheduler: Any = None
    ) -> tuple[nn.Module, list[Optimizer], Any]:
        module, optimizers, scheduler = super().setup_module_and_optimizers(module, optimizers, scheduler)
        for optimizer in optimizers:  # which Lightning does not set up with this strategy
            self.adopt(optimizer)
        return module, optimizers, scheduler

    def _wrap(self, module: nn.Module, **options: Any) -> FullyShardedDataParallel:
        return torch.distributed.fsdp.FullyShardedDataParallel(
            module,
            cpu_offload=self.cpu_offload,
            mixed_precision=self.mixed_precision_config,
            sharding_strategy=self.sharding_strategy,
            device_id=self.root_device,
            **options,
        )

    def _wrap_and_fill(self, module: nn.Module) -> nn.Module:
        options = dict(self._fsdp_kwargs)
        if options.pop("param_init_fn", None) is not None:
            raise FabricInitError(
                "FSDPStrategy(param_init_fn=…) and init_module(empty_init=True or checkpoint=…) both say how the model "
                "gets its values. Leave one of them out."
            )
        if (by_hand := self._units_by_hand(module)) is not None:
            if options.get("auto_wrap_policy") is not None:
                rank_zero_warn("FSDPStrategy(auto_wrap_policy=…) is not used: the model's constructor marks its units.")
            options["auto_wrap_policy"] = by_hand
        if (policy := options.get("auto_wrap_policy")) is not None:
            options["auto_wrap_policy"] = _without_split_storages(module, policy)
        options["sync_module_states"] = False  # each rank fills its own after the plan that all agree on
        choose_own_init(module)
        with planned_for(module, self.agreement) as prepared, plain_meta(prepared):
            filling = IncrementalFill(prepared, self.placement(module))

            def wrap() -> tuple[nn.Module, FillRecord]:
                filling.begin()
                wrapped = self._wrap(module, param_init_fn=filling.fill_under, **options)
                return wrapped, filling.finish()

            wrapped, record = self.agreement.run_together("wrapping and filling the model", wrap)
        unwatch_loads(module)
        release_forward(module)
        keep_record(module, record)
        return wrapped

    # -- units that the model's constructor marks ----------------------------------------------------------------------

    @contextmanager
    def while_recording(self) -> Iterator[None]:
        """Context in which ``torch.distributed.fsdp.wrap.wrap(module)`` marks a unit, to be wrapped in ``setup``."""
        marked: _Marks = getattr(self, "_marked", WeakKeyDictionary())
        self._marked = marked

        def mark(module: nn.Module, **options: Any) -> nn.Module:
            marked[module] = options
            return module

        with enable_wrap(wrapper_cls=mark):
            yield

    def _units_by_hand(self, model: nn.Module) -> WrapPolicy | None:
        marked: _Marks = getattr(self, "_marked", WeakKeyDictionary())
        if not any(module in marked for module in model.modules()):
            return None
        return CustomPolicy(lambda module: marked[module] or True if module in marked else False)


Policy = WrapPolicy | Callable[..., bool]


def _without_split_storages(model: nn.Module, policy: Policy) -> Policy:
    """``policy``, without units that share a parameter, or its memory, with other parts of the model.

    FSDP would flatten it in one of them, and the others would find a shard in its place. It goes into the unit around
    all that use it.
    """
    whole = _modules_with_storages_of_their_own(model)
    if isinstance(policy, WrapPolicy):
        return _FlatSlice(policy, whole)

    def chosen(module: nn.Module, recurse: bool, nonwrapped_numel: int) -> bool:
        wanted = policy(module=module, recurse=recurse, nonwrapped_numel=nonwrapped_numel)
        return wanted and (recurse or id(module) in whole)

    return chosen


class _FlatSlice(WrapPolicy):
    """A policy restricted to some modules, named by id."""

    def __init__(self, policy: WrapPolicy, whole: set[int]) -> None:
        self._policy = policy
        self._whole = whole

    def _run_policy(self, *args: Any, **kwargs: Any) -> dict[nn.Module, dict[str, Any]]:
        chosen = self._policy._run_policy(*args, **kwargs)
        return {module: options for module, options in chosen.items() if id(module) in self._whole}


def _modules_with_storages_of_their_own(model: nn.Module) -> set[int]:
    def uses(module: nn.Module) -> Counter[int]:
        """Storages of parameters, and how often they are used: a module in two places counts twice."""
        return Counter(
            parameter.untyped_storage()._cdata
            for _, part in named_modules(module)
            for parameter in part._parameters.values()
            if parameter is not None
        )

    everywhere = uses(model)
    return {
        id(module)
        for module in model.modules()
        if all(everywhere[storage] == count for storage, count in uses(module).items())
    }


register_strategy(FSDPStrategy, instead_of=lightning_fsdp.FSDPStrategy)
