"""Lightning's ``"fsdp"``: units are filled when FSDP wraps them, and only what is its own to say.

That every rank holds what one device would hold, and trains alike, is in ``test_weights.py`` and ``test_training.py``.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import lambda_auto_wrap_policy, wrap

from fabric_init import CheckpointMismatchError, FabricInitError, UninitializedTensorError, deferred_init, materialize
from fabric_init.recording.tensor.recorded_tensor import RecordedTensor
from fabric_init.strategies import FSDPStrategy
from tests.support.ranks import run_ranks
from tests.support.zoo import (
    VOCABULARY,
    Block,
    Transformerish,
    assert_close,
    assert_same,
    build,
    inner,
    launch,
    loss_of,
    named,
    one_device,
    tokens,
    weights,
    write_checkpoint,
)


def is_block(module: nn.Module) -> bool:
    return isinstance(module, Block)


def blocks_by_function(module: nn.Module, recurse: bool, nonwrapped_numel: int) -> bool:
    return lambda_auto_wrap_policy(module, recurse, nonwrapped_numel, is_block)


POLICIES: dict[str, Any] = {"classes": {Block}, "a function": blocks_by_function, "none": None}


def units(model: nn.Module) -> list[str]:
    """Names of the modules that are units of their own, the model itself aside."""
    found = []
    for name, module in inner(model).named_modules():
        if isinstance(module, FullyShardedDataParallel):
            found.append(name.replace("_fsdp_wrapped_module.", ""))
    return found


# -- memory ------------------------------------------------------------------------------------------------------------


class Watched(FSDPStrategy):
    """Counts the elements that have memory each time a part has been filled."""

    def _wrap(self, module: nn.Module, **options: Any) -> FullyShardedDataParallel:
        fill = options.pop("param_init_fn")
        self.seen: list[int] = []

        def watched(part: nn.Module) -> None:
            fill(part)
            self.seen.append(sum(p.untyped_storage().nbytes() // 4 for p in module.parameters() if not p.is_meta))

        return super()._wrap(module, param_init_fn=watched, **options)


def watch(path: Path | None) -> tuple[list[int], int, int]:
    fabric = launch(Watched(auto_wrap_policy={Block}))
    options: dict[str, Any] = {"empty_init": True} if path is None else {"checkpoint": path}
    model = build(fabric, "even", **options)
    block = sum(p.numel() for p in model.layers[0].parameters())
    whole = sum(p.numel() for p in model.parameters())
    fabric.setup(model)
    return fabric.strategy.seen, block, whole


@pytest.mark.parametrize("checkpoint", [True, False])
def test_one_unit_is_whole_at_a_time(checkpoint: bool, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model.safetensors", "even") if checkpoint else None
    for seen, block, whole in run_ranks(4, watch, path=path):
        rest = whole - 3 * block
        # shards of a unit share one storage, which is counted for each of its five parameters
        assert max(seen) <= max(block, rest) + 3 * 5 * (block // 4 + 4)
        assert seen[0] == block
        assert max(seen) < whole


def load_after_setup(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], set[str]]:
    fabric = launch("fsdp")
    model = fabric.setup(build(fabric, "transformerish", empty_init=True))
    own = weights(model)
    statuses = {row.status for row in fabric.init_report(model).rows}
    fabric.load_raw(path, model, strict=False)
    return own, weights(model), statuses


def test_without_a_checkpoint_a_model_gets_its_own_init_in_setup_and_a_load_overwrites_it(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "raw.pt", "transformerish", partial=True)
    for own, after, statuses in run_ranks(2, load_after_setup, path=path):
        assert_same(own, weights(one_device("transformerish")))
        assert_same(after, weights(one_device("transformerish", checkpoint=path, strict=False)))
        assert "unfilled" not in statuses


# -- units -------------------------------------------------------------------------------------------------------------


def set_up_with_policy(name: str, policy: str, path: Path) -> tuple[list[str], dict[str, Tensor], float]:
    fabric = launch(FSDPStrategy(auto_wrap_policy=POLICIES[policy]))
    model = fabric.setup(build(fabric, name, checkpoint=path, strict=False))
    return units(model), weights(model), loss_of(model, tokens(0)).item()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ["transformerish", "cross_tied"])
def test_units_are_the_policys_but_never_split_a_tie(name: str, policy: str, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model.safetensors", name, partial=True)
    model = one_device(name, checkpoint=path, strict=False)
    blocks = [f"layers.{index}" for index in range(3)]
    for found, values, loss in run_ranks(2, set_up_with_policy, name=name, policy=policy, path=path):
        assert found == ([] if policy == "none" or name == "cross_tied" else blocks)
        assert_same(values, weights(model))
        assert loss == pytest.approx(loss_of(model, tokens(0)).item(), rel=1e-5)


class Marked(nn.Module):
    """Says itself what its units are, with an option for one; two of its layers are halves of one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 6)
        self.first = wrap(Block(6, 13))
        self.second = wrap(Block(6, 13), forward_prefetch=True)
        halves = torch.randn(2, 6, 6)
        self.left, self.right = wrap(nn.Linear(6, 6)), wrap(nn.Linear(6, 6))
        self.left.weight, self.right.weight = nn.Parameter(halves[0]), nn.Parameter(halves[1])
        self.head = nn.Linear(6, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.second(self.first(self.embedding(tokens)))
        return self.head(self.right(self.left(hidden)))


def set_up_marked() -> tuple[list[str], bool, dict[str, Tensor], float]:
    fabric = launch(FSDPStrategy())
    torch.manual_seed(1)
    with fabric.init_module(empty_init=True):
        model = Marked()
    handle = fabric.setup(model)
    return units(handle), model.second.forward_prefetch, weights(handle), loss_of(handle, tokens(0)).item()


def test_units_may_be_marked_in_the_constructor() -> None:
    torch.manual_seed(1)
    with deferred_init():
        model = Marked()
    materialize(model)
    for found, prefetch, values, loss in run_ranks(2, set_up_marked):
        assert found == ["first", "second"], "left and right share memory"
        assert prefetch
        assert_same(values, weights(model))
        assert loss == pytest.approx(loss_of(model, tokens(0)).item(), rel=1e-5)


# -- options of Lightning's and FSDP's ---------------------------------------------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = {
    "activation checkpointing": {"activation_checkpointing_policy": {Block}},
    "parameters flattened": {"use_orig_params": False},
    "sync_module_states": {"sync_module_states": True},
    "gradients alone": {"sharding_strategy": "SHARD_GRAD_OP"},
    "nothing sharded": {"sharding_strategy": "NO_SHARD"},
    "hybrid on a mesh": {"sharding_strategy": "HYBRID_SHARD", "device_mesh": "2 × 2"},
}


