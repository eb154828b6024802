"""``fabric-init plan``: what a load would do and take, before a weight is read."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, get_args

import typer

from fabric_init.cli import CommandError, model_argument, plan_tables
from fabric_init.distributed.io import Io
from fabric_init.errors import FabricInitError
from fabric_init.strategies.fsdp2 import Units
from fabric_init.tools.forecast import OptimizerName, PrecisionName, StrategyName, TrainingConfig, forecast

_COMPLETE, _INCOMPLETE, _WRONG_CALL = 0, 1, 2

_PREFIXES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_BANDWIDTH = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?|[kmgt]i)(B|b|bit)(?:/s|ps)", re.IGNORECASE)


def bytes_a_second(text: str) -> float:
    """``2GB/s``, ``500 MiB/s``, ``25Gbit/s`` in bytes a second.

    Raises:
        typer.BadParameter: it is none of these.
    """
    found = _BANDWIDTH.fullmatch(text.strip())
    if found is None or not float(found[1]):
        raise typer.BadParameter(
            f"{text!r}: give a number with its unit, as 2GB/s, 500MiB/s or 25Gbit/s", param_hint="--bandwidth"
        )
    scale = (_PREFIXES | _BINARY)[found[2].lower()]
    return float(found[1]) * scale / (1 if found[3] == "B" else 8)


def units_named(text: str) -> Units:
    """``blocks``, a number of parameters, or names of classes with commas between them."""
    if text == "blocks":
        return "blocks"
    if text.isdigit():
        return int(text)
    names = set(text.split(","))
    return lambda module: type(module).__name__ in names


def renames(texts: Sequence[str]) -> dict[str, str] | None:
    """``PATTERN=REPLACEMENT``, several of them.

    Raises:
        typer.BadParameter: one has no ``=``.
    """
    for text in texts:
        if "=" not in text:
            raise typer.BadParameter(
                f"{text!r}: give PATTERN=REPLACEMENT, as '^model\\.=' or 'gamma$=weight'", param_hint="--rename"
            )
    return dict(text.split("=", 1) for text in texts) or None


def _names(literal: object) -> str:
    return ", ".join(f"`{name}`" for name in get_args(literal))


def run(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=model_argument.HELP)],
    path: Annotated[
        str | None,
        typer.Argument(
            metavar="PATH",
            help="The checkpoint: file, folder, URL or Hub id. Left out: the folder that is `MODEL`.",
            show_default=False,
        ),
    ] = None,
    strategy: Annotated[
        StrategyName,
        typer.Option(metavar="NAME", help=f"How it is to be trained, by Fabric's names: {_names(StrategyName)}."),
    ] = "auto",
    devices: Annotated[int, typer.Option(metavar="N", min=1, help="Ranks a machine.")] = 1,
    nodes: Annotated[int, typer.Option(metavar="N", min=1, help="Machines.")] = 1,
    precision: Annotated[
        PrecisionName, typer.Option(metavar="NAME", help=f"By Fabric's names: {_names(PrecisionName)}.")
    ] = "32-true",
    optimizer: Annotated[
        OptimizerName,
        typer.Option(metavar="NAME", help=f"Whose states take memory: {_names(OptimizerName)} (no training)."),
    ] = "adamw",
    units: Annotated[
        str | None,
        typer.Option(
            metavar="UNITS",
            help="For FSDP, what is gathered together: `blocks`, a number of parameters, or `Class,Class`.",
        ),
    ] = None,
    bandwidth: Annotated[
        str | None,
        typer.Option(metavar="SPEED", help="Of the storage, for the time: `2GB/s`, `500MiB/s`, `25Gbit/s`."),
    ] = None,
    io: Annotated[
        Io, typer.Option(metavar="WAY", help=f"Who reads: {_names(Io)}. Each rank what it keeps, or rank 0 for all.")
    ] = "auto",
    rename: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FROM=TO", help="A regular expression for checkpoint keys, and what makes them names; repeatable."
        ),
    ] = None,
    entry: Annotated[
        str | None, typer.Option(metavar="NAME", help="The state dict that is meant, where a file holds several.")
    ] = None,
    strict: Annotated[
        bool, typer.Option(help="Whether a missing or unexpected key is an error, or gets the model's own init.")
    ] = True,
    reinit: Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB", help="Tensors to initialize although they are there; repeatable."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="All of it as JSON, nothing left out.")] = False,
) -> int:
    """What a load would do and take: no weight is read, no memory taken, on any machine.

    It tells what of the model the checkpoint covers; what is missing, with the rule and line that would initialize it;
    what is left over, cast, or of a wrong shape, and the renames that would help; how many bytes each rank reads, and
    how long that takes; and the memory that training takes on each rank, activations aside.

    The exit status is 0 if the load would go through as asked for, 1 if not, and 2 if the call itself is wrong: no such
    model or checkpoint, say.

    - A folder with config and weights, on eight GPUs

        fabric-init plan Llama-3.1-8B/ --strategy fsdp2 --devices 8 --precision bf16-true --bandwidth 2GB/s

    - A model of your own under a new head, from a file whose keys begin otherwise

        fabric-init plan my_package.models:build body.pt --rename '^model[.]=' --no-strict

    - For scripts

        fabric-init plan Llama-3.1-8B/ --json | jq .memory.peak
    """
    speed = None if bandwidth is None else bytes_a_second(bandwidth)
    mapping = renames(rename or ())
    try:
        TrainingConfig(strategy, devices, nodes, precision, optimizer)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    try:
        found = forecast(
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
        return _WRONG_CALL
    if as_json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        plan_tables.show(found)
    return _COMPLETE if found.complete else _INCOMPLETE


def _checkpoint(model: str, path: str | None) -> str:
    if path is not None:
        return path
    if Path(model).is_dir():
        return model
    raise CommandError(f"which checkpoint? Give its path after {model}.")
