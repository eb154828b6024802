"""SHA-256 digests checked while reading: no changed byte of a weight gets into a model."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from fabric_init import Fabric
from fabric_init.checkpoints import Span, open_checkpoint, take, write_manifest
from fabric_init.errors import CheckpointError, CheckpointFormatError, CheckpointNotFoundError
from tests.support.dcp_writers import save_alone
from tests.support.recordings import is_recorded
from tests.support.regions import regions
from tests.support.web_server import serving

STATE = {
    "a": torch.arange(600.0).reshape(20, 30),
    "b": torch.arange(100, dtype=torch.bfloat16),
    "c": torch.arange(7, dtype=torch.int8),
}
BLOCK = 256


@pytest.fixture(scope="module", params=["m.safetensors", "m.pt"])
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with a manifest of each kind beside it."""
    path: Path = tmp_path_factory.mktemp("sums") / request.param
    (save_file if path.suffix == ".safetensors" else torch.save)(STATE, path)
    write_manifest(path, path.parent / "BLOCKS", block_bytes=BLOCK)
    plain = subprocess.run(["sha256sum", path.name], cwd=path.parent, check=True, capture_output=True, text=True)
    (path.parent / "PLAIN").write_text(plain.stdout)
    return path


@pytest.mark.parametrize("sums", ["PLAIN", "BLOCKS"])
@settings(max_examples=100, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_an_unchanged_file_reads_as_without(file: Path, sums: str, data: st.DataObject) -> None:
    reader = open_checkpoint(file, manifest=file.parent / sums, mmap=data.draw(st.booleans()))
    assert sorted(reader.keys()) == sorted(STATE)
    key = data.draw(st.sampled_from(sorted(STATE)))
    region = data.draw(regions(tuple(STATE[key].shape)))
    assert torch.equal(reader.read(key, region), take(STATE[key], region))


def test_sha256sum_itself_takes_what_is_written(file: Path) -> None:
    subprocess.run(["sha256sum", "--check", "--strict", "BLOCKS"], cwd=file.parent, check=True, capture_output=True)


@pytest.mark.parametrize("sums", ["PLAIN", "BLOCKS"])
@settings(max_examples=200, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_changed_byte_gets_into_a_tensor(file: Path, sums: str, data: st.DataObject) -> None:
    folder = file.parent / "changed"
    folder.mkdir(exist_ok=True)
    changed = folder / file.name
    content = bytearray(file.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] ^= data.draw(st.integers(1, 255))
    changed.write_bytes(content)
    refusal = None
    try:
        reader = open_checkpoint(changed, manifest=file.parent / sums, mmap=data.draw(st.booleans()))
        for key in reader.keys():
            assert torch.equal(reader.read(key), STATE[key])
    except CheckpointFormatError as error:
        refusal = str(error)
    if sums == "PLAIN":
        assert refusal is not None
    # With blocks, a byte in the zip's padding that no read ever touches may go unseen: no tensor has it.
    assert refusal is None or str(changed) in refusal


@pytest.mark.parametrize("cut", [-1, 1])
def test_a_file_that_lost_or_gained_bytes_is_refused(file: Path, tmp_path: Path, cut: int) -> None:
    content = file.read_bytes()
    for sums in ("PLAIN", "BLOCKS"):
        (tmp_path / file.name).write_bytes(content[:-1] if cut < 0 else content + bytes(BLOCK))
        with pytest.raises(CheckpointFormatError, match=r"m\.\w+(: SHA-256 mismatch| has| is not a complete)"):
            reader = open_checkpoint(tmp_path / file.name, manifest=file.parent / sums)
            for key in reader.keys():
                reader.read(key)


def test_with_blocks_a_region_costs_its_blocks_and_not_the_file(tmp_path: Path) -> None:
    save_file({"big": torch.arange(2_000_000.0)}, tmp_path / "m.safetensors")
    sums = write_manifest(tmp_path / "m.safetensors", block_bytes=1 << 16)
    with serving(tmp_path) as server:
        reader = open_checkpoint(f"{server.url}/m.safetensors", manifest=sums)
        server.reset()
        assert torch.equal(reader.read("big", Span(1_000_000, 1_100_000)), torch.arange(1_000_000.0, 1_100_000))
        assert server.sent <= 400_000 + 2 * (1 << 16)


def test_a_file_written_over_after_it_was_opened_is_noticed_at_the_next_read(file: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copy(file, tmp_path))
    reader = open_checkpoint(copy, manifest=file.parent / "BLOCKS", mmap=False)
    at = file.read_bytes().index(STATE["a"].numpy().tobytes())
    with copy.open("r+b") as target:
        target.seek(at + 1500)
        target.write(b"\xff\xff")
    with pytest.raises(CheckpointFormatError, match=r"changed"):
        reader.read("a")


def test_a_changed_byte_leaves_no_model_that_could_be_used(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(300, 200).state_dict(), tmp_path / "m.pt")
    sums = write_manifest(tmp_path / "m.pt", block_bytes=BLOCK)
    good = (tmp_path / "m.pt").read_bytes()
    fabric = Fabric(accelerator="cpu", devices=1)
    with fabric.init_module(checkpoint=tmp_path / "m.pt", manifest=sums):
        model = torch.nn.Linear(300, 200)
    at = good.index(model.weight.detach().numpy().tobytes()) + 1000
    del model
    (tmp_path / "m.pt").write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
    with (
        pytest.raises(CheckpointFormatError, match=r"m\.pt: SHA-256 mismatch with .*m\.pt\.sha256"),
        fabric.init_module(checkpoint=tmp_path / "m.pt", manifest=sums),
    ):
        model = torch.nn.Linear(300, 200)
    assert all(is_recorded(parameter) for parameter in model.parameters())


def test_a_sharded_checkpoint_is_checked_with_its_index(tmp_path: Path) -> None:
    save_file({"w": torch.ones(9)}, tmp_path / "s.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"w": "s.safetensors"}}')
    sums = write_manifest(tmp_path)
    assert sums == tmp_path / "SHA256SUMS"
    assert torch.equal(open_checkpoint(tmp_path, manifest=sums).read("w"), torch.ones(9))
    index.write_text('{"weight_map": {"w": "s.safetensors"} }')
    with pytest.raises(CheckpointFormatError, match=r"index.json: SHA-256 mismatch"):
        open_checkpoint(tmp_path, manifest=sums)


def test_a_file_that_is_not_listed_is_not_read(file: Path, tmp_path: Path) -> None:
    other = tmp_path / f"other{file.suffix}"
    shutil.copy(file, other)
    with pytest.raises(CheckpointFormatError, match=r"other\.\w+ is not listed in the manifest .*It lists m\."):
        open_checkpoint(other, manifest=file.parent / "BLOCKS")


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "is empty"),
        ("# nothing\n", "lists no file"),
        ("abc  m.pt\n", r"line 1: expected"),
        (f"{'0' * 64}  m.pt\n{'1' * 64}  m.pt\n", r"line 2: 'm.pt' is listed twice"),
    ],
)
def test_what_is_no_manifest_is_refused(file: Path, tmp_path: Path, text: str, error: str) -> None:
    (tmp_path / "SUMS").write_text(text)
    with pytest.raises(CheckpointFormatError, match=error):
        open_checkpoint(file, manifest=tmp_path / "SUMS")
    with pytest.raises(CheckpointNotFoundError, match="none"):
        open_checkpoint(file, manifest=tmp_path / "none")


@settings(max_examples=100, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_manifest_never_lets_a_wrong_weight_pass(file: Path, tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray((file.parent / "BLOCKS").read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "SUMS").write_bytes(content)
    try:
        reader = open_checkpoint(file, manifest=tmp_path / "SUMS")
        for key in reader.keys():
            assert torch.equal(reader.read(key), STATE[key])
    except CheckpointError:
        pass


def test_a_file_that_is_listed_and_gone_from_a_folder_is_missed(tmp_path: Path) -> None:
    folder = save_alone({"w": torch.ones(2)}, tmp_path / "checkpoint")
    assert open_checkpoint(folder, manifest=write_manifest(folder)), "the manifest itself may lie in it"
    (folder / "SHA256SUMS").unlink()
    (folder / "extra").write_text("listed, too")
    sums = write_manifest(folder, tmp_path / "sums")
    assert list(open_checkpoint(folder, manifest=sums).keys()) == ["w"]
    (folder / "extra").unlink()
    with pytest.raises(CheckpointNotFoundError, match=r"extra is listed in .*sums, and is not there"):
        open_checkpoint(folder, manifest=sums)
