"""FSDP1 in plain PyTorch: ``FullyShardedDataParallel`` fills a recorded model while it wraps it."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel, StateDictType
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from fabric_init import CheckpointMismatchError, FabricInitError, deferred_init, init_report, param_init_fn
from tests.support.ranks import run_ranks
from tests.support.zoo import MODELS, Block, assert_same, one_device, tokens, weights, write_checkpoint

MODEL = "transformerish"


def wrapped(path: Path | None, strict: bool) -> tuple[nn.Module, nn.Module]:
    dist.init_process_group("gloo")
    torch.manual_seed(1 + dist.get_rank())  # all draw what rank 0 draws
    with deferred_init():
        model = MODELS[MODEL]()
    wrap = functools.partial(
        FullyShardedDataParallel,
        device_id=torch.device("cpu"),
        auto_wrap_policy=ModuleWrapPolicy([Block]),
        use_orig_params=True,
    )
    with param_init_fn(model, checkpoint=path, strict=strict) as init:
        return model, wrap(model, param_init_fn=init)


def gathered(path: Path | None, strict: bool) -> tuple[dict[str, Tensor], set[str], list[Tensor]]:
    model, sharded = wrapped(path, strict)
    whole = FullStateDictConfig(offload_to_cpu=False, rank0_only=False)
    with FullyShardedDataParallel.state_dict_type(sharded, StateDictType.FULL_STATE_DICT, whole):
        state = {name: value.clone() for name, value in sharded.state_dict().items()}
    sharded(tokens(0)).sum().backward()
    statuses = {row.status for row in init_report(model).rows}
    buffers = [buffer.clone() for buffer in sharded.buffers()]
    dist.destroy_process_group()
    return state, statuses, buffers


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_each_unit_gets_its_values_when_it_is_wrapped(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model.safetensors", MODEL, partial=True)
    expected = weights(one_device(MODEL, checkpoint=path, strict=False))
    for state, statuses, buffers in run_ranks(2, gathered, path=path, strict=False):
        assert_same(state, {name: expected[name] for name in state})
        assert statuses >= {"loaded", "initialized"}
        assert all(buffer.isfinite().all() for buffer in buffers)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_ranks_with_other_seeds_make_one_model_from_scratch() -> None:
    first, second = run_ranks(2, gathered, path=None, strict=True)
    assert_same(first[0], second[0])
    assert_same(first[0], {name: value for name, value in weights(one_device(MODEL)).items() if name in first[0]})
    assert "initialized" in first[1]


def refused(path: Path) -> str:
    with pytest.raises(FabricInitError) as raised:
        wrapped(path, True)
    dist.destroy_process_group()
    assert isinstance(raised.value, CheckpointMismatchError)
    return str(raised.value)


def test_a_missing_tensor_is_an_error_before_anything_is_wrapped(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model.safetensors", MODEL, partial=True)
    for message in run_ranks(2, refused, path=path):
        assert "Missing from the checkpoint" in message
