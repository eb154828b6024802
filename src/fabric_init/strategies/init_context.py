"""The block in which a model is recorded, and then filled, allocated or kept for setup."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Protocol

import torch
from lightning.fabric.plugins import BitsandbytesPrecision, Precision, TransformerEnginePrecision
from torch import nn
from torch.nn.parameter import is_lazy

from fabric_init._gc import PausedCollector
from fabric_init.checkpoints import CheckpointReader
from fabric_init.distributed.agreement import Agreement
from fabric_init.distributed.who_reads import check_io, open_on_all_ranks
from fabric_init.errors import FabricInitError, RecordingError
from fabric_init.filling.execute import fill_model
from fabric_init.filling.in_setup import bind
from fabric_init.filling.wait_for_load import wait_for_load
from fabric_init.guard.guard_model import guard_model
from fabric_init.option_names import Io
from fabric_init.planning.checkpoint_source import CheckpointSource
from fabric_init.planning.placement import Placement
from fabric_init.planning.plan import LoadOptions
from fabric_init.planning.tensors import named_modules
from fabric_init.recording.in_block.built_modules import BuiltModules, refuse_scripted
from fabric_init.recording.mode import RecordMode, active
from fabric_init.strategies.zero3 import built_whole

_NOTHING_WANTED = LoadOptions()


class RecordingStrategy(Protocol):
    """The interface of a strategy for the block, which :class:`~fabric_init.strategies.DeferredInitMixin` has."""

    io: Io

    @property
    def fills_in_setup(self) -> bool:
        """Whether the model is filled in ``setup``, after it is sharded."""
        ...

    @property
    def precision(self) -> Precision:
        """The plugin that says in which dtypes the model is built."""
        ...

    @property
    def root_device(self) -> torch.device:
        """The device that the model is built for."""
        ...

    @property
    def agreement(self) -> Agreement:
        """How the ranks run their steps together."""
        ...

    def placement(self, model: nn.Module) -> Placement:
        """Return where this rank keeps the tensors of ``model``."""
        ...

    def while_recording(self) -> AbstractContextManager[Any]:
        """Return the context that the constructor runs in."""
        ...


@contextmanager
def init_context(
    strategy: RecordingStrategy,
    source: CheckpointSource | None = None,
    wanted: LoadOptions = _NOTHING_WANTED,
) -> Iterator[None]:
    """Record the model that is built in the block; at its end fill it, allocate it, or bind it until setup.

    Raises:
        RecordingError: Blocks are nested, or a block builds no model, or several models for one checkpoint.
        FabricInitError: A rank failed, or the precision plugin replaces layers of the model by its own.
    """
    agreement = strategy.agreement
    with PausedCollector(), agreement.telling("the init_module block"):
        yield from _recorded(strategy, source, wanted, agreement)


def _recorded(
    strategy: RecordingStrategy, source: CheckpointSource | None, wanted: LoadOptions, agreement: Agreement
) -> Iterator[None]:
    refuse_nesting()
    _refuse_precision(strategy.precision)
    agreement.run_together("init_module", lambda: _way(strategy, source, wanted), str)
    reader = None
    if source is not None:  # a bad path fails before the build
        machines, whole = getattr(strategy, "num_nodes", 1), not strategy.fills_in_setup
        reader = open_on_all_ranks(source, strategy.io, whole=whole, machines=machines, agreement=agreement)
    failure: BaseException | None = None
    try:
        with ExitStack() as contexts:
            contexts.enter_context(built_whole())
            built = contexts.enter_context(BuiltModules())
            recording = contexts.enter_context(RecordMode(agree=agreement.from_rank_zero, skips_init=reader is None))
            recording.tape.shares_seed = True
            device = strategy.root_device
            if device != torch.get_default_device():  # a default device makes every call in the block slower
                contexts.enter_context(device)
            contexts.enter_context(strategy.precision.module_init_context())
            contexts.enter_context(strategy.while_recording())
            yield
            if strategy.fills_in_setup:
                for model in built.roots():  # setup casts to the precision: that belongs to the recording, too
                    strategy.precision.convert_module(model)
    except BaseException as error:  # the other ranks have to hear of it, once the recording has ended
        failure = error

    def built_models() -> list[nn.Module]:
        if failure is not None:
            raise failure
        models = built.roots()
        if not models and (reader is not None or recording.tape.storages):
            raise RecordingError("no module was built in this init_module block; build the model inside it")
        for model in models:
            refuse_scripted(named_modules(model))
        if reader is not None:
            _one_model(models, reader)
        return models

    try:
        models = agreement.run_together("building the model", built_models, _described)
        _complete(models, reader, wanted, strategy)
    except BaseException:
        _hold_failed(built.roots())
        raise


def _way(strategy: RecordingStrategy, source: CheckpointSource | None, wanted: LoadOptions) -> str:
    """Return which way this rank goes: what differs here would make ranks wait for what others never do."""
    load = (
        "no checkpoint" if source is None else f"a declared load, strict={wanted.strict}, reinit={list(wanted.reinit)}"
    )
    return f"{type(strategy).__name__} with io={check_io(strategy.io)!r} and {load}"


def refuse_nesting() -> None:
    """Raise if a recorded block is open.

    Raises:
        RecordingError: One is.
    """
    if active() is not None:
        raise RecordingError(
            "init_module inside a recorded block: build both models in one block, or one after the other"
        )


def _refuse_precision(precision: Precision) -> None:
    if isinstance(precision, (BitsandbytesPrecision, TransformerEnginePrecision)):
        instead = "Use init_module() without empty_init or checkpoint, and load the weights into that model."
        if isinstance(precision, BitsandbytesPrecision):
            instead = (
                "Fill the model with its own layers first, with deferred_init() and materialize(model, checkpoint=…): "
                "fabric.setup(model) then converts them, as precision.convert_module(model) does. Or build the layers "
                "of bitsandbytes themselves, without the plugin: these are quantized while they are filled."
            )
        raise FabricInitError(
            f"{type(precision).__name__} puts layers of its own in the place of the model's, which cannot be recorded "
            f"yet. {instead}"
        )


def _complete(
    models: list[nn.Module], reader: CheckpointReader | None, wanted: LoadOptions, strategy: RecordingStrategy
) -> None:
    if strategy.fills_in_setup:
        for model in models:
            bind(model, reader, wanted, strategy.agreement)
    elif reader is None:
        wait_for_load(models, strategy.placement, strategy.agreement)
    else:
        fill_model(models[0], reader, wanted, strategy.placement(models[0]), agreement=strategy.agreement)


def _hold_failed(models: list[nn.Module]) -> None:
    """Let nobody use what is left of models whose block has failed; what had values in them before may be used."""
    for model in models:
        guard_model(model, "Its init_module block ended with an error: build it again.")


def _one_model(models: list[nn.Module], reader: CheckpointReader) -> None:
    if len(models) > 1:
        names = ", ".join(sorted(type(model).__name__ for model in models))
        raise RecordingError(
            f"{len(models)} models were built in one init_module(checkpoint={str(reader.path)!r}) block: {names}. "
            "Give each its own block, so that it is clear which one the checkpoint is for."
        )


def _described(models: list[nn.Module]) -> str:
    """Return a text that differs where models differ between ranks."""
    described = []
    for model in models:
        shapes = [p.shape for p in model.parameters() if not is_lazy(p)]
        elements = sum(shape.numel() for shape in shapes)
        described.append(f"{type(model).__name__} with {len(shapes)} parameters of {elements:,} elements")
    return ", ".join(described) or "no model"
