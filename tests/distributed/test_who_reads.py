"""Which way of reading is taken, and that a wrong one is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fabric_init import Fabric
from fabric_init.checkpoints import SafetensorsReader
from fabric_init.distributed.agreement import SingleProcess
from fabric_init.distributed.who_reads import choose_io, open_on_all_ranks
from fabric_init.option_names import Io
from fabric_init.planning.checkpoint_source import CheckpointSource


@pytest.mark.parametrize(
    ("whole", "machines", "file_system", "expected"),
    [
        (True, 2, "nfs4", "broadcast"),
        (True, 8, "fuse.gcsfuse", "broadcast"),
        (False, 2, "nfs4", "local"),  # shards: each byte is read once in total anyway
        (True, 1, "nfs4", "local"),  # ranks of one machine share what it has read
        (True, 2, "ext4", "local"),
        (True, 2, None, "local"),
    ],
)
def test_auto_broadcasts_whole_models_from_network_storage_to_several_machines(
    whole: bool, machines: int, file_system: str | None, expected: str
) -> None:
    assert choose_io("auto", whole=whole, machines=machines, file_system=file_system) == expected


@pytest.mark.parametrize("io", ["local", "broadcast"])
@pytest.mark.parametrize("whole", [True, False])
def test_what_the_user_says_is_done(io: Io, whole: bool) -> None:
    assert choose_io(io, whole=whole, machines=2, file_system="nfs4") == io
    assert choose_io(io, whole=whole, machines=1, file_system="ext4") == io


def test_fabric_refuses_another_way() -> None:
    with pytest.raises(ValueError, match=r"io='remote': give 'local' .*, 'broadcast' .* or 'auto'"):
        Fabric(accelerator="cpu", devices=1, io="remote")


@pytest.mark.parametrize("io", ["auto", "local", "broadcast"])
def test_one_process_reads_by_itself(io: Io, tmp_path: Path) -> None:
    save_file({"weight": torch.ones(2)}, tmp_path / "m.safetensors")
    reader = open_on_all_ranks(
        CheckpointSource(tmp_path / "m.safetensors"), io, whole=True, machines=1, agreement=SingleProcess()
    )
    assert isinstance(reader, SafetensorsReader)
