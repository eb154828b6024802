"""A path -> the right reader, or a message that says what is there instead."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fabric_init.checkpoints import CheckpointReader, open_checkpoint
from fabric_init.errors import CheckpointFormatError, CheckpointNotFoundError
from tests.support.dcp_writers import save_alone

W = {"w": torch.ones(2)}


def put(folder: Path, *names: str) -> None:
    for name in names:
        if name.endswith(".index.json"):
            shard = "s.safetensors" if ".safetensors." in name else "s.bin"
            put(folder, shard)
            (folder / name).write_text(json.dumps({"weight_map": {"w": shard}}))
        elif name.endswith(".safetensors"):
            save_file(W, folder / name)
        else:
            torch.save(W, folder / name)


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    put(tmp_path, "model.safetensors")
    assert tuple(open_checkpoint("~/model.safetensors").keys()) == ("w",)
    with pytest.raises(CheckpointNotFoundError, match=f"{tmp_path}/nothing.pt does not exist"):
        open_checkpoint("~/nothing.pt")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["model.safetensors"], "safetensors"),
        (["adapter_model.safetensors"], "safetensors"),
        (["pytorch_model.bin"], "torch"),
        (["lit_model.pth"], "torch"),
        (["checkpoint.ckpt", "optimizer.pt", "training_args.bin"], "torch"),
        # as from_pretrained, whose order this is: the index may be left from an earlier save
        (["model.safetensors", "model.safetensors.index.json"], "safetensors"),
        (["pytorch_model.bin", "pytorch_model.bin.index.json"], "torch"),
        (["x.safetensors.index.json", "pytorch_model.bin.index.json"], "sharded safetensors"),
        (["model.safetensors", "model.fp16.safetensors", "pytorch_model.bin.index.json"], "safetensors"),
        (["pytorch_model.bin", "other.pt"], "torch"),
    ],
)
def test_a_folder_opens_what_is_preferred_in_it(tmp_path: Path, names: list[str], expected: str) -> None:
    put(tmp_path, *names)
    reader = open_checkpoint(tmp_path)
    assert reader.format == expected
    assert torch.equal(reader.read("w"), W["w"])


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize(
    "name", ["m.safetensors", "m.bin", "model.safetensors.index.json", "pytorch_model.bin.index.json"]
)
def test_a_file_or_an_index_may_be_named_itself(tmp_path: Path, name: str, mmap: bool) -> None:
    put(tmp_path, name)
    reader: CheckpointReader = open_checkpoint(str(tmp_path / name), mmap=mmap)
    assert reader.path == tmp_path / name
    assert torch.equal(reader.read("w"), W["w"])


def test_content_counts_and_not_the_suffix(tmp_path: Path) -> None:
    save_file(W, tmp_path / "a.bin")
    torch.save(W, tmp_path / "b.weights")
    assert open_checkpoint(tmp_path / "a.bin").format == "safetensors"
    assert open_checkpoint(tmp_path / "b.weights").format == "torch"


def test_a_missing_path_names_itself_and_what_is_near(tmp_path: Path) -> None:
    put(tmp_path, "model.safetensors")
    with pytest.raises(
        CheckpointNotFoundError, match=r"modle\.safetensors does not exist\. .* there is model\.safetensors"
    ):
        open_checkpoint(tmp_path / "modle.safetensors")
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        open_checkpoint(tmp_path / "no" / "model.safetensors")
    with pytest.raises(CheckpointNotFoundError, match="does not exist"):
        open_checkpoint(tmp_path / "a\0b")
    with pytest.raises(CheckpointFormatError, match="cannot be opened"):
        open_checkpoint(tmp_path / ("a" * 1000))


def test_a_folder_without_a_checkpoint_says_what_was_looked_for_and_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match=r"Looked for .*; found an empty folder"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "sub").mkdir()
    put(tmp_path, "optimizer.bin")
    with pytest.raises(
        CheckpointNotFoundError, match=r"pytorch_model\.bin.*found config\.json, optimizer\.bin, sub/\."
    ):
        open_checkpoint(tmp_path)


def test_several_unrelated_files_are_named_rather_than_guessed_at(tmp_path: Path) -> None:
    put(tmp_path, "a.safetensors", "b.safetensors")
    with pytest.raises(CheckpointFormatError, match=r"2 files that could be meant: a\.safetensors, b\.safetensors"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("asked", ["", ".metadata"])
def test_a_distributed_checkpoint_is_preferred_to_the_torch_file_that_lightning_puts_beside_it(
    tmp_path: Path, asked: str, mmap: bool
) -> None:
    save_alone({"model": W}, tmp_path)
    put(tmp_path, "meta.pt")
    reader = open_checkpoint(tmp_path / asked, mmap=mmap)
    assert reader.format == "torch.distributed.checkpoint"
    assert torch.equal(reader.read("w"), W["w"])
    with pytest.raises(CheckpointFormatError, match=rf"give the folder, {tmp_path}"):
        open_checkpoint(tmp_path / "__0_0.distcp")


def test_a_state_dict_can_be_named_where_there_are_several(tmp_path: Path) -> None:
    content = {"generator": W, "critic": {"w": torch.zeros(2)}}
    torch.save(content, tmp_path / "m.ckpt")
    save_alone(content, tmp_path / "folder")
    for path in (tmp_path / "m.ckpt", tmp_path / "folder"):
        with pytest.raises(CheckpointFormatError, match="entry='generator'"):
            open_checkpoint(path)
        assert torch.equal(open_checkpoint(path, entry="critic").read("w"), torch.zeros(2))
    put(tmp_path, "m.safetensors")
    with pytest.raises(CheckpointFormatError, match=r"m\.safetensors holds a single state dict; remove entry='critic'"):
        open_checkpoint(tmp_path / "m.safetensors", entry="critic")


@pytest.mark.parametrize("name", ["m.safetensors", "m.bin"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
        (b"GGUF\3\0\0\0", "GGUF"),
        (b"<!DOCTYPE html>", "error page"),
        (b"\x1f\x8b\x08\0", "gzip"),
    ],
)
def test_what_people_have_instead_of_weights_is_recognized(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointFormatError, match=message) as caught:
        open_checkpoint(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


def test_an_unknown_format_says_how_it_begins(tmp_path: Path) -> None:
    (tmp_path / "m.weights").write_bytes(b"hello world")
    with pytest.raises(CheckpointFormatError, match=r"no format that is known here .* begins with b'hello wo'"):
        open_checkpoint(tmp_path / "m.weights")
