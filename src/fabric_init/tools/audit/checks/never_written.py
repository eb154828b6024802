"""What the tape alone says is wrong. Each check takes all rows and gives its findings."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

from torch import nn

from fabric_init.reports.write_history import Event
from fabric_init.tools.audit.checks.conflicts import repeated, two_rules
from fabric_init.tools.audit.checks.consistency import default_init, differs_between_twins
from fabric_init.tools.audit.findings import Finding, Level
from fabric_init.tools.audit.rows import AuditedTensor

_MEND_NEVER = (
    "write it in the constructor, or in the function that initializes its module: torch.nn.init.normal_(…, std=…), "
    "say; torch.empty promises no values"
)


def tape_findings(model: nn.Module, told: Sequence[AuditedTensor]) -> list[Finding]:
    """The findings of every check on the tape, the worst first."""
    modules = {type(module).__module__ for module in model.modules()}
    files = {getattr(sys.modules.get(name), "__file__", None) for name in modules}
    found = [
        *never_written(told),
        *two_rules(told, files),
        *repeated(told),
        *differs_between_twins(told),
        *default_init(told),
        *overwritten_defaults(told),
    ]
    return sorted(found, key=lambda finding: -finding.level)


def never_written(told: Sequence[AuditedTensor]) -> Iterator[Finding]:
    """Parameters and saved buffers of which no op wrote some part: plain PyTorch leaves garbage there."""
    for one in told:
        if not one.unwritten or not one.history.slot.saved:
            continue
        writes = one.row.writes
        seen = (
            f"{len(writes)} writes reach it, and leave a part as torch.empty made it (the last: {writes[-1].rule} at "
            f"{writes[-1].place})"
            if writes
            else "no op writes it: it stays as torch.empty made it"
        )
        names = (one.row.name, *one.row.ties)
        yield Finding(Level.ERROR, "never-written", names, f"{seen}, with whatever the memory held", _MEND_NEVER)


def overwritten_defaults(told: Sequence[AuditedTensor]) -> Iterator[Finding]:
    """The usual waste, in one note: torch's own modules initialize themselves, and the model's code does it again."""
    dead: dict[int, tuple[AuditedTensor, Event]] = {}
    for one in told:
        for event in one.history.events:
            if event.dead and not event.is_rule:
                dead.setdefault(event.op.number, (one, event))
    elements = sum(event.ref.size.numel() for _, event in dead.values())
    if not elements:
        return
    seconds = sum(one.seconds_of(event) for one, event in dead.values())
    names = tuple(dict.fromkeys(one.row.name for one, _ in dead.values()))
    count = "1 tensor" if len(names) == 1 else f"{len(names)} tensors"
    yield Finding(
        Level.NOTE,
        "overwritten-default",
        names,
        f"default values that were overwritten before being read ({count}): "
        f"{elements:,} elements and {seconds:.3g} s where the model is built eagerly",
        "nothing, if the model is recorded: dead writes are not run. Elsewhere: torch.nn.utils.skip_init",
    )
