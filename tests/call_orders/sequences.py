"""Every order in which a user may load, initialize and set up a model, and what it must hold afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fabric_init import UninitializedTensorError
from tests.support.sweeps import sampled
from tests.support.zoo import MODELS, build, one_device, weights, write_checkpoint

NAME = "transformerish"
BUILDS = ["eager", "empty", "checkpoint"]


@dataclass(frozen=True)
class Files:
    """What there is to load: each holds other values."""

    declared: Path  # what init_module(checkpoint=…) is given
    raw: Path  # a state dict
    state: Path  # {"model": a state dict}
    part: Path  # a state dict that lacks some tensors


def write_files(folder: Path) -> Files:
    raw = write_checkpoint(folder / "raw.pt", NAME, seed=2)
    state = write_checkpoint(folder / "other.pt", NAME, seed=3)
    torch.save({"model": torch.load(state)}, folder / "state.pt")
    return Files(
        write_checkpoint(folder / "declared.safetensors", NAME, seed=1),
        raw,
        folder / "state.pt",
        write_checkpoint(folder / "part.pt", NAME, seed=4, partial=True),
    )


def _load_state_dict(fabric: Any, model: nn.Module, files: Files, **options: Any) -> None:
    model.load_state_dict(torch.load(files.raw), **options)


ACTIONS: dict[str, tuple[Callable[[Any, Any, Files], object], Callable[[Files], Path] | None]] = {
    "load_state_dict": (_load_state_dict, lambda files: files.raw),
    "assign": (lambda f, m, files: _load_state_dict(f, m, files, assign=True), lambda files: files.raw),
    "load_raw": (lambda fabric, model, files: fabric.load_raw(files.raw, model), lambda files: files.raw),
    "load": (lambda fabric, model, files: fabric.load(files.state, {"model": model}), lambda files: files.state),
    "part": (lambda fabric, model, files: fabric.load_raw(files.part, model, strict=False), lambda files: files.part),
    "init_missing": (lambda fabric, model, files: fabric.init_missing(model), None),
}
"""What is called, and the file whose values it brings."""


@dataclass(frozen=True)
class Cell:
    """One row of the table: how the model is built, what is called before ``setup``, and what after it."""

    build: str
    before: tuple[str, ...]
    after: tuple[str, ...]

    def __str__(self) -> str:
        return " → ".join((self.build, *self.before, "setup", *self.after))


def cells() -> Iterator[Cell]:
    up_to_one = [(), *((action,) for action in ACTIONS)]
    up_to_two = [*up_to_one, *((first, second) for first in ACTIONS for second in ACTIONS if first != second)]
    for how in BUILDS:
        for before in up_to_one:
            for after in up_to_two if not before else up_to_one:
                yield Cell(how, before, after)


def values_of(path: Path) -> dict[str, Tensor]:
    return dict(torch.load(path)) if "state" not in path.name else dict(torch.load(path)["model"])


def expected_after(done: list[str], how: str, files: Files) -> dict[str, Tensor] | None:
    """What plain PyTorch would hold after these calls; ``None`` where nothing has given the model values."""
    if how == "empty" and not done:
        return None
    found = first_values(how, files)
    for action in done:
        file = ACTIONS[action][1]
        if file is not None:
            found.update(values_of(file(files)))
    return found


def first_values(how: str, files: Files) -> dict[str, Tensor]:
    """What the model holds before anything is loaded after the block, or would hold."""
    if how == "eager":
        torch.manual_seed(1)
        return weights(MODELS[NAME]())
    return weights(one_device(NAME, checkpoint=files.declared if how == "checkpoint" else None))


def run_cell(fabric: Any, cell: Cell, files: Files, *, waits: bool = True) -> tuple[str, str]:
    """``("right", "")``, ``("refused", the call and its error)``, or ``("WRONG", why)``.

    ``waits``: whether a model without values is one still after ``setup``.
    """
    options = {"eager": {}, "empty": {"empty_init": True}, "checkpoint": {"checkpoint": files.declared}}[cell.build]
    model: Any = build(fabric, NAME, **options)
    done: list[str] = []
    for action in (*cell.before, "setup", *cell.after):
        try:
            if action == "setup":
                model = fabric.setup(model)
                done += [] if waits or cell.build != "empty" or done else ["init_missing"]
            else:
                ACTIONS[action][0](fabric, model, files)
                done.append(action)
        except Exception as error:
            refused = f"{action}: {type(error).__name__}: {error}"
            left = _left_after_refusal(model, cell, files)
            return ("WRONG", f"{refused}\nand then {left}") if left else ("refused", refused)
    expected = expected_after(done, cell.build, files)
    try:
        model(torch.zeros(1, 6, dtype=torch.long))
    except UninitializedTensorError as error:
        return ("WRONG", f"it will not run: {error}") if expected is not None else ("right", "")
    except Exception as error:
        return "WRONG", f"running it: {type(error).__name__}: {error}"
    if expected is None:
        return "WRONG", "it runs, and nothing has given it values"
    found = weights(model)
    wrong = [name for name, value in expected.items() if not torch.equal(found[name], value)]
    return ("WRONG", f"these tensors have other values: {wrong}") if wrong else ("right", "")


def _left_after_refusal(model: Any, cell: Cell, files: Files) -> str:
    """What is wrong with the model after a call that was refused; torch's own loads what it can before it raises."""
    try:
        model(torch.zeros(1, 6, dtype=torch.long))
    except Exception:
        return ""  # it cannot be used, and says so
    sources = [first_values(cell.build, files), *(values_of(file) for file in (files.raw, files.state, files.part))]
    wrong = [
        name
        for name, value in weights(model).items()
        if not any(name in source and torch.equal(source[name], value) for source in sources)
    ]
    return f"these tensors have values from nowhere: {wrong}" if wrong else ""


def run_table(
    fabric: Any, files: Files, *, every: int = 1, first: int = 0, **options: Any
) -> dict[str, tuple[str, str]]:
    """The outcome of one in ``every`` cells."""
    return {str(cell): run_cell(fabric, cell, files, **options) for cell in sampled(list(cells()), every, first)}
