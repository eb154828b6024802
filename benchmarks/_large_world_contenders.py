"""One rank of a large world, with torch's fake process group: nothing that is timed here needs the other ranks.

Each contender builds a model, shards it with ``fully_shard``, layer by layer, and gives this rank's part its values
from hollow files, in which every number is zero.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from _log_times import times_in_log
from _planning_models import LLAMA, MOE, MixtureOfExperts
from _shards import local_part, touch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore


def phases(
    contender: str, model: str, layers: str, rank: str, ranks: str, folder: str
) -> Generator[tuple[str, Callable[[], Any]], Any, None]:
    dist.init_process_group("fake", store=FakeStore(), rank=int(rank), world_size=int(ranks))
    mesh = init_device_mesh("cpu", (int(ranks),))
    make, way = _maker(model, int(layers)), CONTENDERS[contender]()
    torch.set_default_dtype(torch.bfloat16)
    fully_shard(nn.Linear(8, 8, device="meta"), mesh=mesh)  # what the first call in a process imports

    def build() -> nn.Module:
        with way.context():
            return make()

    built = yield "build", build
    yield "shard", lambda: _shard(built, mesh)
    yield "fill", lambda: way.fill(built, Path(folder))
    yield "touch", lambda: touch(built)
    yield "verify", lambda: _verify(built)


class Ours:
    """``deferred_init``, ``fully_shard``, ``materialize``; this process alone, since no other rank would answer."""

    def __init__(self) -> None:
        from fabric_init import deferred_init

        self.context: Callable[[], AbstractContextManager[Any]] = deferred_init

    def fill(self, model: nn.Module, folder: Path) -> dict[str, float]:
        from fabric_init import materialize

        with times_in_log("plan") as planned:
            start = time.perf_counter()
            materialize(model, checkpoint=folder, process_group=False)
        return {"plan": planned[0] - start}


class Dcp:
    """The meta device, ``fully_shard``, ``to_empty``, ``dcp.load``: by someone who has no buffers to repair."""

    def __init__(self) -> None:
        import torch.distributed.checkpoint

        self.context: Callable[[], AbstractContextManager[Any]] = lambda: torch.device("meta")

    def fill(self, model: nn.Module, folder: Path) -> dict[str, float]:
        from torch.distributed import checkpoint as dcp
        from torch.distributed.checkpoint import HuggingFaceStorageReader

        model.to_empty(device="cpu")
        dcp.load(model.state_dict(), storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
        return {}


def _maker(model: str, layers: int) -> Callable[[], nn.Module]:
    if model == "llama":
        from transformers import LlamaConfig
        from transformers.models.llama.modeling_llama import LlamaForCausalLM

        config = LlamaConfig(**(dict(LLAMA) | {"num_hidden_layers": layers}))
        return lambda: LlamaForCausalLM(config)
    shape = dict(MOE) | {"layers": layers}
    return lambda: MixtureOfExperts(**shape, stacked=model == "stacked")


def _shard(model: Any, mesh: DeviceMesh) -> None:
    for layer in model.model.layers if hasattr(model, "model") else model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def _verify(model: nn.Module) -> dict[str, Any]:
    """What this rank holds, and how many parameters have no values, or others than the files."""
    parts = [local_part(parameter) for parameter in model.parameters()]
    filled = [part.reshape(-1) for part in parts if part.numel() and not part.is_meta]
    return {
        "tensors": len(parts),
        "part": sum(part.nbytes for part in parts),
        "on_meta": sum(part.is_meta for part in parts),
        "wrong": sum(bool(flat[[0, -1]].any()) for flat in filled),
    }


CONTENDERS: dict[str, type] = {"ours": Ours, "dcp": Dcp}
