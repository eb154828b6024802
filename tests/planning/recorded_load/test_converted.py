"""Converted checkpoints: what is read, held against plain torch on whole tensors; how much; and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from fabric_init import deferred_init
from fabric_init.checkpoints import (
    BaseReader,
    Box,
    CheckpointReader,
    Conversion,
    ConversionResult,
    Fuse,
    Region,
    Span,
    Split,
    Stack,
    TensorSpec,
    Transpose,
    Unstack,
    open_checkpoint,
    take,
)
from fabric_init.errors import CheckpointMismatchError
from fabric_init.planning.recorded_load.converted import converted


class Counting(BaseReader):
    """A checkpoint in memory that counts the elements it is asked for."""

    path = Path("memory")
    format = "memory"
    note: str | None = None

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors
        self.specs = {key: TensorSpec(tensor.shape, tensor.dtype) for key, tensor in tensors.items()}
        self.elements = 0
        self.largest = 0

    def read(self, key: str, region: Region | None = None) -> Tensor:
        part = take(self.tensors[key], region)
        self.elements += part.numel()
        self.largest = max(self.largest, part.nbytes)
        return part


def numbered(*shape: int, start: int = 0) -> Tensor:
    return torch.arange(start, start + math.prod(shape)).reshape(shape)


def interleaved(parts: list[Tensor], dim: int, groups: int) -> Tensor:
    return torch.cat([torch.cat([part.chunk(groups, dim)[g] for part in parts], dim) for g in range(groups)], dim)


KINDS = ["fuse", "split", "stack", "unstack", "transpose", "fuse and stack", "transpose, split"]
Case = tuple[dict[str, Tensor], list[Conversion], dict[str, Tensor]]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Tensors of a checkpoint, conversions, and what these make of them in plain torch."""
    kind = draw(st.sampled_from(KINDS))
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    if kind.startswith("transpose"):
        shape = [*shape, draw(st.integers(1, 4))]
    if kind in ("fuse", "split", "transpose, split"):
        dim = draw(st.integers(-len(shape), len(shape) - 1))
        groups = draw(st.integers(1, 3))
        sizes = [groups * n for n in draw(st.lists(st.integers(0, 3), min_size=1, max_size=3))]
        parts, start = {}, 0
        for index, size in enumerate(sizes):
            shape[dim] = size
            parts[f"m.{index}.weight"] = numbered(*shape, start=start)
            start += math.prod(shape)
        one = {"m.all.weight": interleaved(list(parts.values()), dim, groups)}
        names = [f"{index}.weight" for index in range(len(sizes))]
        if kind == "fuse":
            return parts, [Fuse(names, into="all.weight", dim=dim, groups=groups)], one
        split = Split("all.weight", into=names, sizes=sizes, dim=dim, groups=groups)
        if kind == "split":
            return one, [split], parts
        return (
            {"m.all.weight": one["m.all.weight"].transpose(-1, -2).clone()},
            [Transpose(["all.weight"]), split],
            parts,
        )
    whole = numbered(*shape)
    if kind == "transpose":
        return {"a": whole}, [Transpose(["a"])], {"a": whole.transpose(-1, -2).clone()}
    apart = {f"x.{index}.w": one.clone() for index, one in enumerate(whole.unbind())}
    if kind == "stack":
        return apart, [Stack("{}.w", into="w")], {"x.w": whole}
    if kind == "unstack":
        return {"x.w": whole}, [Unstack("w", into="{}.w")], apart
    if whole.dim() == 1:
        return apart, [Stack("x.{}.w", into="w")], {"w": whole}
    halves = {f"x.{i}.{half}": one + 90 * (half == "b") for i, one in enumerate(whole.unbind()) for half in "ab"}
    return (
        halves,
        [Fuse(["{}.a", "{}.b"], into="{}.ab"), Stack("{}.ab", into="ab")],
        {"x.ab": torch.stack([torch.cat([one, one + 90]) for one in whole.unbind()])},
    )


@st.composite
def regions(draw: st.DrawFn, shape: torch.Size) -> Region | None:
    kind = draw(st.sampled_from(KINDS))
    if kind == "whole":
        return None
    if kind == "span":
        start = draw(st.integers(0, shape.numel()))
        return Span(start, draw(st.integers(start, shape.numel())))
    offsets = tuple(draw(st.integers(0, size)) for size in shape)
    return Box(offsets, tuple(draw(st.integers(0, size - at)) for size, at in zip(shape, offsets, strict=True)))


