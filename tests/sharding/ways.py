"""Ways in which plain PyTorch shards a model, and models that none of them divides evenly.

Each way works on a model with values and on a recorded one: what PyTorch makes of the one is what we want of the other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from fabric_init import deferred_init

VOCABULARY = 11


class Block(nn.Module):
    """Linear layers between a buffer that is saved and one that is not."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 3 * width)
        self.down = nn.Linear(3 * width, width)
        self.register_buffer("scale", torch.rand(width))
        self.register_buffer("positions", torch.arange(width).float() * 0.5, persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.down(torch.relu(self.up(self.norm(hidden)))) * self.scale + self.positions


class Model(nn.Module):
    """No dimension divides by 2, 3 or 8 alone; of some tensors most ranks get no element."""

    def __init__(self, width: int = 7) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.extra = nn.Parameter(torch.randn(3))
        self.one = nn.Parameter(torch.ones(1))

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden) * self.extra.sum() * self.one


class Tied(Model):
    """Its head is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.head.weight = self.embedding.weight


def local_part(tensor: Tensor) -> Tensor:
    """Return what this rank holds of ``tensor``."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def one_dimension(world: int) -> DeviceMesh:
    return init_device_mesh("cpu", (world,))


def two_dimensions(world: int) -> DeviceMesh:
    sizes = (world // 2, 2) if world % 2 == 0 else (1, world)
    return init_device_mesh("cpu", sizes, mesh_dim_names=("outer", "inner"))


def three_dimensions(world: int) -> DeviceMesh:
    sizes = (2, 2, 2) if world == 8 else (1, world, 1)
    return init_device_mesh("cpu", sizes, mesh_dim_names=("replicas", "shards", "inner"))


def block_by_block(model: nn.Module, world: int, source: int | None) -> None:
    fully_shard_on(model, one_dimension(world))


def fully_shard_on(model: nn.Module, mesh: DeviceMesh) -> None:
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def as_one_unit(model: nn.Module, world: int, source: int | None) -> None:
    fully_shard(model, mesh=one_dimension(world))


def hybrid(model: nn.Module, world: int, source: int | None) -> None:
    fully_shard_on(model, two_dimensions(world))


def parallelize(model: nn.Module, mesh: DeviceMesh, source: int | None) -> None:
    for block in model.blocks:
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()}, src_data_rank=source)


def tensor_parallel(model: nn.Module, world: int, source: int | None) -> None:
    parallelize(model, one_dimension(world), source)


def tensor_parallel_in_part(model: nn.Module, world: int, source: int | None) -> None:
    parallelize(model, two_dimensions(world)["inner"], source)


def fsdp_over_tensor_parallel(model: nn.Module, world: int, source: int | None) -> None:
    mesh = two_dimensions(world)
    parallelize(model, mesh["inner"], source)
    fully_shard_on(model, mesh["outer"])


def hybrid_over_tensor_parallel(model: nn.Module, world: int, source: int | None) -> None:
    mesh = three_dimensions(world)
    parallelize(model, mesh["inner"], source)
    fully_shard_on(model, mesh["replicas", "shards"])


def by_hand(model: nn.Module, world: int, source: int | None) -> None:
    mesh = one_dimension(world)
    distribute(model, mesh, lambda tensor: [Shard(tensor.dim() - 1)], source)


def by_hand_on_two_dimensions(model: nn.Module, world: int, source: int | None) -> None:
    mesh = two_dimensions(world)
    distribute(model, mesh, lambda tensor: [Shard(0), Shard(tensor.dim() - 1)], source)


def by_hand_in_copies(model: nn.Module, world: int, source: int | None) -> None:
    mesh = two_dimensions(world)
    distribute(model, mesh, lambda tensor: [Replicate(), Shard(0)], source)


