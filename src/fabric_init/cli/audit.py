"""``fabric-init audit``: check how a model is initialized."""

from __future__ import annotations

import json
import os
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fabric_init.cli import CommandError
from fabric_init.cli.model_argument import HELP, model_builder

if TYPE_CHECKING:
    from torch import nn

    from fabric_init.tools.audit.report import AuditReport

_FOUND = 1


class FailOn(str, Enum):
    """The lowest level that makes the exit status 1."""

    ERROR = "error"
    WARNING = "warning"
    NOTE = "note"
    NEVER = "never"


def run(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=HELP)],
    batch: Annotated[
        bool | None,
        typer.Option(
            "--batch/--no-batch",
            help="Also fill the model and run it once, on a generated batch. Default: if the model tells its inputs, "
            "and its weights and gradients fit in half of this machine's memory.",
            show_default=False,
        ),
    ] = None,
    fail_on: Annotated[
        FailOn, typer.Option(help="Exit with status 1 if there is a finding of this level or a worse one.")
    ] = FailOn.ERROR,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Random seed for the weights and the batch.")] = 0,
    rows: Annotated[
        int, typer.Option(metavar="N", min=0, help="How many tensors to list; all findings are shown.")
    ] = 30,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole report as JSON.")] = False,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the report as one HTML page, with plots.")
    ] = None,
) -> int:
    """Audit a model's init: which rule wrote each tensor, how often, with what result, and what looks wrong.

    The model is recorded, not built: without a batch no memory is allocated for weights, so its size does not matter.

    Errors are tensors that are never initialized, and a first loss far from ln(classes). Warnings are rules that
    overwrite each other, weights that are initialized several times, and layers that are skipped. Notes are for
    information.

    The exit status is 0 without errors (see `--fail-on`), 1 with errors or if the model cannot be built, and 2 if an
    option is invalid.

    - A transformers model, from its `config.json`; only the findings

        fabric-init audit t5-v1_1-base/ --rows 0

    - A model of your own, as a check in CI

        fabric-init audit my_package.models:build --fail-on warning

    - A page with plots

        fabric-init audit my_package.models:build --html audit.html

    - For scripts

        fabric-init audit my_package.models:build --json | jq '.findings[0]'
    """
    import torch

    from fabric_init.api import deferred_init
    from fabric_init.cli import audit_tables
    from fabric_init.tools.audit.findings import Level

    if html is not None:
        _check_page(html)
    build = model_builder(model)
    torch.manual_seed(seed)
    with deferred_init():
        recorded = build()
    report = _audited(recorded, batch)
    if html is not None:
        _save(report, html)
    if as_json:
        print(json.dumps(report.to_dict(), indent=2, allow_nan=False))
    else:
        audit_tables.show(report, rows)
    failing = fail_on is not FailOn.NEVER and report.worst is not None and report.worst >= Level[fail_on.name]
    return _FOUND if failing else 0


def _audited(model: nn.Module, batch: bool | None) -> AuditReport:
    from fabric_init._text import human_bytes
    from fabric_init.errors import FabricInitError, RecordingError
    from fabric_init.tools.audit.audit import audit

    if batch is not None:
        return audit(model, batch="auto" if batch else None)
    needed, limit = 2 * sum(parameter.nbytes for parameter in model.parameters()), _half_of_memory()
    if needed > limit:
        _say(f"not run: weights and gradients take {human_bytes(needed)}, over {human_bytes(limit)}; --batch runs it")
        return audit(model)
    try:
        return audit(model, batch="auto")
    except RecordingError:
        raise
    except FabricInitError as error:
        _say(f"not run: {error}")
        return audit(model)


def _half_of_memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _say(text: str) -> None:
    from fabric_init.cli.console import err

    err().print(f"fabric-init audit: {text}")


def _check_page(path: Path) -> None:
    from fabric_init.reports.html import check_plotly
    from fabric_init.reports.save import is_page

    if not is_page(path):
        raise CommandError(f"--html {path}: the file name must end in .html")
    if not path.parent.is_dir():
        raise CommandError(f"--html {path}: there is no folder {path.parent}")
    check_plotly()


def _save(report: AuditReport, path: Path) -> None:
    try:
        report.save(path)
    except OSError as error:
        raise CommandError(f"--html {path}: {error.strerror}") from None
