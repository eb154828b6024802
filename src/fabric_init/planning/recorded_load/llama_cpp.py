"""GGUF files in Hugging Face models: llama.cpp's names and layouts, as ``from_pretrained(gguf_file=…)`` takes them.

transformers knows which of llama.cpp's names is which tensor. For some architectures it also has a table of what is
done with the values, which runs here as it does there. For all others that is code for NumPy, which cannot run on
tensors without values: :data:`_PROCESSED` says the same in torch, and what is not in it is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from fabric_init._text import joined
from fabric_init.checkpoints import CheckpointReader
from fabric_init.checkpoints.reader import fields_of
from fabric_init.errors import CheckpointMismatchError
from fabric_init.planning.recorded_load.hugging_face import HuggingFaceCode
from fabric_init.planning.recorded_load.record import Outcome

_TABLES, _LEGACY = "transformers.integrations.gguf", "transformers.modeling_gguf_pytorch_utils"
_MODEL_TYPES = {
    "command-r": ("cohere",),
    "gemma3": ("gemma3_text",),
    "gemma4": ("gemma4_text",),
    "gpt-oss": ("gpt_oss",),
    "llama": ("llama", "mistral"),
    "minimax-m2": ("minimax_m2",),
    "qwen2moe": ("qwen2_moe",),
    "qwen35": ("qwen3_5_text",),
    "qwen35moe": ("qwen3_5_moe_text",),
    "qwen3moe": ("qwen3_moe",),
    "t5": ("t5", "umt5"),
    "t5encoder": ("t5", "umt5"),
}
"""By the architecture of a file: the ``model_type`` of its models, where that is another name."""
_NOT_WEIGHTS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""What a model computes from its config."""
_ADAPTED = ".base_layer."  # of peft: the layer that is adapted
_HEADS = {
    "attention.head_count": ("num_attention_heads", "n_head"),
    "attention.head_count_kv": ("num_key_value_heads",),
}


def is_llama_cpp(reader: CheckpointReader, names: Sequence[str] | frozenset[str]) -> bool:
    """Return whether ``names`` are llama.cpp's: those of a GGUF file that ``rename`` has not made others."""
    keys = set(reader.keys()) if "general.architecture" in fields_of(reader) else set()
    return not keys.isdisjoint(names)


