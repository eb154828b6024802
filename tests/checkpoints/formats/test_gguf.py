"""GGUF files: plain types as they are, blocks as the gguf package dequantizes them, and what is refused."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fabric_init.checkpoints import Box, GGUFReader, Span, TensorSpec, open_checkpoint, take
from fabric_init.checkpoints.formats.gguf import blocks
from fabric_init.errors import CheckpointFormatError, CheckpointNotFoundError
from tests.support.gguf_files import write_blocks, write_tensors
from tests.support.regions import regions

BOTH = pytest.mark.parametrize("mmap", [True, False], ids=["mapped", "copied"])
BLOCKS = [Type[name] for name in (
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "TQ1_0", "TQ2_0", "MXFP4",
    "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S", "IQ1_M", "IQ4_NL", "IQ4_XS",
)]  # fmt: skip


def plain(path: Path, tensors: Mapping[str, Tensor], **fields: Any) -> Path:
    return write_tensors(path, "llama", tensors, fields, lambda key, shape: Type.F32)


@BOTH
def test_plain_tensors_are_read_as_they_are_stored(tmp_path: Path, mmap: bool) -> None:
    values = torch.linspace(-3, 3, 24).view(2, 3, 4)
    kinds = {"f32": Type.F32, "f16": Type.F16, "bf16": Type.BF16}
    state = dict.fromkeys(kinds, values)
    path = write_tensors(tmp_path / "m.gguf", "llama", state, {}, lambda key, shape: kinds[key])
    reader = open_checkpoint(path, mmap=mmap)
    assert isinstance(reader, GGUFReader)
    assert (reader.keys(), reader.format, reader.note) == (tuple(kinds), "GGUF", "architecture llama")
    for key, dtype in {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}.items():
        assert reader.spec(key) == TensorSpec(torch.Size([2, 3, 4]), dtype)
        assert torch.equal(reader.read(key), values.to(dtype))
        assert torch.equal(reader.read(key, Box((0, 1, 1), (2, 2, 2))), values.to(dtype)[:, 1:, 1:3])
        assert torch.equal(reader.read(key, Span(5, 17)), values.to(dtype).flatten()[5:17])


@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.name)
def test_blocks_have_the_values_that_the_gguf_package_gives_them(tmp_path: Path, kind: Type) -> None:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = np.random.default_rng(5).integers(0, 256, (2, 3, 2 * size), dtype=np.uint8)
    path = write_blocks(tmp_path / "m.gguf", "llama", {"w": (blocks, kind)})
    with np.errstate(all="ignore"):
        expected = torch.from_numpy(gguf.quants.dequantize(blocks, kind))
    reader = GGUFReader(path)
    assert reader.spec("w") == TensorSpec(torch.Size([2, 3, 2 * block]), torch.float32)
    for region in (None, Box((0, 1, 3), (2, 2, block)), Box((1, 0, 0), (1, 3, 2 * block)), Span(7, 4 * block + 3)):
        got = reader.read("w", region)
        assert got.contiguous().numpy().tobytes() == take(expected, region).contiguous().numpy().tobytes()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_region_of_blocks_is_that_part_of_the_whole(tmp_path_factory: Any, data: st.DataObject) -> None:
    shape = (3, 2, 96)
    values = torch.sin(torch.arange(math.prod(shape))).view(shape)
    path = tmp_path_factory.getbasetemp() / "regions.gguf"
    if not path.exists():
        write_tensors(path, "llama", {"w": values}, {}, lambda key, shape: Type.Q8_0)
    reader = GGUFReader(path)
    region = data.draw(regions(shape))
    assert torch.equal(reader.read("w", region), take(reader.read("w"), region))


def test_of_a_part_only_the_blocks_that_it_touches_are_read(tmp_path: Path) -> None:
    path = write_tensors(tmp_path / "m.gguf", "llama", {"w": torch.randn(64, 256)}, {}, lambda key, shape: Type.Q8_0)
    reader = GGUFReader(path)
    file, _ = reader._tensors["w"]
    asked: list[int] = []
    original = file.tensor

    def counting(dtype: torch.dtype, offset: int, window: Any) -> Tensor:
        asked.append(math.prod(window.sizes))
        return original(dtype, offset, window)

    file.tensor = counting  # type: ignore[method-assign]
    reader.read("w", Box((32, 0), (32, 256)))
    assert asked == [32 * 256 // 32 * 34]
    reader.read("w", Box((0, 33), (64, 30)))
    assert asked[1:] == [64 * 34]


def test_a_mapped_tensor_is_not_copied(tmp_path: Path) -> None:
    reader = GGUFReader(plain(tmp_path / "m.gguf", {"w": torch.ones(8)}))
    assert reader.read("w").data_ptr() == reader.read("w").data_ptr()


def test_no_other_types_need_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain(tmp_path / "plain.gguf", {"w": torch.ones(8)})
    write_tensors(tmp_path / "blocks.gguf", "llama", {"w": torch.ones(2, 32)}, {}, lambda key, shape: Type.Q5_1)

    blocks.ggml_type.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    assert GGUFReader(tmp_path / "plain.gguf").read("w").tolist() == [1.0] * 8
    with pytest.raises(CheckpointFormatError, match=r"tensor 'w' is quantized \(type 7\).*pip install gguf"):
        GGUFReader(tmp_path / "blocks.gguf")


# -- split files -------------------------------------------------------------------------------------------------------


def split(folder: Path, count: int = 3, **wrong: Any) -> list[Path]:
    found = []
    for number in range(count):
        fields = {"split.no": number, "split.count": count, "split.tensors.count": count} | wrong
        path = folder / f"model-{number + 1:05}-of-{count:05}.gguf"
        found.append(plain(path, {f"blk.{number}.w": torch.full((2,), float(number))}, **fields))
    return found


@pytest.mark.parametrize("given_part", [0, 2, None])
def test_any_part_and_the_folder_stand_for_all_parts(tmp_path: Path, given_part: int | None) -> None:
    paths = split(tmp_path)
    reader = open_checkpoint(tmp_path if given_part is None else paths[given_part])
    assert reader.keys() == ("blk.0.w", "blk.1.w", "blk.2.w")
    assert [reader.read(key)[0].item() for key in reader.keys()] == [0, 1, 2]
    assert reader.note == "architecture llama; 3 parts"


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    paths = split(tmp_path)
    paths[1].unlink()
    with pytest.raises(CheckpointNotFoundError, match=r"one of 3 parts, and there is no model-00002-of-00003.gguf"):
        open_checkpoint(paths[0])


def test_parts_in_a_wrong_order_or_of_another_model_are_refused(tmp_path: Path) -> None:
    paths = split(tmp_path)
    paths[1].write_bytes(paths[2].read_bytes())
    with pytest.raises(CheckpointFormatError, match=r"says that it is part 2 .* where part 1 of 3 should be"):
        open_checkpoint(paths[0])
    (tmp_path / "b").mkdir()
    with pytest.raises(CheckpointFormatError, match="hold 3 tensors together, of 7"):
        open_checkpoint(split(tmp_path / "b", **{"split.tensors.count": 7})[0])


def test_a_part_under_another_name_is_refused(tmp_path: Path) -> None:
    path = split(tmp_path)[0].rename(tmp_path / "other.gguf")
    with pytest.raises(CheckpointFormatError, match=r"-00001-of-00003.gguf and so on"):
        open_checkpoint(path)


def test_of_several_models_in_a_folder_one_has_to_be_named(tmp_path: Path) -> None:
    plain(tmp_path / "q4.gguf", {"w": torch.ones(1)})
    plain(tmp_path / "q8.gguf", {"w": torch.ones(1)})
    with pytest.raises(CheckpointFormatError, match=r"2 files that could be meant: q4\.gguf, q8\.gguf"):
        open_checkpoint(tmp_path)


# -- damage ------------------------------------------------------------------------------------------------------------


def header(*, version: int = 3, tensors: int = 1, pairs: int = 0, body: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, pairs) + body


def tensor(name: bytes = b"w", shape: tuple[int, ...] = (4,), kind: int = 0, offset: int = 0) -> bytes:
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return struct.pack("<Q", len(name)) + name + sizes + struct.pack("<IQ", kind, offset)


def pair(name: bytes, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(name)) + name + struct.pack("<I", kind) + value


ALIGNED = pair(b"general.alignment", 4, struct.pack("<I", 24))
DAMAGED = {
    "begins as a big-endian file": (header(version=3 << 24), "written for big-endian machines"),
    "is of the first version": (header(version=1), r"version 1 is none of \(2, 3\)"),
    "ends in its header": (header(tensors=3, body=tensor()), "it ends before"),
    "announces very many tensors": (header(tensors=2**62), "it ends before"),
    "lacks its data": (header(body=tensor(shape=(400,))), "its tensors take"),
    "has a tensor twice": (header(tensors=2, body=tensor() + tensor(offset=32)) + bytes(100), "'w' is there twice"),
    "has a field twice": (header(pairs=2, body=2 * pair(b"a", 0, b"1")), "the field 'a' is there twice"),
    "has a hole": (header(body=tensor(offset=32)) + bytes(100), "said to lie at 32 of the data, and should at 0"),
    "has too many dimensions": (header(body=tensor(shape=(1,) * 5)) + bytes(100), "5 dimensions, of at most 4"),
    "has a shape beyond bounds": (header(body=tensor(shape=(2**40, 2**40))), "beyond what torch can hold"),
    "has rows of a part of a block": (header(body=tensor(shape=(33,), kind=8)), "Q8_0 has blocks of 32"),
    "has blocks in a scalar": (header(body=tensor(shape=(), kind=8)), "is a scalar, and Q8_0 has blocks"),
    "has a type that nobody knows": (header(body=tensor(kind=255)), "'w' is of type 255, which the installed gguf"),
    "has a type that cannot be dequantized": (header(body=tensor(kind=15, shape=(256,))), "'w' is Q8_K"),
    "has a value of no type": (header(pairs=1, body=pair(b"a", 99, b"")), "no value of type 99"),
    "has an array of arrays": (header(pairs=1, body=pair(b"a", 9, struct.pack("<IQ", 9, 1))), "no array of type 9"),
    "has a name that is no text": (header(body=tensor(name=b"\xff")), "can't decode byte"),
    "has a name without end": (header(body=struct.pack("<Q", 2**40)), "a name of 1,099,511,627,776 bytes"),
    "is aligned to no power of two": (header(tensors=0, pairs=1, body=ALIGNED), "alignment is 24, not a power of two"),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_file_is_refused_that(what: str, tmp_path: Path) -> None:
    content, message = DAMAGED[what]
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointFormatError, match=message) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value)
