"""How ``ckpt_path=`` of a ``Trainer`` goes together with what was declared for its model."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fabric_init.errors import FabricInitError
from fabric_init.guard.loads import unwatch_loads
from fabric_init.guard.waiting_tensors import unfilled
from fabric_init.trainer.declared_load import Declared, fill_rest, on_some_rank
from fabric_init.trainer.early_copies import copies_filled, has_copies

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule
    from lightning.pytorch.strategies import Strategy as _Base
else:
    _Base = ABC  # as theirs: an object takes no class whose instances are laid out otherwise


class ResumingMixin(_Base):
    """A strategy that fills its model from what was declared, or from ``ckpt_path`` if that brings all of it."""

    declared: Declared
    """What models are filled from."""

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read what ``ckpt_path`` names, after what was declared, unless it brings all that is to have that."""
        model = self.lightning_module
        if model is not None and (not _is_loaded_whole(model) or on_some_rank(has_copies(model))):
            self._fill(model)
        return super().load_checkpoint(*args, **kwargs)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load what ``ckpt_path`` names, before ``setup`` or after it.

        Raises:
            FabricInitError: Hooks of the model have let it leave out what was declared.
        """
        model = self.lightning_module
        assert model is not None
        unwatch_loads(model)  # what is left here would be given its own init
        super().load_model_state_dict(checkpoint, strict)
        kept = model.state_dict()
        left = [name for name, _ in unfilled(model) if name in kept]
        if left and self.declared.options["checkpoint"] is not None:
            raise FabricInitError(
                f"the checkpoint to resume from has not brought {', '.join(left[:5])}. With strict_loading = False in "
                f"{type(model).__name__} they keep what FillModel declares."
            )
        fill_rest(model, self._fills_on())

    def _fill(self, model: nn.Module) -> None:
        """Give every tensor of ``model`` that waits its value."""
        with copies_filled(model):
            self.declared.fill(model, self._fills_on(), self._partitions_by())

    def _fills_on(self) -> torch.device | None:
        """Return the device for all tensors; ``None`` for FSDP, which moves what it has cut."""
        return None if "FSDPStrategy" in names_of(self) else self.root_device

    def _partitions_by(self) -> Mapping[str, Any] | None:
        """Return the configuration by which DeepSpeed partitions parameters; ``None`` if it does not."""
        return None


def _is_loaded_whole(model: LightningModule) -> bool:
    """Return whether a checkpoint to resume from brings all that is saved of ``model``, or raises."""
    its = type(model)
    hook = getattr(its.on_load_checkpoint, "__module__", "").partition(".")[0]
    plain = its.load_state_dict is nn.Module.load_state_dict and hook in ("lightning", "pytorch_lightning")
    return plain and model.strict_loading


def names_of(plugin: object) -> set[str]:
    """Return the names of its classes: two packages have classes of these names."""
    return {cls.__name__ for cls in type(plugin).__mro__}
