"""A strategy of Lightning's ``Trainer``, made to record models and to fill them before it takes them.

[Note: one mechanism for every strategy of the Trainer]
The strategies of the Trainer differ in what they do with a model: they move it, wrap it, or find it sharded by
``configure_model``. None of this matters here, because a recorded model can be sharded as any other can (see [Note:
sharding recorded tensors]). So there is one mixin and no class for each: ``tensor_init_context``, in which the Trainer
builds models, records them; and ``setup``, which moves and wraps the model and makes optimizers, first fills what this
rank keeps. A strategy gets it by changing its class, as the Trainer's connectors know the object already.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import TYPE_CHECKING, Any, cast

from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from fabric_init.api import deferred_init
from fabric_init.errors import FabricInitError
from fabric_init.guard.waiting_tensors import unfilled
from fabric_init.recording.mode import active
from fabric_init.trainer.declared_load import Declared, declare
from fabric_init.trainer.resume import ResumingMixin, names_of

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


class RecordingMixin(ResumingMixin):
    """What a strategy gets from :func:`let_record`."""

    configures: bool = False
    """Whether ``configure_model`` is what the Trainer builds next."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Return how a copy is made: processes that are spawned get one, and find no class of ours by its name."""
        made = super().__reduce_ex__(protocol)
        return (_new, (type(self).__bases__[1],), *made[2:])

    @contextmanager
    def tensor_init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        """Record what ``configure_model`` builds, and shards, or ``Trainer.init_module(empty_init=True)``."""
        configures, self.configures = self.configures, False
        if not (configures if empty_init is None else empty_init):
            with super().tensor_init_context(empty_init):
                yield
            return
        with deferred_init(), self._fills_on() or nullcontext(), self.precision_plugin.tensor_init_context():
            yield

    def setup(self, trainer: Trainer) -> None:
        """Fill the model, and then set it up."""
        self.configures = False
        assert self.lightning_module is not None
        _refuse_wrapped(self.lightning_module)
        self._fill(self.lightning_module)
        super().setup(trainer)


class PartitioningMixin(RecordingMixin):
    """The same for DeepSpeed's, which may partition parameters. Lightning asks whether a strategy has this context."""

    zero_stage_3: bool

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Leave what is recorded to ``setup``, which has the values, where ZeRO-3 would partition it as it is built."""
        leave = active() is not None and self.zero_stage_3
        with nullcontext() if leave else super().model_sharded_context():
            yield

    def _partitions_by(self) -> Mapping[str, Any] | None:
        if not self.zero_stage_3:
            return None
        theirs: Any = self
        theirs._init_config_if_needed()  # as their own setup does first
        config: Mapping[str, Any] = theirs.config
        return config


def let_record(strategy: Any, declared: Declared) -> None:
    """Let ``strategy``, of a Trainer, record models and fill them from now on.

    Raises:
        FabricInitError: It, or its precision, builds models in a way that cannot be recorded.
        OptionError: Something else was declared for it.
    """
    _refuse(strategy)
    declare(strategy, declared, "Trainer")
    if not isinstance(strategy, RecordingMixin):
        strategy.__class__ = _recording(cast(Any, type(strategy)))


@cache
def _recording(theirs: Any) -> Any:
    ours = PartitioningMixin if hasattr(theirs, "zero_stage_3") else RecordingMixin
    return type(theirs.__name__, (ours, theirs), {"__module__": theirs.__module__})


def _new(theirs: type) -> Any:
    return object.__new__(_recording(theirs))


def _refuse(strategy: Any) -> None:
    instead = "Build the model outside of fabric_init's blocks, without FillModel."
    for plugin in (strategy, strategy.precision_plugin):
        wrong = names_of(plugin) & {"XLAStrategy", "SingleDeviceXLAStrategy", *_OWN_LAYERS}
        if wrong:
            raise FabricInitError(f"fabric_init cannot record models for {wrong.pop()} yet. {instead}")


def _refuse_wrapped(model: nn.Module) -> None:
    """Raise if FSDP has flattened parameters of ``model`` that wait for values: what it makes cannot be filled."""
    wrapped = [name for name, module in model.named_modules() if isinstance(module, FullyShardedDataParallel)]
    if wrapped and unfilled(model):
        raise FabricInitError(
            f"{wrapped[0] or type(model).__name__} was wrapped by FSDP before it had values. Leave wrap() out of "
            "configure_model and give FSDPStrategy an auto_wrap_policy; or use ModelParallelStrategy and fully_shard."
        )


_OWN_LAYERS = ("BitsandbytesPrecision", "TransformerEnginePrecision")  # which they put in the place of the model's
