"""The checks that need the tape alone."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

from torch import nn

from fabric_init.reports.write_history import Event
from fabric_init.tools.audit.checks.conflicts import repeated, two_rules
from fabric_init.tools.audit.checks.consistency import default_init, differs_between_twins
from fabric_init.tools.audit.findings import Finding, Level
from fabric_init.tools.audit.rows import AuditedTensor

_FIX_NEVER_WRITTEN = (
    "write it in the constructor, or in the function that initializes its module: torch.nn.init.normal_(…, std=…), "
    "say; torch.empty leaves memory uninitialized"
)


def tape_findings(model: nn.Module, tensors: Sequence[AuditedTensor]) -> list[Finding]:
    """Return the findings of every check on the tape, the worst first."""
    modules = {type(module).__module__ for module in model.modules()}
    files = {getattr(sys.modules.get(name), "__file__", None) for name in modules}
    findings = [
        *never_written(tensors),
        *two_rules(tensors, files),
        *repeated(tensors),
        *differs_between_twins(tensors),
        *default_init(tensors),
        *overwritten_defaults(tensors),
    ]
    return sorted(findings, key=lambda finding: -finding.level)


def never_written(tensors: Sequence[AuditedTensor]) -> Iterator[Finding]:
    """Report parameters and saved buffers of which some part is never written: uninitialized in plain PyTorch."""
    for tensor in tensors:
        if not tensor.unwritten or not tensor.history.slot.saved:
            continue
        writes = tensor.row.writes
        seen = (
            f"{len(writes)} writes reach it, and leave a part as torch.empty allocated it "
            f"(the last: {writes[-1].rule} at {writes[-1].place})"
            if writes
            else "no op writes it: it stays as torch.empty allocated it"
        )
        names = (tensor.row.name, *tensor.row.ties)
        yield Finding(Level.ERROR, "never-written", names, f"{seen}, with whatever the memory held", _FIX_NEVER_WRITTEN)


def overwritten_defaults(tensors: Sequence[AuditedTensor]) -> Iterator[Finding]:
    """Report in a note the usual waste: modules of torch initialize themselves, and the model does it again."""
    dead: dict[int, tuple[AuditedTensor, Event]] = {}
    for tensor in tensors:
        for event in tensor.history.events:
            if event.dead and not event.is_rule:
                dead.setdefault(event.op.number, (tensor, event))
    elements = sum(event.ref.size.numel() for _, event in dead.values())
    if not elements:
        return
    seconds = sum(tensor.seconds_of(event) for tensor, event in dead.values())
    names = tuple(dict.fromkeys(tensor.row.name for tensor, _ in dead.values()))
    count = "1 tensor" if len(names) == 1 else f"{len(names)} tensors"
    yield Finding(
        Level.NOTE,
        "overwritten-default",
        names,
        f"default values that were overwritten before being read ({count}): "
        f"{elements:,} elements and {seconds:.3g} s where the model is built eagerly",
        "nothing, if the model is recorded: dead writes are not run. Elsewhere: torch.nn.utils.skip_init",
    )
