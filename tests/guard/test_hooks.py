"""A tensor that has memory but no values cannot be used, whichever way one comes to it; and the guard goes away."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fabric_init import Fabric, FabricInitError, UninitializedTensorError


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
    "state_dict": lambda model, folder: model.state_dict(),
    "state_dict of a container": lambda model, folder: model.body.state_dict(),
    "state_dict of a leaf": lambda model, folder: model.body[1].state_dict(),
    "torch.save": lambda model, folder: torch.save(model, folder / "m.pt"),
    "torch.save of a container": lambda model, folder: torch.save(model.body, folder / "m.pt"),
    "pickle": lambda model, folder: pickle.dumps(model),
    "inference_mode": lambda model, folder: torch.inference_mode()(model)(torch.tensor([1])),
    "vmap": lambda model, folder: torch.func.vmap(model)(torch.tensor([1, 2])),
}


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


@pytest.mark.parametrize("use", [use for name, use in USES.items() if " of " not in name and "child" not in name])
@pytest.mark.parametrize("missing", ["embedding.weight", "body.1.bias"])
def test_one_tensor_that_is_left_is_enough_and_is_the_one_that_is_named(
    fabric: Fabric, tmp_path: Path, use: Callable[[Model, Path], object], missing: str
) -> None:
    with fabric.init_module(empty_init=True):
        model = Model()
    for name in NAMES:
        if name != missing:
            nn.init.ones_(model.get_parameter(name))
    with pytest.raises(UninitializedTensorError) as caught:
        use(model, tmp_path)
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
    if hooked:  # torch lets no hook go while another is still to be called, so the first forward takes the last of ours
        model(torch.tensor([1]))
    assert {where: len(hooks) for where, hooks in hook_tables(model).items()} == {
        where: len(hooks) for where, hooks in hook_tables(plain).items()
    }
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


def test_views_of_one_memory_are_unfilled_until_each_is_written(fabric: Fabric) -> None:
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            both = torch.ones(4)
            self.left = nn.Parameter(both[:2])
            self.right = nn.Parameter(both[2:])

        def forward(self) -> Tensor:
            return self.left + self.right

    with fabric.init_module(empty_init=True):
        model = Views()
    with pytest.raises(UninitializedTensorError, match=r"(?s)  left.*  right"):
        model()
    nn.init.zeros_(model.left)
    with pytest.raises(UninitializedTensorError, match=r"one of its tensors(.|\n)*  right"):
        model()
    fabric.init_missing(model)
    assert torch.equal(model.left, torch.zeros(2))
    assert torch.equal(model.right, torch.ones(2))
    assert model.left.untyped_storage().data_ptr() == model.right.untyped_storage().data_ptr()


@pytest.mark.parametrize("shape", [(3, 2, 3, 3), (2, 3, 2, 2), (3, 3, 5, 5), (5, 4, 2, 3)], ids=str)
def test_another_memory_format_is_not_taken_for_values(fabric: Fabric, shape: tuple[int, ...]) -> None:
    with fabric.init_module(empty_init=True):
        model = nn.Conv2d(shape[1], shape[0], shape[2:], bias=False)
    model.to(memory_format=torch.channels_last)
    with pytest.raises(UninitializedTensorError, match="weight"):
        model(torch.ones(1, shape[1], 8, 8))
    fabric.init_missing(model)
    assert model.weight.is_contiguous(memory_format=torch.channels_last)
    assert model.weight.isfinite().all()


NOT_A_WRITE: dict[str, Callable[[nn.Module], object]] = {
    "requires_grad_": lambda model: model.requires_grad_(False),
    "zero_grad": lambda model: model.zero_grad(),
    "train and eval": lambda model: model.eval().train(),
    "to the device it is on": lambda model: model.to("cpu"),
    "half and back": lambda model: model.half().float(),
    "float8": lambda model: model.to(torch.float8_e5m2).to(torch.float32),
    "an optimizer": lambda model: torch.optim.AdamW(model.parameters()).zero_grad(),
    "reading": lambda model: [parameter.detach().clone().sum() for parameter in model.parameters()],
    "share_memory": lambda model: model.share_memory(),
    "an empty strict load of a part": lambda model: nn.ReLU().load_state_dict({}),
}


@pytest.mark.parametrize("do", NOT_A_WRITE.values(), ids=NOT_A_WRITE)
def test_what_writes_nothing_fills_nothing(fabric: Fabric, do: Callable[[nn.Module], object]) -> None:
    with fabric.init_module(empty_init=True):
        model = Model()
    do(model)
    with pytest.raises(UninitializedTensorError) as caught:
        model(torch.tensor([1]))
    assert [name for name in NAMES if f"  {name}\n" not in str(caught.value)] == []


MARKS = {"nan": (torch.float32, float("nan")), "int8": (torch.int8, -38), "uint8": (torch.uint8, 165)}
MARKS["int64"] = (torch.int64, -(2**63) + 90)


@pytest.mark.parametrize(
    ("dtype", "value", "how"),
    [
        pytest.param(*mark, how, id=f"{name}-{how}")
        for name, mark in MARKS.items()
        for how in ("in place", "assign", "copy")
        if (name, how) != ("nan", "copy")  # cannot be told from memory that was only computed with
    ],
)
def test_a_value_that_was_given_is_taken_whatever_it_is(
    fabric: Fabric, dtype: torch.dtype, value: float, how: str
) -> None:
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("x", torch.zeros(3, dtype=dtype))

        def forward(self) -> Tensor:
            return self.x

    given = torch.full((3,), value, dtype=dtype)
    with fabric.init_module(empty_init=True):
        model = One()
    if how in ("in place", "assign"):
        model.load_state_dict({"x": given}, assign=how == "assign")
    else:
        model.x.copy_(given)
    assert torch.equal(
        model().nan_to_num(7.0) if dtype.is_floating_point else model(),
        given.nan_to_num(7.0) if dtype.is_floating_point else given,
    )


@pytest.mark.parametrize(
    "dtype",
    [
        torch.int8,
        torch.uint8,
        torch.int32,
        torch.int64,
        torch.float64,
        torch.bfloat16,
        torch.float8_e4m3fn,
        torch.complex64,
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(), (1,), (2, 3)], ids=str)
def test_tensors_of_every_dtype_and_size_are_guarded_and_initialized(
    fabric: Fabric, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("x", torch.ones(shape).to(dtype))

    with fabric.init_module(empty_init=True):
        model = One()
    with pytest.raises(UninitializedTensorError, match=r"  x"):
        model.state_dict()
    fabric.init_missing(model)
    assert model.x.dtype == dtype
    assert torch.equal(model.state_dict()["x"].to(torch.complex64), torch.ones(shape, dtype=torch.complex64))


def test_a_tensor_without_elements_needs_no_values(fabric: Fabric) -> None:
    class None_(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.nothing = nn.Parameter(torch.empty(0, 3))

    with fabric.init_module(empty_init=True):
        model = None_()
    fabric.init_missing(model)
    assert model.state_dict()["nothing"].shape == (0, 3)


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


def test_a_strict_load_that_fails_raises_as_in_plain_pytorch_and_leaves_no_garbage(fabric: Fabric) -> None:
    with fabric.init_module(empty_init=True):
        model = nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"bias\""):
        model.load_state_dict({"weight": torch.ones(2, 2)})
    row = next(row for row in fabric.init_report(model).rows if row.name == "bias")
    assert row.status in ("unfilled", "initialized")
    assert row.status == "unfilled" or model.bias.abs().max() < 1


def test_a_wrapper_of_the_users_own_is_guarded_and_loads_as_well(fabric: Fabric) -> None:
    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    with fabric.init_module(empty_init=True):
        inner = nn.Linear(2, 2)
    model = Wrapper(inner)
    with pytest.raises(UninitializedTensorError):
        model(torch.ones(1, 2))
    with pytest.raises(UninitializedTensorError):
        model.state_dict()
    model.load_state_dict({"inner.weight": torch.ones(2, 2)}, strict=False)
    assert torch.equal(model.inner.weight, torch.ones(2, 2))
    assert model(torch.ones(1, 2)).isfinite().all()
    assert fabric.init_report(inner).complete


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
    import gc
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


def test_a_part_written_through_data_fills_nothing(fabric: Fabric) -> None:
    with fabric.init_module(empty_init=True):
        model = nn.Embedding(100, 8, padding_idx=0)
    model.weight.data[0].zero_()
    with pytest.raises(UninitializedTensorError, match="weight"):
        model(torch.tensor([1]))


def test_a_bool_buffer_gets_its_own_init_at_once_for_nothing_can_mark_it(fabric: Fabric) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.ones(3, dtype=torch.bool))

    with fabric.init_module(empty_init=True):
        model = Masked()
    assert copy.deepcopy(model).mask.tolist() == [True, True, True]


def test_integers_that_were_written_in_part_are_still_asked_for(fabric: Fabric) -> None:
    class Indices(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("x", torch.arange(100))

    for where in (slice(0, 1), slice(3, 9), slice(0, 99)):
        with fabric.init_module(empty_init=True):
            model = Indices()
        model.x[where] = 5
        with pytest.raises(UninitializedTensorError, match=r"  x"):
            model.state_dict()


def test_a_cast_and_a_load_of_a_model_into_itself_fill_nothing(fabric: Fabric) -> None:
    with fabric.init_module(empty_init=True):
        model = Model()
    model.half().load_state_dict(dict(model.named_parameters()), strict=False)
    with pytest.raises(UninitializedTensorError, match="embedding"):
        model(torch.tensor([1]))


def test_a_model_goes_when_its_last_reference_goes(fabric: Fabric) -> None:
    import gc
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


def test_models_may_be_built_and_filled_in_several_threads(fabric: Fabric) -> None:
    def build_and_fill(number: int) -> Tensor:
        for _ in range(30):
            with fabric.init_module(empty_init=True):
                model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
            model.load_state_dict({name: torch.full_like(value, number) for name, value in state.items()})
        return model(torch.ones(1, 2)).detach()

    state = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).state_dict()
    with ThreadPoolExecutor(4) as pool:
        for number, found in enumerate(pool.map(build_and_fill, range(8))):
            assert torch.equal(found, torch.full((1, 2), float(3 * number) * 2 * number + number))


def test_what_no_longer_waits_is_not_kept(fabric: Fabric) -> None:
    with fabric.init_module(empty_init=True):
        model = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
    first = weakref.ref(model[0].weight)
    model[0].load_state_dict(nn.Linear(2, 2).state_dict())
    model[0] = nn.Identity()
    assert first() is None


def test_a_load_that_a_hook_ends_keeps_no_model_alive(fabric: Fabric) -> None:
    def refuse(*args: object) -> None:
        raise LookupError("the user's own")

    with fabric.init_module(empty_init=True):
        model = nn.Sequential(nn.Linear(2, 2))
    model[0].register_load_state_dict_pre_hook(refuse)
    with pytest.raises(LookupError):
        model.load_state_dict(nn.Sequential(nn.Linear(2, 2)).state_dict())
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_a_model_that_the_user_has_written_pickles_at_once(fabric: Fabric) -> None:
    with fabric.init_module(empty_init=True):
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    assert torch.equal(pickle.loads(pickle.dumps(model))(torch.ones(1, 2)), torch.full((1, 2), 7.0))
