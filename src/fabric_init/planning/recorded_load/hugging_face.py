"""Hugging Face models: transformers knows how each of its architectures lies on disk.

``from_pretrained`` renames keys and converts tensors by a table (``get_model_conversion_mapping``) on their way into
the modules. Here the same function runs, on tensors that have no values yet.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from fabric_init._text import listed
from fabric_init.checkpoints import CheckpointReader
from fabric_init.errors import CheckpointMismatchError
from fabric_init.planning.recorded_load.record import Outcome
from fabric_init.planning.reinit import is_reinitialized
from fabric_init.planning.tensors import Walk

_MODELS, _LOADING, _TABLE, _LOGGING = (
    f"transformers.{name}" for name in ("modeling_utils", "core_model_loading", "conversion_mapping", "utils.logging")
)
_NO_THREADS = "HF_DEACTIVATE_ASYNC_LOAD"
_environment = threading.Lock()


def outermost(walk: Walk) -> list[tuple[str, nn.Module]]:
    """Return the transformers models that are in no other one, by name; none if transformers has no such table."""
    if _MODELS not in sys.modules or _LOADING not in sys.modules or _TABLE not in sys.modules:
        return []
    base: type[nn.Module] = sys.modules[_MODELS].PreTrainedModel
    found: list[tuple[str, nn.Module]] = []
    for name, module in walk.once:
        if isinstance(module, base) and not any(not of or name.startswith(f"{of}.") for of, _ in found):
            found.append((name, module))
    return found


class HuggingFaceCode:
    """Loads a state dict as ``from_pretrained`` does.

    Args:
        reader: The checkpoint; errors name it.
        reinit: Globs of tensors that are not loaded, so their shapes may differ.
        table: How the checkpoint differs from the model, in transformers' terms; ``None`` for what its table says.
            Tensors that are computed with keep the checkpoint's dtype until then.
    """

    replaces = False

    def __init__(self, reader: CheckpointReader, reinit: Sequence[str], table: list[Any] | None = None) -> None:
        self._reader = reader
        self._reinit = reinit
        self._table = table

    def __call__(self, model: nn.Module, state: dict[str, Any]) -> Outcome:
        """Load ``state``.

        Raises:
            CheckpointMismatchError: A tensor has another shape, or cannot be converted.
        """
        loading: Any = sys.modules[_LOADING]
        mapping, quantizer = self._table, None
        if mapping is None:
            mapping = sys.modules[_TABLE].get_model_conversion_mapping(model)
        else:
            quantizer = _CastsLast(mapping, loading.WeightConverter)
        config = sys.modules[_MODELS].LoadStateDictConfig(weight_mapping=mapping, hf_quantizer=quantizer)
        meant = model.state_dict()
        with _in_this_thread():
            info, _ = loading.convert_and_load_state_dict_in_model(model, state, config)
        problems = [
            f"{name} is {tuple(here)} in the model and {tuple(there)} in the checkpoint"
            for name, there, here in sorted(info.mismatched_keys)
            if not is_reinitialized([name], self._reinit)
        ]
        problems += [f"{name}: {error}" for name, error in dict(info.conversion_errors).items()]
        if problems or info.error_msgs:
            raise CheckpointMismatchError(
                f"{self._reader.path}: tensors do not fit the model:\n"
                + listed([*problems, *map(str, info.error_msgs)])
                + "\nBuild the model from the checkpoint's own config, or have these tensors initialized: reinit=[…]."
            )
        model._adjust_missing_and_unexpected_keys(info)  # type: ignore[operator]
        renamings = [each for each in mapping if isinstance(each, loading.WeightRenaming)]
        converters = [each for each in mapping if isinstance(each, loading.WeightConverter)]
        extra = info.unexpected_keys
        unexpected = tuple(
            name
            for name in state
            if name in extra
            or loading.rename_source_key(name, renamings, converters, model.base_model_prefix, meant)[0] in extra
        )
        return Outcome(frozenset(info.missing_keys), unexpected)


class _CastsLast:
    """Takes the place of a quantizer of transformers, which alone may say when tensors are cast.

    Those of a ``table`` that are computed with are cast when that is done, all others when they are read.
    """

    pre_quantized = True

    def __init__(self, table: list[Any], converter: type) -> None:
        for each in table:
            if isinstance(each, converter):
                each.operations.append(self)  # type: ignore[attr-defined]

    def get_new_dtype(self, converter: Any, tensor: object, dtype: object) -> object:
        """Return the dtype in which a tensor is read; ``None`` for its own."""
        return None if getattr(converter, "operations", None) else dtype

    def convert(self, tensors: dict[str, Any], *, model: Any, full_layer_name: str, **_: Any) -> dict[str, Any]:
        """Cast tensors to what the model has: the last operation on them."""
        dtype = model.get_parameter_or_buffer(full_layer_name).dtype
        return {key: tensor.to(dtype) for key, tensor in tensors.items()}


@contextmanager
def _in_this_thread() -> Iterator[None]:
    """Context in which transformers loads in this thread, which records, and shows no progress of it."""
    logging: Any = sys.modules[_LOGGING]
    with _environment:
        before, shown = os.environ.get(_NO_THREADS), logging.is_progress_bar_enabled()
        os.environ[_NO_THREADS] = "1"
        logging.disable_progress_bar()
        try:
            yield
        finally:
            if shown:
                logging.enable_progress_bar()
            if before is None:
                del os.environ[_NO_THREADS]
            else:
                os.environ[_NO_THREADS] = before
