"""The architectures of the installed transformers, and configs of theirs that are small enough to build by the hundred.

An *architecture* is one ``modeling_*.py`` file of transformers; it stands for every model class in it that has a config
class (``*PreTrainedModel`` bases aside). All of these classes are built, so nothing depends on a choice of "the" class
for an architecture, and the number of architectures cannot be made up by counting the heads of one model.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple


class Shrink(NamedTuple):
    """How much smaller: attention heads and head size are divided by these, every other width by their product."""

    heads: int
    head_size: int
    experts: int
    lists: bool = True


LADDER = (
    Shrink(8, 4, 2),
    Shrink(4, 4, 4),
    Shrink(4, 2, 4),
    Shrink(2, 2, 8),
    Shrink(1, 4, 8),
    Shrink(2, 1, 8),
    Shrink(1, 1, 8),
    Shrink(1, 1, 1000, False),
)
"""The first of these from which eager PyTorch can build the model is taken. Layers and vocabulary always shrink."""

_LAYERS = re.compile(r"(^|_)(n_|num_)?(\w*_)?(layers?|blocks|depth|n_layer|stages?_repeats|repeats|resblocks)$")
_DEPTHS = re.compile(r"(^|_)(depths|num_blocks|layers|layer_depths|layers_per_stage|num_repeats)$")
_HEADS = re.compile(r"(^|_)(n_|num_)?\w*heads?(_kv|_q)?$|num_key_value|n_head_kv|num_attention_groups|num_query_groups")
_HEAD_SIZE = re.compile(
    r"head_dim$|head_size$|head_width$|d_kv$|rotary_dim$|attention_head_size|(qk|v)_\w*dim$|kv_channels"
)
_WIDTH = re.compile(
    r"hidden_size|hidden_dim|d_model|_dim$|^dim$|dims$|_size$|_sizes$|width|n_embd|n_inner|channels|d_ff|d_inner|ffn|"
    r"intermediate|rank$|units|embed|projection|d_conv_in|features|hidden_channels|planes"
)
_NOT_WIDTH = re.compile(
    r"vocab|image_size|patch|kernel|stride|window|chunk|num_channels|in_channels|in_chans|num_labels|pool|block_size|"
    r"position|input_feat|mel|audio_channels|group|codebook_size|crop|tile|grid|time|dilat|length|spatial|temporal|"
    r"state_size|bins|conv_kernel|sampling|scale|type_vocab|num_feature|buckets|img|input_size|frame|n_fft|step"
)
_EXPERTS = re.compile(r"experts$|^num_experts|_num_experts$|n_routed|n_experts")
_DENSE = re.compile(r"^first_k_dense_replace$|^num_dense_layers$|^moe_layer_start_index$")
"""How many of the first layers have no experts: the last has them in the small model, too."""
_PER_TOKEN = re.compile(r"per_tok|top_?k|per_token|n_shared|shared_experts")
_POSITIONS = re.compile(r"max_position|n_positions|max_\w*positions|max_seq_len|max_sequence_length|n_ctx$")
_VOCAB = re.compile(
    r"(^|_)vocab_size|^n_vocab|vocabulary_size|_vocab_size|num_embeddings$|n_words|codebook_size|emb_size$"
)
_TOKEN = re.compile(r"_(token_id|index|token_index|idx)$|^(pad|bos|eos)")
_MOST_LAYERS, _MOST_POSITIONS, _VOCABULARY = 2, 64, 128  # a codebook has to be a power of two


def names() -> list[str]:
    """Every architecture, as ``folder/modeling_file``, found without importing transformers."""
    spec = importlib.util.find_spec("transformers")
    assert spec is not None
    assert spec.origin is not None
    models = Path(spec.origin).parent / "models"
    return sorted(f"{path.parent.name}/{path.stem}" for path in models.glob("*/modeling_*.py"))


def model_classes(architecture: str) -> list[Any]:
    """The architecture's model classes."""
    from transformers import PreTrainedModel

    module = importlib.import_module("transformers.models." + architecture.replace("/", "."))
    return [
        value
        for name, value in vars(module).items()
        if inspect.isclass(value)
        and issubclass(value, PreTrainedModel)
        and value.__module__ == module.__name__
        and not name.endswith("PreTrainedModel")
        and value.config_class is not None
    ]


def configs(model_class: Any) -> Iterator[Any]:
    """Makers of ever larger configs for a model class, the smallest first."""
    for shrink in LADDER:
        yield lambda shrink=shrink: small(default_config(model_class), shrink)


