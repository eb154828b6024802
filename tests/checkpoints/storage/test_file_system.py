"""The type of the file system that a path is on."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fabric_init.checkpoints.storage.file_system import file_system_of, is_network

TABLE = """\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
30 22 0:25 / /data rw,relatime - nfs4 server:/data rw,vers=4.2
31 30 0:26 / /data/cache rw - tmpfs tmpfs rw
32 22 0:27 / /my\\040models rw master:2 propagate_from:1 - fuse.sshfs host:/ rw
33 22 0:28 / /twice rw - ext4 /dev/sdb1 rw
34 22 0:29 / /twice rw - lustre mgs@tcp:/fs rw
not a mount
"""


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/home/me/model.safetensors", "ext4"),
        ("/data/model", "nfs4"),
        ("/data", "nfs4"),
        ("/database/model", "ext4"),
        ("/data/cache/model", "tmpfs"),
        ("/my models/llama", "fuse.sshfs"),
        ("/twice/model", "lustre"),
    ],
)
def test_it_is_that_of_the_innermost_mount(path: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "mountinfo").write_text(TABLE)
    assert file_system_of(path, tmp_path / "mountinfo") == expected


def test_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "mountinfo").write_text(TABLE)
    (tmp_path / "model").symlink_to("/data/model")
    assert file_system_of(tmp_path / "model", tmp_path / "mountinfo") == "nfs4"


def test_where_there_is_no_table_it_is_unknown(tmp_path: Path) -> None:
    assert file_system_of(tmp_path, tmp_path / "mountinfo") is None


@pytest.mark.skipif(sys.platform != "linux", reason="the table of mounts is Linux's")
def test_this_machine_has_an_answer(tmp_path: Path) -> None:
    assert file_system_of("/proc/self/status") == "proc"
    assert file_system_of(tmp_path)


def test_what_comes_over_a_network() -> None:
    assert all(map(is_network, ["nfs", "nfs4", "lustre", "beegfs", "ceph", "9p", "fuse.s3fs"]))
    assert not any(map(is_network, ["ext4", "xfs", "tmpfs", "overlay", "fuseblk", None]))
