"""One .safetensors file: zero copy, regions, and what is refused."""

from __future__ import annotations

import json
import os
import struct
import threading
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import save_file

from fabric_init.checkpoints import Box, Region, SafetensorsReader, Span, TensorSpec, take
from fabric_init.errors import CheckpointFormatError, CheckpointNotFoundError

BOTH = pytest.mark.parametrize("mmap", [True, False], ids=["mapped", "copied"])
REGIONS: list[Region | None] = [
    None,
    Box((1, 2), (3, 4)),
    Box((2, 0), (2, 8)),
    Box((0, 0), (0, 8)),
    Span(5, 29),
    Span(0, 0),
]
DTYPE_NAMES = [
    "bool",
    "uint8",
    "int8",
    "uint16",
    "int16",
    "uint32",
    "int32",
    "uint64",
    "int64",
    "float16",
    "bfloat16",
    "float32",
    "float64",
    "complex64",
    "float8_e4m3fn",
    "float8_e5m2",
    "float8_e8m0fnu",
    "float8_e4m3fnuz",
    "float8_e5m2fnuz",
]
DTYPES = [getattr(torch, name) for name in DTYPE_NAMES]


def write_raw(path: Path, header: dict[str, object] | bytes, data: bytes = b"") -> Path:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)
    return path


def entry(dtype: str, shape: list[int], start: int, stop: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def same_bytes(left: torch.Tensor, right: torch.Tensor) -> bool:
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    flat = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (left, right)]
    return torch.equal(*flat)


@BOTH
def test_keys_shapes_and_dtypes_come_from_the_header(tmp_path: Path, mmap: bool) -> None:
    save_file({"b": torch.zeros(2, 3), "a": torch.zeros(4, dtype=torch.bfloat16)}, tmp_path / "x.safetensors")
    reader = SafetensorsReader(tmp_path / "x.safetensors", mmap=mmap)
    assert sorted(reader.keys()) == ["a", "b"]
    assert reader.spec("a") == TensorSpec(torch.Size([4]), torch.bfloat16)
    assert reader.spec("b") == TensorSpec(torch.Size([2, 3]), torch.float32)
    assert (reader.format, reader.note, reader.path) == ("safetensors", None, tmp_path / "x.safetensors")


@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_is_read_bit_for_bit(tmp_path: Path, dtype: torch.dtype, mmap: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    raw = torch.randint(0, 2 if dtype is torch.bool else 256, (6 * 8 * dtype.itemsize,), generator=generator)
    tensor = raw.to(torch.uint8).view(dtype).reshape(6, 8)
    save_file({"w": tensor, "other": torch.zeros(3)}, tmp_path / "x.safetensors")
    reader = SafetensorsReader(tmp_path / "x.safetensors", mmap=mmap)
    for region in REGIONS:
        assert same_bytes(reader.read("w", region), take(tensor, region)), region


@BOTH
def test_scalars_and_empty_tensors_are_read(tmp_path: Path, mmap: bool) -> None:
    save_file({"scalar": torch.tensor(7.0), "empty": torch.zeros(0, 3), "w": torch.ones(2)}, tmp_path / "x.safetensors")
    reader = SafetensorsReader(tmp_path / "x.safetensors", mmap=mmap)
    assert reader.read("scalar").item() == 7.0
    assert reader.read("empty").shape == (0, 3)
    assert torch.equal(reader.read("w"), torch.ones(2))


def test_a_mapped_tensor_lies_in_the_map_and_writing_to_it_never_reaches_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"w": torch.zeros(1000, 100)}, path)
    before = path.read_bytes()
    parameter = torch.nn.Parameter(SafetensorsReader(path).read("w"))
    maps = [row.split()[0] for row in Path("/proc/self/maps").read_text().splitlines() if row.endswith(str(path))]
    bounds = [tuple(int(end, 16) for end in row.split("-")) for row in maps]
    assert any(start <= parameter.data_ptr() < stop for start, stop in bounds)
    with torch.no_grad():
        parameter.fill_(3.0)
    assert path.read_bytes() == before
    assert torch.equal(SafetensorsReader(path).read("w"), torch.zeros(1000, 100))


def test_the_tensor_outlives_its_reader_and_is_nobodys_view(tmp_path: Path) -> None:
    save_file({"w": torch.arange(12.0).reshape(3, 4), "v": torch.ones(50)}, tmp_path / "x.safetensors")
    tensor = SafetensorsReader(tmp_path / "x.safetensors").read("w")
    assert torch.equal(tensor, torch.arange(12.0).reshape(3, 4))
    assert tensor._base is None
    assert tensor._version == 0
    assert tensor.untyped_storage().nbytes() == 48, "a storage of its own, so saving it saves nothing else"


