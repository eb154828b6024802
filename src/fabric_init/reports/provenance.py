"""What was written to a tensor, as plain data and in words."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fabric_init.recording.op_schemas import only_copies, pointwise
from fabric_init.recording.tape import CallSite, Op, Tape
from fabric_init.reports.rules import import_path, rule_of
from fabric_init.reports.write_history import Event, History

_LONGEST_CHAIN = 4


@dataclass(frozen=True)
class Write:
    """One recorded write to a tensor.

    Attributes:
        rule: what wrote: the op and its plain arguments, such as ``normal_(std=0.02)``.
        file: the model's source file that asked for it, as its import would find it; ``None`` if nobody did.
        line: the line in ``file``.
        whole: every element was written, whatever they held before.
        elements: how many elements were written.
        wasted: a later write replaced the result before anything had read it.
    """

    rule: str
    file: str | None
    line: int | None
    whole: bool
    elements: int
    wasted: bool

    @property
    def place(self) -> str:
        """``file:line``, or an empty text."""
        return f"{self.file}:{self.line}" if self.file else ""

    @property
    def said(self) -> str:
        """The rule, and where."""
        return f"{self.rule} at {self.place}" if self.file else self.rule

    def __str__(self) -> str:
        return f"{self.said}, in vain" if self.wasted else self.said


def wasted_by_rule(found: Iterable[tuple[str, Sequence[Write]]]) -> list[tuple[str, int, str]]:
    """Return for each rule: its name, how many elements it wrote that were overwritten unread, and of which tensors."""
    elements: Counter[str] = Counter()
    names: defaultdict[str, dict[str, None]] = defaultdict(dict)
    for name, writes in found:
        for write in writes:
            if write.wasted and write.elements:
                elements[write.said] += write.elements
                names[write.said][name] = None
    return [(rule, count, _first_of(list(names[rule]))) for rule, count in elements.items()]


def _first_of(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def write_of(event: Event) -> Write:
    """``event`` as plain data."""
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
    """As its import would find it."""
    return None if source is None else import_path(source.file)


def place_of(source: CallSite | None) -> str:
    """``file:line``."""
    return "somewhere" if source is None else f"{import_path(source.file)}:{source.line}"


def rule_said(history: History) -> str:
    """What gave the tensor its value: the last write to all of it, and what changed it afterwards."""
    winner, tape = history.winner, history.tape
    if winner is None or tape is None:
        return ""
    text = rule_text(tape, winner.op)
    steps = []
    for event in history.later:
        part = event.ref.size.numel() < winner.ref.size.numel()
        steps.append(rule_of(event.op) + (" in a part" if part else ""))
    shown = list(dict.fromkeys(steps))
    return ", then ".join([text, *shown[:_LONGEST_CHAIN]]) + (", …" if len(shown) > _LONGEST_CHAIN else "")


def rule_text(tape: Tape, op: Op, depth: int = 0) -> str:
    """The rule in words; what one tensor was computed from comes first, and copies are seen through."""
    reads = {read for read in op.reads() if read not in op.targets}
    if len(reads) == 1 and depth < _LONGEST_CHAIN and (only_copies(op.func) or pointwise(op.func)):
        read = next(iter(reads))
        before = [number for number in tape.writers.get(read.storage, ()) if number < op.number]
        if before:
            earlier = rule_text(tape, tape.ops[before[-1]], depth + 1)
            return earlier if only_copies(op.func) else f"{earlier}, then {rule_of(op)}"
    return rule_of(op)
