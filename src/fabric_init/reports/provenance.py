"""Describe recorded writes: as plain data, and the init rule of a tensor in words."""

from __future__ import annotations

import os
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

from fabric_init.recording.tape.op_properties import only_copies, pointwise
from fabric_init.recording.tape.tape import CallSite, Op, Tape, TensorRef
from fabric_init.reports.write_history import Event, History, events_backward, last_full_write

_LONGEST_CHAIN = 4


@dataclass(frozen=True)
class Write:
    """One recorded write to a tensor.

    Attributes:
        rule: the op and its plain arguments, such as ``normal_(std=0.02)``.
        file: the source file of the model that called it, relative to its import root; ``None`` if unknown.
        line: the line in ``file``.
        whole: every element was written, regardless of its old value.
        elements: the number of elements written.
        wasted: the result was overwritten before being read (a dead write).
    """

    rule: str
    file: str | None
    line: int | None
    whole: bool
    elements: int
    wasted: bool

    @property
    def place(self) -> str:
        """``file:line``, or an empty string."""
        return f"{self.file}:{self.line}" if self.file else ""

    @property
    def rule_and_place(self) -> str:
        """``rule at file:line``, or the rule alone."""
        return f"{self.rule} at {self.place}" if self.file else self.rule

    def __str__(self) -> str:
        return f"{self.rule_and_place}, overwritten before being read" if self.wasted else self.rule_and_place


def wasted_by_rule(rows: Iterable[tuple[str, Sequence[Write]]]) -> list[tuple[str, int, str]]:
    """Return for each rule with dead writes: its name, their number of elements, and the tensors they went to."""
    elements: Counter[str] = Counter()
    names: defaultdict[str, dict[str, None]] = defaultdict(dict)
    for name, writes in rows:
        for write in writes:
            if write.wasted and write.elements:
                elements[write.rule_and_place] += write.elements
                names[write.rule_and_place][name] = None
    return [(rule, count, _first_of(list(names[rule]))) for rule, count in elements.items()]


def _first_of(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def write_of(event: Event) -> Write:
    """Return ``event`` as plain data."""
    source = event.source
    return Write(
        rule=rule_of(event.op),
        file=file_of(source),
        line=None if source is None else source.line,
        whole=event.whole,
        elements=event.ref.size.numel(),
        wasted=event.dead,
    )


def file_of(source: CallSite | None) -> str | None:
    """Return the source file of a call site, relative to its import root."""
    return None if source is None else _import_path(source.file)


def place_of(source: CallSite | None) -> str:
    """Return ``file:line`` of a call site."""
    return "an unknown line" if source is None else f"{_import_path(source.file)}:{source.line}"


@cache
def _import_path(file: str) -> str:
    roots = [root for entry in sys.path if file.startswith(root := os.path.join(os.path.abspath(entry), ""))]
    return file.removeprefix(max(roots, key=len, default=""))


def describe_rule(tape: Tape, ref: TensorRef) -> str:
    """Return the rule that determined the value of a recorded tensor, with its line.

    Unlike a history this reads only the last writes of the tensor, so that filling a model can afford it.
    """
    winner, later = last_full_write(events_backward(tape, ref))
    return "" if winner is None else _rule_in_words(tape, winner, later, with_place=True)


def rule_of_history(history: History) -> str:
    """Return the rule that determined the value of a tensor, without its line."""
    if history.winner is None or history.tape is None:
        return ""
    return _rule_in_words(history.tape, history.winner, history.later, with_place=False)


def _rule_in_words(tape: Tape, winner: Event, later: Sequence[Event], *, with_place: bool) -> str:
    """Return the last full write, then what changed its result."""

    def placed(rule: str, event: Event) -> str:
        return f"{rule} at {place_of(event.source)}" if with_place and event.source is not None else rule

    steps = []
    for event in later:
        part = event.ref.size.numel() < winner.ref.size.numel()
        steps.append(placed(rule_of(event.op) + (" in a part" if part else ""), event))
    shown = [placed(_rule_with_inputs(tape, winner.op), winner), *dict.fromkeys(steps)]
    return ", then ".join(shown[: _LONGEST_CHAIN + 1]) + (", …" if len(shown) > _LONGEST_CHAIN + 1 else "")


def _rule_with_inputs(tape: Tape, op: Op, depth: int = 0) -> str:
    """Return the rule of ``op``, after that of the one tensor it was computed from; copies are skipped."""
    reads = {read for read in op.reads() if read not in op.targets}
    if len(reads) == 1 and depth < _LONGEST_CHAIN and (only_copies(op.func) or pointwise(op.func)):
        read = next(iter(reads))
        before = [number for number in tape.writers.get(read.storage, ()) if number < op.number]
        if before:
            earlier = _rule_with_inputs(tape, tape.ops[before[-1]], depth + 1)
            return earlier if only_copies(op.func) else f"{earlier}, then {rule_of(op)}"
    return rule_of(op)


def rule_of(op: Op) -> str:
    """Return the name of an op with its plain arguments."""
    name = getattr(op.func, "__name__", str(op.func)).removesuffix(".default").split(".")[0]
    plain = [value for value in op.args if isinstance(value, (int, float)) and not isinstance(value, TensorRef)]
    named = [f"{key}={value:g}" for key, value in op.kwargs.items() if type(value) in (int, float)]
    return f"{name}({', '.join([f'{value:g}' for value in plain] + named)})"
