"""Regions through ops: a region of what was computed from a checkpoint's tensors, and how much is read for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fabric_init.checkpoints import BaseReader, Box, Region, Span, TensorSpec, take
from fabric_init.planning.recorded_load.key_tensors import KeyTensor, source_tensor
from fabric_init.planning.recorded_load.regions import Evaluation, copied_source, sources_of
from fabric_init.recording.mode import RecordMode
from fabric_init.recording.tape.tape import Tape, TensorRef
from fabric_init.recording.tensor.recorded_tensor import meta_of, recorded
from fabric_init.recording.tensor.storage_tags import ref_of

Function = Callable[[dict[str, Tensor]], Tensor]


class CountingReader(BaseReader):
    """Tensors in memory, and how many elements of them were read."""

    path = Path("memory")
    format = "memory"

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors
        self.specs = {key: TensorSpec(tensor.shape, tensor.dtype) for key, tensor in tensors.items()}
        self.elements = 0

    def read(self, key: str, region: Region | None = None) -> Tensor:
        part = take(self.tensors[key], region)
        self.elements += part.numel()
        return part.clone()


def some_tensors() -> dict[str, Tensor]:
    numbers = iter(range(10_000))

    def make(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        count = torch.Size(shape).numel()
        return torch.tensor([next(numbers) for _ in range(count)], dtype=dtype).reshape(shape)

    return {
        "a": make(8, 6),
        "b": make(8, 6),
        "wide": make(4, 12),
        "cube": make(3, 4, 5),
        "vector": make(12),
        "half": make(8, 6, dtype=torch.bfloat16),
        "scalar": make(),
        "one": make(1),
    }


def record(function: Function, reader: BaseReader) -> tuple[Tape, TensorRef]:
    with RecordMode() as mode, torch.no_grad():
        result = function({key: source_tensor(mode.recorder, KeyTensor(reader, key)) for key in reader.keys()})
    found = recorded(result)
    assert found is not None
    return mode.tape, ref_of(meta_of(result), found.storage)


def in_place(s: dict[str, Tensor]) -> Tensor:
    out = torch.empty(8, 6)
    out.copy_(s["a"])
    return out.mul_(2)


def written_in_parts(s: dict[str, Tensor]) -> Tensor:
    out = torch.empty(16, 6)
    out[:8] = s["a"]
    out[8:] = s["b"]
    return out


FUNCTIONS: dict[str, Function] = {
    "the source itself": lambda s: s["a"],
    "a slice": lambda s: s["a"][2:7, 1:4],
    "every other row": lambda s: s["a"][::2],
    "a chunk": lambda s: s["wide"].chunk(3, dim=1)[1],
    "one of split": lambda s: s["a"].split([3, 5])[1],
    "transposed": lambda s: s["a"].t(),
    "permuted": lambda s: s["cube"].permute(2, 0, 1),
    "rows as heads": lambda s: s["a"].view(2, 4, 6),
    "flattened": lambda s: s["cube"].flatten(),
    "flattened, then a slice": lambda s: s["cube"].flatten()[7:50],
    "expanded": lambda s: s["one"].expand(4),
    "an element": lambda s: s["one"][0],
    "a new dimension": lambda s: s["scalar"].view(1),
    "cat": lambda s: torch.cat([s["a"], s["b"]]),
    "cat along the columns": lambda s: torch.cat([s["a"], s["b"]], dim=-1),
    "stack": lambda s: torch.stack([s["a"], s["b"]]),
    "stack along the columns": lambda s: torch.stack([s["a"], s["b"]], dim=2),
    "stack of cats": lambda s: torch.stack([torch.cat([s["a"], s["b"]]), torch.cat([s["b"], s["a"]])]),
    "cat, transposed, contiguous": lambda s: torch.cat([s["a"], s["b"]]).t().contiguous(),
    "interleaved heads": lambda s: s["a"].view(2, 2, 2, 6).transpose(1, 2).reshape(8, 6),
    "a cast": lambda s: s["half"].to(torch.float32),
    "two casts": lambda s: s["a"].to(torch.bfloat16).to(torch.float32),
    "scaled": lambda s: s["a"] * 0.5,
    "scaled by a row": lambda s: s["a"] * s["b"][0],
    "scaled by a scalar": lambda s: s["a"] * s["scalar"] + 1,
    "one minus": lambda s: 1 - s["a"],
    "in place": in_place,
    "written in parts": written_in_parts,
    "matmul": lambda s: s["a"] @ s["b"].t(),
    "a norm": lambda s: s["a"] / s["a"].norm(dim=1, keepdim=True),
    "gathered rows": lambda s: s["a"][torch.tensor([3, 1, 2])],
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_region_is_that_of_the_whole_result(name: str) -> None:
    tensors = some_tensors()
    expected = FUNCTIONS[name](dict(tensors))
    tape, ref = record(FUNCTIONS[name], CountingReader(tensors))
    values = Evaluation(tape)
    assert torch.equal(values.region(ref, None), expected)
    for dim, size in enumerate(expected.shape):
        for start in range(size):
            offsets, sizes = [0] * expected.dim(), list(expected.shape)
            offsets[dim], sizes[dim] = start, min(2, size - start)
            box = Box(tuple(offsets), tuple(sizes))
            assert torch.equal(values.region(ref, box), take(expected, box)), box
    for start in range(0, expected.numel(), 5):
        span = Span(start, min(start + 7, expected.numel()))
        assert torch.equal(values.region(ref, span), take(expected, span)), span


@pytest.mark.parametrize(
    ("name", "box", "elements"),
    [
        ("a slice", Box((0, 0), (2, 3)), 6),
        ("transposed", Box((0, 0), (3, 8)), 24),
        ("permuted", Box((1, 0, 0), (2, 3, 4)), 24),
        ("rows as heads", Box((1, 0, 0), (1, 4, 6)), 24),
        ("cat", Box((0, 0), (8, 6)), 48),
        ("stack", Box((1, 2, 0), (1, 3, 6)), 18),
        ("stack of cats", Box((0, 4, 0), (1, 8, 6)), 48),
        ("cat, transposed, contiguous", Box((0, 0), (2, 16)), 32),
        ("interleaved heads", Box((0, 0), (4, 6)), 24),
        ("scaled by a row", Box((2, 0), (1, 6)), 12),
        ("in place", Box((3, 0), (2, 6)), 12),
    ],
)
def test_no_more_is_read_than_the_region_needs(name: str, box: Box, elements: int) -> None:
    reader = CountingReader(some_tensors())
    tape, ref = record(FUNCTIONS[name], reader)
    Evaluation(tape).region(ref, box)
    assert reader.elements == elements


def test_what_can_only_be_computed_whole_is_computed_once() -> None:
    reader = CountingReader(some_tensors())
    tape, ref = record(FUNCTIONS["matmul"], reader)
    values = Evaluation(tape)
    for row in range(8):
        values.region(ref, Box((row, 0), (1, 8)))
    assert reader.elements == 96


def test_a_copy_of_a_source_is_known_as_that_source() -> None:
    reader = CountingReader(some_tensors())
    for copy in (lambda s: s["a"], lambda s: s["a"].clone(), lambda s: torch.empty(8, 6).copy_(s["a"])):
        tape, ref = record(copy, reader)
        source = copied_source(tape, ref)
        assert source is not None
        assert source.key == "a"


def test_a_cast_that_rounds_on_the_way_is_more_than_a_copy() -> None:
    tape, ref = record(FUNCTIONS["two casts"], CountingReader(some_tensors()))
    assert copied_source(tape, ref) is None
    assert sources_of(tape, ref) == ["a"]


STEPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "transpose": lambda t, o: t.transpose(0, -1),
    "flatten": lambda t, o: t.reshape(-1),
    "pairs": lambda t, o: t.reshape(-1, 2) if t.numel() % 2 == 0 else t,
    "triples": lambda t, o: t.reshape(3, -1) if t.numel() % 3 == 0 else t,
    "slice": lambda t, o: t[1:] if t.shape[0] > 1 else t,
    "step": lambda t, o: t[::2],
    "last": lambda t, o: t.narrow(-1, t.shape[-1] // 2, t.shape[-1] - t.shape[-1] // 2),
    "cat": lambda t, o: torch.cat([t, t]),
    "stack": lambda t, o: torch.stack([t, t], dim=-1),
    "unsqueeze": lambda t, o: t.unsqueeze(0),
    "scale": lambda t, o: t * 3,
    "add": lambda t, o: t + t.flatten()[0],
    "contiguous": lambda t, o: t.contiguous(),
    "clone": lambda t, o: t.clone(),
    "cast": lambda t, o: t.double(),
    "flip": lambda t, o: t.flip(0),
    "cat with another": lambda t, o: torch.cat([t.reshape(-1), o.reshape(-1)]),
    "sum": lambda t, o: t.cumsum(0),
}


@given(st.sampled_from(["a", "cube", "vector"]), st.lists(st.sampled_from(sorted(STEPS)), max_size=5), st.data())
def test_any_chain_of_ops_gives_every_region_its_values(start: str, steps: list[str], data: st.DataObject) -> None:
    def function(s: dict[str, Tensor]) -> Tensor:
        tensor = s[start]
        for step in steps:
            tensor = STEPS[step](tensor, s["wide"])
        return tensor

    tensors = some_tensors()
    expected = function(tensors)
    tape, ref = record(function, CountingReader(tensors))
    offsets = [data.draw(st.integers(0, size - 1)) for size in expected.shape]
    sizes = [data.draw(st.integers(1, size - at)) for size, at in zip(expected.shape, offsets, strict=True)]
    box = Box(tuple(offsets), tuple(sizes))
    assert torch.equal(Evaluation(tape).region(ref, box), take(expected, box))
