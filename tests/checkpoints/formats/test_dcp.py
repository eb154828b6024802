"""Folders of torch.distributed.checkpoint: whatever wrote them, the tensors come out, whole and in regions."""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.checkpoint.filesystem import SerializationFormat

from fabric_init.checkpoints import Box, DCPReader, Span, TensorSpec, take
from fabric_init.checkpoints.region import Region
from tests.support.dcp_writers import Model, save_alone, save_fsdp2, save_grid, save_with_lightning
from tests.support.ranks import run_ranks

BOTH = pytest.mark.parametrize("mmap", [True, False], ids=["mapped", "copied"])

Saved = tuple[Path, dict[str, Tensor]]


def alone(folder: Path, **options: Any) -> dict[str, Tensor]:
    state = Model().state_dict()
    save_alone(state, folder, **options)
    return state


def on_ranks(world_size: int, save: Callable[..., dict[str, Tensor]]) -> Callable[[Path], dict[str, Tensor]]:
    def write(folder: Path) -> dict[str, Tensor]:
        name = {"name": "net"} if save is save_with_lightning else {}
        return run_ranks(world_size, save, folder=folder, **name)[0]

    return write


WRITERS: dict[str, Callable[[Path], dict[str, Tensor]]] = {
    "alone": alone,
    "a file a tensor": functools.partial(alone, single_file_per_rank=False),
    "two threads": functools.partial(alone, thread_count=2),
    "safetensors inside": functools.partial(alone, serialization_format=SerializationFormat.SAFETENSORS),
    "FSDP2 on 1 rank": on_ranks(1, save_fsdp2),
    "FSDP2 on 2 ranks": on_ranks(2, save_fsdp2),
    "FSDP2 on 4 ranks": on_ranks(4, save_fsdp2),
    "a mesh of 2 x 2": on_ranks(4, save_grid),
    "Lightning on 2 ranks": on_ranks(2, save_with_lightning),
    "Lightning on 4 ranks": on_ranks(4, save_with_lightning),
}


