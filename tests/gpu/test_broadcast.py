"""One reader over NCCL: what is sent is on the GPU, and values stay there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from fabric_init import deferred_init
from fabric_init.checkpoints import open_checkpoint
from fabric_init.distributed.agreement import RankGroup
from fabric_init.distributed.broadcast import BroadcastReader
from fabric_init.distributed.checked_broadcast import CheckedBroadcast
from fabric_init.filling.execute import fill_model
from fabric_init.planning.placement import WholeTensors
from fabric_init.planning.plan import LoadOptions


def _why_no_cuda() -> str:
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).split("\n")[0]
    return ""


NO_CUDA = _why_no_cuda()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(NO_CUDA), reason=NO_CUDA or "cuda works")]


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=device)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("budget", [1000, 1 << 20])
def test_values_go_by_way_of_the_gpu(budget: int, tmp_path: Path) -> None:
    state = nn.TransformerEncoderLayer(32, 2, 64).state_dict()
    torch.save({key: value.bfloat16() for key, value in state.items()}, tmp_path / "m.pt")
    reader = BroadcastReader.open(lambda: open_checkpoint(tmp_path / "m.pt", mmap=False), RankGroup(), budget)
    with deferred_init():
        model = nn.TransformerEncoderLayer(32, 2, 64)
    fill_model(model, reader, LoadOptions(), WholeTensors(torch.device("cuda", 0)), agreement=RankGroup())
    for key, value in model.state_dict().items():
        assert value.is_cuda
        assert torch.equal(value.cpu(), state[key].bfloat16().float()), key


def test_what_is_sent_is_on_the_gpu() -> None:
    with CheckedBroadcast("testing") as ranks:
        assert ranks.device == torch.device("cuda", 0)
        sent = torch.arange(4, device=ranks.device)
        ranks.broadcast(sent)
        ranks.roll_call()
    assert sent.tolist() == [0, 1, 2, 3]