@given(st.data())
def test_every_region_is_that_of_the_converted_whole_and_no_element_too_many_is_read(data: st.DataObject) -> None:
    tensors, conversions, expected = data.draw(cases())
    below = Counting(tensors)
    reader = converted(below, conversions)
    assert set(reader.keys()) == expected.keys()
    for key, value in expected.items():
        region = data.draw(regions(value.shape))
        assert reader.spec(key) == TensorSpec(value.shape, value.dtype)
        below.elements = 0
        found = reader.read(key, region)
        assert torch.equal(found, take(value, region))
        assert below.elements == found.numel()


# -- what stands where, and what is copied -----------------------------------------------------------------------------


def llama(layers: int = 2) -> dict[str, Tensor]:
    state = {"embed.weight": numbered(5, 4)}
    for i in range(layers):
        for name, rows in {"q": 4, "k": 2, "v": 2}.items():
            state[f"layers.{i}.attn.{name}_proj.weight"] = numbered(rows, 4, start=100 * i + rows)
    return state


QKV = ["q_proj.weight", "k_proj.weight", "v_proj.weight"]


def test_one_declaration_serves_every_layer_and_keeps_the_order_and_all_other_keys() -> None:
    state = llama()
    reader = converted(Counting(state), [Fuse(QKV, into="qkv.weight")])
    assert reader.keys() == ("embed.weight", "layers.0.attn.qkv.weight", "layers.1.attn.qkv.weight")
    assert torch.equal(reader.read("embed.weight", Span(3, 5)), torch.tensor([3, 4]))
    assert torch.equal(
        reader.read("layers.1.attn.qkv.weight"), torch.cat([state[f"layers.1.attn.{name}"] for name in QKV])
    )
    assert reader.note == "Fuse(['q_proj.weight', 'k_proj.weight', 'v_proj.weight'], into='qkv.weight'): 2 tensors made"


def test_a_key_that_was_converted_is_gone() -> None:
    reader = converted(Counting(llama()), [Fuse(QKV, into="qkv.weight")])
    for ask in (reader.spec, reader.read):
        with pytest.raises(KeyError, match=r"memory has no tensor 'layers\.0\.attn\.q_proj\.weight'"):
            ask("layers.0.attn.q_proj.weight")


def test_a_blank_stands_for_weight_and_bias_alike() -> None:
    state = {"h.0.qkv.weight": numbered(6, 2), "h.0.qkv.bias": numbered(6)}
    reader = converted(Counting(state), [Split("qkv.{}", into=["q.{}", "k.{}", "v.{}"])])
    assert reader.keys() == tuple(f"h.0.{part}.{kind}" for kind in ("weight", "bias") for part in "qkv")
    assert reader.read("h.0.k.bias").tolist() == [2, 3]


@pytest.mark.parametrize("region", [None, Box((1, 0), (2, 4))])
def test_rows_of_one_tensor_are_a_view_of_the_mapped_file(region: Region | None, tmp_path: Path) -> None:
    save_file({"qkv": numbered(12, 4), "experts": numbered(3, 4, 4)}, tmp_path / "a.safetensors")
    below = open_checkpoint(tmp_path / "a.safetensors")
    reader = converted(below, [Split("qkv", into=["q", "k", "v"]), Unstack("experts", into="experts.{}")])
    rows = 0 if region is None else 1
    assert reader.read("k", region).data_ptr() == below.read("qkv")[4 + rows :].data_ptr()
    assert reader.read("experts.2", region).data_ptr() == below.read("experts")[2, rows:].data_ptr()


def test_what_is_put_together_is_read_a_little_at_a_time() -> None:
    state = {f"{i}.{name}": torch.rand(5, 200_000) for i in range(2) for name in "ab"}  # rows of 0.8 MB
    below = Counting(state)
    reader = converted(below, [Fuse(["{}.a", "{}.b"], into="{}.ab"), Stack("{}.ab", into="ab")])
    expected = torch.stack([torch.cat([state[f"{i}.a"], state[f"{i}.b"]]) for i in range(2)])
    assert torch.equal(reader.read("ab"), expected)
    assert torch.equal(reader.read("ab", Box((0, 3, 5), (2, 4, 199_000))), expected[:, 3:7, 5:199_005])
    assert below.largest <= 1 << 20


def test_a_torch_file_and_plain_reads_give_the_same(tmp_path: Path) -> None:
    state = llama()
    torch.save(state, tmp_path / "a.pt")
    save_file(state, tmp_path / "a.safetensors")
    declared = [Fuse(QKV, into="qkv", dim=0, groups=2), Transpose(["qkv"])]
    expected = interleaved([state[f"layers.1.attn.{name}"] for name in QKV], 0, 2).t()
    for file in ("a.pt", "a.safetensors"):
        for mmap in (True, False):
            reader = converted(open_checkpoint(tmp_path / file, mmap=mmap), declared)
            assert torch.equal(reader.read("layers.1.attn.qkv"), expected)
            assert torch.equal(reader.read("layers.1.attn.qkv", Span(5, 21)), expected.flatten()[5:21])


