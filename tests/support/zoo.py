"""Tiny models with everything that sharding can get wrong, what one device makes of them, and how ranks build them."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from fabric_init import Fabric, deferred_init, materialize
from fabric_init.strategies import DeepSpeedStrategy, FSDPStrategy

VOCABULARY = 11
STRATEGIES = ["ddp", "fsdp", "fsdp2", "deepspeed_stage_2", "deepspeed_stage_3"]
WHOLE_ON_EACH_RANK = ["ddp", "deepspeed_stage_2"]
SHARDED = ["fsdp", "fsdp2", "deepspeed_stage_3"]
IN_PAIRS = [f"{strategy}-2" for strategy in STRATEGIES]
IN_FOURS = [f"{strategy}-4" for strategy in SHARDED]
"""Samples of sweeps: more than two ranks matter most where each keeps a part."""


class Uneven(nn.Module):
    """No dimension divides evenly; some tensors are shorter than the number of ranks, one has no elements.

    That one is not trained: the gradients of FSDP2 cannot do it ("_chunk_cat expects non-empty tensor").
    """

    def __init__(self, empty: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 5)
        self.first = nn.Linear(5, 7)
        self.norm = nn.LayerNorm(7)
        self.mix = nn.Parameter(torch.randn(3, 7, 7) / 7)  # initialized by plain ops, not by torch.nn.init
        self.second = nn.Linear(7, 1)
        self.nothing = nn.Parameter(torch.zeros(0 if empty else 1, 3), requires_grad=False)
        self.out = nn.Linear(1, VOCABULARY)
        with torch.no_grad():
            self.out.bias.fill_(0.25)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.norm(torch.tanh(self.first(self.embedding(tokens))))
        for weight in self.mix.unbind():
            hidden = hidden + hidden @ weight
        return self.out(self.second(hidden)) + self.nothing.sum()


class Block(nn.Module):
    def __init__(self, width: int, inside: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, inside)
        self.down = nn.Linear(inside, width, bias=False)
        self.register_buffer("scale", torch.tensor([1 / math.sqrt(width)]), persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.scale * self.down(torch.tanh(self.up(self.norm(hidden))))


class Transformerish(nn.Module):
    """Equal blocks in a list, a head tied to the embedding, and an init of its own over torch's, as in transformers."""

    def __init__(self, width: int = 6, inside: int = 13, depth: int = 3) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, width)
        self.layers = nn.ModuleList(Block(width, inside) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, VOCABULARY, bias=False)
        self.lm_head.weight = self.embed_tokens.weight
        inverse = 1.0 / (100 ** (torch.arange(0, width, 2).float() / width))
        self.register_buffer("inv_freq", inverse, persistent=False)
        self.apply(self._init_weights)
        for name, parameter in self.named_parameters():
            if name.endswith("down.weight"):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * depth))

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.2)
            if module.bias is not None:
                module.bias.data.zero_()
        elif isinstance(module, nn.Embedding):
            module.weight.data.normal_(std=0.2)

    def forward(self, tokens: Tensor) -> Tensor:
        angles = torch.arange(tokens.shape[1])[:, None] * self.inv_freq
        hidden = self.embed_tokens(tokens) + torch.cat((angles.sin(), angles.cos()), -1).to(self.norm.weight.dtype)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.lm_head(self.norm(hidden))


class Untied(Transformerish):
    """With a head of its own, for loads that cut ties: ``load_state_dict(assign=True)`` of plain PyTorch does."""

    def __init__(self) -> None:
        super().__init__(width=8, inside=16)
        self.lm_head = nn.Linear(8, VOCABULARY, bias=False)
        self.apply(self._init_weights)


