"""Damaged and malicious folders of torch.distributed.checkpoint: errors of ours that name the file; nothing runs."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.filesystem import SerializationFormat
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, ChunkStorageMetadata, MetadataIndex

from fabric_init.checkpoints import Box, DCPReader, Span, open_checkpoint
from fabric_init.errors import CheckpointError, CheckpointFormatError, CheckpointNotFoundError
from tests.support.dcp_writers import save_alone

STATE = {"layers.0.weight": torch.ones(6, 4), "layers.0.bias": torch.zeros(4, dtype=torch.bfloat16), "step": 3}


def metadata_of(folder: Path) -> Any:
    return pickle.loads((folder / ".metadata").read_bytes())


def write_metadata(folder: Path, metadata: object) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def read_all(folder: Path, mmap: bool = True) -> None:
    reader = open_checkpoint(folder, mmap=mmap)
    for key in reader.keys():
        shape = reader.spec(key).shape
        assert shape.numel() <= 1000
        assert reader.read(key).shape == shape
        assert reader.read(key, Span(0, shape.numel())).numel() == shape.numel()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_alone(STATE, tmp_path / "checkpoint")


# -- code --------------------------------------------------------------------------------------------------------------


def test_code_in_the_metadata_is_not_run(folder: Path, harmful: object, marker: Path) -> None:
    good = (folder / ".metadata").read_bytes()
    for place in ("planner_data", "storage_meta", "storage_data", "state_dict_metadata"):
        metadata = pickle.loads(good)
        setattr(metadata, place, {"w": harmful})
        write_metadata(folder, metadata)
        with pytest.raises(CheckpointFormatError, match=r"\.metadata is not the metadata .* it names posix\.mkdir"):
            open_checkpoint(folder)
    write_metadata(folder, harmful)
    with pytest.raises(CheckpointFormatError, match=r"posix\.mkdir.*Nothing in it was run"):
        open_checkpoint(folder)
    assert not marker.exists()


def test_code_in_a_tensors_item_is_not_run(folder: Path, harmful: object, marker: Path) -> None:
    torch.save(harmful, folder / "__0_0.distcp")
    metadata = metadata_of(folder)
    for info in metadata.storage_data.values():
        info.offset, info.length = 0, (folder / "__0_0.distcp").stat().st_size
    write_metadata(folder, metadata)
    with pytest.raises(CheckpointFormatError, match=r"layers\.0\.weight.*__0_0\.distcp .*it names posix\.mkdir"):
        open_checkpoint(folder).read("layers.0.weight")
    assert not marker.exists()


def test_code_beside_the_weights_is_not_even_looked_at(folder: Path, harmful: object, marker: Path) -> None:
    torch.save({"step": harmful}, folder / "meta.pt")
    read_all(folder)
    assert not marker.exists()
    with pytest.raises(CheckpointFormatError, match=r"meta\.pt holds more than tensors: .*posix\.mkdir"):
        open_checkpoint(folder / "meta.pt")
    assert not marker.exists()


def test_code_in_an_extra_state_is_not_run(tmp_path: Path, harmful: object, marker: Path) -> None:
    reader = DCPReader(save_alone({"w": torch.ones(1), "q._extra_state": harmful}, tmp_path / "checkpoint"))
    assert torch.equal(reader.read("w"), torch.ones(1))
    with pytest.raises(CheckpointFormatError, match=r"'q\._extra_state' cannot be loaded as plain data"):
        _ = reader.extra_state["q._extra_state"]
    assert not marker.exists()


# -- files -------------------------------------------------------------------------------------------------------------


def test_a_missing_file_is_named_with_the_number_of_its_keys(folder: Path) -> None:
    (folder / "__0_0.distcp").unlink()
    with pytest.raises(CheckpointNotFoundError, match=r"names the shard '__0_0\.distcp', which holds 2 of its keys"):
        open_checkpoint(folder)


def test_missing_metadata_is_said(folder: Path) -> None:
    (folder / ".metadata").unlink()
    with pytest.raises(CheckpointNotFoundError, match=r"no checkpoint in it\. Looked for .*\.metadata"):
        open_checkpoint(folder)
    with pytest.raises(CheckpointNotFoundError, match=r"\.metadata does not exist"):
        DCPReader(folder)


@pytest.mark.parametrize("part", [0.01, 0.5, 0.99])
@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata"])
def test_a_truncated_file_is_seen_at_opening(folder: Path, name: str, part: float) -> None:
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: int(len(data) * part)])
    with pytest.raises(CheckpointFormatError, match=f"{folder / name} (has|is not)"):
        open_checkpoint(folder)


@pytest.mark.parametrize("mmap", [True, False])
def test_a_file_that_is_cut_short_after_opening_is_an_error_and_no_crash(folder: Path, mmap: bool) -> None:
    opened, read = open_checkpoint(folder, mmap=mmap), open_checkpoint(folder, mmap=mmap)
    read.read("layers.0.bias")
    (folder / "__0_0.distcp").write_bytes(b"PK\x03\x04")
    for reader in (opened, read):
        with pytest.raises(CheckpointFormatError, match=r"__0_0\.distcp"):
            reader.read("layers.0.weight")


@pytest.mark.parametrize("mmap", [True, False])
def test_a_file_that_is_replaced_before_it_is_first_read_is_seen(folder: Path, mmap: bool) -> None:
    reader = open_checkpoint(folder, mmap=mmap)
    other = save_alone({**STATE, "layers.0.weight": torch.zeros(6, 4)}, folder.parent / "other")
    (other / "__0_0.distcp").rename(folder / "__0_0.distcp")
    with pytest.raises(CheckpointFormatError, match=r"__0_0\.distcp changed after it was opened"):
        reader.read("layers.0.weight")


@pytest.mark.parametrize("name", ["../__0_0.distcp", "/etc/passwd", "..\\b", "C:b", ""])
def test_a_file_outside_the_folder_is_refused(folder: Path, name: str) -> None:
    metadata = metadata_of(folder)
    for info in metadata.storage_data.values():
        info.relative_path = name
    write_metadata(folder, metadata)
    with pytest.raises(CheckpointFormatError, match="outside its folder"):
        open_checkpoint(folder)


def test_a_huge_metadata_is_refused_unread(folder: Path) -> None:
    with (folder / ".metadata").open("r+b") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(CheckpointFormatError, match=r"\.metadata has .* bytes; metadata has at most"):
        open_checkpoint(folder)


# -- wrong metadata ----------------------------------------------------------------------------------------------------

KEY = "layers.0.weight"


def of_weight(metadata: Any) -> Any:
    return metadata.state_dict_metadata[KEY]


def chunks(*boxes: tuple[tuple[int, int], tuple[int, int]]) -> Callable[[Any], None]:
    def change(metadata: Any) -> None:
        made = [ChunkStorageMetadata(torch.Size(at), torch.Size(sizes)) for at, sizes in boxes]
        of_weight(metadata).chunks = made
        info = metadata.storage_data[MetadataIndex(KEY, (0, 0))]
        metadata.storage_data.update({MetadataIndex(KEY, chunk.offsets): info for chunk in made})

    return change


def change(path: str, value: Any) -> Callable[[Any], None]:
    """Sets an attribute of the weight's metadata, or of where it lies."""

    def apply(metadata: Any) -> None:
        target = metadata.storage_data[MetadataIndex(KEY, (0, 0))] if path in ("offset", "length") else metadata
        target = target if path in ("offset", "length", "storage_data") else of_weight(metadata)
        for name in path.split(".")[:-1]:
            target = getattr(target, name)
        setattr(target, path.split(".")[-1], value)

    return apply