# -- what is refused, before a weight is read --------------------------------------------------------------------------


class Header(Counting):
    def read(self, key: str, region: Region | None = None) -> Tensor:
        raise AssertionError(f"{key} was read")


def header(**shapes: Any) -> CheckpointReader:
    dtype = torch.float32
    tensors = {}
    for name, shape in shapes.items():
        shape, dtype = (shape[0], shape[1]) if shape and isinstance(shape[-1], torch.dtype) else (shape, torch.float32)
        tensors[name.replace("__", ".")] = torch.empty(shape, dtype=dtype, device="meta")
    return Header(tensors)


@pytest.mark.parametrize(
    ("conversion", "reader", "message"),
    [
        (
            Split("qkv", into=["q", "k", "v"], sizes=[4, 2, 3]),
            header(a__qkv=(8, 4)),
            r"a\.qkv is \(8, 4\): sizes=\[4, 2, 3\], together 9, do not make up the 8 of dimension 0",
        ),
        (
            Split("qkv", into=["q", "k", "v"]),
            header(a__qkv=(8, 4)),
            r"a\.qkv is \(8, 4\): 3 equal parts do not make up",
        ),
        (Split("ab", into=["a", "b"], groups=3), header(ab=(8, 4)), r"a size of 4 cannot be in 3 equal groups"),
        (Split("ab", into=["a", "b"], dim=1), header(ab=(8,)), r"ab is \(8,\): it has no dimension 1"),
        (Split("ab", into=["a", "b"]), header(ab=(8,), a=(4,)), r"it makes a, and the checkpoint has a tensor of that"),
        (
            Fuse(["a", "b"], into="ab"),
            header(x__a=(2, 3), x__b=(2, 4)),
            r"x\.a is \(2, 3\) and x\.b is \(2, 4\): they cannot be put together",
        ),
        (Fuse(["a", "b"], into="ab"), header(a=(2,), b=((2,), torch.int8)), r"a is torch.float32 and b is torch.int8"),
        (Fuse(["a", "b"], into="ab"), header(x__a=(2,), x__b=(2,), y__a=(2,)), r"there is y\.a, but no y\.b"),
        (Fuse(["a", "b"], into="ab"), header(a=()), r"no key ends in 'b'"),
        (Fuse(["a", "b"], into="ab"), header(a=(), b=()), r"a is \(\): it has no dimension 0"),
        (Stack("e.{}.w", into="w"), header(e__0__w=(2,), e__2__w=(2,)), r"there is e\.2\.w, but no e\.1\.w"),
        (Stack("e.{}.w", into="w"), header(e__0__w=(2,), e__1__w=(3,)), r"e\.0\.w is \(2,\) and e\.1\.w is \(3,\)"),
        (Stack("e.{}.w", into="w"), header(e__x__w=(2,)), r"no key ends in 'e\.\{\}\.w' with a number"),
        (Stack("{}.w", into="w"), header(**{"9" * 5000 + "__w": (2,)}), r"no key ends in '\{\}\.w' with a number"),
        (Unstack("w", into="{}.w"), header(w=(2**50, 0)), r"w is \(1125899906842624, 0\): there is nothing in it"),
        (Unstack("w", into="{}.w"), header(w=()), r"w is \(\): it has no dimension 0"),
        (Transpose(["b"]), header(b=(3,)), r"b is \(3,\): there are no two dimensions to swap"),
        (
            Transpose(["c_attn.weigth"]),
            header(h__0__c_attn__weight=(2, 2)),
            r"memory: Transpose\(\['c_attn.weigth'\]\): no key ends in 'c_attn.weigth'; there is 'c_attn.weight'",
        ),
    ],
)
def test_a_checkpoint_that_is_not_as_declared_is_refused_with_both_shapes(
    conversion: Conversion, reader: CheckpointReader, message: str
) -> None:
    with pytest.raises(CheckpointMismatchError, match=message) as caught:
        converted(reader, [conversion])
    assert str(caught.value).startswith(f"memory: {conversion}: ")