class CrossTied(nn.Module):
    """Two blocks of one kind that share a weight: a unit per block would cut the tie."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 5)
        self.layers = nn.ModuleList(Block(5, 11) for _ in range(2))
        self.layers[1].up.weight = self.layers[0].up.weight
        self.head = nn.Linear(5, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(hidden)


class Buffers(nn.Module):
    """Buffers of all kinds, BatchNorm's among them, and a parameter that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 5)
        self.norm = nn.BatchNorm1d(5)
        self.head = nn.Linear(5, VOCABULARY)
        self.frozen = nn.Parameter(torch.rand(5), requires_grad=False)
        self.register_buffer("noise", torch.randn(5))
        self.register_buffer("steps", torch.tensor(3))
        self.register_buffer("mask", torch.tensor([True, False, True, True, False]), persistent=False)
        self.register_buffer("angles", torch.linspace(0, 1, 5), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.norm(self.embedding(tokens).flatten(0, 1)).unflatten(0, tokens.shape)
        return self.head(torch.where(self.mask, hidden, hidden * self.frozen) + self.noise + self.angles)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "uneven": Uneven,
    "transformerish": Transformerish,
    "cross_tied": CrossTied,
    "buffers": Buffers,
    "even": lambda: Transformerish(width=8, inside=16),  # for what torch cannot do with uneven dimensions
    "even, untied": Untied,
    "uneven, nothing empty": lambda: Uneven(empty=False),
}
NAMES = ["uneven", "transformerish", "cross_tied", "buffers"]
LEFT_OUT = {
    "uneven": ["mix", "second.weight", "out.bias"],
    "transformerish": ["lm_head.weight", "embed_tokens.weight", "layers.1.down.weight", "layers.2.norm.bias"],
    "cross_tied": ["layers.0.up.weight", "layers.1.up.weight", "head.bias"],
    "buffers": ["noise", "norm.running_var", "head.weight", "frozen"],
    "even": ["layers.0.up.weight", "layers.1.down.weight"],
    "even, untied": ["layers.0.up.weight", "layers.1.down.weight", "norm.bias"],
    "uneven, nothing empty": ["mix", "second.weight", "out.bias"],
}
"""What a partial checkpoint does not have: each kind of tensor, ties under all their names."""


def runnable(name: str, strategy: str) -> str:
    """The model, or one like it without empty tensors, which ZeRO-3 fills but cannot gather for a forward:
    "torch.cat(): expected a non-empty list of Tensors"."""
    return "uneven, nothing empty" if name == "uneven" and "stage_3" in strategy else name


def tokens(seed: int, rows: int = 4) -> Tensor:
    return torch.randint(VOCABULARY, (rows, 6), generator=torch.Generator().manual_seed(seed))


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(batch).float().flatten(0, 1), batch.roll(1, 1).flatten())


