"""Small files that would make much work: opening them takes time and memory in proportion to their size."""

from __future__ import annotations

import json
import struct
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fabric_init.checkpoints import open_checkpoint
from fabric_init.errors import FabricInitError

SECONDS = 20.0
"""Far more than any of them takes, and far less than any of them took."""


def _text(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text)) + text.encode()


def _zip_of(pickle: bytes, folder: Path) -> Path:
    path = folder / "file.pt"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a/data.pkl", pickle)
    return path


def nested_dicts(folder: Path) -> Path:
    depth = 30_000
    return _zip_of(b"\x80\x02" + (b"}" + _text("a")) * depth + b"}" + b"s" * depth + b".", folder)


def shared_lists(folder: Path) -> Path:
    pickle = b"\x80\x02}" + _text("n0") + b"]q\x01s"
    for level in range(1, 60):
        name = "_extra_state" if level == 59 else f"n{level}"
        pickle += _text(name) + b"](h%ch%ceq%cs" % (level, level, level + 1)
    tensor = b"ctorch._utils\n_rebuild_meta_tensor_no_storage\n(ctorch\nfloat32\nK\x01\x85K\x01\x85\x89tR"
    return _zip_of(pickle + _text("w") + tensor + b"s.", folder)


def a_shape_of_many_sizes(folder: Path) -> Path:
    header = json.dumps({"w": {"dtype": "F32", "shape": [0] + [2**62] * 50_000, "data_offsets": [0, 0]}}).encode()
    path = folder / "long.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    return path


@pytest.mark.parametrize("write", [nested_dicts, shared_lists, a_shape_of_many_sizes], ids=lambda write: write.__name__)
def test_a_small_file_takes_little_time_and_memory(write: Callable[[Path], Path], tmp_path: Path) -> None:
    path = write(tmp_path)
    tracemalloc.start()
    start = time.process_time()
    with pytest.raises(FabricInitError):
        open_checkpoint(path)
    seconds, (_, peak) = time.process_time() - start, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seconds < SECONDS
    assert peak < 100 * path.stat().st_size + (1 << 24)


def test_lists_that_extra_state_shares_stay_shared(tmp_path: Path) -> None:
    shared = [torch.ones(2)]
    torch.save({"w": torch.ones(1), "_extra_state": {"one": shared, "two": shared}}, tmp_path / "file.pt")
    state = open_checkpoint(tmp_path / "file.pt").extra_state["_extra_state"]
    assert state["one"] is state["two"]
    assert torch.equal(state["one"][0], torch.ones(2))