WRONG: dict[str, tuple[Callable[[Any], None], str]] = {
    "a gap": (chunks(((0, 0), (5, 4))), "has 24 elements, and its chunks have 20"),
    "an overlap": (chunks(((0, 0), (4, 4)), ((3, 0), (2, 4))), "has chunks that overlap"),
    "an overlap in the other dimension": (chunks(((0, 0), (6, 3)), ((0, 2), (6, 1))), "has chunks that overlap"),
    "one that sticks out": (chunks(((0, 0), (5, 4)), ((5, 0), (4, 1))), "sticks out"),
    "no chunk": (change("chunks", []), "its chunks have 0"),
    "chunks that are none": (change("chunks", [3]), "there is a int where a ChunkStorageMetadata should be"),
    "chunks of other dimensions": (
        change("chunks", [ChunkStorageMetadata(torch.Size((0,)), torch.Size((24,)))]),
        "a chunk of other dimensions",
    ),
    "no place": (change("storage_data", {}), "nothing says where the chunk of 'layers.0.weight' at"),
    "no size": (change("size", None), "the size of 'layers.0.weight' is no list of sizes"),
    "a negative size": (change("size", torch.Size((-6, -4))), "is no list of sizes"),
    "a size beyond all": (change("size", torch.Size((2**40, 2**40))), "is no list of sizes"),
    "no dtype": (change("properties.dtype", 7), "has no dtype"),
    "sparse": (change("properties.layout", torch.sparse_coo), "is not dense"),
    "no properties": (change("properties", None), "has no dtype"),
    "a negative offset": (change("offset", -1), "has offset and length"),
    "an offset beyond the end": (change("offset", 10**12), "looks for .* at 1,000,000,000,000"),
    "a length beyond the end": (change("length", 10**12), "looks for 1,000,000,000,000 at"),
    "no tensors": (lambda metadata: metadata.state_dict_metadata.clear(), "holds no tensor"),
}
WRONG_ITEM: dict[str, tuple[Callable[[Any], None], str]] = {
    "another offset": (change("offset", 1), "does not hold what torch.save wrote at bytes 1 to"),
    "a short length": (change("length", 100), "does not hold what torch.save wrote"),
    "no length": (change("length", 0), "does not hold what torch.save wrote"),
    "another dtype": (change("properties.dtype", torch.int32), "it is a tensor of torch.float32, not torch.int32"),
    "another shape": (chunks(((0, 0), (3, 4)), ((3, 0), (3, 4))), r"of shape \(6, 4\), not \(3, 4\)"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_metadata_is_refused_at_opening(folder: Path, case: str) -> None:
    spoil, message = WRONG[case]
    metadata = metadata_of(folder)
    spoil(metadata)
    write_metadata(folder, metadata)
    with pytest.raises(CheckpointFormatError, match=message) as caught:
        open_checkpoint(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("case", WRONG_ITEM)
def test_an_item_that_is_not_what_the_metadata_says_is_refused_by_its_key(folder: Path, case: str) -> None:
    spoil, message = WRONG_ITEM[case]
    metadata = metadata_of(folder)
    spoil(metadata)
    write_metadata(folder, metadata)
    reader = open_checkpoint(folder)
    for region in (None, Box((0, 0), (1, 1)), Span(3, 20)):
        with pytest.raises(CheckpointFormatError, match=f"'layers.0.weight': (.|\n)*{message}"):
            reader.read(KEY, region)


def test_other_pickles_are_no_metadata(folder: Path) -> None:
    for content in (3, [1], {}, _MEM_FORMAT_ENCODING(0), torch.Size((1, 2))):
        write_metadata(folder, content)
        with pytest.raises(CheckpointFormatError, match=r"\.metadata: there is a .* where a Metadata should be"):
            open_checkpoint(folder)


def test_compressed_items_are_refused_by_name(folder: Path) -> None:
    metadata = metadata_of(folder)
    for info in metadata.storage_data.values():
        info.transform_descriptors = ["stream.zstd/1"]
    write_metadata(folder, metadata)
    with pytest.raises(CheckpointFormatError, match=r"'__0_0\.distcp' was written through extensions"):
        open_checkpoint(folder)


def test_an_archive_that_swells_is_not_unpacked(folder: Path) -> None:
    path = folder / "__0_0.distcp"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(1 << 26))
    metadata = metadata_of(folder)
    for info in metadata.storage_data.values():
        info.offset, info.length = 0, path.stat().st_size
    write_metadata(folder, metadata)
    before = psutil.Process().memory_info().rss
    with pytest.raises(CheckpointFormatError, match="its archive is compressed"):
        open_checkpoint(folder).read(KEY)
    assert psutil.Process().memory_info().rss - before < 16 << 20


def test_several_chunks_of_a_key_in_one_safetensors_file_are_refused(tmp_path: Path) -> None:
    state = {KEY: torch.ones(6, 4)}
    save_alone(state, tmp_path, serialization_format=SerializationFormat.SAFETENSORS)
    metadata = metadata_of(tmp_path)
    chunks(((0, 0), (3, 4)), ((3, 0), (3, 4)))(metadata)
    write_metadata(tmp_path, metadata)
    with pytest.raises(CheckpointFormatError, match=r"was to hold several chunks of 'layers\.0\.weight'"):
        open_checkpoint(tmp_path).read(KEY)


@settings(max_examples=150, deadline=5000)
@given(data=st.binary(max_size=300))
def test_any_bytes_at_all_as_metadata(data: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.getbasetemp() / "any"
    folder.mkdir(exist_ok=True)
    (folder / ".metadata").write_bytes(data)
    with pytest.raises(CheckpointError):
        open_checkpoint(folder)