@pytest.fixture(scope="module", params=WRITERS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A folder, and the state dict that went into it."""
    folder = tmp_path_factory.mktemp("dcp") / "checkpoint"
    return folder, WRITERS[request.param](folder)


def same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)


@BOTH
def test_every_tensor_comes_out_as_it_was_saved_and_nothing_else_does(saved: Saved, mmap: bool) -> None:
    folder, expected = saved
    reader = DCPReader(folder, mmap=mmap)
    assert set(reader.keys()) == set(expected)
    for key, value in expected.items():
        assert reader.spec(key) == TensorSpec(value.shape, value.dtype)
        found = reader.read(key)
        assert same(found, value), key
        assert found._base is None
        assert not found.requires_grad


@st.composite
def regions(draw: st.DrawFn, shape: torch.Size) -> Region:
    if draw(st.booleans()):
        start = draw(st.integers(0, shape.numel()))
        return Span(start, draw(st.integers(start, shape.numel())))
    offsets = tuple(draw(st.integers(0, size)) for size in shape)
    return Box(offsets, tuple(draw(st.integers(0, size - at)) for size, at in zip(shape, offsets, strict=True)))


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=2000)
@given(data=st.data(), mmap=st.booleans())
def test_any_region_is_that_part_of_the_whole(saved: Saved, data: st.DataObject, mmap: bool) -> None:
    folder, expected = saved
    reader = DCPReader(folder, mmap=mmap)
    key = data.draw(st.sampled_from(sorted(expected)))
    region = data.draw(regions(expected[key].shape))
    assert same(reader.read(key, region), take(expected[key], region))


def test_a_region_that_sticks_out_is_an_assertion_of_ours(saved: Saved) -> None:
    reader = DCPReader(saved[0])
    key = next(key for key, value in saved[1].items() if value.dim() == 2 and value.numel())
    rows, columns = saved[1][key].shape
    for region in (Span(0, rows * columns + 1), Box((1, 0), (rows, columns)), Box((-1, 0), (1, 1)), Box((0,), (1,))):
        with pytest.raises((AssertionError, ValueError)):
            reader.read(key, region)


def test_what_was_left_out_is_noted(tmp_path: Path) -> None:
    state = {"model": {"w": torch.ones(2)}, "opt": {"state": {0: {"m": torch.ones(2)}}, "param_groups": []}, "step": 3}
    reader = DCPReader(save_alone(state, tmp_path / "a"))
    assert reader.keys() == ("w",)
    assert reader.note == (
        "state dict found under 'model'; other tensors, left out: 1; entries that are no tensors, left out: 2"
    )
    assert DCPReader(save_alone({"model.w": torch.ones(2)}, tmp_path / "b")).note is None
    assert DCPReader(tmp_path / "b").keys() == ("model.w",), "a model's own names are not taken for a wrapper"


def test_optimizers_whose_state_is_flattened_are_recognized(tmp_path: Path) -> None:
    state = {"net": {"w": torch.ones(2)}, "adam": {"state.w.exp_avg": torch.zeros(2), "param_groups.w.lr": 0.1}}
    assert DCPReader(save_alone(state, tmp_path)).note == (
        "state dict found under 'net'; other tensors, left out: 1; entries that are no tensors, left out: 1"
    )


def test_a_checkpoint_without_the_planners_data_has_its_keys_as_they_are(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    planner = dcp.DefaultSavePlanner(flatten_state_dict=False)
    with pytest.warns(UserWarning, match="single process"):
        dcp.save({"model.w": torch.ones(2)}, checkpoint_id=tmp_path, planner=planner, no_dist=True)
    assert DCPReader(tmp_path).keys() == ("model.w",)


def test_extra_state_is_loaded_when_asked_for(tmp_path: Path) -> None:
    state = {
        "w": torch.ones(1),
        "q._extra_state": 7,
        "r._extra_state": {"scale": 2, "history": {"amax": torch.arange(3)}},
        "t._extra_state": torch.ones(1),
        "version": "1",
    }
    for folder, content in (tmp_path / "flat", state), (tmp_path / "inside", {"net": state, "_extra_state": 3}):
        reader = DCPReader(save_alone(content, folder))
        assert set(reader.keys()) == {"w", "t._extra_state"}
        amax = reader.extra_state["r._extra_state"]["history"].pop("amax")
        assert torch.equal(amax, torch.arange(3))
        assert reader.extra_state == {"q._extra_state": 7, "r._extra_state": {"scale": 2, "history": {}}}


def test_metadata_of_older_versions_of_torch_is_read(tmp_path: Path) -> None:
    from torch.distributed._shard.sharded_tensor.metadata import TensorProperties

    metadata = pickle.loads((save_alone({"w": torch.ones(3)}, tmp_path) / ".metadata").read_bytes())
    metadata.state_dict_metadata["w"].properties = TensorProperties(torch.float32)
    del metadata.storage_meta, metadata.version
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    assert torch.equal(DCPReader(tmp_path).read("w"), torch.ones(3))


@BOTH
def test_layouts_and_dtypes_of_all_kinds(tmp_path: Path, mmap: bool) -> None:
    numbers = torch.arange(2.0 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    complex_numbers = torch.view_as_complex(numbers.reshape(3, 20, 2))
    state = {
        "transposed": numbers[0, 0].t(),
        "channels last": numbers.to(memory_format=torch.channels_last),
        "permuted": numbers.permute(2, 0, 3, 1),
        "strided": numbers[:, ::2, 1:],
        "expanded": numbers[0, 0, :, :1].expand(4, 6),
        "conjugate": complex_numbers.conj(),
        "negative": complex_numbers.conj().imag,
        "column": numbers[:, :1, :1, :1].transpose(0, 1),
        "parameter": torch.nn.Parameter(numbers),
        **{str(dtype): numbers[0, 0].to(dtype) for dtype in (torch.bool, torch.int8, torch.uint8, torch.float64)},
        **{str(dtype): numbers[0, 0].to(dtype) for dtype in (torch.float16, torch.uint16, torch.float8_e4m3fn)},
    }
    reader = DCPReader(save_alone(state, tmp_path), mmap=mmap)
    for key, value in state.items():
        expected = value.detach().resolve_conj().resolve_neg()
        middle = Box(tuple(size // 3 for size in value.shape), tuple(-(-size // 2) for size in value.shape))
        for region in (None, middle, Span(1, value.numel() - 1)):
            found = reader.read(key, region)
            part = take(expected, region)
            assert found.dtype == part.dtype
            # float8 knows no comparison
            assert torch.equal(found.to(torch.complex64), part.to(torch.complex64)), (key, region)
            assert not found.is_conj()
            assert not found.is_neg()


# -- memory ------------------------------------------------------------------------------------------------------------


def test_a_tensor_in_one_aligned_chunk_is_a_view_of_a_private_map(tmp_path: Path) -> None:
    save_alone({"w": torch.zeros(64, 64), "v": torch.ones(3)}, tmp_path, single_file_per_rank=False)
    before = [path.read_bytes() for path in sorted(tmp_path.glob("*.distcp"))]
    reader = DCPReader(tmp_path)
    tensor = reader.read("w")
    tensor.fill_(1.0)
    assert reader.read("w", Box((3, 3), (1, 1))).item() == 1.0, "the same memory"
    assert tensor.untyped_storage().nbytes() == tensor.nbytes
    assert [path.read_bytes() for path in sorted(tmp_path.glob("*.distcp"))] == before
    copied = DCPReader(tmp_path, mmap=False)
    copied.read("w").fill_(1.0)
    assert copied.read("w").sum() == 0


def test_two_reads_of_bytes_that_are_not_aligned_are_two_copies_of_no_more_than_the_region(tmp_path: Path) -> None:
    save_alone({str(i): torch.arange(1 << 14).reshape(1 << 7, 1 << 7) for i in range(4)}, tmp_path)
    reader = DCPReader(tmp_path)
    parts = [reader.read(key, Box((0, 3), (1 << 7, 2))) for key in reader.keys()]
    copies = [part for part in parts if part.untyped_storage().nbytes() == 2 * 8 * (1 << 7)]
    assert len(copies) >= 3, "items of an odd length follow one another"
    for part in parts:
        assert part.data_ptr() % 8 == 0
        assert torch.equal(part, torch.arange(1 << 14).reshape(1 << 7, 1 << 7)[:, 3:5])


def resident(folder: Path) -> int:
    """Bytes of the folder's files that are mapped in by this process and have been touched."""
    maps = psutil.Process().memory_maps(grouped=False)
    return sum(one.rss for one in maps if one.path.startswith(str(folder)))


@pytest.mark.parametrize("options", [{}, {"single_file_per_rank": False}], ids=["one file", "a file a tensor"])
def test_reading_a_region_touches_the_region(tmp_path: Path, options: dict[str, Any]) -> None:
    save_alone({str(i): torch.zeros(4096, 4096) for i in range(2)}, tmp_path, **options)
    reader = DCPReader(tmp_path)
    assert resident(tmp_path) == 0, "opening reads the metadata only"
    reader.read("1", Box((1000, 0), (16, 512))).sum()
    # The kernel maps in some 64 KiB around each page that is touched, or 2 MiB where the file lies in large pages.
    assert 0 < resident(tmp_path) < 16 << 20
    reader.read("0", Box((0, 7), (4096, 1))).sum()
    reader.read("0").sum()
    assert resident(tmp_path) > 60 << 20, "the measure can tell"


def test_plain_reads_read_the_region(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fabric_init.checkpoints.storage import local as file_bytes

    save_alone({"w": torch.zeros(4096, 1024)}, tmp_path)
    reader = DCPReader(tmp_path, mmap=False)
    read = 0

    def counted(file: Any, start: int, target: memoryview, source: Any) -> None:
        nonlocal read
        read += len(target)
        original(file, start, target, source)

    original = file_bytes._read_into
    monkeypatch.setattr(file_bytes, "_read_into", counted)
    reader.read("w", Box((1000, 0), (16, 1024)))
    assert 16 * 1024 * 4 <= read < 16 * 1024 * 4 + 5000


def test_more_files_than_a_process_may_have_open_are_read_without_maps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fabric_init.checkpoints.formats.dcp import reader as dcp

    monkeypatch.setattr(dcp, "MAPPED_FILES", 3)
    state = {str(i): torch.full((2,), float(i)) for i in range(4)}
    reader = DCPReader(save_alone(state, tmp_path, single_file_per_rank=False))
    for key, value in state.items():
        assert torch.equal(reader.read(key), value)
    assert resident(tmp_path) == 0


def test_an_unknown_key_is_a_key_error_that_names_the_folder(tmp_path: Path) -> None:
    reader = DCPReader(save_alone({"w": torch.ones(1)}, tmp_path))
    for ask in (reader.spec, reader.read):
        with pytest.raises(KeyError, match=f"{tmp_path} has no tensor 'nope'"):
            ask("nope")
