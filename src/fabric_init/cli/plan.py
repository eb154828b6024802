"""``fabric-init plan``: what a load would do and take, before a weight is read."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from fabric_init.cli import CommandError, model_argument, plan_tables
from fabric_init.errors import FabricInitError
from fabric_init.filling.opening import Io
from fabric_init.planning import OptimizerName, PrecisionName, Setting, StrategyName, forecast
from fabric_init.strategies.fsdp2 import Units

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
        raise typer.BadParameter(f"{text!r}: give a number with its unit, as 2GB/s, 500MiB/s or 25Gbit/s")
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
            raise typer.BadParameter(f"--rename {text!r}: give PATTERN=REPLACEMENT, as '^model\\.=' or 'gamma$=weight'")
    return dict(text.split("=", 1) for text in texts) or None


def run(
    model: Annotated[str, typer.Argument(help=model_argument.HELP)],
    path: Annotated[
        str | None,
        typer.Argument(help="The checkpoint: file, folder, URL or Hub id. Left out: the folder that is `MODEL`."),
    ] = None,
    strategy: Annotated[StrategyName, typer.Option(help="How the model is to be trained, by Fabric's names.")] = "auto",
    devices: Annotated[int, typer.Option(min=1, help="Ranks a machine.")] = 1,
    nodes: Annotated[int, typer.Option(min=1, help="Machines.")] = 1,
    precision: Annotated[PrecisionName, typer.Option(help="By Fabric's names.")] = "32-true",
    optimizer: Annotated[OptimizerName, typer.Option(help="`none`: no training.")] = "adamw",
    units: Annotated[
        str | None,
        typer.Option(help="For FSDP, what is gathered together: `blocks`, a number of parameters, or `Class,Class`."),
    ] = None,
    bandwidth: Annotated[
        str | None, typer.Option(help="Of the storage, for the time: `2GB/s`, `500MiB/s`, `25Gbit/s`.")
    ] = None,
    io: Annotated[Io, typer.Option(help="Each rank reads what it keeps, or rank 0 reads and sends.")] = "auto",
    rename: Annotated[
        list[str] | None, typer.Option(help="`PATTERN=REPLACEMENT` from checkpoint key to tensor name; repeatable.")
    ] = None,
    entry: Annotated[str | None, typer.Option(help="The state dict that is meant, where a file holds several.")] = None,
    strict: Annotated[
        bool, typer.Option(help="Whether a missing or unexpected key is an error, or gets the model's own init.")
    ] = True,
    reinit: Annotated[
        list[str] | None, typer.Option(help="Glob of tensors to initialise although they are there; repeatable.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="All of it as JSON, nothing left out.")] = False,
) -> int:
    """What a load would do and take: no weight is read, no memory taken, on any machine.

    It tells what of the model the checkpoint covers; what is missing, with the rule and line that would initialise it;
    what is left over, cast, or of a wrong shape, and the renames that would help; how many bytes each rank reads, and
    how long that takes; and the memory that training takes on each rank, activations aside.

    The exit status is 0 if the load would go through as asked for, 1 if not, and 2 if the call itself is wrong: no such
    model or checkpoint, say.

    `fabric-init plan Llama-3.1-8B/ --strategy fsdp2 --devices 8 --precision bf16-true --bandwidth 2GB/s`
    """
    speed = None if bandwidth is None else bytes_a_second(bandwidth)
    mapping = renames(rename or ())
    try:
        Setting(strategy, devices, nodes, precision, optimizer)
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
