"""``fabric-init plan``: show what a load would do, without reading a weight."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from fabric_init.cli import CommandError, model_argument
from fabric_init.option_names import Io, OptimizerName, PrecisionName, StrategyName

if TYPE_CHECKING:
    from fabric_init.strategies.fsdp2 import Units

_COMPLETE, _INCOMPLETE, _CANNOT_RUN = 0, 1, 2

_PREFIXES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_BANDWIDTH = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?|[kmgt]i)(B|b|bit)(?:/s|ps)", re.IGNORECASE)


def bytes_a_second(text: str) -> float:
    """Return ``2GB/s``, ``500 MiB/s`` or ``25Gbit/s`` in bytes per second.

    Raises:
        typer.BadParameter: ``text`` is not such a speed.
    """
    parsed = _BANDWIDTH.fullmatch(text.strip())
    if parsed is None or not float(parsed[1]):
        raise typer.BadParameter(
            f"{text!r}: give a number with its unit, as 2GB/s, 500MiB/s or 25Gbit/s", param_hint="--bandwidth"
        )
    scale = (_PREFIXES | _BINARY)[parsed[2].lower()]
    return float(parsed[1]) * scale / (1 if parsed[3] == "B" else 8)


def units_named(text: str) -> Units:
    """Return the units that ``text`` names: ``blocks``, a number of parameters, or class names separated by commas."""
    if text == "blocks":
        return "blocks"
    if text.isdigit():
        return int(text)
    names = set(text.split(","))
    return lambda module: type(module).__name__ in names


def renames(texts: Sequence[str]) -> dict[str, str] | None:
    """Return the mapping that texts of the form ``PATTERN=REPLACEMENT`` make, ``None`` if there are none.

    Raises:
        typer.BadParameter: A text has no ``=``.
    """
    for text in texts:
        if "=" not in text:
            raise typer.BadParameter(
                f"{text!r}: give PATTERN=REPLACEMENT, as '^model\\.=' or 'gamma$=weight'", param_hint="--rename"
            )
    return dict(text.split("=", 1) for text in texts) or None


def _names(literal: object) -> str:
    return ", ".join(f"`{name}`" for name in get_args(literal))


Model = Annotated[str, typer.Argument(metavar="MODEL", help=model_argument.HELP)]
Checkpoint = Annotated[
    str | None,
    typer.Argument(
        metavar="PATH",
        help="The checkpoint: a file, folder, URL or Hub id. Default: `MODEL`, if that is a folder.",
        show_default=False,
    ),
]
Strategy = Annotated[
    StrategyName, typer.Option(metavar="NAME", help=f"Strategy, by Fabric's names: {_names(StrategyName)}.")
]
Devices = Annotated[int, typer.Option(metavar="N", min=1, help="Devices (ranks) per machine.")]
Nodes = Annotated[int, typer.Option(metavar="N", min=1, help="Number of machines.")]
Precision = Annotated[
    PrecisionName, typer.Option(metavar="NAME", help=f"Precision, by Fabric's names: {_names(PrecisionName)}.")
]
Optimizer = Annotated[
    OptimizerName,
    typer.Option(metavar="NAME", help=f"Optimizer, whose states take memory: {_names(OptimizerName)} (no training)."),
]
UnitsText = Annotated[
    str | None,
    typer.Option(
        metavar="UNITS",
        help="For FSDP, the modules to wrap: `blocks`, a minimum number of parameters, or `Class,Class`.",
    ),
]
Bandwidth = Annotated[
    str | None,
    typer.Option(metavar="SPEED", help="Storage bandwidth, for the time: `2GB/s`, `500MiB/s`, `25Gbit/s`."),
]
ReadBy = Annotated[
    Io, typer.Option(metavar="MODE", help=f"{_names(Io)}: each rank reads what it keeps, or rank 0 reads for all.")
]
Renames = Annotated[
    list[str] | None,
    typer.Option(metavar="FROM=TO", help="Regular expression for checkpoint keys, and its replacement; repeatable."),
]
Entry = Annotated[
    str | None, typer.Option(metavar="NAME", help="The key of the state dict to load, if a file holds several.")
]
Strict = Annotated[
    bool, typer.Option(help="Fail on missing or extra keys; else initialize missing tensors, ignore extra keys.")
]
Reinit = Annotated[
    list[str] | None,
    typer.Option(metavar="GLOB", help="Tensors to initialize even if the checkpoint has them; repeatable."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print everything as JSON.")]


def run(
    model: Model,
    path: Checkpoint = None,
    strategy: Strategy = "auto",
    devices: Devices = 1,
    nodes: Nodes = 1,
    precision: Precision = "32-true",
    optimizer: Optimizer = "adamw",
    units: UnitsText = None,
    bandwidth: Bandwidth = None,
    io: ReadBy = "auto",
    rename: Renames = None,
    entry: Entry = None,
    strict: Strict = True,
    reinit: Reinit = None,
    as_json: AsJson = False,
) -> int:
    """Show what a load would do and cost: no weight is read, no memory allocated, on any machine.

    It shows what the checkpoint covers of the model; what is missing, with the rule and line that would initialize it;
    which keys are extra, cast or of a wrong shape, and the renames that would help; how many bytes each rank reads, and
    how long that takes; and the memory that training needs on each rank, without activations.

    The exit status is 0 if the load would succeed with these options, 1 if not, and 2 if the command cannot run, for
    example because there is no such model or checkpoint.

    - A folder with config and weights, on eight GPUs

        fabric-init plan Llama-3.1-8B/ --strategy fsdp2 --devices 8 --precision bf16-true --bandwidth 2GB/s

    - Your own model with a new head, from a file whose keys have a prefix

        fabric-init plan my_package.models:build body.pt --rename '^model[.]=' --no-strict

    - For scripts

        fabric-init plan Llama-3.1-8B/ --json | jq .memory.peak
    """
    from fabric_init.cli import plan_tables
    from fabric_init.errors import FabricInitError
    from fabric_init.tools.forecast import TrainingConfig, forecast

    speed = None if bandwidth is None else bytes_a_second(bandwidth)
    mapping = renames(rename or ())
    try:
        TrainingConfig(strategy, devices, nodes, precision, optimizer)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    try:
        result = forecast(
            model_argument.model_builder(model),
            _checkpoint(model, path),
            strategy=strategy,
            devices=devices,
            nodes=nodes,
            precision=precision,
            optimizer=optimizer,
            bandwidth=speed,
            units=None if units is None else units_named(units),
            io=io,
            strict=strict,
            rename=mapping,
            reinit=reinit or (),
            entry=entry,
        )
    except (CommandError, FabricInitError) as error:
        print(f"fabric-init plan: {error}", file=sys.stderr)
        return _CANNOT_RUN
    if as_json:
        print(json.dumps(result.to_dict(), indent=2))
    else:
        plan_tables.show(result)
    return _COMPLETE if result.complete else _INCOMPLETE


def _checkpoint(model: str, path: str | None) -> str:
    if path is not None:
        return path
    if Path(model).is_dir():
        return model
    raise CommandError(f"no checkpoint given; its path goes after {model}")
