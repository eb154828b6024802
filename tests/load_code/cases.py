"""What a case of load code is, what plain PyTorch makes of it, and what a load without that code would.

Load code is whatever ``load_state_dict`` of plain PyTorch calls on the way: hooks, overrides, extra state. A case is a
model with such code, and a state dict that is right only if the code has run.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from fabric_init import deferred_init, materialize
from tests.support.identity import differences

State = dict[str, Any]
Keys = list[str]
Metadata = dict[str, Any]
Kind = TypeVar("Kind", bound=Any)
WIDTH, ROWS = 6, 4
"""Of most layers here: divisible by two ranks."""


class Case(NamedTuple):
    """A model with load code.

    Attributes:
        build: makes the model.
        saved: makes the state dict that the code understands.
        strict: whether plain PyTorch takes it strictly.
        on_ranks: whether the model can be sharded, and its load code runs there.
        has_effect: whether the load code changes anything; where not, that is the point.
    """

    build: Callable[[], nn.Module]
    saved: Callable[[], State]
    strict: bool = True
    on_ranks: bool = True
    has_effect: bool = True


CASES: dict[str, Case] = {}


def case(sentence: str, **options: bool) -> Callable[[Kind], Kind]:
    """Add a class of models, which has a static method ``saved``, to the cases."""

    def register(kind: Kind) -> Kind:
        assert sentence not in CASES
        CASES[sentence] = Case(kind, kind.saved, **options)
        return kind

    return register


def made(shapes: Mapping[str, tuple[int, ...]], seed: int = 7) -> State:
    """Return values that no init would give."""
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.rand(shape, generator=generator) * 0.5 + 0.25 for key, shape in shapes.items()}


def with_versions(state: State, **versions: int) -> State:
    """Return ``state`` with the metadata that ``Module.state_dict`` leaves on it: versions by module name."""
    result = OrderedDict(state)
    names = {"": 1, **{name.replace("__", "."): version for name, version in versions.items()}}
    result._metadata = OrderedDict((name, {"version": number}) for name, number in names.items())  # type: ignore[attr-defined]
    return result


class Around(nn.Module):
    """A layer with load code, ``inside``, beside one without: the code meets a prefix, and other keys than its own."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside
        self.head = nn.Linear(WIDTH, ROWS)

    @staticmethod
    def around(state: State) -> State:
        """Return the state dict of the whole from that of what is ``inside``."""
        head = made({"head.weight": (ROWS, WIDTH), "head.bias": (ROWS,)}, seed=8)
        return {f"inside.{key}": value for key, value in state.items()} | head


def inside(sentence: str, **options: bool) -> Callable[[Kind], Kind]:
    """Add the model around a layer that has load code; the layer's class makes the layer's own keys."""

    def register(kind: Kind) -> Kind:
        assert sentence not in CASES
        saved = kind.saved
        CASES[sentence] = Case(lambda: Around(kind()), lambda: Around.around(saved()), **options)
        return kind

    return register


# -- what comes of it --------------------------------------------------------------------------------------------------


def built(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return build()


def recorded(build: Callable[[], nn.Module], seed: int, rng: Any = "eager") -> nn.Module:
    torch.manual_seed(seed)
    with deferred_init(rng=rng):
        return build()


def initialized(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """The model with its own init, from the random numbers that a recorded build has by default."""
    model = recorded(build, seed, "per_op")
    materialize(model)
    return model


def loaded(model: nn.Module, path: Path, strict: bool = True) -> nn.Module:
    """What plain PyTorch does."""
    model.load_state_dict(torch.load(path), strict=strict)
    return model


def persistent(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by the names that they have in a state dict, which no hook has touched."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        dot = f"{prefix}." if prefix else ""
        for name, value in (*module._parameters.items(), *module._buffers.items()):
            if value is not None and name not in module._non_persistent_buffers_set:
                yield dot + name, value


def without_load_code(model: nn.Module, state: State, strict: bool) -> nn.Module | None:
    """Give each tensor what the file has under its name, and run no code; ``None`` if that would be an error."""
    own = dict(persistent(model))
    if strict and own.keys() != state.keys():
        return None
    for key in own.keys() & state.keys():
        if own[key].shape != state[key].shape:
            return None
        with torch.no_grad():
            own[key].copy_(state[key])
    return model


def code_matters(build: Callable[[], nn.Module], path: Path, strict: bool, seed: int) -> bool:
    """Whether plain PyTorch loads the file, and to another end than it would without the load code."""
    right = loaded(built(build, seed), path, strict)
    naive = without_load_code(built(build, seed), torch.load(path), strict)
    return naive is None or differences(right, naive) != []
