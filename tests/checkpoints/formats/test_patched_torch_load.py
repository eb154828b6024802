"""A program that has replaced ``torch.load`` by one that runs code does not make us run any."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from fabric_init.checkpoints import open_checkpoint
from fabric_init.errors import CheckpointFormatError


class Code:
    def __init__(self, touched: Path) -> None:
        self.touched = touched

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.touched}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_no_code_runs_where_torch_load_is_patched(
    zipped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, touched = tmp_path / "file.pt", tmp_path / "code has run"
    torch.save({"w": torch.ones(3), "code": Code(touched)}, path, _use_new_zipfile_serialization=zipped)
    original = torch.load
    patched = functools.wraps(original)(lambda *args, **kwargs: original(*args, **{**kwargs, "weights_only": False}))
    monkeypatch.setattr(torch, "load", patched)
    monkeypatch.setattr(torch.serialization, "load", patched)
    with pytest.raises(CheckpointFormatError, match=r"could run code, so it is not loaded"):
        open_checkpoint(path)
    assert not touched.exists()
