"""A mixin for Lightning strategies that record models and fill them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from inspect import Signature, signature
from typing import Any
from weakref import WeakKeyDictionary, ref

from lightning.fabric.strategies.strategy import Strategy
from torch import nn
from torch.optim import Optimizer

from fabric_init.distributed.agreement import Agreement, agreement_of
from fabric_init.distributed.who_reads import check_io
from fabric_init.filling.in_setup import is_bound, shard_and_fill
from fabric_init.guard.before_forward import require
from fabric_init.guard.loads import loading
from fabric_init.guard.waiting_tensors import release_filled
from fabric_init.option_names import Io
from fabric_init.planning.placement import Placement
from fabric_init.planning.tensors import parameters_by_name
from fabric_init.strategies.init_context import init_context
from fabric_init.strategies.mapped_io import mapped_io
from fabric_init.strategies.optimizers import refuse_left_behind, remap


class _SignatureOfTheirs:
    """The ``__signature__`` of a class that takes the mixin's constructor: Lightning's arguments, and ``io``."""

    def __get__(self, _: object, cls: type[DeferredInitMixin]) -> Signature | None:
        if cls.__init__ is not DeferredInitMixin.__init__:
            return None  # which leaves it to `inspect`
        theirs = signature(super(DeferredInitMixin, cls).__init__)
        parameters = [*theirs.parameters.values(), signature(DeferredInitMixin.__init__).parameters["io"]]
        parameters.sort(key=lambda parameter: parameter.kind)  # `**kwargs` is last
        return theirs.replace(parameters=parameters[1:])  # without `self`


class DeferredInitMixin(Strategy):
    """Mixin for a Lightning strategy whose models are recorded first and filled where the strategy keeps them.

    Put it before the strategy's own class, and say where tensors live::

        class MyStrategy(DeferredInitMixin, TheirStrategy):
            def placement(self, model):
                return MyPlacement(...)

    Such a strategy works in :class:`fabric_init.Fabric`, and in an unchanged ``lightning.Fabric``, whose
    ``init_module(empty_init=True)`` then records, and guards uninitialized tensors. The order of calls:
    ``module_init_context`` around the model's constructor; at its end ``placement(model)``; later ``setup_module``.
    With ``fills_in_setup`` nothing is placed at the end of the block: ``setup_module`` calls ``shard(model)`` and then
    ``placement`` with the sharded model.
    """

    fills_in_setup: bool = False
    """Whether models stay recorded until they are set up; ``shard`` is called there, and before ``placement``."""

    io: Io = "auto"
    """How the ranks read a checkpoint, see :class:`fabric_init.Fabric`; also an argument of every strategy of ours."""

    __signature__ = _SignatureOfTheirs()

    def __init__(self, *args: Any, io: Io = "auto", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.io = check_io(io)

    def placement(self, model: nn.Module) -> Placement:
        """Return how this rank keeps the tensors of ``model``, which is sharded by then with ``fills_in_setup``.

        Not asked about DTensors, which say that themselves.
        """
        raise NotImplementedError(f"{type(self).__name__} has to say where it keeps tensors: override placement(model)")

    def shard(self, model: nn.Module) -> nn.Module:
        """Put the strategy's own tensors in the places of the recorded ones, and return the sharded model.

        What torch makes of recorded tensors (``fully_shard``, ``parallelize_module``, ``distribute_tensor``) is
        recorded, without memory.
        """
        raise NotImplementedError(f"{type(self).__name__} fills in setup, and has to override shard(model)")

    def while_recording(self) -> AbstractContextManager[Any]:
        """Return a further context for the constructor of a recorded model."""
        return nullcontext()

    @property
    def agreement(self) -> Agreement:
        """How the ranks run the steps of building and filling a model together."""
        return agreement_of(None if getattr(self, "world_size", 1) > 1 else False)

    # -- what Lightning calls ------------------------------------------------------------------------------------------

    def module_init_context(self, empty_init: bool | None = None) -> AbstractContextManager[Any]:
        """Return the context in which a model is built: recorded with ``empty_init=True``, else eagerly."""
        if empty_init:
            return init_context(self)
        return super().module_init_context(empty_init=empty_init)

    def setup_module(self, module: nn.Module) -> nn.Module:
        """Take what the user has written into account; shard and fill the model if it waits for that."""
        release_filled(module)
        if not is_bound(module):
            return super().setup_module(module)
        before = parameters_by_name(module)
        agreement = self.agreement
        with agreement.telling("setting the model up"):
            sharded = shard_and_fill(module, self.shard, self.placement, agreement)
            self.remember(before, sharded)
            return sharded

    def setup_optimizer(self, optimizer: Optimizer) -> Optimizer:
        """Set up an optimizer, which then holds the parameters that sharding has made.

        Raises:
            FabricInitError: Its parameters are not those of a model that was set up.
        """
        self.adopt(optimizer)
        return super().setup_optimizer(optimizer)

    def load_checkpoint(self, path: Any, state: Any = None, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load a checkpoint; uninitialized tensors that it writes count as loaded when it ends."""
        with self.loading_into(state):
            return super().load_checkpoint(path, state, *args, **kwargs)

    @contextmanager
    def loading_into(self, state: Any) -> Iterator[None]:
        """Context in which a checkpoint is loaded into ``state``, and completes models in it that wait."""
        with ExitStack() as stack:
            for module in modules_in(state):
                stack.enter_context(loading(module))
            if isinstance(state, nn.Module):  # a dictionary may hold optimizers, which keep the tensors they are given
                stack.enter_context(mapped_io(self))
            yield

    def save_checkpoint(self, path: Any, state: Any, *args: Any, **kwargs: Any) -> None:
        """Save a checkpoint.

        Raises:
            UninitializedTensorError: A tensor is uninitialized; raised on every rank.
        """
        for module in modules_in(state):
            require(module, "be saved")
        super().save_checkpoint(path, state, *args, **kwargs)

    # -- optimizers that were made before setup ------------------------------------------------------------------------

    def remember(self, before: Mapping[str, nn.Parameter], sharded: nn.Module) -> None:
        """Remember which parameters ``sharded`` has replaced, as long as it and an optimizer that holds them live."""
        replaced = getattr(self, "_replaced", None)
        if replaced is None:
            replaced = self._replaced = WeakKeyDictionary[nn.Module, dict[str, ref[nn.Parameter]]]()
        replaced[sharded] = {name: ref(parameter) for name, parameter in before.items()}

    def adopt(self, optimizer: Optimizer) -> None:
        """Make an optimizer that was made before ``setup`` hold the sharded parameters.

        Raises:
            FabricInitError: Its parameters are not those of a model that was set up.
        """
        if not self.fills_in_setup:
            return  # parameters stay the same objects, also those that wait for a load
        replaced = dict(getattr(self, "_replaced", {}))
        for sharded, references in replaced.items():
            before = {name: held for name, reference in references.items() if (held := reference()) is not None}
            remap(optimizer, before, parameters_by_name(sharded))
        refuse_left_behind(optimizer, replaced)


def modules_in(state: Any) -> list[nn.Module]:
    """Return the models in what ``load_checkpoint`` or ``save_checkpoint`` is given."""
    if isinstance(state, nn.Module):
        return [state]
    return [value for value in state.values() if isinstance(value, nn.Module)] if isinstance(state, dict) else []