def default_config(model_class: Any) -> Any:
    """The config class's defaults; for classes that put models together, two small well-known parts."""
    import transformers as t

    kind = model_class.config_class
    parts = {
        "EncoderDecoderConfig": lambda: kind(encoder=t.BertConfig().to_dict(), decoder=_decoder(t.BertConfig)),
        "VisionEncoderDecoderConfig": lambda: kind(encoder=t.ViTConfig().to_dict(), decoder=_decoder(t.BertConfig)),
        "SpeechEncoderDecoderConfig": lambda: kind(
            encoder=t.Wav2Vec2Config().to_dict(), decoder=_decoder(t.BertConfig)
        ),
        "VisionTextDualEncoderConfig": lambda: kind(
            vision_config=t.ViTConfig().to_dict(), text_config=t.BertConfig().to_dict()
        ),
        "RagConfig": lambda: kind(question_encoder=t.DPRConfig().to_dict(), generator=t.BartConfig().to_dict()),
        "MusicgenConfig": lambda: kind(
            text_encoder=t.T5Config().to_dict(),
            audio_encoder=t.EncodecConfig().to_dict(),
            decoder=t.MusicgenDecoderConfig().to_dict(),
        ),
    }
    needed = {
        "AutoformerConfig": {"prediction_length": 4},
        "InformerConfig": {"prediction_length": 4},
        "TimeSeriesTransformerConfig": {"prediction_length": 4},
        "EsmConfig": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
        "Lfm2MoeConfig": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
        "VitMatteConfig": {"fusion_hidden_sizes": [256, 128, 64, 32]},
        "Dots1Config": {"n_routed_experts": 8, "n_shared_experts": 1},
    }
    return parts[kind.__name__]() if kind.__name__ in parts else kind(**needed.get(kind.__name__, {}))


def _decoder(config_class: Any) -> dict[str, Any]:
    return dict(config_class(is_decoder=True, add_cross_attention=True).to_dict())


def small(config: Any, shrink: Shrink, seen: set[int] | None = None) -> Any:
    """``config`` itself, made small in place, and so are the configs in it."""
    from transformers import PretrainedConfig

    seen = set() if seen is None else seen
    if id(config) in seen:
        return config
    seen.add(id(config))
    config.return_dict = True
    depths = {
        value for name, value in vars(config).items() if type(value) is int and _LAYERS.search(name) and value > 2
    }
    depths -= {
        len(value) for name, value in vars(config).items() if _DEPTHS.search(name) and isinstance(value, list | tuple)
    }
    for name, value in list(vars(config).items()):
        if isinstance(value, PretrainedConfig):
            small(value, shrink, seen)
        elif name.startswith("_") or isinstance(value, bool) or value is None:
            continue
        elif type(value) is int:
            _set(config, name, _smaller(name, value, shrink))
        elif isinstance(value, (list, tuple)) and value and all(type(item) is int for item in value):
            if _DEPTHS.search(name):
                _set(config, name, [min(item, 1) for item in value])
            elif shrink.lists and not _LAYERS.search(name):
                items = [_smaller(name, item, shrink) for item in value]
                _set(config, name, items[:_MOST_LAYERS] if len(items) in depths else items)
        elif isinstance(value, (list, tuple)) and len(value) in depths:
            _set(config, name, [value[0], value[-1]] if name == "mlp_layer_types" else value[:_MOST_LAYERS])
    held = vars(config)
    heads, width = held.get("num_attention_heads"), held.get("hidden_size")
    if type(heads) is int and type(width) is int:  # defaults that some models need and their configs leave open
        if held.get("num_key_value_heads", heads) is None:
            _set(config, "num_key_value_heads", heads)
        if held.get("head_dim", heads) is None:
            _set(config, "head_dim", width // heads)
    return config


def _set(config: Any, name: str, value: Any) -> None:
    try:
        if getattr(config, name) != value:
            setattr(config, name, value)
    except Exception:  # a read-only property, or a value that the config's own checks refuse: it stays large
        return


def _smaller(name: str, value: int, shrink: Shrink) -> int:
    if value <= 1:
        return value
    if _TOKEN.search(name):
        return min(value, _VOCABULARY - 1)
    if _VOCAB.search(name):
        return min(value, _VOCABULARY)
    if _POSITIONS.search(name):
        return min(value, _MOST_POSITIONS)
    if _DENSE.search(name):
        return min(value, _MOST_LAYERS - 1)
    if _PER_TOKEN.search(name):
        return min(value, shrink.experts)
    if _EXPERTS.search(name):
        return min(value, shrink.experts)
    if _HEAD_SIZE.search(name):
        return _divided(value, shrink.head_size)
    if _HEADS.search(name):
        return max(value // shrink.heads, 1)
    if _LAYERS.search(name):
        return min(value, _MOST_LAYERS)
    if _WIDTH.search(name) and not _NOT_WIDTH.search(name):
        return _divided(value, shrink.heads * shrink.head_size)
    return value


def _divided(value: int, by: int) -> int:
    while by > 1 and (value % by or value // by < 4):
        by //= 2
    return value // by
