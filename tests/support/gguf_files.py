"""GGUF files of small models, in llama.cpp's names and layouts: what its convert_hf_to_gguf.py does.

The metadata is what transformers reads a config from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
import transformers
from gguf import GGMLQuantizationType as Type
from torch import Tensor, nn
from transformers.modeling_gguf_pytorch_utils import GGUF_TO_TRANSFORMERS_MAPPING

Choose = Callable[[str, tuple[int, ...]], Type]
"""From the name and shape of a tensor, the type to store it in."""
Layout = Callable[[Any, dict[str, Tensor]], dict[str, Tensor]]


def _small(**more: Any) -> dict[str, Any]:
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
    return sizes | {"bos_token_id": 1, "eos_token_id": 2} | more


class Architecture(NamedTuple):
    """One architecture: llama.cpp's name, transformers' model, and what llama.cpp does with its tensors."""

    name: str
    model: str
    config: str
    sizes: Mapping[str, Any]
    layout: Layout = lambda config, state: state
    more: Callable[[Any], Mapping[str, Any]] = lambda config: {}
    """Fields that the config's table does not have."""


# -- llama.cpp's layouts -----------------------------------------------------------------------------------------------


def _pairs(weight: Tensor, heads: int) -> Tensor:
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


def _llama(config: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    heads = {"q_proj.weight": config.num_attention_heads, "k_proj.weight": config.num_key_value_heads}
    return {
        name: next((_pairs(weight, count) for end, count in heads.items() if name.endswith(end)), weight)
        for name, weight in state.items()
    }


def _bloom(config: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    made = {}
    for name, weight in state.items():
        name = name.removeprefix("transformer.")
        if "query_key_value" in name:
            weight = weight.reshape(config.n_head, 3, -1, *weight.shape[1:]).swapaxes(0, 1).reshape(weight.shape)
        made[name] = weight
    return made


def _gpt2(config: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    turned = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight")
    return {name: weight.T.contiguous() if name.endswith(turned) else weight for name, weight in state.items()}


def _mamba(config: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    made = {}
    for name, weight in state.items():
        weight = weight.squeeze(1) if name.endswith("conv1d.weight") else weight
        made[name] = -torch.exp(weight) if name.endswith("A_log") else weight
    return made


def _norms_plus_one(config: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: weight + 1 if name.endswith("norm.weight") else weight for name, weight in state.items()}


def _experts(config: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers keeps gate and up joined; llama.cpp has them apart, and a gate of one row as a vector."""
    made = {}
    for name, weight in state.items():
        if name.endswith("experts.gate_up_proj"):
            gate, up = weight.chunk(2, 1)
            made[name.replace("gate_up_proj", "gate_proj.weight")] = gate
            made[name.replace("gate_up_proj", "up_proj.weight")] = up
        elif name.endswith("experts.down_proj"):
            made[f"{name}.weight"] = weight
        elif name.endswith("shared_expert_gate.weight"):
            made[name] = weight[0]
        else:
            made[name] = weight
    return made


def _lfm2(config: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: weight.squeeze(1) if name.endswith("conv.conv.weight") else weight for name, weight in state.items()}


def _minimax(config: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    end = ".mlp.e_score_correction_bias"
    biases = {name: weight for name, weight in state.items() if name.endswith(end)}
    made = _experts(config, {name: weight for name, weight in state.items() if name not in biases})
    return made | {f"blk.{name.split('.')[2]}.exp_probs_b.bias": weight for name, weight in biases.items()}


def _qwen35(config: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Value heads in turn, not by their key head; norms that count from zero; the rest as for Mamba."""
    keys, values, width = config.linear_num_key_heads, config.linear_num_value_heads, config.linear_value_head_dim
    before = 2 * keys * config.linear_key_head_dim

    def turned(weight: Tensor, width: int, start: int = 0) -> Tensor:
        rows = weight[start:].reshape(keys, values // keys, width, *weight.shape[1:])
        return torch.cat([weight[:start], rows.swapaxes(0, 1).reshape(weight[start:].shape)])

    def laid_out(name: str, weight: Tensor) -> tuple[str, Tensor]:
        layer, _, leaf = name.removeprefix("model.layers.").partition(".linear_attn.")
        if leaf == "dt_bias":
            return f"blk.{layer}.ssm_dt.bias", turned(weight, 1)
        if leaf == "A_log":
            return f"blk.{layer}.ssm_a", turned(-torch.exp(weight), 1)
        if leaf in ("in_proj_a.weight", "in_proj_b.weight"):
            return f"blk.{layer}.ssm_{'alpha' if leaf[8] == 'a' else 'beta'}.weight", turned(weight, 1)
        if leaf == "in_proj_z.weight":
            return f"blk.{layer}.attn_gate.weight", turned(weight, width)
        if leaf == "in_proj_qkv.weight":
            return f"blk.{layer}.attn_qkv.weight", turned(weight, width, before)
        if leaf == "conv1d.weight":
            return f"blk.{layer}.ssm_conv1d.weight", turned(weight.squeeze(1), width, before)
        if leaf == "out_proj.weight":
            return f"blk.{layer}.ssm_out.weight", turned(weight.T, width).T
        if leaf == "norm.weight":
            return f"blk.{layer}.ssm_norm.weight", weight
        if name.endswith("post_attention_layernorm.weight"):
            return f"blk.{layer.partition('.')[0]}.post_attention_norm.weight", weight + 1
        return name, weight + 1 if name.endswith("norm.weight") else weight

    return dict(laid_out(name, weight) for name, weight in state.items())


_T5 = {"vocab_size": 96, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
_T5 |= {"is_gated_act": True, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
_LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8}
_LINEAR |= {"linear_value_head_dim": 16, "layer_types": ["linear_attention", "full_attention"]}
_MOE = {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2}
ARCHITECTURES = {
    "llama": Architecture("llama", "LlamaForCausalLM", "LlamaConfig", _small(head_dim=16), _llama),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", "Qwen2Config", _small()),
    "qwen2_moe": Architecture("qwen2moe", "Qwen2MoeForCausalLM", "Qwen2MoeConfig", _small(**_MOE), _experts),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", "Qwen3Config", _small(head_dim=128)),
    "qwen3_moe": Architecture(
        "qwen3moe", "Qwen3MoeForCausalLM", "Qwen3MoeConfig", _small(head_dim=16, **_MOE), _experts
    ),
    "falcon": Architecture("falcon", "FalconForCausalLM", "FalconConfig", _small()),
    "phi3": Architecture("phi3", "Phi3ForCausalLM", "Phi3Config", _small()),
    "bloom": Architecture(
        "bloom",
        "BloomForCausalLM",
        "BloomConfig",
        {"vocab_size": 96, "hidden_size": 64, "n_layer": 2, "n_head": 4},
        _bloom,
    ),
    "t5": Architecture("t5", "T5ForConditionalGeneration", "T5Config", _T5),
    "stablelm": Architecture("stablelm", "StableLmForCausalLM", "StableLmConfig", _small(use_qkv_bias=True)),
    "gpt2": Architecture(
        "gpt2",
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64},
        _gpt2,
    ),
    "starcoder2": Architecture("starcoder2", "Starcoder2ForCausalLM", "Starcoder2Config", _small()),
    "mamba": Architecture(
        "mamba",
        "MambaForCausalLM",
        "MambaConfig",
        {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8},
        _mamba,
    ),
    "nemotron": Architecture("nemotron", "NemotronForCausalLM", "NemotronConfig", _small(), _norms_plus_one),
    "gemma2": Architecture("gemma2", "Gemma2ForCausalLM", "Gemma2Config", _small(head_dim=16), _norms_plus_one),
    "gemma3": Architecture("gemma3", "Gemma3ForCausalLM", "Gemma3TextConfig", _small(head_dim=16), _norms_plus_one),
    "lfm2": Architecture(
        "lfm2",
        "Lfm2ForCausalLM",
        "Lfm2Config",
        _small(layer_types=["conv", "full_attention"]),
        _lfm2,
        lambda config: {"attention.head_count_kv": [0, config.num_key_value_heads]},
    ),
    "mistral": Architecture("llama", "MistralForCausalLM", "MistralConfig", _small(head_dim=16), _llama),
    "umt5": Architecture("t5", "UMT5ForConditionalGeneration", "UMT5Config", _T5),
    "gemma4": Architecture(
        "gemma4",
        "Gemma4ForCausalLM",
        "Gemma4TextConfig",
        _small(head_dim=16, vocab_size_per_layer_input=96, hidden_size_per_layer_input=16),
    ),
    "minimax_m2": Architecture(
        "minimax-m2",
        "MiniMaxM2ForCausalLM",
        "MiniMaxM2Config",
        _small(head_dim=16, num_local_experts=4, num_experts_per_tok=2),
        _minimax,
    ),
    "qwen3_5": Architecture(
        "qwen35", "Qwen3_5ForCausalLM", "Qwen3_5TextConfig", _small(head_dim=16, **_LINEAR), _qwen35
    ),
}
"""By transformers' name."""


def build(name: str) -> nn.Module:
    """A small model with every tensor away from its usual init, in float32."""
    known = ARCHITECTURES[name]
    config = getattr(transformers, known.config)(**known.sizes)
    torch.manual_seed(3)
    model: nn.Module = getattr(transformers, known.model)(config)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.randn(tensor.shape) * 0.1)
    return model


def fields_of(name: str, config: Any) -> Iterator[tuple[str, Any]]:
    known = ARCHITECTURES[name]
    for field, attribute in GGUF_TO_TRANSFORMERS_MAPPING["config"].get(name, {}).items():
        value = None if attribute is None else getattr(config, attribute, None)
        if value is not None:
            yield f"{known.name}.{field}", value
    yield from {f"{known.name}.{field}": value for field, value in known.more(config).items()}.items()


def tensors_of(name: str, model: nn.Module) -> dict[str, Tensor]:
    """The model's tensors by llama.cpp's names, in its layouts."""
    known = ARCHITECTURES[name]
    config: Any = model.config
    architecture = next(arch for arch, its in gguf.MODEL_ARCH_NAMES.items() if its == known.name)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    state: dict[str, Tensor] = {}
    for key, tensor in model.state_dict().items():
        if not any(tensor.data_ptr() == other.data_ptr() for other in state.values()):  # of ties, the first
            state[key] = tensor
    made = {}
    for key, tensor in known.layout(config, state).items():
        new = key if key.startswith("blk.") else names.get_name(key, (".weight", ".bias"))
        assert new is not None, f"llama.cpp has no name for {key}"
        made[new] = tensor
    return made


def write_tensors(
    path: Path, architecture: str, tensors: Mapping[str, Tensor], fields: Mapping[str, Any], choose: Choose
) -> Path:
    """A file with these tensors, each in the type that ``choose`` returns."""
    stored = {}
    for key, tensor in tensors.items():
        kind = choose(key, tuple(tensor.shape))
        stored[key] = gguf.quants.quantize(tensor.detach().float().contiguous().numpy(), kind), kind
    return write_blocks(path, architecture, stored, fields)


def write_blocks(
    path: Path,
    architecture: str,
    tensors: Mapping[str, tuple[np.ndarray[Any, Any], Type]],
    fields: Mapping[str, Any] = MappingProxyType({}),
) -> Path:
    """A file with what is stored in these types: bytes of blocks, or numbers."""
    writer = gguf.GGUFWriter(path, architecture)
    for field, value in fields.items():
        _add(writer, field, value)
    for key, (data, kind) in tensors.items():
        writer.add_tensor(key, np.ascontiguousarray(data), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, field: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(field, value)
    elif isinstance(value, int):
        writer.add_uint32(field, value)
    elif isinstance(value, float):
        writer.add_float32(field, value)
    elif isinstance(value, str):
        writer.add_string(field, value)
    else:
        writer.add_array(field, value)


def as_llama_cpp_would(kind: Type) -> Choose:
    """Matrices in ``kind`` where their rows are of whole blocks; vectors in float32."""
    block, _ = gguf.GGML_QUANT_SIZES[kind]

    def choose(key: str, shape: tuple[int, ...]) -> Type:
        return kind if len(shape) > 1 and shape[-1] % block == 0 and "ssm" not in key else Type.F32

    return choose


def write_gguf(name: str, model: nn.Module, path: Path, kind: Type = Type.F32, **more: Any) -> Path:
    """A file of one of :data:`ARCHITECTURES`."""
    fields = dict(fields_of(name, model.config))
    fields["tokenizer.ggml.tokens"] = [f"<{number}>" for number in range(model.config.vocab_size)]
    return write_tensors(
        path, ARCHITECTURES[name].name, tensors_of(name, model), fields | more, as_llama_cpp_would(kind)
    )