def test_opening_and_reading_a_mapped_file_takes_no_memory_until_it_is_touched(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"w": torch.zeros(64 << 20, dtype=torch.uint8)}, path)
    reader = SafetensorsReader(path)
    process = psutil.Process()
    start = process.memory_info().rss
    tensor, rows = reader.read("w"), reader.read("w", Span(10 << 20, 20 << 20))
    assert process.memory_info().rss - start < 8 << 20
    rows.sum()
    assert process.memory_info().rss - start < 32 << 20, "touching a region maps no more than the region"
    assert tensor.shape == (64 << 20,)


def test_a_copy_of_a_region_takes_the_memory_of_the_region(tmp_path: Path) -> None:
    save_file({"w": torch.arange(1 << 20).reshape(1 << 10, 1 << 10)}, tmp_path / "x.safetensors")
    part = SafetensorsReader(tmp_path / "x.safetensors", mmap=False).read("w", Box((3, 5), (1000, 7)))
    assert part.untyped_storage().nbytes() == 1000 * 7 * 8
    assert torch.equal(part, torch.arange(1 << 20).reshape(1 << 10, 1 << 10)[3:1003, 5:12])


def test_a_copy_by_rows_reads_no_other_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fabric_init.checkpoints.storage import local as file_bytes

    save_file({"w": torch.arange(60).reshape(10, 6)}, tmp_path / "x.safetensors")
    reader = SafetensorsReader(tmp_path / "x.safetensors", mmap=False)
    seen: list[int] = []
    plain = file_bytes._read_into

    def counting(file: object, start: int, target: memoryview, source: object) -> None:
        seen.append(len(target))
        plain(file, start, target, source)  # type: ignore[arg-type]

    monkeypatch.setattr(file_bytes, "_read_into", counting)
    assert torch.equal(reader.read("w", Box((4, 0), (2, 6))), torch.arange(24, 36).reshape(2, 6))
    assert torch.equal(reader.read("w", Span(7, 11)), torch.arange(7, 11))
    assert seen == [2 * 6 * 8, 4 * 8]
    monkeypatch.setattr(file_bytes, "_GATHER_BYTES", 0)
    assert torch.equal(reader.read("w", Box((4, 1), (2, 2))), torch.arange(60).reshape(10, 6)[4:6, 1:3])
    assert seen[2:] == [2 * 8, 2 * 8]


@BOTH
def test_data_that_is_not_aligned_is_still_right(tmp_path: Path, mmap: bool) -> None:
    data = struct.pack("<4f", 1.0, 2.0, 3.0, 4.0)
    header = b'{"w":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'
    path = write_raw(tmp_path / "x.safetensors", header + b" " * (4 - (8 + len(header)) % 4 + 1), data)
    tensor = SafetensorsReader(path, mmap=mmap).read("w")
    assert tensor.tolist() == [1.0, 2.0, 3.0, 4.0]
    assert tensor.data_ptr() % 4 == 0


@BOTH
def test_threads_may_read_at_once(tmp_path: Path, mmap: bool) -> None:
    state = {f"w{i}": torch.full((100, 10), i) for i in range(50)}
    save_file(state, tmp_path / "x.safetensors")
    reader = SafetensorsReader(tmp_path / "x.safetensors", mmap=mmap)
    wrong: list[str] = []

    def work() -> None:
        wrong.extend(
            key for key in state if not torch.equal(reader.read(key, Span(3, 900)), state[key].flatten()[3:900])
        )

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@BOTH
def test_reading_ignores_a_default_device(tmp_path: Path, mmap: bool) -> None:
    save_file({"w": torch.ones(4), "empty": torch.ones(0)}, tmp_path / "x.safetensors")
    with torch.device("meta"):
        reader = SafetensorsReader(tmp_path / "x.safetensors", mmap=mmap)
        assert {reader.read(key).device.type for key in reader.keys()} == {"cpu"}


def test_an_unknown_key_is_a_key_error_that_names_the_file(tmp_path: Path) -> None:
    save_file({"w": torch.ones(4)}, tmp_path / "x.safetensors")
    reader = SafetensorsReader(tmp_path / "x.safetensors")
    for ask in (reader.spec, reader.read):
        with pytest.raises(KeyError, match=r"x\.safetensors has no tensor 'nope'"):
            ask("nope")


@BOTH
@pytest.mark.parametrize("cut", [1, 7, 8, 30, -1])
def test_a_truncated_file_is_refused_before_any_weight_is_read(tmp_path: Path, cut: int, mmap: bool) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"w": torch.ones(100)}, path)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(CheckpointFormatError, match=r"x\.safetensors is not a complete safetensors file"):
        SafetensorsReader(path, mmap=mmap)


