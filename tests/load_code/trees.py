"""Modules put together from a description: a tree of layers, with load code at some of them; and files for them."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from tests.load_code.cases import State, made
from tests.load_code.vocabulary import CODES, GROUP_CODES, Code

Leaf = tuple[str, str]
"""The kind of a layer, and its load code."""
Tree = Any
"""A leaf, or the load code of a group and the list of what is in it."""
WIDTH = 4


class Coded(nn.Module):
    """Has load code of the vocabulary."""

    _version = 2
    code: Code
    total: Tensor

    def give(self, code: Code) -> None:
        self.code = code
        self.loads = 0
        self.level = 0.0
        self.register_buffer("total", torch.zeros(()), persistent=False)
        code.install(self)

    def _load_from_state_dict(self, state_dict: State, prefix: str, *args: Any) -> None:
        if self.code.override is None or not self.code.override(self, state_dict, prefix):
            super()._load_from_state_dict(state_dict, prefix, *args)


class Linear(Coded, nn.Linear):
    pass


class BatchNorm(Coded, nn.BatchNorm1d):
    pass


class Embedding(Coded, nn.Embedding):
    pass


class Own(Coded):
    """Is initialized by plain ops, and has plain attributes that are computed from random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, 3) / 3)
        self.gain = nn.Parameter(torch.ones(WIDTH))
        self.register_buffer("noise", torch.rand(WIDTH))
        self.register_buffer("steps", torch.tensor(0))
        self.offsets = torch.rand(2)


class Stateful(Coded, nn.Linear):
    """Has extra state."""

    def __init__(self) -> None:
        super().__init__(WIDTH, 3)
        self.seen = 0

    def get_extra_state(self) -> Any:
        return {"seen": self.seen}

    def set_extra_state(self, state: Any) -> None:
        self.seen += state["seen"]


KINDS: dict[str, Any] = {
    "linear": lambda: Linear(WIDTH, 3),
    "linear without bias": lambda: Linear(3, WIDTH, bias=False),
    "batch norm": lambda: BatchNorm(WIDTH),
    "embedding": lambda: Embedding(5, WIDTH),
    "own": Own,
    "stateful": Stateful,
}


class Group(Coded):
    """Has children, and perhaps load code for them."""

    def __init__(self, tree: Tree) -> None:
        super().__init__()
        code, children = tree
        self.parts = nn.ModuleList(made_of(child) for child in children)
        self.give(GROUP_CODES[code])


class Root(nn.Module):
    """The tree, beside a layer whose keys are in every file; ``renames``: in a ``load_state_dict`` of its own."""

    def __init__(self, tree: Tree, renames: bool) -> None:
        super().__init__()
        self.anchor = nn.Linear(2, 2)
        self.tree = made_of(tree)
        self.renames = renames

    def load_state_dict(self, state_dict: Any, strict: bool = True) -> Any:  # type: ignore[override]
        if self.renames:
            versions = state_dict._metadata
            state_dict = OrderedDict((key.replace("trunk.", "tree."), value) for key, value in state_dict.items())
            state_dict._metadata = versions
        return super().load_state_dict(state_dict, strict)


def made_of(tree: Tree) -> nn.Module:
    """Build what ``tree`` describes."""
    head, rest = tree
    if not isinstance(rest, str):
        return Group(tree)
    layer = KINDS[head]()
    layer.give(CODES[rest])
    return layer  # type: ignore[no-any-return]


def file_for(model: Root, seed: int) -> State:
    """Return a state dict of an older version of ``model``, with values that no init would give."""
    state = model.state_dict()
    versions = state._metadata  # type: ignore[attr-defined]
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    values = made({key: tuple(value.shape) for key, value in tensors.items()}, seed)
    old: State = OrderedDict(state)
    for key, value in tensors.items():
        old[key] = values[key] if value.is_floating_point() else value + 17
    for key in old.keys() - tensors.keys():
        old[key] = {"seen": 5}
    for name, module in reversed(list(model.named_modules())):  # children before what they are in
        if isinstance(module, Coded):
            module.code.age(old, f"{name}.", module)
            if module.code.forgets_version:
                del versions[name]
    if model.renames:
        old = OrderedDict((key.replace("tree.", "trunk.", 1), value) for key, value in old.items())
    old._metadata = versions  # type: ignore[attr-defined]
    return old


def damaged(state: State, how: str, position: int) -> State:
    """Return ``state`` with one key, not the anchor's, missing, misshapen or misnamed, or one too many."""
    changed: State = OrderedDict(state)
    changed._metadata = state._metadata  # type: ignore[attr-defined]
    keys = [key for key, value in state.items() if isinstance(value, Tensor) and not key.startswith("anchor.")]
    key = keys[position % len(keys)] if keys else "anchor.bias"
    if how == "missing":
        del changed[key]
    elif how == "misshapen":
        changed[key] = torch.zeros(*state[key].shape, 2, dtype=state[key].dtype)
    elif how == "misnamed":
        changed[f"{key}_x"] = changed.pop(key)
    else:
        changed[f"{key}_extra"] = torch.ones(2)
    return changed


DAMAGES = ["missing", "misshapen", "misnamed", "too many"]
