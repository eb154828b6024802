"""The whole recording of a model as text, for whoever debugs a constructor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress

from torch import nn

from fabric_init.errors import FabricInitError, RecordingError
from fabric_init.planning.tensors import TensorInfo, tensors_and_tapes
from fabric_init.recording.tape.liveness import live_ops
from fabric_init.recording.tape.tape import Tape
from fabric_init.reports.registry import report_of
from fabric_init.strategies.unwrap import original


def dump_tape(model: nn.Module) -> str:
    """Return every op that was recorded while ``model`` was built, in order, and which tensor lies on which storage.

    An op marked ``dead`` was overwritten before the end: unless ``rng="eager"``, it is never run. Storages without a
    name are intermediate results. Nothing is run, and the model stays as it is.

    Args:
        model: a model built under :func:`~fabric_init.deferred_init` or ``init_module``, filled or not, or what
            ``setup`` returned.

    Raises:
        RecordingError: the model has a recording no longer, or never had one.
    """
    tensors = list(_recorded_tensors(original(model)))
    if not tensors:
        raise RecordingError(
            f"this {type(model).__name__} has no recording: it was not built under deferred_init() or "
            "init_module(empty_init=True), or its report has not kept the recording. Build it under deferred_init() "
            "and call dump_tape before anything fills it."
        )
    by_tape: dict[Tape, list[TensorInfo]] = {}
    for tensor, tape in tensors:
        by_tape.setdefault(tape, []).append(tensor)
    return "\n\n".join("\n".join(_lines(tape, on_it)) for tape, on_it in by_tape.items())


def _recorded_tensors(model: nn.Module) -> Iterator[tuple[TensorInfo, Tape]]:
    slots, _, tapes = tensors_and_tapes(model)
    yield from ((slot, tapes[slot.ref.storage]) for slot in slots if slot.ref is not None)
    if not tapes:  # filled, or waiting for values in its own memory: the report has kept what was recorded
        with suppress(FabricInitError):  # there is no report
            kept = [row.recording for row in report_of(model).rows]
            yield from ((one.slot, one.tape.current()) for one in kept if one is not None)


def _lines(tape: Tape, tensors: Iterable[TensorInfo]) -> Iterator[str]:
    names: dict[int, str] = {}
    for slot in tensors:
        assert slot.ref is not None
        before = f"{names[slot.ref.storage]}, " if slot.ref.storage in names else ""
        names[slot.ref.storage] = before + " = ".join(slot.names)  # ties of a tensor, then others on its storage
    live = live_ops(tape, names, exact=False)
    yield tape.summary()
    yield "storages:"
    for number, info in sorted(tape.storages.items()):
        yield f"  {f's{number}':<6} {info.nbytes:>14,} bytes  {info.device!s:<6}  {names.get(number, '(intermediate)')}"
    yield "ops:"
    for number in sorted(tape.ops):
        yield f"  {'    ' if number in live else 'dead'} {tape.ops[number].text(names)}"
