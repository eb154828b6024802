"""A checkpoint in several files: every broken promise of the index is seen at opening."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fabric_init.checkpoints import Box, ShardedReader, Span
from fabric_init.errors import CheckpointFormatError, CheckpointNotFoundError

STATE = {f"layers.{i}.w": torch.full((4, 6), float(i)) for i in range(6)}


def write(folder: Path, suffix: str = ".safetensors", weight_map: object = None) -> Path:
    """Three shards with two tensors each, and their index."""
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for number, (key, value) in enumerate(STATE.items()):
        shards.setdefault(f"part-{number % 3}{suffix}", {})[key] = value
    for name, shard in shards.items():
        save_file(shard, folder / name) if suffix == ".safetensors" else torch.save(shard, folder / name)
    if weight_map is None:
        weight_map = {key: name for name, shard in shards.items() for key in shard}
    index = folder / ("model.safetensors.index.json" if suffix == ".safetensors" else "pytorch_model.bin.index.json")
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("mmap", [True, False], ids=["mapped", "copied"])
def test_tensors_and_regions_come_from_the_right_shard(tmp_path: Path, suffix: str, mmap: bool) -> None:
    reader = ShardedReader(write(tmp_path, suffix), path=tmp_path, mmap=mmap)
    assert sorted(reader.keys()) == sorted(STATE)
    assert reader.path == tmp_path
    assert reader.note is None
    assert reader.format == ("sharded safetensors" if suffix == ".safetensors" else "sharded torch")
    for key, value in STATE.items():
        assert reader.spec(key).shape == value.shape
        assert torch.equal(reader.read(key), value)
        assert torch.equal(reader.read(key, Box((1, 2), (2, 3))), value[1:3, 2:5])
        assert torch.equal(reader.read(key, Span(3, 9)), value.flatten()[3:9])


def test_shards_that_are_links_out_of_the_folder_are_read_as_in_the_hubs_cache(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    index = write(blobs)
    for entry in blobs.iterdir():
        (snapshot / entry.name).symlink_to(entry)
    assert torch.equal(ShardedReader(snapshot / index.name).read("layers.1.w"), STATE["layers.1.w"])


def test_a_missing_shard_is_named_with_the_number_of_its_keys(tmp_path: Path) -> None:
    index = write(tmp_path)
    (tmp_path / "part-1.safetensors").unlink()
    with pytest.raises(
        CheckpointNotFoundError, match=r"index\.json names the shard 'part-1\.safetensors', which holds 2"
    ):
        ShardedReader(index)
    (tmp_path / "part-1.safetensors").mkdir()
    with pytest.raises(CheckpointNotFoundError, match="there is no such file"):
        ShardedReader(index)


def test_a_key_that_its_shard_lacks_is_named_with_the_shard(tmp_path: Path) -> None:
    index = write(tmp_path, weight_map={"layers.0.w": "part-0.safetensors", "gone": "part-1.safetensors"})
    with pytest.raises(CheckpointFormatError, match=r"'gone' is in part-1\.safetensors, which does not hold it"):
        ShardedReader(index)


def test_tensors_that_the_index_does_not_list_are_ignored_and_noted(tmp_path: Path) -> None:
    reader = ShardedReader(write(tmp_path, weight_map={"layers.0.w": "part-0.safetensors"}))
    assert reader.keys() == ("layers.0.w",)
    assert reader.note == "tensors in the shards that the index does not list, ignored: 1"


@pytest.mark.parametrize(
    "name", ["../part-0.safetensors", "/etc/passwd", "a/../../b.safetensors", "..\\b.bin", "C:\\b.bin", "C:b.bin", ""]
)
def test_a_shard_outside_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "inner").mkdir()
    write(tmp_path)
    with pytest.raises(CheckpointFormatError, match="outside its folder"):
        ShardedReader(write(tmp_path / "inner", weight_map={"layers.0.w": name}))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"is empty"),
        ("{", "is not a readable index"),
        ("[1]", 'has no "weight_map"'),
        ('{"weight_map": []}', 'has no "weight_map"'),
        ('{"weight_map": {}}', 'has no "weight_map"'),
        ('{"weight_map": {"a": 3}}', "the file of 'a' should be a name, and is 3"),
        ('{"weight_map": {"a": "x", "a": "y"}}', "the key 'a' is given twice"),
        ('{"weight_map": {"a": "x\\u0000y"}}', "there is no such file"),
        ('{"weight_map": ' + "[" * 200_000, "is not a readable index"),
        ('{"weight_map": ' + "9" * 10_000 + "}", "is not a readable index"),
    ],
)
def test_a_broken_index_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(text)
    with pytest.raises((CheckpointFormatError, CheckpointNotFoundError), match=message) as caught:
        ShardedReader(index)
    assert str(index) in str(caught.value)


def test_an_index_that_is_not_utf8_or_far_too_large_is_refused(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_bytes(b'{"weight_map": {"\xff\xfe": "x"}}')
    with pytest.raises(CheckpointFormatError, match="is not a readable index"):
        ShardedReader(index)
    with index.open("wb") as file:
        file.truncate(1 << 40)  # sparse: takes no space, and would take a terabyte of memory
    with pytest.raises(CheckpointFormatError, match="an index has at most"):
        ShardedReader(index)


def test_extra_state_and_notes_of_torch_shards_are_passed_on(tmp_path: Path) -> None:
    shard: dict[str, Any] = {"model": {"w": torch.ones(1), "q._extra_state": {"scale": 2}}}
    torch.save(shard, tmp_path / "a.bin")
    (tmp_path / "x.bin.index.json").write_text(json.dumps({"weight_map": {"w": "a.bin"}}))
    reader = ShardedReader(tmp_path / "x.bin.index.json")
    assert reader.extra_state == {"q._extra_state": {"scale": 2}}
    assert reader.note == "a.bin: state dict found under 'model'"


def test_shards_in_the_legacy_format_are_read(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(3)}, tmp_path / "a.bin", _use_new_zipfile_serialization=False)
    (tmp_path / "x.bin.index.json").write_text(json.dumps({"weight_map": {"w": "a.bin"}}))
    reader = ShardedReader(tmp_path / "x.bin.index.json")
    assert torch.equal(reader.read("w", Span(1, 3)), torch.ones(2))
    assert reader.note == "a.bin: legacy format of before torch 1.6: all of the file is in memory"


def test_an_unknown_key_is_a_key_error(tmp_path: Path) -> None:
    reader = ShardedReader(write(tmp_path))
    for ask in (reader.spec, reader.read):
        with pytest.raises(KeyError, match="has no tensor 'nope'"):
            ask("nope")
