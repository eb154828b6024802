"""A strategy of Lightning's ``Trainer``, made to record models and to fill them before it takes them.

[Note: one mechanism for every strategy of the Trainer]
The strategies of the Trainer differ in what they do with a model: they move it, wrap it, or find it sharded by
``configure_model``. None of this matters here, because a recorded model can be sharded as any other can (see [Note:
sharding recorded tensors]). So there is one mixin and no class for each: ``tensor_init_context``, in which the Trainer
builds models, records them; and ``setup``, which moves and wraps the model and makes optimizers, first fills what this
rank keeps. A strategy gets it by changing its class, as the Trainer's connectors know the object already.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from fabric_init.api import deferred_init
from fabric_init.errors import FabricInitError, OptionError
from fabric_init.trainer.declared import Declared, fill_rest

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from lightning.pytorch.strategies import Strategy as _Base
else:
    _Base = ABC  # as theirs: an object takes no class whose instances are laid out otherwise


class RecordingMixin(_Base):
    """What a strategy gets from :func:`let_record`."""

    declared: Declared
    """What models are filled from."""

    configures: bool = False
    """Whether ``configure_model`` is what the Trainer builds next."""

    @contextmanager
    def tensor_init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        """Record what ``configure_model`` builds, or ``Trainer.init_module(empty_init=True)``.

        Not the ``configure_model`` of ``ModelParallelStrategy``: it shards what it has built, which is for after a
        recorded block.
        """
        configures = self.configures and "ModelParallelStrategy" not in _names(self)
        self.configures = False
        if not (configures if empty_init is None else empty_init):
            with super().tensor_init_context(empty_init):
                yield
            return
        with deferred_init(), self._fills_on() or nullcontext(), self.precision_plugin.tensor_init_context():
            yield

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load what ``ckpt_path`` holds, before ``setup`` or after it.

        A strict load brings all that can be saved, so that a declared checkpoint is not even read. Any other keeps what
        it does not bring, which is what was declared for it.
        """
        model = self.lightning_module
        assert model is not None
        if not strict:
            self.declared.fill(model, self._fills_on())
        super().load_model_state_dict(checkpoint, strict)
        fill_rest(model, self._fills_on())

    def setup(self, trainer: Trainer) -> None:
        """Fill the model, and then set it up."""
        self.configures = False
        assert self.lightning_module is not None
        self.declared.fill(self.lightning_module, self._fills_on())
        super().setup(trainer)

    def _fills_on(self) -> torch.device | None:
        return None if "FSDPStrategy" in _names(self) else self.root_device  # FSDP moves what it has cut


def let_record(strategy: Any, declared: Declared) -> None:
    """Let ``strategy``, of a Trainer, record models and fill them from now on.

    Raises:
        FabricInitError: It, or its precision, builds models in a way that cannot be recorded.
        OptionError: Something else was declared for it.
    """
    _refuse(strategy)
    if getattr(strategy, "declared", declared) is not declared:
        raise OptionError("this Trainer has another FillModel already: declare in one what its model is filled from")
    if not isinstance(strategy, RecordingMixin):
        theirs = type(strategy)
        strategy.__class__ = type(theirs.__name__, (RecordingMixin, theirs), {"__module__": theirs.__module__})
    strategy.declared = declared


def _refuse(strategy: Any) -> None:
    instead = "Build the model outside of fabric_init's blocks, without FillModel."
    if getattr(strategy, "zero_stage_3", False):
        raise FabricInitError(
            f"{type(strategy).__name__} with stage 3 partitions each parameter while the model is built, which cannot "
            "be recorded under the Trainer yet. Use stage 2 or ModelParallelStrategy, or fabric_init.Fabric with stage "
            f"3. {instead}"
        )
    for plugin in (strategy, strategy.precision_plugin):
        wrong = _names(plugin) & {"XLAStrategy", "SingleDeviceXLAStrategy", *_OWN_LAYERS}
        if wrong:
            raise FabricInitError(f"fabric_init cannot record models for {wrong.pop()} yet. {instead}")


_OWN_LAYERS = ("BitsandbytesPrecision", "TransformerEnginePrecision")  # which they put in the place of the model's


def _names(plugin: object) -> set[str]:
    """Return the names of its classes: two packages have classes of these names."""
    return {cls.__name__ for cls in type(plugin).__mro__}
