"""Weights that wrappers have taken the place of, with a class of our own: what torchao's do, in a few lines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fabric_init import FabricInitError, UninitializedTensorError, deferred_init, materialize
from fabric_init.errors import CheckpointMismatchError, RecordingError
from fabric_init.filling.execute import prepare
from fabric_init.planning.plan import LoadOptions

aten = torch.ops.aten


class Packed(Tensor):
    """A matrix as integers, and a scale for each row."""

    rows: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, rows: Tensor, scale: Tensor, dtype: torch.dtype) -> Any:
        return Tensor._make_wrapper_subclass(cls, rows.shape, dtype=dtype, device=rows.device)  # type: ignore[attr-defined]

    def __init__(self, rows: Tensor, scale: Tensor, dtype: torch.dtype) -> None:
        self.rows, self.scale = rows, scale

    def __tensor_flatten__(self) -> tuple[list[str], torch.dtype]:
        return ["rows", "scale"], self.dtype

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], dtype: torch.dtype, size: Any, stride: Any) -> Any:
        return cls(inner["rows"], inner["scale"], dtype)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func in (aten.detach.default, aten.alias.default):
            return cls(func(args[0].rows), func(args[0].scale), args[0].dtype)
        return func(*(each.unpacked() if isinstance(each, cls) else each for each in args), **(kwargs or {}))

    def unpacked(self) -> Tensor:
        return self.rows.to(self.dtype) * self.scale


def packed(weight: Tensor, kind: torch.dtype = torch.int8) -> nn.Parameter:
    scale = weight.detach().abs().amax(1, keepdim=True) / 100
    rows = (weight.detach() / scale).round().to(kind)
    return nn.Parameter(Packed(rows, scale, weight.dtype), requires_grad=False)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(4, 3))
        self.bias = nn.Parameter(torch.zeros(4))
        nn.init.normal_(self.weight)


def pack(layer: Layer) -> None:
    layer.weight = packed(layer.weight)


def pack_both(layer: Layer) -> None:
    layer.weight = packed(layer.weight + layer.bias[:, None])
    del layer.bias


def build(change: Callable[[Layer], None], *, record: bool = True, device: str = "cpu") -> Layer:
    torch.manual_seed(0)
    if not record:
        layer = Layer()
        change(layer)
        return layer
    with deferred_init(rng="eager"), torch.device(device):
        layer = Layer()
        change(layer)
    return layer


def same(layer: Layer, wanted: Layer) -> bool:
    one: Any = layer.weight
    other: Any = wanted.weight
    assert type(one) is type(other) is Packed
    return torch.equal(one.rows, other.rows) and torch.equal(one.scale, other.scale)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    torch.save({"weight": torch.randn(4, 3), "bias": torch.ones(4)}, tmp_path / "layer.pt")
    return tmp_path / "layer.pt"


def test_a_wrapper_comes_to_the_device_that_its_values_are_put_on(path: Path) -> None:
    layer = build(pack, device="cuda")
    weight: Any = layer.weight
    assert weight.device.type == "cuda"
    materialize(layer, checkpoint=path, device="cpu")
    assert layer.weight is weight
    assert weight.device == weight.detach().device == torch.device("cpu")
    wanted = build(lambda each: (each.load_state_dict(torch.load(path)), pack(each)), record=False)  # type: ignore[arg-type,func-returns-value]
    assert same(layer, wanted)


def test_a_wrapper_made_of_several_parameters_is_filled_from_scratch_alone(path: Path) -> None:
    layer = build(pack_both)
    with pytest.raises(CheckpointMismatchError, match="_weight_rows"):
        materialize(layer, checkpoint=path)
    materialize(layer)
    assert same(layer, build(pack_both, record=False))


def test_a_wrapper_of_what_was_never_a_parameter_is_filled_from_scratch_alone(path: Path) -> None:
    def make(layer: Layer) -> None:
        layer.weight = packed(torch.randn(4, 3))

    with pytest.raises(CheckpointMismatchError, match="_weight_rows"):
        materialize(build(make), checkpoint=path)
    layer = build(make)
    materialize(layer)
    assert same(layer, build(make, record=False))


def test_a_parameter_that_is_changed_after_it_was_packed_is_refused_by_name(path: Path) -> None:
    def change(layer: Layer) -> None:
        layer.kept = layer.weight  # type: ignore[assignment]
        pack(layer)
        with torch.no_grad():
            layer.kept.add_(1)

    with pytest.raises(RecordingError, match="weight was changed after a Packed"):
        materialize(build(change), checkpoint=path)


def test_integers_of_another_kind_in_the_file_are_refused(tmp_path: Path) -> None:
    saved = build(pack, record=False).weight
    inner = {"_weight_rows": saved.rows, "_weight_scale": saved.scale, "bias": torch.ones(4)}  # type: ignore[attr-defined]
    torch.save(inner, tmp_path / "packed.pt")

    def pack_wider(layer: Layer) -> None:
        layer.weight = packed(layer.weight, torch.int16)

    with pytest.raises(CheckpointMismatchError, match="_weight_rows is int8, and int16 in the Packed"):
        materialize(build(pack_wider), checkpoint=tmp_path / "packed.pt")
    layer = build(pack)
    materialize(layer, checkpoint=tmp_path / "packed.pt")
    assert same(layer, build(pack, record=False))


class Renames(Layer):
    """Has load code of its own."""

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        state[f"{prefix}weight"] = state.pop(f"{prefix}old")
        super()._load_from_state_dict(state, prefix, *rest)


def test_a_load_that_fails_leaves_the_wrapper_in_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with deferred_init(rng="eager"):
        layer = Renames()
        pack(layer)
    weight, keys = layer.weight, list(layer.state_dict())
    torch.save({"old": torch.randn(4, 3), "bias": torch.ones(5)}, tmp_path / "other.pt")
    with pytest.raises(CheckpointMismatchError, match="bias"):
        materialize(layer, checkpoint=tmp_path / "other.pt")
    assert layer.weight is weight
    saved = {"old": torch.randn(4, 3), "bias": torch.ones(4)}
    torch.save(saved, tmp_path / "layer.pt")
    with monkeypatch.context() as patched:
        patched.setattr("fabric_init.filling.execute.fill", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            materialize(layer, checkpoint=tmp_path / "layer.pt")
    assert layer.weight is weight
    assert list(layer.state_dict()) == keys
    materialize(layer, checkpoint=tmp_path / "layer.pt")
    assert same(
        layer,
        build(
            lambda each: (each.load_state_dict({"weight": saved["old"], "bias": saved["bias"]}), pack(each)),
            record=False,
        ),
    )  # type: ignore[arg-type,func-returns-value]


def test_what_is_tied_in_the_model_has_to_be_one_in_the_file_too(tmp_path: Path) -> None:
    def two_of_one() -> nn.ModuleList:
        one, other = Layer(), Layer()
        other.weight = one.weight
        pack(one)
        other.weight = one.weight
        return nn.ModuleList([one, other])

    with deferred_init():
        model = two_of_one()
    weights = {f"{index}.weight": torch.full((4, 3), float(index)) for index in range(2)}
    torch.save({**weights, "0.bias": torch.ones(4), "1.bias": torch.ones(4)}, tmp_path / "two.pt")
    with pytest.raises(CheckpointMismatchError, match="one tied tensor"):
        materialize(model, checkpoint=tmp_path / "two.pt")


def test_what_cannot_fill_wrappers_refuses_them_by_name() -> None:
    with pytest.raises(FabricInitError, match="weight is a Packed"):
        prepare(build(pack), None, LoadOptions())


def test_a_wrapper_without_values_refuses_to_be_used() -> None:
    layer = build(pack)
    with pytest.raises(UninitializedTensorError, match="weight"):
        (layer.weight @ torch.ones(3)).sum().item()
