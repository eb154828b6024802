"""Load what layers of bitsandbytes have saved once they were quantized: packed weights beside their scales.

``load_state_dict`` of these layers takes float weights, or none of the scales. What takes both is a constructor of the
parameter, ``Params4bit.from_prequantized``, which transformers calls as well.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import nn

from fabric_init.errors import CheckpointMismatchError
from fabric_init.planning.recorded_load.record import LoadCode, Outcome
from fabric_init.planning.tensors import Walked, named_modules
from fabric_init.recording.tensor.recorded_tensor import class_of

_WEIGHT = "weight"
_SCALE, _FORMAT = "SCB", "weight_format"  # of 8 bits
_STATE = "weight.quant_state.bitsandbytes__"  # of 4 bits: with a name of the type, the key of what is no tensor


def saved_quantized(model: Walked, names: Collection[str]) -> dict[str, set[str]]:
    """Return the names of weights that a state dict has packed for layers of bitsandbytes, each with those beside it.

    Args:
        model: The recorded model.
        names: The names in the state dict.
    """
    library: Any = sys.modules.get("bitsandbytes")
    layers = getattr(library, "nn", None)
    if layers is None:
        return {}
    found: dict[str, set[str]] = {}
    for dot, module in _with_weights(model):
        weight = module._parameters[_WEIGHT]
        if f"{dot}{_WEIGHT}" not in names:
            continue
        if isinstance(weight, layers.Params4bit) and any(name.startswith(f"{dot}{_STATE}") for name in names):
            found[f"{dot}{_WEIGHT}"] = {name for name in names if name.startswith(f"{dot}{_WEIGHT}.")}
        elif isinstance(weight, layers.Int8Params) and f"{dot}{_SCALE}" in names:
            found[f"{dot}{_WEIGHT}"] = {f"{dot}{_SCALE}", f"{dot}{_FORMAT}"} & set(names)
    return found


def _with_weights(model: Walked) -> Iterator[tuple[str, nn.Module]]:
    for prefix, module in named_modules(model):
        if dict(module._parameters.items()).get(_WEIGHT) is not None:  # those of a scripted module are in no dict
            yield f"{prefix}." if prefix else "", module


class QuantizedCode:
    """Makes the parameters of layers that a state dict has quantized, and leaves all else to other code.

    Args:
        others: The code that loads all other tensors.
        saved: From :func:`saved_quantized`.
    """

    def __init__(self, others: LoadCode, saved: dict[str, set[str]]) -> None:
        self.replaces = others.replaces
        self._others = others
        self._saved = saved

    def __call__(self, model: nn.Module, state: dict[str, Any]) -> Outcome:
        """Load ``state``.

        Raises:
            CheckpointMismatchError: A weight is of another size than its layer, or packed in an unknown way.
        """
        rest = dict(state)
        for dot, module in _with_weights(model):
            name = f"{dot}{_WEIGHT}"
            if name in self._saved:
                value = rest.pop(name)
                beside = {other.removeprefix(dot): rest.pop(other) for other in self._saved[name]}
                module._parameters[_WEIGHT] = _parameter(name, module, value, beside)
        outcome = self._others(model, rest)
        missing = None if outcome.missing is None else outcome.missing - self._saved.keys()
        return outcome._replace(missing=missing)


def _parameter(name: str, module: nn.Module, value: torch.Tensor, beside: dict[str, Any]) -> nn.Parameter:
    before: Any = module._parameters[_WEIGHT]
    made: Any
    own: Any = class_of(before)
    if _SCALE in beside:
        if _FORMAT in beside and beside[_FORMAT].item() != 0:
            raise CheckpointMismatchError(f"{name} is saved in another format than by rows, which bitsandbytes dropped")
        made = own(value, requires_grad=False, has_fp16_weights=False, SCB=beside[_SCALE]).to(before.device)
        shape = made.shape
    else:
        stats = {key.removeprefix(f"{_WEIGHT}."): tensor for key, tensor in beside.items()}
        try:
            made = own.from_prequantized(value, stats, device=before.device, module=module)
        except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointMismatchError(
                f"bitsandbytes cannot make {name} of what the checkpoint has beside it ({', '.join(sorted(beside))}): "
                f"{type(error).__name__} {error}"
            ) from error
        shape = made.quant_state.shape
    wanted = _shape_of(module)
    if wanted is not None and tuple(shape) != wanted:
        raise CheckpointMismatchError(
            f"{name} is {wanted} in the model and, quantized, {tuple(shape)} in the checkpoint"
        )
    return made  # type: ignore[no-any-return]


def _shape_of(module: nn.Module) -> tuple[int, int] | None:
    """Return the shape that the weight of a layer has before it is packed."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    return (module.num_embeddings, module.embedding_dim) if isinstance(module, nn.Embedding) else None
