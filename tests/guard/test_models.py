"""A model with tensors that wait for values cannot be used or saved; once it is complete, it is a plain model."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_model
from torch import Tensor, nn

from fabric_init import (
    Fabric,
    FabricInitError,
    UninitializedTensorError,
)


@pytest.fixture
def fabric() -> Fabric:
    return Fabric(accelerator="cpu", devices=1)


def hook_tables(model: nn.Module) -> dict[tuple[str, str], list[object]]:
    return {
        (name, table): list(hooks)
        for name, module in model.named_modules()
        for table, hooks in vars(module).items()
        if "hooks" in table
    }


class Head(nn.Module):
    """Uses its child's weight without calling the child."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.embedding = embedding

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.embedding.weight)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.body = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.LayerNorm(4))
        self.head = Head(self.embedding)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.body(self.embedding(tokens)))


NAMES = ["embedding.weight", "body.0.0.weight", "body.0.0.bias", "body.1.weight", "body.1.bias"]


X = torch.ones(1, 4)


USES: dict[str, Callable[[Model, Path], object]] = {
    "forward": lambda model, folder: model(torch.tensor([1])),
    "forward of a leaf": lambda model, folder: model.body[0][0](X),
    "forward of a container": lambda model, folder: model.body(X),
    "forward of an inner container": lambda model, folder: model.body[0](X),
    "forward that uses a child's weight": lambda model, folder: model.head(X),
    "torch.save of the state dict": lambda model, folder: torch.save(model.state_dict(), folder / "m.pt"),
    "torch.save of a part's state dict": lambda model, folder: torch.save(model.body.state_dict(), folder / "m.pt"),
    "torch.save of a leaf's state dict": lambda model, folder: torch.save(model.body[1].state_dict(), folder / "m.pt"),
    "safetensors": lambda model, folder: save_model(model, folder / "m.safetensors"),
    ".forward": lambda model, folder: model.forward(torch.tensor([1])),
    "functional_call": lambda model, folder: torch.func.functional_call(model, {}, torch.tensor([1])),
    "compile": lambda model, folder: torch.compile(model, backend="eager")(torch.tensor([1])),
    "export": lambda model, folder: torch.export.export(model, (torch.tensor([1]),)).module()(torch.tensor([1])),
    "torch.save": lambda model, folder: torch.save(model, folder / "m.pt"),
    "torch.save of a container": lambda model, folder: torch.save(model.body, folder / "m.pt"),
    "pickle": lambda model, folder: pickle.dumps(model),
    "inference_mode": lambda model, folder: torch.inference_mode()(model)(torch.tensor([1])),
    "vmap": lambda model, folder: torch.func.vmap(model)(torch.tensor([1, 2])),
}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch.compile's
@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_every_use_of_an_unfilled_model_raises_with_all_names(
    fabric: Fabric, tmp_path: Path, use: Callable[[Model, Path], object]
) -> None:
    with fabric.init_module(empty_init=True):
        model = Model()
    with pytest.raises(UninitializedTensorError) as caught:
        use(model, tmp_path)
    assert [name for name in NAMES if f"  {name}\n" not in str(caught.value)] == []
    assert "Model cannot" in str(caught.value)
    with pytest.raises(UninitializedTensorError):  # once more: raising is no permission
        use(model, tmp_path)
    fabric.init_missing(model)
    use(model, tmp_path)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch.compile's
@pytest.mark.parametrize("use", [name for name in USES if " of a" not in name and "child" not in name])
@pytest.mark.parametrize("missing", ["embedding.weight", "body.1.bias"])
def test_one_tensor_that_is_left_is_enough_and_is_the_one_that_is_named(
    fabric: Fabric, tmp_path: Path, use: str, missing: str
) -> None:
    with fabric.init_module(empty_init=True):
        model = Model()
    for name in NAMES:
        if name != missing:
            nn.init.ones_(model.get_parameter(name))
    with pytest.raises(UninitializedTensorError) as caught:
        USES[use](model, tmp_path)
    assert [name for name in NAMES if name in str(caught.value)] == [missing]


def test_saving_nothing_is_left_behind_by_a_refused_save(fabric: Fabric, tmp_path: Path) -> None:
    with fabric.init_module(empty_init=True):
        model = Model()
    with pytest.raises(UninitializedTensorError):
        fabric.save(tmp_path / "m.ckpt", {"model": model})
    assert list(tmp_path.iterdir()) == []


FILLS: dict[str, Callable[[Fabric, nn.Module, dict[str, Tensor]], object]] = {
    "load_state_dict": lambda fabric, model, state: model.load_state_dict(state),
    "assign": lambda fabric, model, state: model.load_state_dict(state, assign=True),
    "not strict": lambda fabric, model, state: model.load_state_dict({NAMES[0]: state[NAMES[0]]}, strict=False),
    "init_missing": lambda fabric, model, state: fabric.init_missing(model),
    "by hand, then forward": lambda fabric, model, state: (
        [nn.init.ones_(parameter) for parameter in model.parameters()],
        model(torch.tensor([1])),
    ),
    "by hand, then state_dict": lambda fabric, model, state: (
        [nn.init.ones_(parameter) for parameter in model.parameters()],
        model.state_dict(),
    ),
    "by hand, then report": lambda fabric, model, state: (
        [nn.init.ones_(parameter) for parameter in model.parameters()],
        fabric.init_report(model),
    ),
}


