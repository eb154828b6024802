"""One state dict written in every format there is, in one file and sharded, by the libraries whose formats they are."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import lightning
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from gguf import GGMLQuantizationType
from lightning.fabric.strategies.model_parallel import ModelParallelStrategy
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.fsdp import fully_shard

from tests.support.dcp_writers import save_alone
from tests.support.gguf_files import write_blocks
from tests.support.zoo import MODELS

State = dict[str, Tensor]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def _safetensors(state: State, path: Path) -> None:
    save_file({key: value.clone() for key, value in state.items()}, path)  # it refuses ties


def _legacy(state: State, path: Path) -> None:
    torch.save(state, path, _use_new_zipfile_serialization=False)


_GGUF = {torch.float32: "F32", torch.float16: "F16", torch.float64: "F64", torch.int64: "I64", torch.int32: "I32"}


def _gguf(state: State, path: Path) -> None:
    """By names of no model of llama.cpp, as they are: for a model of any other kind."""
    stored = {key: (value.detach().numpy(), GGMLQuantizationType[_GGUF[value.dtype]]) for key, value in state.items()}
    write_blocks(path, "llama", stored)


def _index(state: State, folder: Path, suffix: str, save: Callable[[State, Path], object]) -> Path:
    keys = list(state)
    parts = {f"part-1{suffix}": keys[::2], f"part-2{suffix}": keys[1::2]}
    for name, part in parts.items():
        save({key: state[key] for key in part}, folder / name)
    index = folder / f"model{suffix}.index.json"
    index.write_text(json.dumps({"weight_map": {key: name for name, part in parts.items() for key in part}}))
    return index


def _hub(state: State, folder: Path, sharded: bool) -> Path:
    """The cache as huggingface_hub lays it out."""
    model = folder / "models--org--name"
    snapshot, blobs = model / "snapshots" / COMMIT, model / "blobs"
    for made in (snapshot, blobs, model / "refs"):
        made.mkdir(parents=True)
    (model / "refs" / "main").write_text(COMMIT)
    if sharded:
        _index(state, blobs, ".safetensors", _safetensors)
    else:
        _safetensors(state, blobs / "model.safetensors")
    for blob in sorted(blobs.iterdir()):
        (snapshot / blob.name).symlink_to(os.path.relpath(blob, snapshot))
    return model


def write_alone(state: State, folder: Path, name: str) -> dict[str, Path]:
    """Every format that one process writes: what it is called -> what to open."""

    def new(kind: str) -> Path:
        made = folder / kind
        made.mkdir(parents=True)
        return made

    found = {
        "safetensors with index": _index(state, new("1"), ".safetensors", _safetensors),
        ".bin with index": _index(state, new("2"), ".bin", torch.save),
        "legacy .bin with index": _index(state, new("3"), ".bin", _legacy),
        "cache of the Hub": _hub(state, new("4"), sharded=False),
        "cache of the Hub, sharded": _hub(state, new("5"), sharded=True),
        "DCP folder of one process": save_alone({"model": state}, new("6")),
    }
    one = new("one file")
    _safetensors(state, one / "model.safetensors")
    _gguf(state, one / "model.gguf")
    torch.save(state, one / "model.pt")
    _legacy(state, one / "legacy.pt")
    torch.save({"model": state, "step": 3}, one / "lit_model.pth")
    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    fabric.save(one / "run.ckpt", {"net": fabric.setup(pruned(name, state)), "step": 1})
    named = {"safetensors": "model.safetensors", "GGUF": "model.gguf", ".pt": "model.pt", "legacy .pt": "legacy.pt"}
    named |= {"lit_model.pth": "lit_model.pth", "Lightning's file": "run.ckpt"}
    return found | {kind: one / file for kind, file in named.items()}


def pruned(name: str, state: State) -> nn.Module:
    """A model that has what ``state`` has, and nothing else to be saved."""
    model = MODELS[name]()
    for key in model.state_dict().keys() - state.keys():
        owner, _, attribute = key.rpartition(".")
        setattr(model.get_submodule(owner), attribute, None)
    model.load_state_dict(state)
    return model


# -- in the ranks ------------------------------------------------------------------------------------------------------


def write_by_ranks(source: Path, folder: Path, name: str) -> dict[str, Path]:
    """The formats that ranks write together."""
    import deepspeed

    state: State = torch.load(source)
    ranks = int(os.environ["WORLD_SIZE"])
    strategy: Any = ModelParallelStrategy(
        lambda model, mesh: fully_shard(model, mesh=mesh["data_parallel"]),
        data_parallel_size=ranks,
        tensor_parallel_size=1,
    )
    fabric = lightning.Fabric(accelerator="cpu", devices=ranks, strategy=strategy)
    fabric.launch()
    fabric.save(folder / "lightning", {"net": fabric.setup(pruned(name, state)), "step": 1})

    sharded = pruned(name, state)
    fully_shard(sharded)
    dcp.save({"model": get_model_state_dict(sharded)}, checkpoint_id=folder / "dcp")

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # or it would call the compiler, for minutes
    model = pruned(name, state)
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    config |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad])
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    engine.save_checkpoint(str(folder / "deepspeed"), tag="start")
    dist.barrier()
    return {
        "Lightning's folder": folder / "lightning",
        "DCP folder of two ranks": folder / "dcp",
        "DeepSpeed ZeRO-3": folder / "deepspeed",
    }


URLS = {"URL": "safetensors", "URL, sharded": "safetensors with index", "URL of .bin with index": ".bin with index"}
"""What is also opened as ``memory://``."""


def with_urls(paths: dict[str, Path]) -> dict[str, str]:
    """All that there is to open, in this process: no other sees its ``memory://``."""
    found = {kind: str(path) for kind, path in paths.items()}
    files = fsspec.filesystem("memory")
    for kind, of in URLS.items():
        files.put(f"{paths[of].parent}/", f"/{kind.replace(',', '').replace(' ', '-')}/", recursive=True)
        found[kind] = f"memory://{kind.replace(',', '').replace(' ', '-')}/{paths[of].name}"
    return found
