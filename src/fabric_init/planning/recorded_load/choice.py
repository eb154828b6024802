"""Choose how a checkpoint is loaded: by names alone, by the modules' own load code, or as Hugging Face models are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from fabric_init.checkpoints import CheckpointReader
from fabric_init.planning.recorded_load.hugging_face import HuggingFaceCode, outermost
from fabric_init.planning.recorded_load.llama_cpp import LlamaCppCode, is_llama_cpp
from fabric_init.planning.recorded_load.module_code import ModuleCode, has_load_code
from fabric_init.planning.recorded_load.quantized_layers import QuantizedCode, saved_quantized
from fabric_init.planning.recorded_load.record import LoadCode, Outcome
from fabric_init.planning.tensors import Walk, Walked, registered_tensors


def load_code(walk: Walk, reader: CheckpointReader, names: Mapping[str, str], reinit: Sequence[str]) -> LoadCode | None:
    """Return the code that loads ``reader`` into a model; ``None`` if matching names does all that it would do.

    Args:
        walk: Over the recorded model.
        reader: The open checkpoint.
        names: The name in the state dict for each key of the checkpoint.
        reinit: Globs of tensors that are not loaded.
    """
    quantized = saved_quantized(walk, frozenset(names.values()))
    given = frozenset(names.values()).difference(*quantized.values())
    code = _load_code(walk, reader, given, reinit)
    return QuantizedCode(code or ModuleCode(reader), quantized) if quantized else code


def _load_code(walk: Walk, reader: CheckpointReader, given: frozenset[str], reinit: Sequence[str]) -> LoadCode | None:
    parts = [
        prefix
        for prefix, part in outermost(walk)
        if not _is_as_built(walk if part is walk.model else part, _under(prefix, given))
    ]
    if parts == [""]:
        return _hugging_face(reader, given, reinit)
    if parts:
        return _Parts(reader, reinit, parts)
    return ModuleCode(reader) if has_load_code(walk, given) else None


def _hugging_face(
    reader: CheckpointReader, given: frozenset[str], reinit: Sequence[str]
) -> HuggingFaceCode | LlamaCppCode:
    """Return the code that loads what has these names into a transformers model."""
    return (LlamaCppCode if is_llama_cpp(reader, given) else HuggingFaceCode)(reader, reinit)


class _Parts:
    """Loads some modules as ``from_pretrained`` does, and all others as ``load_state_dict`` does."""

    replaces = False

    def __init__(self, reader: CheckpointReader, reinit: Sequence[str], prefixes: Sequence[str]) -> None:
        self._reader = reader
        self._reinit = reinit
        self._prefixes = prefixes

    def __call__(self, model: nn.Module, state: dict[str, Any]) -> Outcome:
        missing: set[str] = set()
        unexpected: list[str] = []
        rest = dict(state)
        for prefix in self._prefixes:
            dot = f"{prefix}."
            its = {name.removeprefix(dot): rest.pop(name) for name in state if name.startswith(dot)}
            reinit = [glob.removeprefix(dot) for glob in self._reinit]
            code = _hugging_face(self._reader, frozenset(its), reinit)
            outcome = code(model.get_submodule(prefix), its)
            missing |= {dot + name for name in outcome.missing or ()}
            unexpected += [dot + name for name in outcome.unexpected]
        outcome = ModuleCode(self._reader)(model, rest)
        dots = tuple(f"{prefix}." for prefix in self._prefixes)
        missing |= {name for name in outcome.missing or () if not name.startswith(dots)}
        return Outcome(frozenset(missing), (*unexpected, *outcome.unexpected))


def _under(prefix: str, names: frozenset[str]) -> frozenset[str]:
    dot = f"{prefix}."
    return frozenset(name.removeprefix(dot) for name in names if name.startswith(dot)) if prefix else names


def _is_as_built(model: Walked, given: frozenset[str]) -> bool:
    """Return whether a state dict has the names of the model's tensors, of tied ones at least one, and no others."""
    names: dict[int, list[str]] = {}
    for name, kind, tensor in registered_tensors(model):
        if kind != "non-persistent buffer":
            names.setdefault(id(tensor), []).append(name)
    known = {name for of_one in names.values() for name in of_one}
    return given <= known and all(any(name in given for name in of_one) for of_one in names.values())
