"""``fabric-init inspect``: show what a checkpoint holds, and what is wrong with it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from fabric_init.cli import CommandError, console

if TYPE_CHECKING:
    from rich.progress import TaskID


def run(
    path: Annotated[
        str, typer.Argument(metavar="PATH", help="A file, a folder, a URL, or a model id of the Hugging Face Hub.")
    ],
    match: Annotated[
        list[str] | None,
        typer.Argument(help="Globs: list only tensors whose names match.", metavar="GLOB", show_default=False),
    ] = None,
    all_: Annotated[
        bool, typer.Option("--all", "-a", help="One line per tensor and file, instead of one per kind of layer.")
    ] = False,
    values: Annotated[
        bool,
        typer.Option("--values", help="Read every element: minimum, maximum, mean, std, NaN, infinities, duplicates."),
    ] = False,
    entry: Annotated[
        str | None, typer.Option(help="The key of the state dict to inspect, if there are several.", show_default=False)
    ] = None,
    manifest: Annotated[
        str | None, typer.Option(help="A file of SHA-256 digests; every byte is compared with it.", show_default=False)
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> int:
    """Show what a checkpoint holds, and what is wrong with it.

    Reads headers only, so a checkpoint of any size takes about a second; with `--values` every element is read, in
    little memory. For a damaged checkpoint it shows which tensors are intact. Exit status: 0 if it is sound, 1 if it
    is damaged or cannot be read.

    - A model, one line per kind of layer

        fabric-init inspect Llama-3.1-8B/

    - Every bias, with the file it is in

        fabric-init inspect Llama-3.1-8B/ '*.bias' --all

    - One of several state dicts, with statistics of its values

        fabric-init inspect run.ckpt --entry generator --values

    - A bucket, compared with digests

        fabric-init inspect s3://bucket/model --manifest SHA256SUMS

    - For scripts

        fabric-init inspect Llama-3.1-8B/ --json | jq .damage
    """
    from fabric_init.tools.inspect import inspect

    bar = console.new_progress(not json_)
    tasks: dict[str, TaskID] = {}

    def advance(what: str, done: int, total: int) -> None:
        if what not in tasks:
            bar.start()
            tasks[what] = bar.add_task(what, total=total)
        bar.update(tasks[what], completed=done)

    try:
        contents = inspect(path, entry=entry, manifest=manifest, match=match or (), values=values, progress=advance)
    finally:
        bar.stop()
    if match and not contents.tensors:
        raise CommandError(
            f"{path} has no tensor whose name matches {' or '.join(match)}; without globs all are listed"
        )
    if json_:
        print(json.dumps(contents.to_dict(), indent=2, allow_nan=False))
    else:
        from fabric_init.cli.contents_tables import show

        show(console.out(), contents, each=all_)
    return 0 if contents.sound else 1