@BOTH
def test_a_file_cut_short_after_opening_is_an_error_and_no_crash(tmp_path: Path, mmap: bool) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"w": torch.ones(10_000)}, path)
    reader = SafetensorsReader(path, mmap=mmap)
    os.truncate(path, 5000)
    with pytest.raises(CheckpointFormatError, match="changed after it was opened"):
        reader.read("w")


def test_a_copied_file_that_is_replaced_after_opening_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"w": torch.ones(10)}, path)
    reader = SafetensorsReader(path, mmap=False)
    path.unlink()
    with pytest.raises(CheckpointFormatError, match="can no longer be read"):
        reader.read("w")
    save_file({"w": torch.zeros(10)}, path)
    os.utime(path, ns=(1, 1))
    with pytest.raises(CheckpointFormatError, match="changed after it was opened"):
        reader.read("w")


@pytest.mark.parametrize("code", ["F4", "F6_E2M3", "F6_E3M2"])
def test_a_dtype_that_torch_lacks_is_named_with_its_key(tmp_path: Path, code: str) -> None:
    bits = 4 if code == "F4" else 6
    path = write_raw(tmp_path / "x.safetensors", {"blk.w": entry(code, [8], 0, bits)}, b"\0" * bits)
    with pytest.raises(CheckpointFormatError, match=rf"x\.safetensors: tensor 'blk\.w' has dtype {code}"):
        SafetensorsReader(path)


BAD_HEADERS = {
    "huge header length": (struct.pack("<Q", 2**60) + b"{}", "header too large"),
    "overlap": ({"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 0, 4)}, "invalid offset"),
    "hole": ({"a": entry("F32", [1], 4, 8)}, "invalid offset"),
    "beyond the end": ({"a": entry("F32", [100], 0, 400)}, "not fully covered"),
    "backwards": ({"a": entry("F32", [1], 8, 4)}, "invalid offset"),
    "huge shape": ({"a": entry("F32", [2**62, 2**62], 0, 8)}, "overflow"),
    "huge empty shape": (
        {"a": entry("F32", [0, 2**62, 2**62], 0, 0), "b": entry("F32", [2], 0, 8)},
        "beyond what torch",
    ),
    "negative shape": ({"a": entry("F32", [-1], 0, 8)}, "invalid"),
    "unknown dtype": (
        {"a": entry("F33", [1], 0, 8)},
        "tensor 'a' has dtype F33, which the safetensors library does not know",
    ),
    "not an object": (b"[1, 2]", "header"),
    "not UTF-8": (b'{"\xff": 1}', "UTF-8"),
    "deep nesting": (b'{"__metadata__":' + b"[" * 100_000, "header"),
    "deep value": (b'{"a":' * 50_000, "header"),
    "key given twice": (
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        "has 'a' twice",
    ),
}


@BOTH
@pytest.mark.parametrize("name", BAD_HEADERS)
def test_a_hostile_header_is_refused_by_name(tmp_path: Path, name: str, mmap: bool) -> None:
    header, message = BAD_HEADERS[name]
    path = tmp_path / "x.safetensors"
    if name == "huge header length":
        assert isinstance(header, bytes)
        path.write_bytes(header)
    else:
        write_raw(path, header, b"\0" * 8)
    with pytest.raises(CheckpointFormatError, match=message) as caught:
        SafetensorsReader(path, mmap=mmap)
    assert str(path) in str(caught.value)


def test_metadata_that_looks_like_an_entry_is_no_duplicate(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "x.safetensors", metadata={"data_offsets": "1"})
    assert SafetensorsReader(tmp_path / "x.safetensors").keys() == ("w",)


def test_missing_files_folders_pipes_and_empty_files_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="does not exist"):
        SafetensorsReader(tmp_path / "none.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(CheckpointFormatError, match="is a folder"):
        SafetensorsReader(tmp_path / "folder.safetensors")
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(CheckpointFormatError, match="not a regular file"):
        SafetensorsReader(tmp_path / "pipe.safetensors")
    (tmp_path / "empty.safetensors").touch()
    with pytest.raises(CheckpointFormatError, match=r"is empty \(0 bytes\)"):
        SafetensorsReader(tmp_path / "empty.safetensors")
    with pytest.raises(CheckpointFormatError, match="null"):
        SafetensorsReader(tmp_path / "a\0b.safetensors")


def test_a_file_that_may_not_be_read_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "x.safetensors")

    def refuse(path: Path) -> None:  # a mode of 0 does not stop root, who may be running this
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("fabric_init.checkpoints.storage.local.FileIO", refuse)
    with pytest.raises(CheckpointFormatError, match=r"x\.safetensors cannot be read: .*Permission denied"):
        SafetensorsReader(tmp_path / "x.safetensors")


def test_a_file_without_a_tensor_has_no_keys(tmp_path: Path) -> None:
    save_file({}, tmp_path / "x.safetensors")
    assert SafetensorsReader(tmp_path / "x.safetensors").keys() == ()
