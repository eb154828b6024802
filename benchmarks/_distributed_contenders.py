"""The ways to get a Llama ready on several ranks. Each is a function that prepares and returns the part to be timed.

What stands before the inner function is outside the clock: imports, the config, the process group and its first use,
warming the page cache with the file that this way reads. The inner function is what a user writes. It returns the
model, whose names are the checkpoint's, and what the strategy has put around it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _shards import touch, verify
from _workload import INIT_SEED, Workload, default_dtype, warm, warm_in_small_pages
from torch import distributed as dist
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM

Build = Callable[[], tuple[nn.Module, Any]]
RANK, RANKS = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


@dataclass(frozen=True)
class Task:
    workload: Workload
    accelerator: str
    small_pages: bool

    @property
    def config(self) -> LlamaConfig:
        return LlamaConfig.from_pretrained(self.workload.folder)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.accelerator == "cpu" else f"cuda:{os.environ['LOCAL_RANK']}")

    @property
    def fabric(self) -> dict[str, Any]:
        """What every Fabric is made with."""
        return {"accelerator": self.accelerator, "devices": RANKS, "precision": "bf16-true"}

    def prepare(self, file: Path) -> None:
        """When the process group is there: connect the ranks, and have ``file`` in the page cache."""
        if RANK == 0:
            (warm_in_small_pages if self.small_pages else warm)(file)
        dist.all_reduce(torch.zeros(1, device=self.device))
        # Another seed than the reference's, so that a tensor which was not loaded cannot look as if it were.
        torch.manual_seed(INIT_SEED + 1)


def phases(name: str, root: str, accelerator: str, pages: str) -> Generator[tuple[str, Callable[[], Any]], Any, None]:
    task = Task(Workload(Path(root)), accelerator, pages == "small pages")
    build = CONTENDERS[name](task)
    built = yield "ready", lambda: _finished(build(), task)
    if built is None:
        return
    model = built[0]
    yield "touch", lambda: touch(model)
    cast = torch.bfloat16 if name not in BUFFERS_AS_BUILT else None
    device = torch.cuda.max_memory_allocated() if accelerator == "cuda" else None
    initialized = "init_missing" in name or "scratch" in name
    yield "verify", lambda: verify(model, task.workload, cast, initialized=initialized) | {"device": device}


def _finished(built: tuple[nn.Module, Any], task: Task) -> tuple[nn.Module, Any]:
    if task.accelerator == "cuda":
        torch.cuda.synchronize()
    return built


# FSDP2 ---------------------------------------------------------------------------------------------------------------


def fsdp2_lightning(task: Task) -> Build:
    from lightning.fabric import Fabric
    from lightning.fabric.strategies import ModelParallelStrategy
    from torch.distributed.device_mesh import DeviceMesh

    def parallelize(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
        return _shard(model, mesh["data_parallel"])

    strategy = ModelParallelStrategy(parallelize, data_parallel_size=RANKS, tensor_parallel_size=1)
    config, file = task.config, task.workload.torch_file
    fabric = Fabric(strategy=strategy, **task.fabric)
    fabric.launch()
    task.prepare(file)

    def build() -> tuple[nn.Module, Any]:
        with fabric.init_module(empty_init=True):
            model = LlamaForCausalLM(config)
        wrapped = fabric.setup(model)
        fabric.load_raw(file, wrapped)
        return model, wrapped

    return build


def fsdp2_dcp(task: Task) -> Build:
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    folder = str(task.workload.folder)
    return _emptied(task, lambda model: dcp.load(model.state_dict(), storage_reader=HuggingFaceStorageReader(folder)))


def fsdp2_broadcast(task: Task) -> Build:
    """Rank 0 reads the whole file, as torchtune does."""
    from safetensors.torch import load_file
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    file, options = task.workload.safetensors, StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    return _emptied(
        task, lambda model: set_model_state_dict(model, load_file(file) if RANK == 0 else {}, options=options)
    )


def _emptied(task: Task, load: Callable[[nn.Module], object]) -> Build:
    """By someone who knows which buffers of this very model are left without values."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config, device, mesh = task.config, task.device, _mesh(task)

    def build() -> tuple[nn.Module, Any]:
        with default_dtype(torch.bfloat16), torch.device("meta"):
            model = LlamaForCausalLM(config)
        _shard(model, mesh)
        model.to_empty(device=device)
        load(model)
        model.model.rotary_emb = LlamaRotaryEmbedding(config).to(device)
        return model, None

    return build


def fsdp2_scratch(task: Task) -> Build:
    """Without a checkpoint, as torchtitan does: every module's own init runs on what this rank holds."""

    def initialize(model: nn.Module) -> None:
        with torch.no_grad():
            for module in model.modules():
                model._init_weights(module)

    return _emptied(task, initialize)


def fsdp2_ours(task: Task) -> Build:
    return _ours(task, "fsdp2")


def fsdp2_ours_plain(task: Task) -> Build:
    """Without Fabric: the model is sharded by the user's own code, and then filled."""
    return _ours_plain(task, task.workload.folder)


def fsdp2_ours_scratch(task: Task) -> Build:
    return _ours_plain(task, None)


def _ours_plain(task: Task, folder: Path | None) -> Build:
    from fabric_init import deferred_init, materialize

    config, device, mesh = task.config, task.device, _mesh(task)

    def build() -> tuple[nn.Module, Any]:
        with default_dtype(torch.bfloat16), device, deferred_init():
            model = LlamaForCausalLM(config)
        _shard(model, mesh)
        materialize(model, checkpoint=folder)
        return model, None

    return build


