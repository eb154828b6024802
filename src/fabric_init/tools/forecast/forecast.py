"""The function :func:`fabric_init.forecast` and its result."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from fabric_init._gc import PausedCollector
from fabric_init._text import human_bytes, joined
from fabric_init.checkpoints.mapping.rename import Rename
from fabric_init.checkpoints.storage.file_system import file_system_of
from fabric_init.distributed.who_reads import check_io, choose_io
from fabric_init.option_names import Io, OptimizerName, PrecisionName, StrategyName
from fabric_init.planning.checkpoint_source import CheckpointSource
from fabric_init.planning.matching import match
from fabric_init.planning.plan import Action, LoadOptions, Plan
from fabric_init.planning.prepare import load_with_code
from fabric_init.planning.recorded_load.converted import Convert
from fabric_init.planning.tensors import TensorInfo, tensors_and_tapes
from fabric_init.recording.mode import recorded_build
from fabric_init.strategies.fsdp2 import Units
from fabric_init.tools.forecast.coverage import Coverage, coverage_of
from fabric_init.tools.forecast.memory import Memory, gathered_units, memory_of
from fabric_init.tools.forecast.reading_by_rank import IoEstimate, reading_of
from fabric_init.tools.forecast.training_config import TrainingConfig

_MOST_NAMES = 5


@dataclass(frozen=True)
class Forecast:
    """What a load would do, and the memory that the model would take. ``str()`` returns a summary.

    Attributes:
        model: the class of the model.
        checkpoint: as the user named it; ``None`` for a model that is initialized.
        format: the format of the checkpoint.
        note: how the checkpoint is read, if that is notable.
        setting: the training configuration.
        coverage: which tensors of the model the checkpoint covers.
        reading: bytes and seconds for each rank.
        memory: bytes on each rank.
    """

    model: str
    checkpoint: str | None
    format: str | None
    note: str | None
    setting: TrainingConfig
    coverage: Coverage
    reading: IoEstimate
    memory: Memory

    @property
    def complete(self) -> bool:
        """Whether the load would succeed with these options."""
        return self.coverage.complete

    def to_dict(self) -> dict[str, Any]:
        """Return the forecast as plain data for JSON."""
        memory = asdict(self.memory) | {"kept": self.memory.kept, "peak": self.memory.peak}
        return {"complete": self.complete} | asdict(self) | {"memory": memory}

    def __str__(self) -> str:
        coverage, setting = self.coverage, self.setting
        source = f"from {self.checkpoint} ({self.format})" if self.checkpoint else "from scratch"
        lines = [
            f"{self.model} {source}: {'complete' if self.complete else 'not complete'}",
            f"covers {coverage.loaded.tensors} of {coverage.wanted.tensors} tensors, "
            f"{human_bytes(coverage.loaded.bytes)} of {human_bytes(coverage.wanted.bytes)}",
            *(f"cast: {cast.tensors} tensors {cast.saved_as} → {cast.kept_as}" for cast in coverage.casts),
            *_names_line("missing", [tensor.name for tensor in coverage.missing]),
            *_names_line("not in the model", [tensor.key for tensor in coverage.unexpected]),
            *_names_line("does not fit", [tensor.name for tensor in coverage.wrong_shapes]),
            *_names_line("without a value", coverage.without_values),
            *coverage.problems,
            *(f"likely to help: {text}" for text in coverage.proposed),
            f"{setting.strategy}, ranks: {setting.ranks}, {setting.precision}, {setting.optimizer}: a rank reads "
            f"{human_bytes(max(self.reading.by_rank))} and needs {human_bytes(self.memory.peak)} beside activations",
        ]
        return "\n".join(lines)


def _names_line(what: str, names: Sequence[str]) -> list[str]:
    return [f"{what}: {joined(names, _MOST_NAMES)}"] if names else []


def forecast(
    model: nn.Module | Callable[[], nn.Module],
    checkpoint: str | os.PathLike[str] | None = None,
    *,
    strategy: StrategyName = "auto",
    devices: int = 1,
    nodes: int = 1,
    precision: PrecisionName = "32-true",
    optimizer: OptimizerName = "adamw",
    bandwidth: float | None = None,
    units: Units | None = None,
    io: Io = "auto",
    strict: bool = True,
    rename: Rename = None,
    reinit: Sequence[str] = (),
    entry: str | None = None,
    convert: Convert = (),
) -> Forecast:
    """Forecast ``fabric.init_module(checkpoint=…)`` and training, without reading weights or allocating memory.

    Every mismatch between checkpoint and model is in the result; none raises.

    Args:
        model: a callable that builds it, which is recorded under ``precision``; or a model, recorded or not, which
            stays as it is.
        checkpoint: all that :func:`~fabric_init.checkpoints.open_checkpoint` takes; ``None`` to initialize everything.
        strategy: ``"single_device"``, ``"ddp"``, ``"fsdp"`` (the first FSDP), ``"fsdp2"``, ``"deepspeed_stage_1"``,
            ``_2`` or ``_3``; ``"auto"`` is one device, or DDP where there are several ranks.
        devices: ranks per machine.
        nodes: machines.
        precision: as Fabric takes it: ``"bf16-true"``, ``"16-true"``, ``"32-true"``, ``"64-true"``, ``"bf16-mixed"``,
            ``"16-mixed"``.
        optimizer: ``"adamw"``, ``"adam"``, ``"adagrad"``, ``"rmsprop"``, ``"sgd-momentum"``, ``"sgd"``; ``"none"`` for
            a model that is not trained.
        bandwidth: of the storage, in bytes per second, to estimate the time.
        units: for ``"fsdp2"`` and ``"fsdp"``, which modules are gathered as one, see
            :class:`~fabric_init.strategies.FSDP2Strategy`. ``None``: what the strategy does when nothing is said:
            ``"blocks"`` for ``"fsdp2"``, the model as the only one for ``"fsdp"``.
        io: see :class:`fabric_init.Fabric`.
        strict: see :meth:`fabric_init.Fabric.init_module`, as for ``rename``, ``reinit``, ``entry`` and ``convert``.

    Raises:
        ValueError: a name is unknown, or Lightning refuses the combination of strategy and precision.
        CheckpointError: the checkpoint cannot be opened.
        CheckpointMismatchError: ``rename`` or ``convert`` is not usable with it.
        OptionError: ``rename`` is invalid, or ``reinit`` matches no tensor.
        RecordingError: the constructor does what cannot be recorded.
    """
    setting = TrainingConfig(strategy, devices, nodes, precision, optimizer)
    if bandwidth is not None and bandwidth <= 0:
        raise ValueError(f"bandwidth must be a positive number of bytes per second, got {bandwidth}")
    check_io(io)
    reader = None if checkpoint is None else CheckpointSource(checkpoint, entry=entry, convert=convert).open()
    wanted = LoadOptions(strict, rename, reinit)
    with PausedCollector():
        module = model if isinstance(model, nn.Module) else _record_model(model, setting)
        slots, _, tapes = tensors_and_tapes(module)
        slots = [setting.kept(slot) for slot in slots]
        load = None if reader is None else load_with_code(module, reader, wanted)
        if load is not None:
            load.undo()
            reader = load.reader
        matching = match(slots, tapes, reader, wanted, load)
        misfits = {misfit.slot.name for misfit in matching.misfits}
        loads = [e for e in matching.entries if e.action is not Action.LOAD or e.slot.name not in misfits]
        file_system = None if checkpoint is None else file_system_of(checkpoint)
        way = choose_io(io, whole=not setting.model.sharded, machines=nodes, file_system=file_system)
        return Forecast(
            model=type(module).__name__,
            checkpoint=None if checkpoint is None else str(checkpoint),
            format=None if reader is None else reader.format,
            note=None if reader is None else reader.note,
            setting=setting,
            coverage=coverage_of(matching, tapes, reader, wanted, _refused(slots, setting)),
            reading=reading_of(Plan(tuple(loads)), tapes, setting, way, bandwidth),
            memory=memory_of(slots, gathered_units(module, units, setting), setting),
        )


def _record_model(build: Callable[[], nn.Module], setting: TrainingConfig) -> nn.Module:
    with recorded_build("per_op"), setting.building():
        model = build()
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"forecast takes a module or a callable that builds one, got {type(model).__name__} from {build}"
        )
    return model


def _refused(slots: Sequence[TensorInfo], setting: TrainingConfig) -> list[str]:
    """Return the tensors that the strategy does not support, as messages."""
    scalars = [slot.name for slot in slots if slot.kind == "parameter" and not slot.shape]
    if setting.model.shards_scalars or not scalars:
        return []
    return [f"FSDP2 does not shard parameters without dimensions: {', '.join(scalars)}. Give them the shape (1,)."]
