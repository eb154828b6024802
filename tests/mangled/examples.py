"""One example: mangle a checkpoint, load it, follow what the errors propose, and compare what comes of it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import save_file

from fabric_init import checkpoints, deferred_init, materialize
from fabric_init.errors import CheckpointMismatchError
from tests.mangled.operations import Mangled, mangle
from tests.support.small_models import MODELS

RIGHT = "right at once"
FOLLOWED = "an error with a proposal that works"
PARTLY = "an error with a proposal that works for a part"
AMBIGUOUS = "an error that says ambiguous"
ALONE = "an error without a proposal"
WRONG = "silently wrong"
OUTCOMES = (RIGHT, FOLLOWED, PARTLY, AMBIGUOUS, ALONE, WRONG)
_ROUNDS = 4


@dataclass
class Answer:
    """What came of one example."""

    number: int
    model: str
    done: str
    outcome: str = ""
    lenient: str = ""
    """The outcome with ``strict=False`` from the beginning."""
    wrong: list[str] = field(default_factory=list)


@dataclass
class Options:
    """What a user has copied from errors so far."""

    rename: list[Any] = field(default_factory=list)
    convert: list[Any] = field(default_factory=list)
    reinit: list[str] = field(default_factory=list)
    strict: bool = True

    def add(self, text: str) -> None:
        """Evaluate the arguments at the beginning of ``text``."""
        names = {name: getattr(checkpoints, name) for name in checkpoints.__all__}
        names |= {"fabric_init": __import__("fabric_init"), "dict": dict}
        arguments = eval(f"dict({arguments_in(text)})", names)
        rename = arguments.pop("rename", [])
        self.rename += rename if isinstance(rename, list) else [rename]
        self.convert += arguments.pop("convert", [])
        self.reinit += arguments.pop("reinit", [])
        self.strict = arguments.pop("strict", self.strict)
        assert not arguments, text


def arguments_in(text: str) -> str:
    """Return the longest beginning of ``text`` that is source code of arguments."""
    for stop in range(len(text), 0, -1):
        if text[stop - 1] in "])}e":
            try:
                ast.parse(f"f({text[:stop]})")
            except SyntaxError:
                continue
            return text[:stop]
    raise AssertionError(f"no arguments in {text!r}")


def proposed(message: str) -> list[list[str]]:
    """Return the ways that an error offers, each as the arguments that go together."""
    lines = [line.removeprefix("Likely: ") for line in message.splitlines() if line.startswith("Likely: ")]
    parts = [line for line in lines if "checkpoints.Part(" in line]
    together = [line for line in lines if line not in parts]
    return [way for way in (together, *([part] for part in parts)) if way]


def run_example(number: int, folder: Path) -> Answer:
    rng = Random(f"mangled {number}")
    name = rng.choice(list(MODELS))
    torch.manual_seed(number)
    state = {key: tensor.clone() for key, tensor in MODELS[name]().state_dict().items()}
    for tensor in state.values():
        if tensor.is_floating_point():
            tensor.normal_()
    mangled = mangle(state, rng)
    path = save(mangled, folder, torch_file=rng.random() < 0.5)
    answer = Answer(number, name, "; ".join(mangled.done))
    example = Example(mangled, MODELS[name], path, answer)
    answer.outcome = example.outcome(strict=True)
    answer.lenient = example.outcome(strict=False)
    return answer


def save(mangled: Mangled, folder: Path, torch_file: bool) -> Path:
    tensors = {key: value.tensor.clone() for key, value in mangled.keys.items()}
    path = folder / ("model.pt" if torch_file else "model.safetensors")
    torch.save(tensors, path) if torch_file else save_file(tensors, path)
    return path


@dataclass
class Example:
    """The loads of one checkpoint."""

    mangled: Mangled
    build: Any
    path: Path
    answer: Answer

    def outcome(self, strict: bool) -> str:
        message = self.load(Options(strict=strict))
        if message is None:
            return WRONG if self.answer.wrong else RIGHT
        outcomes = [self.followed(Options(strict=strict), way) for way in proposed(message)]
        if self.answer.wrong:
            return WRONG
        if outcomes:
            return min(outcomes, key=OUTCOMES.index)
        if not strict:
            return AMBIGUOUS if "Ambiguous" in message else ALONE
        again = self.load(Options(strict=False))  # what strict=False then says of the rest
        if self.answer.wrong:
            return WRONG
        return FOLLOWED if again is None else AMBIGUOUS if "Ambiguous" in message else ALONE

    def followed(self, options: Options, way: list[str]) -> str:
        """Return the outcome of what is proposed, as often as more is proposed."""
        message: str | None = None
        for _ in range(_ROUNDS):
            for text in way:
                options.add(text)
            message = self.load(options)
            if message is None:
                return FOLLOWED
            way = next(iter(proposed(message)), [])
            if not way:
                break
        assert message is not None
        if options.strict:  # what is left is new, or no longer there
            options.strict = False
            again = self.load(options)
            if again is None:
                return FOLLOWED
            message = again
        return AMBIGUOUS if "Ambiguous" in message else PARTLY

    def load(self, options: Options) -> str | None:
        """Return the error, or note what is wrong with what was loaded."""
        with deferred_init():
            model = self.build()
        try:
            report = materialize(
                model,
                checkpoint=self.path,
                strict=options.strict,
                rename=options.rename or None,
                convert=options.convert,
                reinit=options.reinit,
            )
        except CheckpointMismatchError as error:
            return str(error)
        found = model.state_dict()
        how = f"strict={options.strict}, rename={options.rename}, convert={options.convert}, reinit={options.reinit}"
        status = {row.name: row.status for row in report.rows}
        self.answer.wrong += [f"{problem} ({how})" for problem in self.problems(found, status, options)]
        return None

    def problems(self, found: dict[str, torch.Tensor], status: dict[str, str], options: Options) -> Iterator[str]:
        held = self.mangled.held()
        for name, tensor in found.items():
            if status[name] == "loaded":
                if name not in held:
                    yield f"{name} is loaded, and the checkpoint does not have it"
                elif not same_bits(tensor, self.mangled.truth[name]):
                    yield f"{name} has other values"
            elif name in held and name not in self.mangled.obscure:
                yield f"{name} is {status[name]}, and the checkpoint has it"


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)