# -- one device --------------------------------------------------------------------------------------------------------


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def one_device(name: str, *, seed: int = 1, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    """The model as one device makes it, in this process; ``options`` are those of ``materialize``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        with default_dtype(dtype), deferred_init():
            model = MODELS[name]()
        materialize(model, device="cpu", **options)
    return model


def write_checkpoint(
    path: Path, name: str, *, dtype: torch.dtype = torch.float32, partial: bool = False, seed: int = 99
) -> Path:
    """A checkpoint whose values no init would give: ``.safetensors``, or the model's state dict as a torch file."""
    generator = torch.Generator().manual_seed(seed)
    state = one_device(name, dtype=dtype).state_dict()
    by_memory: dict[int, Tensor] = {}
    for key, value in state.items():
        if value.numel() and value.data_ptr() in by_memory:
            state[key] = by_memory[value.data_ptr()]  # tied
            continue
        old, new = value, value.clone()
        if value.is_floating_point():
            new = torch.rand(value.shape, generator=generator).mul_(0.3).add_(0.05).to(value.dtype)
        elif value.dtype == torch.int64:
            new = value + 17
        by_memory[old.data_ptr()] = state[key] = new
    state = {key: value for key, value in state.items() if not (partial and key in LEFT_OUT[name])}
    if path.suffix == ".safetensors":
        save_file({key: value.clone() for key, value in state.items()}, path)
    else:
        torch.save(state, path)
    return path


# -- in the ranks ------------------------------------------------------------------------------------------------------


def launch(strategy: Any, precision: Any = "32-true", **options: Any) -> Fabric:
    """The Fabric of this rank, launched."""
    world_size = int(os.environ["WORLD_SIZE"])
    if strategy == "fsdp":  # by name, Lightning refuses it on the CPU
        strategy = FSDPStrategy(auto_wrap_policy={Block})
    fabric = Fabric(accelerator="cpu", devices=world_size, strategy=strategy, precision=precision, **options)
    if isinstance(fabric.strategy, DeepSpeedStrategy):
        prepare_deepspeed(fabric.strategy)
    fabric.launch()
    assert fabric.world_size == world_size
    return fabric


def prepare_deepspeed(strategy: DeepSpeedStrategy) -> None:
    """Let DeepSpeed do as the others, and without its operators, for which it would call the compiler for minutes."""
    without_operators()
    assert isinstance(strategy.config, dict)
    strategy.config["zero_force_ds_cpu_optimizer"] = False  # offloading would want an Adam of its own
    strategy.config["gradient_clipping"] = 0.0  # 1.0 by default


def without_operators() -> None:
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # gloo does as well


def set_up(fabric: Fabric, model: nn.Module, make_optimizer: Callable[[nn.Module], Optimizer]) -> tuple[Any, Any]:
    """The model, then an optimizer for it, where the strategy takes one after the other; else both together."""
    if isinstance(fabric.strategy, DeepSpeedStrategy):
        return fabric.setup(model, make_optimizer(model))
    model = fabric.setup_module(model)
    return model, fabric.setup_optimizers(make_optimizer(model))


def build(fabric: Fabric, name: str, *, seed: int = 1, **options: Any) -> nn.Module:
    """A recorded model, not yet set up; ``options`` are those of ``init_module``."""
    torch.manual_seed(seed)
    with fabric.init_module(**options):
        return MODELS[name]()


_WRAPPERS = (
    "_FabricModule",
    "DistributedDataParallel",
    "FullyShardedDataParallel",
    "DeepSpeedEngine",
    "OptimizedModule",
)


def inner(model: nn.Module) -> nn.Module:
    """The user's model, out of what ``fabric.setup``, DDP, FSDP and DeepSpeed put around it."""
    while type(model).__name__ in _WRAPPERS:
        model = model._orig_mod if type(model).__name__ == "OptimizedModule" else model.module
    return model


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, put together from all ranks: each must ask for it."""
    with gathered(tensor), torch.no_grad():
        return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu().clone()


def gathered(tensor: Tensor) -> AbstractContextManager[Any]:
    """While ``tensor`` is whole, if DeepSpeed has partitioned it."""
    if not hasattr(tensor, "ds_tensor"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(tensor)


def named(model: nn.Module, kind: str) -> Iterator[tuple[str, Any]]:
    """``named_parameters`` or ``named_buffers`` with ties under all their names, names as the user knows them."""
    for name, value in getattr(inner(model), kind)(remove_duplicate=False):
        yield name.replace("_fsdp_wrapped_module.", ""), value


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer under each of its names, whole."""
    with FullyShardedDataParallel.summon_full_params(model, writeback=False):  # concerns the modules of FSDP alone
        found = {name: whole(value) for name, value in named(model, "named_parameters")}
        found.update((name, whole(value)) for name, value in named(model, "named_buffers"))
    return found


def ties(model: nn.Module) -> set[frozenset[str]]:
    """Which names mean one parameter."""
    names: dict[int, set[str]] = {}
    for name, value in named(model, "named_parameters"):
        names.setdefault(id(value), set()).add(name)
    return {frozenset(group) for group in names.values() if len(group) > 1}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Bit for bit, and the same dtypes and names."""
    assert found.keys() == expected.keys()
    wrong = []
    for name, value in expected.items():
        other = found[name]
        if other.dtype != value.dtype or other.shape != value.shape:
            wrong.append(f"{name}: {other.dtype} {tuple(other.shape)}, not {value.dtype} {tuple(value.shape)}")
        elif not torch.equal(other, value):
            at = (other != value).nonzero()[:3].tolist()
            wrong.append(f"{name}: values differ, first at {at} of {tuple(value.shape)}")
    assert not wrong, "\n".join(wrong)


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-5, atol: float = 1e-6) -> None:
    """Within float tolerance: sums over ranks come in another order."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )
