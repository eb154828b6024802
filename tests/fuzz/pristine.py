"""A good checkpoint of every format, small, and the same bytes on every run: a seed then means the same damage."""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf as llama_cpp
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from safetensors.torch import save_file
from torch.utils._pytree import tree_map_only

from fabric_init.checkpoints import write_manifest
from tests.support.dcp_writers import save_alone, save_fsdp2, save_with_lightning

COMMIT = "0123456789abcdef0123456789abcdef01234567"
STATE = {
    "layers.0.weight": torch.arange(12.0).reshape(3, 4),
    "layers.0.bias": torch.arange(4).bfloat16(),
    "layers.1.weight": torch.arange(30, dtype=torch.float64).reshape(5, 6),
    "n": torch.tensor(3),
    "nothing": torch.zeros(0, 3),
}
SHARDS = {"one": ("layers.0.weight", "layers.0.bias"), "two": ("layers.1.weight", "n", "nothing")}


class _Bytes:
    """In a pickle, a call for this many bytes: four of its own, of which a damaged one may ask for 2 GB."""

    def __reduce__(self) -> Any:
        return bytearray, (1 << 16,)


def _training() -> dict[str, Any]:
    """What a training run saves: a tie, a tensor that is not row-major, an expanded one, an optimizer's state."""
    model = STATE | {"head": STATE["layers.0.weight"], "columns": torch.arange(12.0).reshape(4, 3).t()}
    model["wide"] = torch.arange(3.0).expand(2, 3)
    optimizer = {"state": {0: {"step": torch.tensor(2.0)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    return {"model": model, "optimizer": optimizer, "step": 2, "q._extra_state": {"a": 1}, "bytes": _Bytes()}


def _sharded(folder: Path, suffix: str, save: Callable[[dict[str, Any], Path], object]) -> None:
    for name, keys in SHARDS.items():
        save({key: STATE[key] for key in keys}, folder / f"{name}{suffix}")
    weight_map = {key: f"{name}{suffix}" for name, keys in SHARDS.items() for key in keys}
    (folder / f"model{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def safetensors(folder: Path) -> str:
    save_file(STATE, folder / "model.safetensors")
    return "model.safetensors"


def safetensors_index(folder: Path) -> str:
    _sharded(folder, ".safetensors", save_file)
    return "."


def gguf(folder: Path) -> str:
    """In two parts, with an array as long as a tokenizer's."""
    for number, keys in enumerate((["layers.0.weight", "layers.0.bias", "n"], ["layers.1.weight", "blocks"])):
        writer = llama_cpp.GGUFWriter(folder / f"model-{number + 1:05}-of-00002.gguf", "llama")
        writer.add_array("tokenizer.ggml.tokens", [f"<{token}>" for token in range(20)])
        writer.add_array("llama.heads", [1, 2])
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", 2)
        writer.add_int32("split.tensors.count", 5)
        for key in keys:
            if key == "blocks":
                values = np.linspace(-1, 1, 96, dtype=np.float32).reshape(3, 32)
                writer.add_tensor(key, llama_cpp.quants.quantize(values, Type.Q4_0), raw_dtype=Type.Q4_0)
            else:
                tensor = STATE[key]
                writer.add_tensor(
                    key, (tensor.float() if key == "layers.0.bias" else tensor).reshape(tensor.shape or (1,)).numpy()
                )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return "model-00001-of-00002.gguf"


def torch_zip(folder: Path) -> str:
    torch.save(_training(), folder / "model.pt")
    return "model.pt"


def torch_index(folder: Path) -> str:
    _sharded(folder, ".bin", torch.save)
    return "model.bin.index.json"


def torch_legacy(folder: Path) -> str:
    """Its storages go by their addresses, and lie in the order of those: both are made the same on every run."""
    free = sorted((torch.UntypedStorage(0) for _ in range(20)), key=lambda storage: str(storage._cdata), reverse=True)
    moved: dict[int, torch.UntypedStorage] = {}

    def move(value: torch.Tensor) -> torch.Tensor:
        old = value.untyped_storage()
        if old._cdata not in moved:
            new = moved[old._cdata] = free.pop()
            new.resize_(old.nbytes())
            new.copy_(old)
        new = moved[old._cdata]
        return torch.empty(0, dtype=value.dtype).set_(new, value.storage_offset(), value.shape, value.stride())

    content = tree_map_only(torch.Tensor, move, _training())
    torch.save(content, folder / "model.pt", _use_new_zipfile_serialization=False)
    data = (folder / "model.pt").read_bytes()
    for number, storage in enumerate(moved.values()):
        name, other = str(storage._cdata).encode(), b"10%02d" % number
        data = data.replace(_text(name), _text(other))
    (folder / "model.pt").write_bytes(data)
    return "model.pt"


def _text(content: bytes) -> bytes:
    """As a pickle has it."""
    return b"X" + struct.pack("<I", len(content)) + content


def dcp(folder: Path) -> str:
    save_alone({"model": STATE, "step": 2}, folder)
    return _without_chance(folder)


def manifest(folder: Path) -> str:
    """Here it is the manifest that is damaged, not the checkpoint."""
    safetensors_index(folder)
    write_manifest(folder, block_bytes=64)
    return "."


def hub_cache(folder: Path) -> str:
    """As huggingface_hub lays it out, but for the links."""
    model = folder / "models--org--name"
    snapshot = model / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(COMMIT)
    safetensors_index(snapshot)
    return model.name


# -- written by two ranks ----------------------------------------------------------------------------------------------


def dcp_of_ranks(folder: Path) -> str:
    save_fsdp2(folder)
    return _without_chance(folder)


def lightning_sharded(folder: Path) -> str:
    save_with_lightning(folder, "net")
    return _without_chance(folder)


def deepspeed(stage: int, folder: Path) -> str:
    import deepspeed as library
    import torch.distributed as dist

    from tests.support.deepspeed_saves import save

    library.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # or it would call the compiler, for a minute
    dist.init_process_group("gloo")
    save(stage, "bf16", folder)
    if dist.get_rank() == 0:
        (folder / "expected.pth").unlink()
        (folder / "zero_to_fp32.py").unlink(missing_ok=True)
    dist.barrier()
    return "."


def deepspeed_2(folder: Path) -> str:
    return deepspeed(2, folder)


def deepspeed_3(folder: Path) -> str:
    return deepspeed(3, folder)


def _without_chance(folder: Path) -> str:
    """The metadata has a random number and the folder's name in it."""
    if os.environ.get("RANK", "0") == "0":
        path = folder / ".metadata"
        metadata = pickle.loads(path.read_bytes())
        metadata.storage_meta = None
        path.write_bytes(pickle.dumps(metadata))
    return "."


ALONE = [safetensors, safetensors_index, gguf, torch_zip, torch_index, torch_legacy, dcp, manifest, hub_cache]
BY_RANKS = [dcp_of_ranks, lightning_sharded, deepspeed_2, deepspeed_3]
OVER_URL = [safetensors, safetensors_index, gguf, torch_zip, torch_index, torch_legacy]
"""What is read from ``memory://``, too: other code reads it there."""
