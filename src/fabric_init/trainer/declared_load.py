"""What a model of a Trainer is filled from: a declared checkpoint, or its own init."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from fabric_init.api import materialize
from fabric_init.distributed.agreement import agreement_of
from fabric_init.errors import FabricInitError, OptionError, RecordingError
from fabric_init.guard.waiting_tensors import unfilled
from fabric_init.reports.registry import report_of, statuses


def declare(owner: Any, declared: Declared, what: str) -> None:
    """Let models that ``owner``, a strategy or an ``Accelerator``, takes be filled from ``declared``.

    Raises:
        OptionError: Something else was declared for it.
    """
    if getattr(owner, "declared", declared) is not declared:
        raise OptionError(f"this {what} has another FillModel already: declare in one what its models are filled from")
    owner.declared = declared


class Declared(NamedTuple):
    """A declared load: the options of :func:`~fabric_init.materialize`, and the part of the model that it is for."""

    options: dict[str, Any]
    part: str = ""

    def fill(self, model: nn.Module, device: torch.device | None, deepspeed: Mapping[str, Any] | None = None) -> None:
        """Give every tensor of ``model`` that waits its value, on all ranks together.

        Args:
            model: The model.
            device: The device for all tensors, as for :func:`~fabric_init.materialize`.
            deepspeed: The configuration of DeepSpeed, which may partition parameters.

        Raises:
            RecordingError: A checkpoint is declared, and nothing has ever waited for it.
            OptionError: The model has no such part.
            FabricInitError: As :func:`~fabric_init.materialize`.
        """
        if self.options["checkpoint"] is None:
            fill_rest(model, device, deepspeed)
        elif on_some_rank(bool(unfilled(model))):
            materialize(self._part_of(model), device=device, deepspeed=deepspeed, **self.options)
            fill_rest(model, device, deepspeed)
        elif not _was_recorded(model):
            raise RecordingError(
                f"checkpoint={str(self.options['checkpoint'])!r} was declared for {type(model).__name__}, which was "
                "built with values. Build it in configure_model, or in a block of fabric_init.deferred_init(); "
                "trainer.init_module(empty_init=True) is one after FillModel.attach(trainer). With a callback that "
                "calls configure_model itself, as WeightAveraging does, build it in such a block."
            )

    def _part_of(self, model: nn.Module) -> nn.Module:
        try:
            return model.get_submodule(self.part)
        except AttributeError:
            names = ", ".join(name for name, _ in model.named_children()) or "none"
            raise OptionError(f"part={self.part!r}: {type(model).__name__} has no such part; it has {names}") from None


def fill_rest(model: nn.Module, device: torch.device | None, deepspeed: Mapping[str, Any] | None = None) -> None:
    """Give every tensor of ``model`` that still waits its own init, on all ranks together."""
    if on_some_rank(bool(unfilled(model))):
        materialize(model, device=device, deepspeed=deepspeed)


def on_some_rank(here: bool) -> bool:
    """Return whether something is so on any rank: one whose shards are all empty cannot tell that others wait."""
    return bool(agreement_of(None).from_all(["here"] if here else []))


def _was_recorded(model: nn.Module) -> bool:
    return bool(statuses(model)) or any(_has_report(module) for module in model.modules())


def _has_report(module: nn.Module) -> bool:
    try:
        report_of(module)
    except FabricInitError:
        return False
    return True
