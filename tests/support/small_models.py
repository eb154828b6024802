"""Small models in the layouts that checkpoints come in; only their names and shapes matter, none has a forward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

WIDTH, INNER, LAYERS, EXPERTS = 8, 12, 3, 4


class Tree(nn.Module):
    """Submodules by name."""

    def __init__(self, /, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)


def bare(*sizes: int) -> nn.Linear:
    return nn.Linear(*sizes, bias=False)


def layers(build: Callable[[], nn.Module], count: int = LAYERS) -> nn.ModuleList:
    return nn.ModuleList([build() for _ in range(count)])


class Turned(nn.Module):
    """A linear layer with its weight as GPT-2 has it: inputs first."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))


class Stacked(nn.Module):
    """The experts of a layer, each kind of weight in one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(EXPERTS, 2 * INNER, WIDTH))
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, WIDTH, INNER))


def _attention() -> nn.Module:
    return Tree(q_proj=bare(WIDTH, WIDTH), k_proj=bare(WIDTH, 4), v_proj=bare(WIDTH, 4), o_proj=bare(WIDTH, WIDTH))


def _gated() -> nn.Module:
    return Tree(gate_proj=bare(WIDTH, INNER), up_proj=bare(WIDTH, INNER), down_proj=bare(INNER, WIDTH))


def _norms() -> dict[str, nn.Module]:
    return {"input_layernorm": nn.RMSNorm(WIDTH), "post_attention_layernorm": nn.RMSNorm(WIDTH)}


def _decoder(mlp: Callable[[], nn.Module]) -> nn.Module:
    body = Tree(
        embed_tokens=nn.Embedding(20, WIDTH),
        layers=layers(lambda: Tree(self_attn=_attention(), mlp=mlp(), **_norms())),
        norm=nn.RMSNorm(WIDTH),
    )
    return Tree(model=body, lm_head=bare(WIDTH, 20))


def llama() -> nn.Module:
    return _decoder(_gated)


def mixture() -> nn.Module:
    """Each expert a module of its own."""
    return _decoder(lambda: Tree(gate=bare(WIDTH, EXPERTS), experts=layers(_gated, EXPERTS)))


def stacked_mixture() -> nn.Module:
    """The experts of a layer in two tensors."""
    return _decoder(lambda: Tree(gate=bare(WIDTH, EXPERTS), experts=Stacked()))


class Patches(nn.Module):
    """Patches with their positions, and the tensor of a class."""

    def __init__(self) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.pos_embed = nn.Parameter(torch.randn(1, 17, WIDTH))
        self.proj = nn.Conv2d(3, WIDTH, 4)


def vision() -> nn.Module:
    """As timm's: q, k and v are joined."""
    return Tree(
        patch_embed=Patches(),
        blocks=layers(
            lambda: Tree(
                norm1=nn.LayerNorm(WIDTH),
                attn=Tree(qkv=nn.Linear(WIDTH, 3 * WIDTH), proj=nn.Linear(WIDTH, WIDTH)),
                norm2=nn.LayerNorm(WIDTH),
                mlp=Tree(fc1=nn.Linear(WIDTH, INNER), fc2=nn.Linear(INNER, WIDTH)),
            )
        ),
        norm=nn.LayerNorm(WIDTH),
        head=nn.Linear(WIDTH, 5),
    )


def bert() -> nn.Module:
    def layer() -> nn.Module:
        return Tree(
            attention=Tree(
                self=Tree(query=nn.Linear(WIDTH, WIDTH), key=nn.Linear(WIDTH, WIDTH), value=nn.Linear(WIDTH, WIDTH)),
                output=Tree(dense=nn.Linear(WIDTH, WIDTH), LayerNorm=nn.LayerNorm(WIDTH)),
            ),
            intermediate=Tree(dense=nn.Linear(WIDTH, INNER)),
            output=Tree(dense=nn.Linear(INNER, WIDTH), LayerNorm=nn.LayerNorm(WIDTH)),
        )

    embeddings = Tree(
        word_embeddings=nn.Embedding(20, WIDTH),
        position_embeddings=nn.Embedding(16, WIDTH),
        token_type_embeddings=nn.Embedding(2, WIDTH),
        LayerNorm=nn.LayerNorm(WIDTH),
    )
    body = Tree(embeddings=embeddings, encoder=Tree(layer=layers(layer)), pooler=Tree(dense=nn.Linear(WIDTH, WIDTH)))
    return Tree(bert=body, classifier=nn.Linear(WIDTH, 3))


def gpt2() -> nn.Module:
    """Weights with inputs first, q, k and v joined."""
    body = Tree(
        wte=nn.Embedding(20, WIDTH),
        wpe=nn.Embedding(16, WIDTH),
        h=layers(
            lambda: Tree(
                ln_1=nn.LayerNorm(WIDTH),
                attn=Tree(c_attn=Turned(WIDTH, 3 * WIDTH), c_proj=Turned(WIDTH, WIDTH)),
                ln_2=nn.LayerNorm(WIDTH),
                mlp=Tree(c_fc=Turned(WIDTH, INNER), c_proj=Turned(INNER, WIDTH)),
            )
        ),
        ln_f=nn.LayerNorm(WIDTH),
    )
    return Tree(transformer=body, score=bare(WIDTH, 2))


def diffusion() -> nn.Module:
    """Attention as diffusers has it, with norms for q and k."""

    def block() -> nn.Module:
        attention = Tree(
            norm_q=nn.RMSNorm(WIDTH),
            norm_k=nn.RMSNorm(WIDTH),
            to_q=nn.Linear(WIDTH, WIDTH),
            to_k=nn.Linear(WIDTH, WIDTH),
            to_v=nn.Linear(WIDTH, WIDTH),
            to_out=nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.Dropout()]),
        )
        forward = Tree(
            net=nn.ModuleList([Tree(proj=nn.Linear(WIDTH, 2 * INNER)), nn.Dropout(), nn.Linear(INNER, WIDTH)])
        )
        return Tree(attn1=attention, ff=forward, norm1=nn.LayerNorm(WIDTH))

    return Tree(
        proj_in=nn.Linear(4, WIDTH),
        time_embed=Tree(linear_1=nn.Linear(6, WIDTH), linear_2=nn.Linear(WIDTH, WIDTH)),
        transformer_blocks=layers(block),
        norm_out=nn.LayerNorm(WIDTH),
        proj_out=nn.Linear(WIDTH, 4),
    )


def unet() -> nn.Module:
    """Convolutions, with batch norms and their buffers."""

    def double(inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(inputs, outputs, 3),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
        )

    return Tree(
        inc=double(3, 4),
        down1=Tree(maxpool_conv=double(4, 8)),
        down2=Tree(maxpool_conv=double(8, 8)),
        up1=Tree(up=nn.ConvTranspose2d(8, 4, 2), conv=double(12, 4)),
        up2=Tree(up=nn.ConvTranspose2d(4, 4, 2), conv=double(8, 4)),
        outc=nn.Conv2d(4, 2, 1),
    )


MODELS: dict[str, Callable[[], nn.Module]] = {
    build.__name__: build for build in (llama, mixture, stacked_mixture, vision, bert, gpt2, diffusion, unet)
}
