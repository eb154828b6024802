"""``materialize``: in place, everything that held on to the model's tensors goes on working."""

from __future__ import annotations

import random
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fabric_init import RecordingError, UninitializedTensorError, deferred_init, materialize
from tests.support.recordings import is_recorded


class Net(nn.Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(0.0)
        self.second = nn.Linear(width, 1)
        self.register_buffer("shift", torch.rand(width), persistent=False)
        nn.init.trunc_normal_(self.first.weight, std=0.1)
        nn.init.orthogonal_(self.second.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.norm(self.first(x + self.shift)))


def recorded(seed: int = 0, rng: str = "per_op") -> Net:
    torch.manual_seed(seed)
    with deferred_init(rng=rng):
        return Net()


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    torch.manual_seed(11)
    torch.save(Net().state_dict(), tmp_path / "net.pt")
    return tmp_path / "net.pt"


@pytest.mark.parametrize("load", [False, True], ids=["initialized", "loaded"])
def test_an_optimizer_made_on_the_recorded_model_goes_on_working(path: Path, load: bool) -> None:
    model = recorded()
    optimizer = torch.optim.AdamW(
        [{"params": model.first.parameters(), "lr": 0.1}, {"params": [*model.norm.parameters()]}], lr=0.01
    )
    parameters = dict(model.named_parameters())
    materialize(model, checkpoint=path if load else None)
    assert all(model.get_parameter(name) is parameter for name, parameter in parameters.items())

    twin = Net()
    twin.load_state_dict(model.state_dict())
    twin.shift = model.shift.clone()
    other = torch.optim.AdamW(
        [{"params": twin.first.parameters(), "lr": 0.1}, {"params": [*twin.norm.parameters()]}], lr=0.01
    )
    x = torch.randn(5, 6)
    for _ in range(3):
        for net, steps in ((model, optimizer), (twin, other)):
            steps.zero_grad()
            net(x).square().mean().backward()
            steps.step()
    for name, parameter in twin.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter), name


@pytest.mark.parametrize("load", [False, True], ids=["initialized", "loaded"])
def test_weak_references_hooks_and_attributes_survive(path: Path, load: bool) -> None:
    model = recorded()
    alive = weakref.ref(model.first.weight)
    number = id(model.first.weight)
    model.first.weight.tensor_parallel = True
    grads = []
    model.first.weight.register_hook(grads.append)
    model.norm.weight.requires_grad_(False)
    materialize(model, checkpoint=path if load else None)
    assert alive() is model.first.weight
    assert id(model.first.weight) == number
    assert model.first.weight.tensor_parallel is True
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["norm.weight"]
    model(torch.randn(2, 6)).sum().backward()
    assert len(grads) == 1
    assert model.norm.weight.grad is None


def test_the_same_seed_gives_the_same_values_and_another_seed_others() -> None:
    one, same, other = recorded(1), recorded(1), recorded(2)
    for model in (one, same, other):
        materialize(model)
    for name, tensor in values(one).items():
        assert torch.equal(tensor, values(same)[name]), name
    assert not torch.equal(one.first.weight, other.first.weight)


@pytest.mark.parametrize("trial", range(4))
def test_a_tensor_gets_the_same_values_whatever_else_is_loaded(tmp_path: Path, trial: int) -> None:
    whole = recorded(3)
    materialize(whole)
    keys = random.Random(trial).sample(sorted(Net().state_dict()), trial + 1)
    torch.save({key: tensor for key, tensor in Net().state_dict().items() if key in keys}, tmp_path / "m.pt")
    part = recorded(3)
    materialize(part, checkpoint=tmp_path / "m.pt", strict=False)
    for name, tensor in values(whole).items():
        if name not in keys:
            assert torch.equal(values(part)[name], tensor), name


def test_the_number_of_threads_does_not_change_a_value() -> None:
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            torch.manual_seed(4)
            with deferred_init():
                model = nn.Sequential(*(Net(256) for _ in range(6)))  # large enough to be worth threads
            materialize(model)
            found.append(values(model))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for name, tensor in found[0].items():
        assert all(torch.equal(tensor, other[name]) for other in found[1:]), name


def test_what_happens_between_recording_and_filling_does_not_change_a_value() -> None:
    one, other = recorded(5), recorded(5)
    materialize(one)
    torch.manual_seed(99)
    torch.randn(1000)
    materialize(other)
    assert torch.equal(one.first.weight, other.first.weight)


def test_two_models_in_sequence_differ_as_twin_critics_must() -> None:
    torch.manual_seed(0)
    with deferred_init():
        first, second = Net(), Net()
    with deferred_init():
        third = Net()
    for model in (first, second, third):
        materialize(model)
    weights = [model.first.weight for model in (first, second, third)]
    assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[1], weights[2])
    for model in (first, second, third):
        assert not torch.equal(model.first.weight[:, :1], model.second.weight.t())


