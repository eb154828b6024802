"""The shapes that are planned for: a Llama of 70 billion parameters, and a mixture of experts of a trillion."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

LLAMA: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}


def llama_shapes(layers: int = LLAMA["num_hidden_layers"]) -> dict[str, tuple[int, ...]]:
    """What ``LlamaForCausalLM`` of that config has in its state dict."""
    words, width, inside = LLAMA["vocab_size"], LLAMA["hidden_size"], LLAMA["intermediate_size"]
    groups = width * LLAMA["num_key_value_heads"] // LLAMA["num_attention_heads"]
    layer = {
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (groups, width),
        "self_attn.v_proj": (groups, width),
        "self_attn.o_proj": (width, width),
        "mlp.gate_proj": (inside, width),
        "mlp.up_proj": (inside, width),
        "mlp.down_proj": (width, inside),
        "input_layernorm": (width,),
        "post_attention_layernorm": (width,),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (words, width)}
    for number in range(layers):
        shapes |= {f"model.layers.{number}.{name}.weight": shape for name, shape in layer.items()}
    return shapes | {"model.norm.weight": (width,), "lm_head.weight": (words, width)}


MOE: Mapping[str, int] = {"layers": 60, "width": 7168, "inside": 2048, "experts": 384, "words": 163840}
"""As large as the largest open models: 1.02 trillion parameters in 69,543 tensors."""


def moe_shapes(layers: int = MOE["layers"], *, stacked: bool = False) -> dict[str, tuple[int, ...]]:
    """What :class:`MixtureOfExperts` has in its state dict. It is not asked: a child's peak of memory is never less
    than that of the process which started it."""
    _, width, inside, experts, words = MOE.values()
    layer: dict[str, tuple[int, ...]] = {
        "input_norm": (width,),
        "q_proj": (width, width),
        "k_proj": (width // 8, width),
        "v_proj": (width // 8, width),
        "o_proj": (width, width),
        "norm": (width,),
        "router": (experts, width),
    }
    layer = {f"{name}.weight": shape for name, shape in layer.items()}
    if stacked:
        layer |= {"experts.gate_up_proj": (experts, 2 * inside, width), "experts.down_proj": (experts, width, inside)}
    for number in range(0 if stacked else experts):
        expert = f"experts.{number}"
        layer[f"{expert}.gate_proj.weight"] = layer[f"{expert}.up_proj.weight"] = (inside, width)
        layer[f"{expert}.down_proj.weight"] = (width, inside)
    shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (words, width)}
    for number in range(layers):
        shapes |= {f"layers.{number}.{name}": shape for name, shape in layer.items()}
    return shapes | {"norm.weight": (width,), "head.weight": (words, width)}


class Expert(nn.Module):
    """A gated MLP."""

    def __init__(self, width: int, inside: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inside, bias=False)
        self.up_proj = nn.Linear(width, inside, bias=False)
        self.down_proj = nn.Linear(inside, width, bias=False)


class StackedExperts(nn.Module):
    """The experts of a layer as two tensors, as grouped products want them."""

    def __init__(self, width: int, inside: int, experts: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * inside, width))
        self.down_proj = nn.Parameter(torch.empty(experts, width, inside))
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.02)


class Layer(nn.Module):
    """Attention with eight times fewer keys than queries, and experts."""

    def __init__(self, width: int, inside: int, experts: int, stacked: bool) -> None:
        super().__init__()
        self.input_norm = nn.RMSNorm(width)
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width // 8, bias=False)
        self.v_proj = nn.Linear(width, width // 8, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.norm = nn.RMSNorm(width)
        self.router = nn.Linear(width, experts, bias=False)
        self.experts: nn.Module
        if stacked:
            self.experts = StackedExperts(width, inside, experts)
        else:
            self.experts = nn.ModuleList(Expert(width, inside) for _ in range(experts))


class MixtureOfExperts(nn.Module):
    """Of the size of ``MOE``, unless something else is said; each expert a module of its own, or all stacked."""

    def __init__(
        self,
        layers: int = MOE["layers"],
        width: int = MOE["width"],
        inside: int = MOE["inside"],
        experts: int = MOE["experts"],
        words: int = MOE["words"],
        *,
        stacked: bool = False,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.layers = nn.ModuleList(Layer(width, inside, experts, stacked) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, words, bias=False)