def distribute(
    model: nn.Module, mesh: DeviceMesh, placements: Callable[[Tensor], list[Shard | Replicate]], source: int | None
) -> None:
    done: dict[Tensor, nn.Parameter] = {}
    for module in model.modules():
        for key, tensor in list(module.named_parameters(recurse=False)):
            if tensor not in done:
                sharded = distribute_tensor(tensor, mesh, placements(tensor), src_data_rank=source)
                done[tensor] = nn.Parameter(sharded, tensor.requires_grad)
            setattr(module, key, done[tensor])


def along_its_columns(model: nn.Module, world: int, source: int | None) -> None:
    def placement(parameter: nn.Parameter) -> Shard | None:
        return Shard(1) if parameter.dim() == 2 and parameter.shape[1] % world == 0 else None

    fully_shard(model, mesh=one_dimension(world), shard_placement_fn=placement)


def in_half_precision(model: nn.Module, world: int, source: int | None) -> None:
    model.to(torch.bfloat16)
    block_by_block(model, world, source)


def then_in_half_precision(model: nn.Module, world: int, source: int | None) -> None:
    block_by_block(model, world, source)
    model.to(torch.bfloat16)


def frozen_blocks(model: nn.Module, world: int, source: int | None) -> None:
    model.blocks.requires_grad_(False)
    block_by_block(model, world, source)


def then_frozen(model: nn.Module, world: int, source: int | None) -> None:
    block_by_block(model, world, source)
    model.blocks.requires_grad_(False)


@dataclass(frozen=True)
class Way:
    """A way to shard.

    Attributes:
        shard: Shards a model, over so many ranks; the last argument is the ``src_data_rank`` of torch's functions.
        model: What it shards.
        source: The ``src_data_rank`` on recorded models. Values are cut with ``None``, where no rank sends anything.
    """

    shard: Callable[[nn.Module, int, int | None], None]
    model: Callable[[], nn.Module] = Model
    source: int | None = 0


WAYS = {
    "fully_shard, block by block": Way(block_by_block),
    "fully_shard, as one unit": Way(as_one_unit),
    "fully_shard, tied weights in one unit": Way(block_by_block, Tied),
    "fully_shard, in copies": Way(hybrid),
    "fully_shard, along columns": Way(along_its_columns, lambda: Model(24)),
    "fully_shard, cast before": Way(in_half_precision),
    "fully_shard, cast after": Way(then_in_half_precision),
    "fully_shard, frozen before": Way(frozen_blocks),
    "fully_shard, frozen after": Way(then_frozen),
    "tensor parallel": Way(tensor_parallel),
    "tensor parallel, no source": Way(tensor_parallel, source=None),
    "tensor parallel, in part of the ranks": Way(tensor_parallel_in_part),
    "fully_shard over tensor parallel": Way(fsdp_over_tensor_parallel, lambda: Model(8)),
    "fully_shard over uneven tensor parallel": Way(fsdp_over_tensor_parallel),
    "fully_shard in copies over tensor parallel": Way(hybrid_over_tensor_parallel, lambda: Model(8)),
    "distribute_tensor": Way(by_hand),
    "distribute_tensor, no source": Way(by_hand, source=None),
    "distribute_tensor, two dimensions": Way(by_hand_on_two_dimensions),
    "distribute_tensor, in copies": Way(by_hand_in_copies),
    "distribute_tensor, tied": Way(by_hand, Tied),
}


def options(load: str, folder: Path, way: Way) -> dict[str, Any]:
    """Return the arguments of ``materialize`` for ``load``, whose file this writes."""
    if load == "from scratch":
        return {}
    torch.manual_seed(1)
    state = {name: value + 1 for name, value in way.model().state_dict().items()}
    if "head.weight" in state and state["head.weight"].data_ptr() == state["embedding.weight"].data_ptr():
        del state["head.weight"]
    if load == "missing head":
        state = {name: value for name, value in state.items() if not name.startswith(("head", "blocks.1.down"))}
    save_file({name: value.contiguous().clone() for name, value in state.items()}, folder / "model.safetensors")
    return {"checkpoint": folder / "model.safetensors", "strict": load == "checkpoint"}


def recorded_model(way: Way) -> nn.Module:
    torch.manual_seed(3)
    with deferred_init():
        return way.model()