class LlamaCppCode:
    """Loads the tensors of a GGUF file, by llama.cpp's names, as ``from_pretrained(gguf_file=…)`` does.

    Args:
        reader: The checkpoint.
        reinit: Globs of tensors that are not loaded, so their shapes may differ.
    """

    replaces = False

    def __init__(self, reader: CheckpointReader, reinit: Sequence[str]) -> None:
        self._reader = reader
        self._reinit = reinit
        self._fields = fields_of(reader)
        self._architecture = str(self._fields["general.architecture"])

    def __call__(self, model: nn.Module, state: dict[str, Any]) -> Outcome:
        """Load ``state``.

        Raises:
            CheckpointMismatchError: The file is not of such a model, or a tensor has another shape.
        """
        config: Any = model.config
        self._check(config)
        state = {name: tensor for name, tensor in state.items() if name not in _NOT_WEIGHTS}
        if self._architecture in _with_table():
            table = import_module(_TABLES).get_gguf_conversion_mapping(self._architecture, config)
            return HuggingFaceCode(self._reader, self._reinit, table)(model, state)
        renamed, origin = self._renamed(model, state)
        outcome = HuggingFaceCode(self._reader, self._reinit)(model, renamed)
        return outcome._replace(unexpected=tuple(old for name in outcome.unexpected for old in origin[name]))

    def _check(self, config: Any) -> None:
        """Refuse a file of another architecture or with other heads: shapes do not tell them apart."""
        meant = _MODEL_TYPES.get(self._architecture, (self._architecture,))
        if config.model_type not in meant or not _is_mapped(self._architecture, config.model_type):
            raise CheckpointMismatchError(
                f"{self._reader.path} is a GGUF file of architecture {self._architecture!r}, and the model is "
                f"{config.model_type!r}. Names are mapped for the architectures that transformers maps, if file and "
                "model are of the same. If this file is for the model all the same, rename={regex: replacement} takes "
                "llama.cpp's names to the model's, and convert= its layouts."
            )
        for field, names in _HEADS.items():
            there = self._fields.get(f"{self._architecture}.{field}")
            here = next((value for name in names if (value := getattr(config, name, None)) is not None), None)
            if isinstance(there, int) and isinstance(here, int) and there != here:
                raise CheckpointMismatchError(
                    f"{self._reader.path} states {field} = {there}, and the model's config has {names[0]} = {here}. "
                    "Build the model from the file's config: AutoConfig.from_pretrained(folder, gguf_file=name)."
                )

    def _renamed(self, model: nn.Module, state: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, list[str]]]:
        """Return the state dict by the model's names, and which of llama.cpp's each name is made of."""
        legacy: Any = import_module(_LEGACY)
        config: Any = model.config
        kind = legacy.TENSOR_PROCESSORS.get(self._architecture, legacy.TensorProcessor)
        process = _PROCESSED.get(kind.__name__)
        if process is None:
            raise CheckpointMismatchError(
                f"{self._reader.path}: this release of transformers lays out {self._architecture!r} by "
                f"{kind.__name__}, which is not known here. Load it with from_pretrained(gguf_file=…), save that, and "
                "load it here."
            )
        actual = {name.replace(_ADAPTED, "."): name for name in model.state_dict()}
        names = legacy.get_gguf_hf_weights_map(
            _Names(config, list(actual)),
            kind(config=config),
            model_type=self._architecture,
            num_layers=config.num_hidden_layers,
        )
        parts: dict[str, dict[str, Tensor]] = {}
        for old, tensor in state.items():
            plain = _EXPERTS.sub(r"\1", old)  # of merged experts, which have no suffix in the model
            new = names.get(old) or (names.get(plain) if plain != old else None) or old
            parts.setdefault(actual.get(new, new), {})[old] = tensor
        made = partial(process, partial(_field, self._fields, self._architecture))
        return {new: made(olds) for new, olds in parts.items()}, {new: list(olds) for new, olds in parts.items()}


_EXPERTS = re.compile(r"(.*\.ffn_(?:gate|down|up)_exps)\.weight")


class _Names:
    """What transformers asks of a model to map names: its state dict's names, and those of its children."""

    def __init__(self, config: Any, names: Sequence[str], depth: int = 1) -> None:
        self.config = config
        self._names = names
        self._depth = depth

    def state_dict(self) -> Sequence[str]:
        return self._names

    def named_children(self) -> Iterator[tuple[str, _Names]]:
        """Yield the children, but not theirs: each takes a second, and only files of base models need the first."""
        children = dict.fromkeys(name.partition(".")[0] for name in self._names if "." in name)
        for child in children if self._depth else ():
            inner = [name.removeprefix(f"{child}.") for name in self._names if name.startswith(f"{child}.")]
            yield child, _Names(self.config, inner, self._depth - 1)


def _with_table() -> frozenset[str]:
    """Return the architectures for which this release of transformers has a table; older ones have none."""
    try:
        return frozenset(import_module(_TABLES).GGUF_ARCHS)
    except ImportError:
        return frozenset()


def _is_mapped(architecture: str, model_type: str) -> bool:
    known = {*import_module(_LEGACY).GGUF_SUPPORTED_ARCHITECTURES, *_with_table()}
    return not known.isdisjoint((architecture, model_type))


def _field(fields: Mapping[str, Any], architecture: str, name: str) -> Any:
    return fields.get(f"{architecture}.{name}")


# -- what llama.cpp has done with values, undone -----------------------------------------------------------------------

_Field = Callable[[str], Any]
_Parts = Mapping[str, Tensor]
"""The tensors that one of the model's is made of, by llama.cpp's names."""