@pytest.mark.parametrize(
    ("declare", "message"),
    [
        (lambda: Split("qkv", into="q"), "Split: into should be a list of names, not 'q'"),
        (lambda: Split("qkv", into=["q", "q"]), "into has a name twice"),
        (lambda: Split("qkv.{}", into=["q", "k"]), "there should be as many {} in each name"),
        (lambda: Split("qkv", into=["q", "k"], sizes=[3]), "sizes=.3. should be one size for each of 2 parts"),
        (lambda: Split("qkv", into=["q", "k"], sizes=[3, -1]), "sizes=.* should be one size"),
        (lambda: Split("qkv", into=["q"], groups=0), "groups=0 should be 1 or more"),
        (lambda: Fuse("qkv", into="q"), "Fuse: the first argument should be a list"),
        (lambda: Fuse(["q.{}", "k"], into="q.{}"), "as many {} in each name"),
        (lambda: Fuse([], into="q"), "should be a list of names"),
        (lambda: Stack("experts.w", into="w"), "one {} less in into"),
        (lambda: Unstack("experts.w", into="w"), "one {} more in into"),
        (lambda: Transpose("w"), "Transpose: the argument should be a list"),
        (lambda: Transpose([""]), "an empty name stands for no key"),
    ],
)
def test_a_wrong_declaration_is_refused_where_it_is_written(declare: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        declare()


@pytest.mark.parametrize("wrong", [Transpose(["a"]), {"a": "b"}, ["a"], [Transpose], "a"])
def test_convert_takes_a_list_of_conversions(wrong: Any) -> None:
    with pytest.raises(TypeError, match="convert must be a list of conversions"):
        converted(header(a=(2, 2)), wrong)


class OfEach:
    """A conversion of one's own: a function of every tensor."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self._function = function

    def results(self, specs: Any) -> Any:
        def function(tensor: Tensor) -> list[Tensor]:
            return [self._function(tensor)]

        for key in specs:
            yield ConversionResult([f"{key}.made"], [key], function)

    def __str__(self) -> str:
        return "OfEach()"


STATES = {"a": torch.tensor([-1.0, 5.0]), "b": torch.tensor([3.0, 4.0]), "c": torch.tensor([[3.0]])}


@pytest.mark.parametrize(
    "function",
    [
        lambda t: t + torch.ones(()),
        lambda t: (t + 1).mul_(2),
        lambda t: t.flip(0).contiguous(),
        lambda t: torch.zeros(2).copy_(t.flatten()),
        lambda t: torch.empty(t.shape).fill_(3),
        lambda t: t if t.sum() > 4.5 else -t,
        lambda t: t * t.max().item(),
    ],
    ids=["plain", "in place", "whole", "into a new one", "of none", "by its values", "scaled by its values"],
)
def test_a_conversion_of_ones_own_is_what_its_function_gives_for_each_tensor(
    function: Callable[[Tensor], Tensor],
) -> None:
    reader = converted(Counting({key: value.clone() for key, value in STATES.items()}), [OfEach(function)])
    for key, value in STATES.items():
        assert torch.equal(reader.read(f"{key}.made"), function(value.clone()))


def test_random_numbers_differ_from_tensor_to_tensor_and_leave_the_generator_alone() -> None:
    before = torch.get_rng_state()
    reader = converted(Counting(dict(STATES)), [OfEach(lambda t: t * 0 + torch.rand(t.shape))])
    one, other = reader.read("a.made"), reader.read("b.made")
    assert not torch.equal(one, other)
    assert torch.equal(one, reader.read("a.made"))
    assert torch.equal(before, torch.get_rng_state())


def test_a_function_that_returns_too_little_is_named() -> None:
    class Wrong(OfEach):
        def results(self, specs: Any) -> Any:
            yield ConversionResult(["x", "y"], ["a"], lambda tensor: [tensor])

    with pytest.raises(TypeError, match=r"OfEach\(\) returned 1 tensors for 2 keys"):
        converted(Counting(dict(STATES)), [Wrong(torch.neg)])


def test_a_block_that_is_open_and_the_inference_mode_make_no_difference() -> None:
    state = llama()
    with deferred_init(), torch.inference_mode():
        reader = converted(Counting(state), [Fuse(QKV, into="qkv")])
        found = reader.read("layers.1.attn.qkv")
    assert type(found) is Tensor
    assert torch.equal(found, torch.cat([state[f"layers.1.attn.{name}"] for name in QKV]))


def test_thousands_of_experts_are_recorded_once() -> None:
    experts = {f"{i}.experts.{e}.{half}": (4, 2) for i in range(20) for e in range(64) for half in "ab"}
    calls = []

    class Watched(Stack):
        def results(self, specs: Any) -> Any:
            for made in super().results(specs):
                yield made._replace(function=count)

    def count(*parts: Tensor) -> list[Tensor]:
        calls.append(len(parts))
        return [torch.stack(parts)]

    converted(header(**{key.replace(".", "__"): shape for key, shape in experts.items()}), [Watched("{}.a", into="a")])
    assert calls == [64]
