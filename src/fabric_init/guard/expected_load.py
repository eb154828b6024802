"""A load that is still to come, for models whose strategy had to give them their own init when it set them up.

DeepSpeed copies the weights in ``setup``, so they have to have values by then: those of the model's own init. Nothing
in such a model is garbage, but one that was built with ``empty_init=True`` and never loaded is a mistake all the same.
So the model as a whole refuses to run and to be saved until a load has come, ``init_missing`` was called, or somebody
has written to it.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Iterable, Mapping
from weakref import ref

import torch
from torch import Tensor, nn

from fabric_init.distributed.agreement import Agreement
from fabric_init.errors import UninitializedTensorError
from fabric_init.recording.after_block.waiting_storages import uninitialized
from fabric_init.reports.registry import note_loaded

_EXPECTED = "_fabric_init_expected_load"


class ExpectedLoad:
    """What is known of a model that has its own init and expects a load.

    Args:
        model: The model, as its strategy keeps it.
        names: The tensors that the load was to bring, each with the names of those that it was computed from.
        part_of: Returns this rank's memory of a parameter.
        agreement: How the ranks keep in step that run it together.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Mapping[str, Collection[str]],
        part_of: Callable[[Tensor], Tensor],
        agreement: Agreement,
    ) -> None:
        self._model = ref(model)
        self._names = dict(names)
        self._stale: list[str] = []  # computed from tensors that were loaded since
        self.came = False  # on this rank, with all that would be stale without it
        self._part_of = part_of
        self._agreement = agreement
        self._digest = self._digest_now(model)
        vars(model)[_EXPECTED] = self

    def __call__(self, module: nn.Module) -> None:
        """Complete a load: nothing waits here, what it has not brought has its own init."""

    def note(self, brought: Iterable[tuple[nn.Module, str]]) -> None:
        """Note that a load has written these tensors, each given by its module and its name there."""
        model = self._model()
        if model is not None:
            loaded = note_loaded(model, brought)
            sources = self._names.items()
            self._stale = [name for name, its in sources if name not in loaded and not loaded.isdisjoint(its)]
            self.came = not self._stale

    def require(self, model: nn.Module, use: str) -> None:
        """Raise, on all ranks, unless somebody has written to the model on some rank.

        Before the model runs, all ranks meet, whatever each of them has loaded.

        Raises:
            UninitializedTensorError: Naming the tensors that the load was to bring.
        """
        if self.came and use != "run":
            return
        stale = self._agreement.from_all(self._stale)
        if stale:
            raise UninitializedTensorError(
                f"{type(model).__name__} cannot {use}: the constructor has computed {', '.join(stale[:5])} from "
                "tensors that have been loaded since setup. "
                "Load them as well, or load before setup, or keep them: fabric.init_missing(model)."
            )
        is_written = self.came or self._digest_now(model) != self._digest
        if not self._agreement.from_all(["written"] if is_written else []):
            raise UninitializedTensorError(uninitialized(type(model).__name__, use, list(self._names)))
        vars(model).pop(_EXPECTED, None)

    def _digest_now(self, model: nn.Module) -> int:
        digest = 0
        for tensor in model.parameters():
            part = self._part_of(tensor).detach().cpu().contiguous()
            if part.numel():
                digest = zlib.crc32(part.view(torch.uint8).numpy().data, digest)
        return digest


def expected_load(model: nn.Module) -> ExpectedLoad | None:
    """Return the load that ``model``, or a model in it, still expects."""
    return next((found for module in model.modules() if (found := vars(module).get(_EXPECTED)) is not None), None)


def forget_expected_load(model: nn.Module) -> None:
    """Let the model keep its own init."""
    for module in model.modules():
        vars(module).pop(_EXPECTED, None)
