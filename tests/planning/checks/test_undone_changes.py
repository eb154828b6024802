"""A load does not undo changes of base weights that the checkpoint does not know of; an init it may well replace."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fabric_init import CheckpointMismatchError, deferred_init, materialize

FIX = "build the model in one init_module block, and change it in another"


def truncated(weight: Tensor) -> Tensor:
    left, values, right = torch.linalg.svd(weight.detach().float(), full_matrices=False)
    return ((left[:, :2] * values[:2]) @ right[:2]).to(weight.dtype)


class Adapter(nn.Module):
    """Two small matrices beside a layer that has been there before, and is then changed."""

    def __init__(self, base: nn.Linear, change: Callable[[nn.Linear], None]) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(4, 2, bias=False)
        self.up = nn.Parameter(torch.zeros(4, 2))
        change(base)


def assign(base: nn.Linear) -> None:
    base.weight.data = truncated(base.weight)


def copy_into(base: nn.Linear) -> None:
    with torch.no_grad():
        base.weight.copy_(truncated(base.weight))


def put_another(base: nn.Linear) -> None:
    base.weight = nn.Parameter(truncated(base.weight))


def rotate(base: nn.Linear) -> None:
    base.weight.data = base.weight.data @ torch.linalg.qr(torch.randn(4, 4))[0]


def unitary(base: nn.Linear) -> None:
    base.weight.data = torch.fft.fft(base.weight.data).abs()


CHANGES = [assign, copy_into, put_another, rotate, unitary]


def load(build: Callable[[], nn.Module], path: Path, **options: bool) -> nn.Module:
    with deferred_init():
        model = build()
    materialize(model, checkpoint=path, **options)  # type: ignore[arg-type]
    return model


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Of a layer that is ``0.base`` in a model."""
    torch.save({f"0.base.{name}": value for name, value in nn.Linear(4, 4).state_dict().items()}, tmp_path / "m.pt")
    return tmp_path / "m.pt"


IN_BFLOAT16 = [(change, torch.bfloat16) for change in (assign, copy_into, put_another)]


@pytest.mark.parametrize(("change", "dtype"), [*((change, torch.float32) for change in CHANGES), *IN_BFLOAT16])
def test_a_change_by_linear_algebra_is_not_undone(
    change: Callable[[nn.Linear], None], dtype: torch.dtype, file: Path
) -> None:
    with pytest.raises(CheckpointMismatchError, match=FIX) as refused:
        load(lambda: nn.Sequential(Adapter(nn.Linear(4, 4, dtype=dtype), change)), file, strict=False)
    assert "1 tensors (0.base.weight first)" in str(refused.value)


def test_a_change_of_a_layer_that_inherits_from_linear_is_not_undone(tmp_path: Path) -> None:
    class Low(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 4)
            self.low = nn.Parameter(torch.zeros(4, 2))
            assign(self)

    torch.save({f"0.{name}": value for name, value in nn.Linear(4, 4).state_dict().items()}, tmp_path / "m.pt")
    with pytest.raises(CheckpointMismatchError, match=FIX):
        load(lambda: nn.Sequential(Low()), tmp_path / "m.pt", strict=False)


def test_what_is_taken_out_of_a_weight_before_it_is_rounded_is_not_computed_from_random_numbers(file: Path) -> None:
    class Rounded(Adapter):
        """As LoftQ: the adapter gets what rounding takes away."""

        def __init__(self) -> None:
            super().__init__(nn.Linear(4, 4), lambda base: None)
            rounded = (self.base.weight.data * 8).round() / 8
            left, values, right = torch.linalg.svd(self.base.weight.data - rounded)
            self.up.data, self.down.weight.data = left[:, :2] * values[:2], right[:2]
            self.base.weight.data = rounded

    with pytest.raises(CheckpointMismatchError, match=FIX):
        load(lambda: nn.Sequential(Rounded()), file, strict=False)


