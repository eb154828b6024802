"""Files that are written over while they are read, whatever their dates say, and a folder for our own that is gone."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fabric_init import FabricInitError
from fabric_init.checkpoints import open_checkpoint, write_manifest
from fabric_init.errors import CheckpointFormatError


@pytest.mark.parametrize("mmap", [True, False])
def test_a_file_that_is_written_over_with_its_old_size_and_date_is_seen(mmap: bool, tmp_path: Path) -> None:
    path = tmp_path / "live.safetensors"
    save_file({f"k{number}": torch.ones(1000) for number in range(4)}, path)
    os.utime(path, (0, 0))
    reader = open_checkpoint(path, mmap=mmap)
    reader.read("k0")
    time.sleep(0.02)  # the clock of file systems ticks slowly
    with path.open("r+b") as file:
        file.seek(-16, os.SEEK_END)
        file.write(bytes(16))
    os.utime(path, (0, 0))
    with pytest.raises(CheckpointFormatError, match="changed after it was opened"):
        reader.read("k3")


def test_a_temporary_folder_that_is_gone_is_not_blamed_on_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file({"w": torch.ones(3)}, tmp_path / "m.safetensors")
    sums = write_manifest(tmp_path / "m.safetensors")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(FabricInitError, match=r"folder for temporary files: .*gone.*TMPDIR") as raised:
        open_checkpoint(tmp_path / "m.safetensors", manifest=sums)
    assert not isinstance(raised.value, CheckpointFormatError)
