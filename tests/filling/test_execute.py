"""Values: read or replayed once, in the right dtype and layout, in memory of their own, all or nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fabric_init import CheckpointFormatError, CheckpointMismatchError, deferred_init, materialize
from fabric_init.checkpoints import SafetensorsReader
from tests.support.recordings import is_recorded


def saved(path: Path, state: dict[str, Tensor]) -> Path:
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return path


def recorded(build) -> nn.Module:
    with deferred_init():
        return build()


FILES = pytest.mark.parametrize("name", ["m.safetensors", "m.pt"])


@FILES
def test_each_tensor_is_loaded_bit_for_bit(tmp_path: Path, name: str) -> None:
    state = nn.TransformerEncoderLayer(8, 2, 16).state_dict()
    model = recorded(lambda: nn.TransformerEncoderLayer(8, 2, 16))
    materialize(model, checkpoint=saved(tmp_path / name, state))
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[key]), key


@FILES
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_floats_are_cast_to_what_the_model_has(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    value = torch.randn(3, 3, dtype=torch.float64).to(dtype)
    model = recorded(lambda: nn.Linear(3, 3, bias=False))
    report = materialize(model, checkpoint=saved(tmp_path / name, {"weight": value}))
    assert model.weight.dtype == torch.float32
    assert torch.equal(model.weight, value.float())
    assert report.rows[0].cast_from == str(dtype).removeprefix("torch.")


def test_integers_are_cast_to_wider_integers(tmp_path: Path) -> None:
    model = recorded(lambda: nn.BatchNorm1d(2))
    state = {**nn.BatchNorm1d(2).state_dict(), "num_batches_tracked": torch.tensor(5, dtype=torch.int32)}
    report = materialize(model, checkpoint=saved(tmp_path / "m.pt", state))
    assert model.num_batches_tracked.dtype == torch.int64
    assert model.num_batches_tracked == 5
    assert [row.cast_from for row in report.rows if row.cast_from] == ["int32"]


@pytest.mark.parametrize("checkpoint", [False, True], ids=["initialized", "loaded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["as it is", "cast"])
def test_strides_are_those_of_the_constructor(tmp_path: Path, checkpoint: bool, dtype: torch.dtype) -> None:
    def build() -> nn.Module:
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(3, 5)).to(memory_format=torch.channels_last)
        model.turned = nn.Parameter(torch.ones(2, 7).t())
        return model

    eager = build()
    model = recorded(build)
    path = saved(tmp_path / "m.pt", {k: v.to(dtype).contiguous() for k, v in eager.state_dict().items()})
    materialize(model, checkpoint=path if checkpoint else None)
    for name, parameter in eager.named_parameters():
        assert model.get_parameter(name).stride() == parameter.stride(), name
    if checkpoint:
        for name, parameter in eager.named_parameters():
            assert torch.equal(model.get_parameter(name), parameter.to(dtype).float()), name


def test_a_file_in_another_layout_is_laid_out_as_the_model_wants_it(tmp_path: Path) -> None:
    value = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    model = recorded(lambda: nn.Conv2d(3, 4, 2, bias=False))
    materialize(model, checkpoint=saved(tmp_path / "m.pt", {"weight": value}))
    assert model.weight.is_contiguous()
    assert torch.equal(model.weight, value)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4, 2)
        self.head = nn.Linear(2, 4, bias=False)
        self.head.weight = self.embedding.weight


@FILES
@pytest.mark.parametrize("keys", [["embedding.weight"], ["head.weight"], ["embedding.weight", "head.weight"]])
def test_ties_are_kept_whichever_keys_were_saved(tmp_path: Path, name: str, keys: list[str]) -> None:
    value = torch.randn(4, 2)
    model = recorded(Tied)
    materialize(model, checkpoint=saved(tmp_path / name, {key: value.clone() for key in keys}))
    assert model.head.weight is model.embedding.weight
    assert torch.equal(model.head.weight, value)


@FILES
def test_tied_keys_with_different_values_are_refused_and_the_model_stays_recorded(tmp_path: Path, name: str) -> None:
    model = recorded(Tied)
    state = {"embedding.weight": torch.ones(4, 2), "head.weight": torch.zeros(4, 2)}
    path = saved(tmp_path / name, state)
    with pytest.raises(CheckpointMismatchError) as caught:
        materialize(model, checkpoint=path)
    for word in (str(path), "embedding.weight", "head.weight", "tied", "rename"):
        assert word in str(caught.value)
    assert is_recorded(model.head.weight)
    materialize(model, checkpoint=path, rename=lambda key: key if key.startswith("head") else None, strict=False)
    assert torch.equal(model.embedding.weight, torch.zeros(4, 2))


def test_tied_keys_may_differ_where_the_casts_agree_bit_for_bit_and_nan_is_equal_to_itself(tmp_path: Path) -> None:
    value = torch.full((4, 2), float("nan"))
    model = recorded(Tied)
    state = {"embedding.weight": value, "head.weight": value.clone()}
    materialize(model, checkpoint=saved(tmp_path / "m.pt", state))
    assert model.head.weight.isnan().all()


def test_tensors_that_share_memory_in_the_file_but_not_in_the_model_are_apart(tmp_path: Path) -> None:
    whole = torch.arange(12.0)
    torch.save(
        {"0.weight": whole[:9].view(3, 3), "1.weight": whole[3:].view(3, 3), "0.bias": whole[:3], "1.bias": whole[:3]},
        tmp_path / "m.pt",
    )
    model = recorded(lambda: nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))
    materialize(model, checkpoint=tmp_path / "m.pt")
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.fill_(7)
    assert torch.equal(model[1].weight, whole[3:].view(3, 3))
    assert torch.equal(model[1].bias, whole[:3])


def test_two_models_from_one_file_are_apart(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.safetensors", nn.Linear(3, 3).state_dict())
    one, other = recorded(lambda: nn.Linear(3, 3)), recorded(lambda: nn.Linear(3, 3))
    materialize(one, checkpoint=path)
    materialize(other, checkpoint=path)
    with torch.no_grad():
        one.weight.fill_(3)
    assert not torch.equal(one.weight, other.weight)


class Views(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.both = torch.full((6,), 2.0)
        self.left = nn.Parameter(self.both[:3])
        self.right = nn.Parameter(self.both[3:])


@pytest.mark.parametrize("keys", [["left"], ["right"], ["left", "right"]])
def test_views_of_one_memory_stay_views_when_some_of_them_are_loaded(tmp_path: Path, keys: list[str]) -> None:
    model = recorded(Views)
    state = {key: torch.full((3,), 5.0 + index) for index, key in enumerate(keys)}
    materialize(model, checkpoint=saved(tmp_path / "m.pt", state), strict=False)
    assert len({t.untyped_storage().data_ptr() for t in (model.both, model.left, model.right)}) == 1
    for key in ("left", "right"):
        assert torch.equal(getattr(model, key), state.get(key, torch.full((3,), 2.0))), key
    assert torch.equal(model.both, torch.cat([model.left, model.right]))


def test_nothing_of_the_model_changes_when_a_read_fails_half_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    path = saved(tmp_path / "m.safetensors", source.state_dict())
    model = recorded(lambda: nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    read, seen = SafetensorsReader.read, []

    def fails_at_the_third(self: SafetensorsReader, key: str, region: object = None) -> Tensor:
        seen.append(key)
        if len(seen) == 3:
            raise CheckpointFormatError(f"{self.path}: the disk is gone")
        return read(self, key, None)

    with monkeypatch.context() as patch:
        patch.setattr(SafetensorsReader, "read", fails_at_the_third)
        with pytest.raises(CheckpointFormatError, match="the disk is gone"):
            materialize(model, checkpoint=path)
    assert all(is_recorded(parameter) for parameter in model.parameters())
    materialize(model, checkpoint=path)
    assert torch.equal(model[1].weight, source[1].weight)


def test_a_loaded_float32_weight_is_the_file_itself_not_a_copy(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.safetensors", nn.Linear(64, 64).state_dict())
    model = recorded(lambda: nn.Linear(64, 64))
    materialize(model, checkpoint=path)
    address = model.weight.data_ptr()
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    ranges = [tuple(int(end, 16) for end in fields[0].split("-")) for fields in maps if str(path) in fields[-1]]
    assert any(start <= address < stop for start, stop in ranges)


def test_each_tensor_is_initialized_by_the_rule_that_would_have_won() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            nn.init.ones_(self.linear.weight)
            nn.init.constant_(self.linear.weight, 3.0)
            self.linear.bias.data.zero_().add_(1.5)

    model = recorded(Twice)
    materialize(model)
    assert torch.equal(model.linear.weight, torch.full((4, 4), 3.0))
    assert torch.equal(model.linear.bias, torch.full((4,), 1.5))


class Computes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4))
        self.magnitude = nn.Parameter(self.weight.detach().norm(dim=1))


def test_init_that_computes_on_another_tensor_has_what_the_checkpoint_brings_for_that(tmp_path: Path) -> None:
    weight = torch.rand(3, 4)
    model = recorded(Computes)
    materialize(model, checkpoint=saved(tmp_path / "m.pt", {"weight": weight}), strict=False)
    assert torch.equal(model.magnitude, weight.norm(dim=1))


def test_so_it_has_when_the_model_was_cast_in_between(tmp_path: Path) -> None:
    weight = torch.rand(3, 4)
    model = recorded(lambda: Computes().half())
    materialize(model, checkpoint=saved(tmp_path / "m.pt", {"weight": weight}), strict=False)
    assert torch.equal(model.magnitude, weight.norm(dim=1).half())


def test_what_the_constructor_takes_out_of_a_weight_is_not_loaded_over(tmp_path: Path) -> None:
    class TakenOut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 4))
            self.adapter = nn.Parameter(self.weight.detach() / 2)
            self.weight.data = self.weight.data - self.adapter.data

    model = recorded(TakenOut)
    with pytest.raises(CheckpointMismatchError, match=r"would replace \(weight first\)"):
        materialize(model, checkpoint=saved(tmp_path / "m.pt", {"weight": torch.ones(3, 4)}), strict=False)


def test_a_copy_of_a_loaded_tensor_is_a_copy_of_its_value_in_the_checkpoint(tmp_path: Path) -> None:
    class Copies(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.teacher = nn.Parameter(torch.randn(3))
            self.student = nn.Parameter(self.teacher.detach().clone())

    plain = recorded(Copies)
    materialize(plain)
    assert torch.equal(plain.student, plain.teacher)
    loaded = recorded(Copies)
    materialize(loaded, checkpoint=saved(tmp_path / "m.pt", {"teacher": torch.full((3,), 7.0)}), strict=False)
    assert torch.equal(loaded.student, torch.full((3,), 7.0))
    assert torch.equal(loaded.teacher, loaded.student)
    assert loaded.student.data_ptr() != loaded.teacher.data_ptr()
