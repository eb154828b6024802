"""Train a Llama as torchtitan does: tensor parallel, checkpointed, compiled and fully sharded, from a file or scratch.

torchtitan builds on the meta device, parallelizes, calls ``to_empty`` and ``init_weights``, and then loads. Here the
block takes all of that, and ``materialize`` gives each rank its part.

torchrun --nproc-per-node 2 examples/torchtitan_style.py                 # from scratch
torchrun --nproc-per-node 4 examples/torchtitan_style.py --tensor 2 --checkpoint Llama-3.2-1B/
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional

import fabric_init

HUGGING_FACE = {
    r"^model\.": "",
    r"embed_tokens": "tok_embeddings",
    r"self_attn\.([qkvo])_proj": r"attention.w\1",
    r"mlp\.gate_proj": "feed_forward.w1",
    r"mlp\.down_proj": "feed_forward.w2",
    r"mlp\.up_proj": "feed_forward.w3",
    r"post_attention_layernorm": "ffn_norm",
    r"input_layernorm": "attention_norm",
    r"lm_head": "output",
}
"""From the names of Hugging Face's Llama to those below."""


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.head_width = width // heads
        for name in ("wq", "wk", "wv", "wo"):
            self.add_module(name, nn.Linear(width, width, bias=False))

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        queries, keys, values = (
            each(x).unflatten(-1, (-1, self.head_width)).transpose(1, 2) for each in (self.wq, self.wk, self.wv)
        )
        queries, keys = rotated(queries, angles), rotated(keys, angles)
        mixed = functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        return self.wo(mixed.transpose(1, 2).flatten(2))

    def init_weights(self, std: float) -> None:
        for linear in (self.wq, self.wk, self.wv):
            nn.init.trunc_normal_(linear.weight, std=0.02)
        nn.init.trunc_normal_(self.wo.weight, std=std)


class FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, 4 * width, bias=False)
        self.w2 = nn.Linear(4 * width, width, bias=False)
        self.w3 = nn.Linear(width, 4 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(functional.silu(self.w1(x)) * self.w3(x))

    def init_weights(self, std: float) -> None:
        nn.init.trunc_normal_(self.w1.weight, std=0.02)
        for linear in (self.w2, self.w3):
            nn.init.trunc_normal_(linear.weight, std=std)


class Block(nn.Module):
    def __init__(self, number: int, width: int, heads: int) -> None:
        super().__init__()
        self.attention, self.feed_forward = Attention(width, heads), FeedForward(width)
        self.attention_norm, self.ffn_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.std = 0.02 / (2 * (number + 1)) ** 0.5

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), angles)
        return x + self.feed_forward(self.ffn_norm(x))

    def init_weights(self) -> None:
        for norm in (self.attention_norm, self.ffn_norm):
            norm.reset_parameters()
        self.attention.init_weights(self.std)
        self.feed_forward.init_weights(self.std)


class Llama(nn.Module):
    def __init__(
        self, vocabulary: int = 64, width: int = 16, heads: int = 4, layers: int = 2, length: int = 32
    ) -> None:
        super().__init__()
        self.head_width, self.length = width // heads, length
        self.tok_embeddings = nn.Embedding(vocabulary, width)
        self.register_buffer("angles", self.rotary_angles(), persistent=False)
        self.layers = nn.ModuleDict({str(number): Block(number, width, heads) for number in range(layers)})
        self.norm = nn.RMSNorm(width)
        self.output = nn.Linear(width, vocabulary, bias=False)

    def rotary_angles(self) -> Tensor:
        frequencies = 10000.0 ** -(torch.arange(0, self.head_width, 2).float() / self.head_width)
        return torch.outer(torch.arange(self.length).float(), frequencies)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tok_embeddings(tokens)
        for layer in self.layers.values():
            x = layer(x, self.angles[: tokens.shape[1]])
        return self.output(self.norm(x))

    def init_weights(self) -> None:
        self.angles = self.rotary_angles()
        nn.init.normal_(self.tok_embeddings.weight)
        for layer in self.layers.values():
            layer.init_weights()
        self.norm.reset_parameters()
        nn.init.trunc_normal_(self.output.weight, std=0.05)


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    one, other = x.chunk(2, dim=-1)
    sine, cosine = angles.sin(), angles.cos()
    return torch.cat([one * cosine - other * sine, other * cosine + one * sine], dim=-1)


def parallelize(model: Llama, mesh: DeviceMesh, backend: str = "aot_eager") -> None:
    """Apply tensor parallel, activation checkpointing, compilation and FSDP, in torchtitan's order."""
    plan = {f"attention.{name}": ColwiseParallel() for name in ("wq", "wk", "wv")}
    plan |= {"feed_forward.w1": ColwiseParallel(), "feed_forward.w3": ColwiseParallel()}
    plan |= {"attention.wo": RowwiseParallel(), "feed_forward.w2": RowwiseParallel()}
    for name, block in list(model.layers.named_children()):
        if mesh["tensor"].size() > 1:
            parallelize_module(block, mesh["tensor"], plan)
        block = torch.compile(checkpoint_wrapper(block), backend=backend)
        model.layers.register_module(name, block)
        fully_shard(block, mesh=mesh["data"])
    fully_shard(model, mesh=mesh["data"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="a folder or file with the names of Hugging Face's Llama")
    parser.add_argument("--tensor", type=int, default=1, help="how many ranks share each matrix")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    sizes = (dist.get_world_size() // options.tensor, options.tensor)
    mesh = init_device_mesh(device, sizes, mesh_dim_names=("data", "tensor"))

    torch.manual_seed(0)
    with fabric_init.deferred_init():
        model = Llama()
        parallelize(model, mesh)
        model.init_weights()
    load = {} if options.checkpoint is None else {"checkpoint": options.checkpoint, "rename": HUGGING_FACE}
    report = fabric_init.materialize(model, device=device, **load)
    if dist.get_rank() == 0:
        print(report)

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    tokens = torch.arange(32, device=device).repeat(2, 1)
    for _ in range(3):
        logits = model(tokens[:, :-1])
        loss = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if dist.get_rank() == 0:
            print(f"loss {loss.item():.3f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