def _as_they_are(field: _Field, parts: _Parts) -> Tensor:
    if len(parts) > 1:
        raise CheckpointMismatchError(f"{joined(list(parts))} would be one tensor of the model")
    return next(iter(parts.values()))


def _llama(field: _Field, parts: _Parts) -> Tensor:
    """Undo the order of rotary dimensions: llama.cpp has pairs side by side, transformers the halves of a head."""
    [(name, weight)] = parts.items()
    heads, groups = field("attention.head_count"), field("attention.head_count_kv")
    if heads is None or groups is None:
        return weight  # as transformers does
    if ".attn_q." in name:
        return _halves(weight, heads)
    return _halves(weight, groups) if ".attn_k." in name else weight


def _halves(weight: Tensor, heads: int) -> Tensor:
    apart = weight.reshape(heads, weight.shape[0] // heads // 2, 2, *weight.shape[1:])
    return apart.transpose(1, 2).reshape(weight.shape)


def _experts(field: _Field, parts: _Parts) -> Tensor:
    if len(parts) > 1:
        gates = [weight for name, weight in parts.items() if ".ffn_gate_exps" in name]
        ups = [weight for name, weight in parts.items() if ".ffn_up_exps" in name]
        return torch.cat([*gates, *ups], 1)
    [(name, weight)] = parts.items()
    if ".ffn_gate_exps" in name or ".ffn_up_exps" in name:
        raise CheckpointMismatchError(f"there is {name}, but not the other half of gate_up_proj")
    return weight.unsqueeze(0) if "ffn_gate_inp_shexp" in name else weight


def _bloom(field: _Field, parts: _Parts) -> Tensor:
    [(name, weight)] = parts.items()
    if "attn_qkv" not in name:
        return weight
    heads = field("attention.head_count")
    three = weight.reshape(3, heads, -1, *weight.shape[1:])
    return three.transpose(0, 1).reshape(weight.shape)


def _gpt2(field: _Field, parts: _Parts) -> Tensor:
    [(name, weight)] = parts.items()
    turned = ("attn_qkv.weight", "ffn_down.weight", "ffn_up.weight", "attn_output.weight")
    return weight.T if name.endswith(turned) else weight


def _mamba(field: _Field, parts: _Parts) -> Tensor:
    [(name, weight)] = parts.items()
    if "ssm_conv1d.weight" in name:
        return weight.unsqueeze(1)
    return _log()(-weight.float()) if "ssm_a" in name else weight


def _norms_from_zero(field: _Field, parts: _Parts) -> Tensor:
    [(name, weight)] = parts.items()
    return weight.float() - 1 if "norm.weight" in name else weight


@cache
def _log() -> Callable[..., Any]:
    """Return NumPy's logarithm as an operator: torch's differs in the last bit of some values."""
    import numpy

    def log(values: Tensor) -> Tensor:
        return torch.from_numpy(numpy.log(values.numpy()))

    schema = "(Tensor values) -> Tensor"  # annotations are text here, which torch cannot look up
    operator = torch.library.custom_op("fabric_init::log_of_numpy", log, mutates_args=(), schema=schema)
    operator.register_fake(torch.empty_like)
    return operator


_PROCESSED: Mapping[str, Callable[[_Field, _Parts], Tensor]] = {
    "TensorProcessor": _as_they_are,
    "T5TensorProcessor": _as_they_are,
    "LlamaTensorProcessor": _llama,
    "Qwen2MoeTensorProcessor": _experts,
    "MiniMaxM2TensorProcessor": _experts,
    "BloomTensorProcessor": _bloom,
    "GPT2TensorProcessor": _gpt2,
    "MambaTensorProcessor": _mamba,
    "NemotronTensorProcessor": _norms_from_zero,
    "Gemma2TensorProcessor": _norms_from_zero,
}
"""By the name of the class that transformers has for an architecture: one of the model's tensors, of llama.cpp's."""
