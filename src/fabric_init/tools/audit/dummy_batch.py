"""Generate a batch for a model that declares its inputs, by a transformers config or Lightning's example input."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fabric_init.errors import FabricInitError

_SEED = 0
_ROWS, _TOKENS, _SAMPLES = 4, 32, 16_000  # a second of sound
_CHANNELS, _IMAGE = 3, 224  # if the config does not say
MSG_NO_DUMMY_BATCH = (
    "no batch can be generated for {model}: {reason}. Pass one: audit(model, batch=(inputs, labels)), with the "
    "arguments of forward and then the labels, or audit(model, batch={{'input_ids': …, 'labels': …}})."
)


def dummy_batch(model: nn.Module) -> Any:
    """Return random inputs for ``model`` without labels, from a separate generator.

    Raises:
        FabricInitError: the model does not declare its inputs, or needs inputs of an unknown kind.
    """
    example = getattr(model, "example_input_array", None)
    if example is not None:
        return dict(example) if isinstance(example, Mapping) else example
    config, main = getattr(model, "config", None), getattr(model, "main_input_name", None)
    if config is None or not isinstance(main, str):
        raise _impossible(model, "it has neither a transformers config nor Lightning's example_input_array")
    makers = {
        "input_ids": _token_ids,
        "pixel_values": _images,
        "input_values": _sound,
        "input_features": _spectrograms,
    }
    if main not in makers:
        raise _impossible(model, f"its main input is {main}")
    generator = torch.Generator().manual_seed(_SEED)
    batch = {main: makers[main](model, config, generator)}
    takes = inspect.signature(model.forward).parameters
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in takes:
        batch["decoder_input_ids"] = _token_ids(model, config, generator)
    elif main == "pixel_values" and "input_ids" in takes and hasattr(text_config(config), "vocab_size"):
        batch["input_ids"] = _token_ids(model, config, generator)[: len(batch[main])]
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    inputs = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in batch.items()}
    return inputs | ({"use_cache": False} if "use_cache" in takes else {})  # the cache is for later tokens


def _impossible(model: nn.Module, reason: str) -> FabricInitError:
    return FabricInitError(MSG_NO_DUMMY_BATCH.format(model=type(model).__name__, reason=reason))


def _token_ids(model: nn.Module, config: Any, generator: torch.Generator) -> Tensor:
    """Return int64 ids, rows × tokens, without special tokens except an end token, which some classifiers look for."""
    text = text_config(config)
    size = getattr(text, "vocab_size", None)
    if size is None:
        raise _impossible(model, "its config has no vocab_size")
    ids = torch.arange(size)
    special = {value for name, value in _config_numbers(config, text) if name.endswith(("_token_id", "_token_index"))}
    plain = ids[~torch.isin(ids, torch.tensor(sorted(special), dtype=torch.int64))]
    positions = [value for name, value in _config_numbers(text) if name in ("max_position_embeddings", "n_positions")]
    tokens = min([_TOKENS, *(value for value in positions if value > 0)])
    heads = type(model).__name__
    # without a padding token such classifiers do not know where a row ends, and refuse several
    rows = 1 if heads.endswith("ForSequenceClassification") and text.pad_token_id is None else _ROWS
    choices = (2,) if heads.endswith("ForMultipleChoice") else ()
    batch = plain[torch.randint(len(plain), (rows, *choices, tokens), generator=generator)]
    end = getattr(text, "eos_token_id", None)
    if isinstance(end, int) and 0 <= end < size:
        batch[..., -1] = end
    return batch


def text_config(config: Any) -> Any:
    """Return the part of a config that describes the output text."""
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def _config_numbers(*configs: Any) -> list[tuple[str, int]]:
    return [(name, value) for config in configs for name, value in vars(config).items() if type(value) is int]


def _images(model: nn.Module, config: Any, generator: torch.Generator) -> Tensor:
    """Return standard normal images, rows × channels × height × width."""
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", None) or _IMAGE
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    rows = _ROWS if height * width <= _IMAGE**2 else 2  # large images take the memory of many
    return torch.randn(rows, getattr(vision, "num_channels", _CHANNELS), height, width, generator=generator)


def _sound(model: nn.Module, config: Any, generator: torch.Generator) -> Tensor:
    """Return rows × samples, or rows × frames × mel bins if the model takes spectrograms under this name."""
    if hasattr(config, "num_mel_bins") and hasattr(config, "max_length"):
        return torch.randn(_ROWS, config.max_length, config.num_mel_bins, generator=generator)
    return torch.randn(_ROWS, _SAMPLES, generator=generator)


def _spectrograms(model: nn.Module, config: Any, generator: torch.Generator) -> Tensor:
    """Return rows × mel bins × frames as Whisper takes them, two frames per position."""
    if not hasattr(config, "num_mel_bins") or not hasattr(config, "max_source_positions"):
        raise _impossible(model, "its config does not say what its input_features look like")
    return torch.randn(_ROWS, config.num_mel_bins, 2 * config.max_source_positions, generator=generator)
