"""Choose how a checkpoint is loaded: by names alone, by the modules' own load code, or as Hugging Face models are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from fabric_init.checkpoints import CheckpointReader
from fabric_init.planning.loading.hugging_face import HuggingFaceCode, is_hugging_face
from fabric_init.planning.loading.module_code import ModuleCode, has_load_code
from fabric_init.planning.loading.recorded_load import LoadCode
from fabric_init.planning.tensors import named_tensors


def load_code(
    model: nn.Module, reader: CheckpointReader, names: Mapping[str, str], reinit: Sequence[str]
) -> LoadCode | None:
    """Return the code that loads ``reader`` into ``model``; ``None`` if matching names does all that it would do.

    Args:
        model: The recorded model.
        reader: The open checkpoint.
        names: The name in the state dict for each key of the checkpoint.
        reinit: Globs of tensors that are not loaded.
    """
    given = frozenset(names.values())
    if is_hugging_face(model) and not _is_as_built(model, given):
        return HuggingFaceCode(reader, reinit)
    return ModuleCode(reader) if has_load_code(model, given) else None


def _is_as_built(model: nn.Module, given: frozenset[str]) -> bool:
    """Return whether a state dict has the names of the model's tensors and no others; of a tied tensor, one is enough."""
    names: dict[int, list[str]] = {}
    for name, kind, tensor in named_tensors(model):
        if kind in ("parameter", "buffer"):
            names.setdefault(id(tensor), []).append(name)
    known = {name for of_one in names.values() for name in of_one}
    return given <= known and all(any(name in given for name in of_one) for of_one in names.values())