def _mesh(task: Task) -> Any:
    """The ranks; ``fully_shard`` has run once, as strategies make it do in ``launch``: its first call imports a lot."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if task.accelerator == "cuda":
        torch.cuda.set_device(task.device)
    mesh = init_device_mesh(task.accelerator, (RANKS,))
    fully_shard(nn.Linear(RANKS, RANKS, device="meta"), mesh=mesh)
    task.prepare(task.workload.safetensors)
    return mesh


def _shard(model: nn.Module, mesh: Any) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def fsdp2_ours_load_state_dict(task: Task) -> Build:
    return _ours_later(task, "fsdp2", _load_state_dict)


def fsdp2_ours_load_raw(task: Task) -> Build:
    return _ours_later(task, "fsdp2", _load_raw)


def fsdp2_ours_init_missing(task: Task) -> Build:
    return _ours_later(task, "fsdp2", _init_missing)


# DDP -----------------------------------------------------------------------------------------------------------------


def ddp_lightning(task: Task) -> Build:
    from lightning.fabric import Fabric

    config, file = task.config, task.workload.torch_file
    fabric = Fabric(strategy="ddp", **task.fabric)
    fabric.launch()
    task.prepare(file)

    def build() -> tuple[nn.Module, Any]:
        with fabric.init_module(empty_init=True):
            model = LlamaForCausalLM(config)
        fabric.load_raw(file, model)
        return model, fabric.setup(model)

    return build


def ddp_ours(task: Task) -> Build:
    return _ours(task, "ddp")


def ddp_ours_load_state_dict(task: Task) -> Build:
    return _ours_later(task, "ddp", _load_state_dict)


def ddp_ours_load_raw(task: Task) -> Build:
    return _ours_later(task, "ddp", _load_raw)


def ddp_ours_init_missing(task: Task) -> Build:
    return _ours_later(task, "ddp", _init_missing)


# ZeRO-3 --------------------------------------------------------------------------------------------------------------


def zero3_transformers(task: Task) -> Build:
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    config, folder = task.config, task.workload.folder
    if task.accelerator == "cuda":
        torch.cuda.set_device(task.device)
    deepspeed.init_distributed(dist_backend="nccl" if task.accelerator == "cuda" else "gloo")
    zero3 = HfDeepSpeedConfig(
        {"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}, "train_micro_batch_size_per_gpu": 1}
    )
    _first_partition(zero3.config)
    task.prepare(task.workload.safetensors)

    def build() -> tuple[nn.Module, Any]:
        return LlamaForCausalLM.from_pretrained(folder, config=config, dtype=torch.bfloat16), zero3

    return build


def zero3_ours(task: Task) -> Build:
    build = _ours(task, "deepspeed_stage_3")
    _first_partition({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1})
    return build


def zero3_ours_load_raw(task: Task) -> Build:
    build = _ours_later(task, "deepspeed_stage_3", _load_raw)
    _first_partition({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1})
    return build


def _first_partition(config: dict[str, Any]) -> None:
    """DeepSpeed compiles an operator at its first use, which takes a minute on a new machine."""
    import deepspeed

    with deepspeed.zero.Init(config_dict_or_path=config):
        nn.Linear(8, 8)


def _ours(task: Task, strategy: str) -> Build:
    from fabric_init import Fabric

    config, folder = task.config, task.workload.folder
    fabric = Fabric(strategy=strategy, **task.fabric)
    fabric.launch()
    task.prepare(task.workload.safetensors)

    def build() -> tuple[nn.Module, Any]:
        with fabric.init_module(checkpoint=folder):
            model = LlamaForCausalLM(config)
        return model, fabric.setup(model)

    return build


def _ours_later(task: Task, strategy: str, give_values: Callable[[Any, nn.Module, Task], object]) -> Build:
    """Built with ``empty_init=True``, set up, and given values only then."""
    from fabric_init import Fabric

    config, workload = task.config, task.workload
    fabric = Fabric(strategy=strategy, **task.fabric)
    fabric.launch()
    task.prepare(workload.torch_file if give_values is _load_raw else workload.safetensors)

    def build() -> tuple[nn.Module, Any]:
        with fabric.init_module(empty_init=True):
            model = LlamaForCausalLM(config)
        wrapped = fabric.setup(model)
        give_values(fabric, wrapped, task)
        return model, wrapped

    return build


def _load_state_dict(fabric: Any, model: nn.Module, task: Task) -> None:
    from safetensors.torch import load_file

    model.load_state_dict(load_file(task.workload.safetensors))


def _load_raw(fabric: Any, model: nn.Module, task: Task) -> None:
    fabric.load_raw(task.workload.torch_file, model)


def _init_missing(fabric: Any, model: nn.Module, task: Task) -> None:
    fabric.init_missing(model)


CONTENDERS: dict[str, Callable[[Task], Build]] = {
    contender.__name__: contender
    for contender in (
        fsdp2_lightning,
        fsdp2_dcp,
        fsdp2_broadcast,
        fsdp2_scratch,
        fsdp2_ours,
        fsdp2_ours_plain,
        fsdp2_ours_scratch,
        fsdp2_ours_load_state_dict,
        fsdp2_ours_load_raw,
        fsdp2_ours_init_missing,
        ddp_lightning,
        ddp_ours,
        ddp_ours_load_state_dict,
        ddp_ours_load_raw,
        ddp_ours_init_missing,
        zero3_transformers,
        zero3_ours,
        zero3_ours_load_raw,
    )
}

BUFFERS_AS_BUILT = (
    "fsdp2_dcp",
    "fsdp2_broadcast",
    "fsdp2_scratch",
    "fsdp2_ours_plain",
    "fsdp2_ours_scratch",
    "zero3_transformers",
)
"""The others' ``setup`` casts them, as Fabric's ``bf16-true`` does."""
