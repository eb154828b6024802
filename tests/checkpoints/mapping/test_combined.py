"""Several checkpoints as one: no key of one is taken for another's."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from fabric_init.checkpoints import Transpose, open_checkpoint
from fabric_init.checkpoints.mapping.combined import CombinedReader
from fabric_init.planning.recorded_load.converted import converted


def test_one_file_that_is_converted_in_two_ways_has_both_values(tmp_path: Path) -> None:
    save_file({"weight": torch.arange(4.0).reshape(2, 2)}, tmp_path / "base.safetensors")
    save_file({"weight": torch.arange(4.0, 8.0).reshape(2, 2)}, tmp_path / "other.safetensors")
    base = open_checkpoint(tmp_path / "base.safetensors")
    plain = open_checkpoint(tmp_path / "other.safetensors")
    transposed = converted(plain, [Transpose(["weight"])])
    readers = [base, plain, transposed]
    several = CombinedReader(readers)
    for reader in readers:
        assert torch.equal(several.read(several.key(reader, "weight")), reader.read("weight"))
    assert len(several.keys()) == 3