@pytest.mark.parametrize("hooked", [False, True], ids=["no other hooks", "other hooks too"])
@pytest.mark.parametrize("fill", FILLS.values(), ids=FILLS)
def test_no_hook_stays_after_completion_and_the_users_own_do(
    fabric: Fabric, fill: Callable[..., object], hooked: bool
) -> None:
    called: list[str] = []

    def add_hooks(module: nn.Module) -> None:
        module.register_forward_pre_hook(lambda *args: called.append("forward"))
        module.register_state_dict_pre_hook(lambda *args: called.append("save"))
        module.register_load_state_dict_post_hook(lambda *args: called.append("load"))

    plain = Model()
    with fabric.init_module(empty_init=True):
        model = Model()
    if hooked:
        for module in (*model.modules(), *plain.modules()):
            add_hooks(module)
    state = {name: torch.ones_like(tensor) for name, tensor in plain.state_dict().items()}
    fill(fabric, model, state)
    for table in ("_forward_pre_hooks", "_forward_hooks", "_state_dict_pre_hooks", "_state_dict_hooks"):
        assert all(len(vars(module)[table]) <= hooked for module in model.modules())
    model.load_state_dict(model.state_dict())
    left = {where: len(hooks) for where, hooks in hook_tables(model).items()}
    expected = {where: len(hooks) for where, hooks in hook_tables(plain).items()}
    if hooked:  # torch lets no hook of a load go while another is still to be called: the outermost module keeps ours
        for table in ("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"):
            assert left.pop(("", table)) - expected.pop(("", table)) <= 1
    assert left == expected
    assert "guard" not in repr(hook_tables(model)).lower()
    called.clear()
    model(torch.tensor([1]))
    model.load_state_dict(model.state_dict())
    assert set(called) == ({"forward", "save", "load"} if hooked else set())
    copy.deepcopy(model)  # completed, it can be copied and pickled again


def test_a_completed_model_pickles(fabric: Fabric) -> None:
    with fabric.init_module(empty_init=True):
        model = Model()
    fabric.init_missing(model)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again.embedding.weight, model.embedding.weight)


def test_a_tensor_that_was_taken_out_of_the_model_is_not_asked_for(fabric: Fabric) -> None:
    with fabric.init_module(empty_init=True):
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].bias = None
    with pytest.raises(UninitializedTensorError) as caught:
        model(torch.ones(1, 2))
    assert "0.bias" not in str(caught.value)
    fabric.init_missing(model)
    assert model(torch.ones(1, 2)).isfinite().all()


def test_a_module_that_was_replaced_or_removed_is_not_asked_for(fabric: Fabric) -> None:
    with fabric.init_module(empty_init=True):
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1] = nn.Linear(2, 3)
    model[0].load_state_dict({"weight": torch.ones(2, 2), "bias": torch.zeros(2)})
    assert model(torch.ones(1, 2)).shape == (1, 3)
    assert model.state_dict().keys() == {"0.weight", "0.bias", "1.weight", "1.bias"}


def test_peft_adapters_on_an_unfilled_model_do_not_hide_that_it_is_unfilled(fabric: Fabric) -> None:
    import peft

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.second = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))

    with fabric.init_module(empty_init=True):
        base = Net()
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["first"], r=2))
    with pytest.raises(UninitializedTensorError, match=r"first"):
        model(torch.ones(1, 4))
    fabric.init_missing(model)
    assert model(torch.ones(1, 4)).isfinite().all()


def test_the_guard_dies_with_its_model(fabric: Fabric) -> None:
    import weakref

    with fabric.init_module(empty_init=True):
        model = Model()
    alive = weakref.ref(model), weakref.ref(model.embedding.weight)
    del model
    gc.collect()
    assert [reference() for reference in alive] == [None, None]


def test_asking_for_the_report_of_a_part_says_whom_to_ask(fabric: Fabric) -> None:
    with fabric.init_module(empty_init=True):
        model = Model()
    with pytest.raises(FabricInitError, match="outermost"):
        fabric.init_report(model.body)


def test_a_model_goes_when_its_last_reference_goes(fabric: Fabric) -> None:
    import weakref

    gc.collect()
    gc.disable()
    try:
        with fabric.init_module(empty_init=True):
            model = Model()
        fabric.init_missing(model)
        alive = weakref.ref(model.body)
        del model
        assert alive() is None
    finally:
        gc.enable()


def test_what_no_longer_waits_is_not_kept(fabric: Fabric) -> None:
    with fabric.init_module(empty_init=True):
        model = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
    first = weakref.ref(model[0].weight)
    model[0].load_state_dict(nn.Linear(2, 2).state_dict())
    model[0] = nn.Identity()
    assert first() is None


def test_a_model_that_the_user_has_written_pickles_at_once(fabric: Fabric) -> None:
    with fabric.init_module(empty_init=True):
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    assert torch.equal(pickle.loads(pickle.dumps(model))(torch.ones(1, 2)), torch.full((1, 2), 7.0))