def test_filling_draws_nothing_from_the_global_generator() -> None:
    model = recorded(6)
    torch.manual_seed(8)
    expected = torch.randn(3)
    torch.manual_seed(8)
    materialize(model)
    assert torch.equal(torch.randn(3), expected)


def test_eager_random_numbers_are_those_of_plain_pytorch() -> None:
    torch.manual_seed(7)
    plain = Net()
    for model, rng in ((recorded(7, "eager"), None), (recorded(7), "eager")):
        materialize(model, rng=rng)
        for name, tensor in values(plain).items():
            assert torch.equal(values(model)[name], tensor), name


def test_values_that_the_constructor_saw_cannot_be_drawn_another_way_afterwards() -> None:
    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(2))
            self.sign = self.weight.sum().item() > 0

    with deferred_init(rng="per_op"):
        model = Looks()
    with pytest.raises(RecordingError, match=r"deferred_init\(rng='eager'\)"):
        materialize(model, rng="eager")
    materialize(model)
    assert model.sign == (model.weight.sum() > 0)


def test_filling_twice_keeps_the_first_values(path: Path) -> None:
    model = recorded()
    materialize(model)
    before = values(model)
    with torch.no_grad():
        model.first.bias.fill_(9)
    materialize(model)
    assert torch.equal(model.first.weight, before["first.weight"])
    assert torch.equal(model.first.bias, torch.full((6,), 9.0))
    materialize(model, checkpoint=path)
    assert torch.equal(model.first.weight, torch.load(path)["first.weight"])


def test_a_plain_model_is_left_alone() -> None:
    model = nn.Linear(2, 2)
    before = model.weight.detach().clone()
    report = materialize(model)
    assert torch.equal(model.weight, before)
    assert {row.status for row in report.rows} == {"set when built"}


def test_a_part_of_a_recorded_model_can_be_filled_by_itself() -> None:
    model = recorded(9)
    whole = recorded(9)
    materialize(whole)
    materialize(model.first)
    assert is_recorded(model.norm.weight)
    assert torch.equal(model.first.weight, whole.first.weight)
    materialize(model)
    for name, tensor in values(whole).items():
        assert torch.equal(values(model)[name], tensor), name


def test_a_device_may_be_named_in_words() -> None:
    model = recorded()
    materialize(model, device="cpu")
    assert model.first.weight.device == torch.device("cpu")
    with deferred_init():
        other = nn.Linear(2, 2, device="cuda:3")  # asked for when built, moved here when filled
    materialize(other, device="cpu")
    assert other.weight.device == torch.device("cpu")
    assert other.weight.isfinite().all()


def test_grad_and_training_flags_stay_and_no_graph_is_left() -> None:
    model = recorded().eval()
    materialize(model)
    assert not model.training
    assert all(p.is_leaf and p.grad is None and p.grad_fn is None for p in model.parameters())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_filling_works_under_any_gradient_mode(mode) -> None:
    model = recorded()
    with mode():
        materialize(model)
        assert model(torch.ones(1, 6)).isfinite().all()


def test_failing_changes_nothing_and_a_second_try_can_succeed(tmp_path: Path) -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.never = nn.Parameter(torch.empty(2))
            self.ones = nn.Parameter(torch.ones(2))

    with deferred_init():
        model = Half()
    with pytest.raises(UninitializedTensorError, match="never"):
        materialize(model)
    assert is_recorded(model.ones)
    torch.save({"never": torch.zeros(2)}, tmp_path / "m.pt")
    materialize(model, checkpoint=tmp_path / "m.pt", strict=False)
    assert torch.equal(model.ones, torch.ones(2))
    assert torch.equal(model.never, torch.zeros(2))


def test_a_recorded_model_that_nobody_filled_has_no_values_to_give() -> None:
    model = recorded()
    with pytest.raises((UninitializedTensorError, RuntimeError, NotImplementedError)):
        model(torch.ones(1, 6)).sum().item()


def test_load_state_dict_with_assign_fills_a_recorded_model_and_materialize_does_the_rest() -> None:
    model = recorded()
    state = {name: tensor for name, tensor in Net().state_dict().items() if name != "norm.weight"}
    model.load_state_dict(state, assign=True, strict=False)
    report = materialize(model)
    assert torch.equal(model.first.weight, state["first.weight"])
    assert torch.equal(model.norm.weight, torch.ones(6))
    assert {row.name: row.status for row in report.rows}["first.weight"] == "loaded"
    assert model(torch.ones(1, 6)).isfinite().all()


def test_recurrent_layers_lay_their_weights_out_once_they_are_filled() -> None:
    class Counting(nn.LSTM):
        calls = 0

        def flatten_parameters(self) -> None:
            type(self).calls += 1
            super().flatten_parameters()

    with deferred_init():
        model = nn.Sequential(Counting(3, 4, num_layers=2))
    before = Counting.calls
    materialize(model)
    assert Counting.calls == before + 1
    assert model[0]._flat_weights[0] is model[0].weight_ih_l0
    assert model(torch.ones(1, 2, 3))[0].isfinite().all()