@pytest.mark.parametrize("change", CHANGES)
def test_a_checkpoint_of_the_whole_model_is_loaded(change: Callable[[nn.Linear], None], tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(Adapter(nn.Linear(4, 4), change), nn.Linear(4, 2))

    wanted = build().state_dict()
    torch.save({name: value for name, value in wanted.items() if not name.startswith("1.")}, tmp_path / "m.pt")
    model = load(build, tmp_path / "m.pt", strict=False)  # the head is new
    assert all(torch.equal(value, wanted[name]) for name, value in model.state_dict().items() if name[0] == "0")


def scale(base: nn.Linear) -> None:
    base.weight.data = base.weight.data * 0.02
    base.weight.data.mul_(0.5)


def normalize(base: nn.Linear) -> None:
    with torch.no_grad():
        base.weight.div_(base.weight.norm(dim=1, keepdim=True))
        base.weight.copy_(nn.functional.normalize(base.weight, dim=0))


def recast(base: nn.Linear) -> None:
    base.weight.data = base.weight.data.t().contiguous().clone().to(torch.float64).to(torch.float32)


def draw_anew(base: nn.Linear) -> None:
    nn.init.orthogonal_(base.weight)
    base.weight.data = torch.linalg.qr(torch.randn(4, 4))[0]


def orthogonal_at_once(base: nn.Linear) -> None:
    with torch.no_grad():
        base.weight.normal_()
        base.weight.copy_(torch.linalg.qr(base.weight)[0])


def seeded(base: nn.Linear) -> None:
    torch.manual_seed(0)
    orthogonal_at_once(base)


@pytest.mark.parametrize("change", [scale, normalize, recast, draw_anew, orthogonal_at_once, seeded])
def test_an_init_is_replaced_by_the_load_beside_new_tensors(change: Callable[[nn.Linear], None], file: Path) -> None:
    model = load(lambda: nn.Sequential(Adapter(nn.Linear(4, 4), change)), file, strict=False)
    assert torch.equal(model.state_dict()["0.base.weight"], torch.load(file)["0.base.weight"])


WRAPPED = {
    "weight norm": lambda layer: nn.utils.parametrizations.weight_norm(layer),
    "old weight norm": lambda layer: nn.utils.weight_norm(layer),
    "spectral norm": lambda layer: nn.utils.parametrizations.spectral_norm(layer),
    "old spectral norm": lambda layer: nn.utils.spectral_norm(layer),
    "householder": lambda layer: nn.utils.parametrizations.orthogonal(layer, orthogonal_map="householder"),
    "cayley": lambda layer: nn.utils.parametrizations.orthogonal(layer, orthogonal_map="cayley"),
}


@pytest.mark.filterwarnings("ignore")  # some are old
@pytest.mark.parametrize("name", WRAPPED)
def test_what_torch_wraps_weights_in_is_loaded_below_a_new_head(name: str, tmp_path: Path) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(WRAPPED[name](nn.Linear(4, 4)), nn.LayerNorm(4))
            self.head = nn.Linear(4, 2)

    wanted = {name: value for name, value in Model().state_dict().items() if not name.startswith("head")}
    torch.save(wanted, tmp_path / "m.pt")
    state = load(Model, tmp_path / "m.pt", strict=False).state_dict()
    assert all(torch.equal(state[name], value) for name, value in wanted.items())


def test_an_orthogonal_init_of_all_layers_at_the_end_is_replaced_below_a_new_head(tmp_path: Path) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.ModuleDict({"a": nn.Sequential(nn.Linear(4, 4)), "b": nn.Sequential(nn.Linear(4, 4))})
            self.head = nn.Linear(4, 2)
            for layer in self.body.values():
                assign(layer[0])

    wanted = {name: value for name, value in Model().state_dict().items() if not name.startswith("head")}
    torch.save(wanted, tmp_path / "m.pt")
    state = load(Model, tmp_path / "m.pt", strict=False).state_dict()
    assert all(torch.equal(state[name], value) for name, value in wanted.items())