def train_with_options(options: str, path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
    given = dict(OPTIONS[options])
    on_mesh = given.pop("device_mesh", None) is not None
    strategy = FSDPStrategy(auto_wrap_policy={Block}, **given)
    fabric = launch(strategy)
    if on_mesh:  # given as a tuple, Lightning makes a mesh of CUDA devices
        strategy._fsdp_kwargs["device_mesh"] = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "shards"))
    model = fabric.setup_module(build(fabric, "transformerish", checkpoint=path, strict=False))
    optimizer = fabric.setup_optimizers(torch.optim.SGD(model.parameters(), lr=0.1))
    before = weights(model)
    for step in range(3):
        mine = tokens(step, 2 * fabric.world_size)[fabric.global_rank * 2 :][:2]
        fabric.backward(loss_of(model, mine))
        optimizer.step()
        optimizer.zero_grad()
    checkpointed = sum(isinstance(module, CheckpointWrapper) for module in model.modules())
    plain = {name.replace("_checkpoint_wrapped_module.", ""): value for name, value in weights(model).items()}
    return before, plain, checkpointed


@pytest.mark.parametrize("options", OPTIONS)
def test_options_are_as_without_us(options: str, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model.safetensors", "transformerish", partial=True)
    model = one_device("transformerish", checkpoint=path, strict=False)
    filled = weights(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    world_size = 4 if "mesh" in options else 2
    for step in range(3):
        loss_of(model, tokens(step, 2 * world_size)).backward()
        optimizer.step()
        optimizer.zero_grad()
    for before, after, checkpointed in run_ranks(world_size, train_with_options, options=options, path=path):
        before = {name.replace("_checkpoint_wrapped_module.", ""): value for name, value in before.items()}
        assert_same(before, filled)
        assert_close(after, weights(model))
        assert checkpointed == (3 if options == "activation checkpointing" else 0)


def ignore_a_part(path: Path) -> tuple[dict[str, Tensor], set[str]]:
    strategy = FSDPStrategy(auto_wrap_policy={Block})
    fabric = launch(strategy)
    model = build(fabric, "transformerish", checkpoint=path, strict=False)
    strategy._fsdp_kwargs["ignored_modules"] = [model.layers[1], model.norm]
    handle = fabric.setup(model)
    return weights(handle), {name for name, value in named(handle, "named_parameters") if value.dim() == 2}


def test_what_fsdp_is_to_ignore_is_filled_whole(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model.safetensors", "transformerish", partial=True)
    for values, matrices in run_ranks(2, ignore_a_part, path=path):
        assert_same(values, weights(one_device("transformerish", checkpoint=path, strict=False)))
        assert matrices == {"layers.1.up.weight", "layers.1.down.weight"}


# -- errors ------------------------------------------------------------------------------------------------------------


def never(*_: Any, **__: Any) -> bool:
    raise AssertionError("not to be called")


def raising_on_rank_one(module: nn.Module, recurse: bool, nonwrapped_numel: int) -> bool:
    if torch.distributed.get_rank() == 1 and not recurse:
        raise LookupError("the user's own mistake")
    return blocks_by_function(module, recurse, nonwrapped_numel)


def by_hand(fabric: Any, model: Transformerish) -> None:
    model.norm = FullyShardedDataParallel(model.norm, device_id=fabric.device)  # calls its reset_parameters


def with_init_fn(fabric: Any, model: Transformerish) -> None:
    fabric.strategy._fsdp_kwargs["param_init_fn"] = never


def with_a_mistake(fabric: Any, model: Transformerish) -> None:
    fabric.strategy._fsdp_kwargs["auto_wrap_policy"] = raising_on_rank_one


MISTAKES: dict[str, tuple[Callable[[Any, Transformerish], None], list[str]]] = {
    "param_init_fn": (with_init_fn, ["param_init_fn", "init_module"]),
    "wrapped by hand": (by_hand, ["Build it anew", "auto_wrap_policy"]),
    "a policy that raises on one rank": (with_a_mistake, ["the user's own mistake"]),
}


def fail(mistake: str) -> tuple[str, float, str]:
    fabric = launch(FSDPStrategy(auto_wrap_policy={Block}))
    model = build(fabric, "transformerish", empty_init=True)
    MISTAKES[mistake][0](fabric, model)
    start = time.monotonic()
    with pytest.raises((FabricInitError, LookupError)) as raised:
        fabric.setup(model)
    seconds = time.monotonic() - start
    with pytest.raises(UninitializedTensorError) as refused:
        model(tokens(0))
    return str(raised.value), seconds, str(refused.value)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_setup_that_fails_is_an_error_on_every_rank_and_the_model_cannot_be_used(mistake: str) -> None:
    for message, seconds, _ in run_ranks(2, fail, mistake=mistake):
        assert all(word in message for word in MISTAKES[mistake][1]), message
        assert seconds < 15


def set_up_half_wrapped() -> str:
    fabric = launch(FSDPStrategy(auto_wrap_policy={Block}))
    model = build(fabric, "transformerish", empty_init=True)
    with_a_mistake(fabric, model)
    with pytest.raises((FabricInitError, LookupError)):
        fabric.setup(model)
    fabric.strategy._fsdp_kwargs["auto_wrap_policy"] = blocks_by_function
    with pytest.raises(FabricInitError) as raised:
        fabric.setup(model)
    return str(raised.value)


def test_a_model_that_is_wrapped_in_part_is_not_wrapped_again() -> None:
    assert "Build it anew" in run_ranks(2, set_up_half_wrapped)[0]


def load_untied(path: Path) -> tuple[str, bool]:
    fabric = launch("fsdp")
    model = build(fabric, "transformerish", checkpoint=path)
    with pytest.raises(CheckpointMismatchError) as raised:
        fabric.setup(model)
    return str(raised.value), all(isinstance(parameter, RecordedTensor) for parameter in model.parameters())


def test_a_tie_that_the_checkpoint_breaks_is_found_before_anything_is_wrapped(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model.safetensors", "transformerish")
    state = load_file(path)
    save_file(state | {"lm_head.weight": state["lm_head.weight"] + 1}, path)
    for message, untouched in run_ranks(2, load_untied, path=path):
        assert "lm_head.weight" in message
        assert "embed_tokens.weight" in message
        assert untouched
