"""Who gets what, decided from names, shapes and dtypes alone; and what is said when it cannot be decided."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import pytest
import torch
from torch import Tensor, nn

from fabric_init import deferred_init, materialize
from fabric_init.checkpoints import BaseReader, Region, TensorSpec
from fabric_init.errors import CheckpointMismatchError, OptionError, UninitializedTensorError
from fabric_init.planning.make_plan import make_plan
from fabric_init.planning.plan import Action, LoadOptions, Plan, storage_groups
from fabric_init.planning.tensors import tensors_and_tapes
from tests.support.recordings import is_recorded


class Header(BaseReader):
    """A checkpoint of which there is only the header: whoever reads a weight of it fails."""

    format = "header"

    def __init__(self, specs: dict[str, TensorSpec], note: str | None = None) -> None:
        self.path = Path("folder/model.safetensors")
        self.note = note
        self.specs = specs

    def read(self, key: str, region: Region | None = None) -> NoReturn:
        raise AssertionError(f"{key} was read while planning")


def header(dtype: torch.dtype = torch.float32, /, **shapes: tuple[int, ...]) -> Header:
    return Header({name.replace("__", "."): TensorSpec(torch.Size(s), dtype) for name, s in shapes.items()})


def of_state(state: dict[str, Tensor]) -> Header:
    return Header({name: TensorSpec(tensor.shape, tensor.dtype) for name, tensor in state.items()})


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 2)
        self.head = nn.Linear(2, 4, bias=False)
        self.register_buffer("count", torch.zeros(2, dtype=torch.int64))
        self.register_buffer("angles", torch.arange(2.0), persistent=False)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4, 2)
        self.head = nn.Linear(2, 4, bias=False)
        self.head.weight = self.embedding.weight


def recorded(kind: type[nn.Module]) -> nn.Module:
    with deferred_init():
        return kind()


def plan(model: nn.Module, reader: Header | None, **wanted: object) -> Plan:
    slots, _, tapes = tensors_and_tapes(model)
    return make_plan(slots, tapes, reader, LoadOptions(**wanted))  # type: ignore[arg-type]


def actions(made: Plan) -> dict[str, Action]:
    return {entry.slot.name: entry.action for entry in made.entries}


def test_what_the_checkpoint_has_is_loaded_and_what_it_cannot_have_is_initialized() -> None:
    made = plan(recorded(Model), of_state(Model().state_dict()))
    assert actions(made) == {
        "body.weight": Action.LOAD,
        "body.bias": Action.LOAD,
        "head.weight": Action.LOAD,
        "count": Action.LOAD,
        "angles": Action.INIT,
    }
    assert made.unexpected == ()


def test_without_a_checkpoint_everything_is_initialized() -> None:
    assert set(actions(plan(recorded(Model), None)).values()) == {Action.INIT}


def test_planning_reads_no_weight_and_changes_nothing() -> None:
    model = recorded(Model)
    plan(model, of_state(Model().state_dict()))
    assert all(is_recorded(tensor) for tensor in (*model.parameters(), *model.buffers()))


def test_a_real_tensor_is_kept_and_may_be_loaded_over() -> None:
    model = recorded(Model)
    model.body = nn.Linear(3, 2)
    made = actions(plan(model, None))
    assert made["body.weight"] is Action.KEEP
    assert actions(plan(model, of_state(Model().state_dict())))["body.weight"] is Action.LOAD


def test_room_that_is_never_saved_and_never_written_is_scratch() -> None:
    class Cache(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))
            self.register_buffer("cache", torch.empty(3), persistent=False)

    assert actions(plan(recorded(Cache), None)) == {"weight": Action.INIT, "cache": Action.SCRATCH}


def test_missing_and_unexpected_keys_are_all_named_with_the_coverage() -> None:
    state = Model().state_dict()
    del state["count"], state["head.weight"]
    with pytest.raises(CheckpointMismatchError) as caught:
        plan(recorded(Model), of_state({**state, "extra.one": torch.ones(9), "extra.two": torch.ones(9)}))
    message = str(caught.value)
    assert "folder/model.safetensors: 2 of 4 tensors match." in message
    assert "Missing from the checkpoint (2):\n  count\n  head.weight" in message
    assert "Not in the model (2):\n  extra.one\n  extra.two" in message
    assert "strict=False" in message


@pytest.mark.parametrize("number", [60, 200])
def test_every_key_is_named_however_many_there_are(number: int) -> None:
    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(1, 1) for _ in range(number))

    with pytest.raises(CheckpointMismatchError) as caught:
        plan(recorded(Many), header(layers__0__weight=(1, 1)))
    listed = {line.strip() for line in str(caught.value).splitlines()}
    assert {f"layers.{i}.{name}" for i in range(number) for name in ("weight", "bias")} - {"layers.0.weight"} <= listed


def test_a_likely_rename_is_offered() -> None:
    state = {f"module.{name}": tensor for name, tensor in Model().state_dict().items()}
    with pytest.raises(CheckpointMismatchError) as caught:
        plan(recorded(Model), of_state(state))
    assert "0 of 4 tensors match" in str(caught.value)
    assert r'rename={r"^module\.": ""} would match all 4 missing keys' in str(caught.value)
    assert "another model" not in str(caught.value)


@pytest.mark.parametrize("strict", [True, False])
def test_a_checkpoint_of_another_model_is_refused_even_when_not_strict(strict: bool) -> None:
    with pytest.raises(CheckpointMismatchError, match=r"0 of 4 tensors match(.|\n)*another model"):
        plan(recorded(Model), header(conv=(7, 7)), strict=strict)


def test_a_note_on_how_the_file_was_read_is_part_of_the_message() -> None:
    reader = header(conv=(7, 7))
    reader.note = "state dict found under 'model'"
    with pytest.raises(CheckpointMismatchError, match=r"state dict found under 'model'"):
        plan(recorded(Model), reader)


def test_ties_saved_under_both_names_count_as_the_one_tensor_that_they_are() -> None:
    with pytest.raises(CheckpointMismatchError) as caught:
        plan(recorded(Tied), header(embedding__weight=(4, 2), head__weight=(4, 2), other=(1,)))
    assert "1 of 1 tensors match" in str(caught.value)


def test_ties_take_whichever_of_their_names_the_checkpoint_has() -> None:
    for name in ("embedding__weight", "head__weight"):
        made = plan(recorded(Tied), header(**{name: (4, 2)}))
        assert [entry.keys for entry in made.entries] == [(name.replace("__", "."),)]
        assert made.unexpected == ()
    both = plan(recorded(Tied), header(head__weight=(4, 2), embedding__weight=(4, 2)))
    assert [sorted(entry.keys) for entry in both.entries] == [["embedding.weight", "head.weight"]]


@pytest.mark.parametrize("strict", [True, False])
def test_a_wrong_shape_is_refused_with_both_shapes_and_the_way_out(strict: bool) -> None:
    state = {**Model().state_dict(), "head.weight": torch.ones(5, 2), "body.bias": torch.ones(7)}
    with pytest.raises(CheckpointMismatchError) as caught:
        plan(recorded(Model), of_state(state), strict=strict)
    message = str(caught.value)
    assert "folder/model.safetensors" in message
    assert "head.weight is (4, 2) in the model and (5, 2) in the checkpoint" in message
    assert "body.bias is (2,) in the model and (7,) in the checkpoint" in message
    assert "reinit=[" in message
    made = actions(plan(recorded(Model), of_state(state), reinit=["head.weight", "body.bias"]))
    assert made["head.weight"] is made["body.bias"] is Action.INIT


def test_the_reinit_that_the_message_offers_is_one_that_works() -> None:
    state = {f"x.{name}": tensor for name, tensor in Model().state_dict().items()}
    state["x.head.weight"] = torch.ones(5, 2)
    options = {"rename": {r"^x\.": ""}}
    with pytest.raises(CheckpointMismatchError) as caught:
        plan(recorded(Model), of_state(state), **options)
    assert "head.weight (checkpoint key x.head.weight)" in str(caught.value)
    offered = str(caught.value).split('reinit=["')[1].split('"')[0]
    assert actions(plan(recorded(Model), of_state(state), **options, reinit=[offered]))["head.weight"] is Action.INIT


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("count", torch.float32),
        ("body.bias", torch.int64),
        ("body.bias", torch.complex64),
        ("body.bias", torch.bool),
        ("count", torch.bool),
    ],
)
def test_a_cast_that_changes_what_numbers_mean_is_refused(strict: bool, name: str, dtype: torch.dtype) -> None:
    state = {**Model().state_dict(), name: torch.ones(2, dtype=dtype)}
    with pytest.raises(CheckpointMismatchError) as caught:
        plan(recorded(Model), of_state(state), strict=strict)
    assert name in str(caught.value)
    assert str(dtype) in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_casts_between_floats_are_planned_and_kept_for_the_report(dtype: torch.dtype) -> None:
    state = {**Model().state_dict(), "body.bias": torch.ones(2).to(dtype)}
    casts = {entry.slot.name: entry.cast_from for entry in plan(recorded(Model), of_state(state)).entries}
    assert casts.pop("body.bias") == dtype
    assert set(casts.values()) == {None}


def test_not_strict_initializes_what_is_missing_and_keeps_a_list_of_the_rest() -> None:
    made = plan(recorded(Model), header(body__weight=(2, 3), extra=(3,)), strict=False)
    assert actions(made)["body.weight"] is Action.LOAD
    assert actions(made)["head.weight"] is Action.INIT
    assert made.unexpected == ("extra",)


def test_a_dropped_key_is_not_unexpected() -> None:
    state = of_state({**Model().state_dict(), "ema.x": torch.ones(1)})
    made = plan(recorded(Model), state, rename=lambda key: None if key.startswith("ema") else key)
    assert made.unexpected == ()


def test_a_non_persistent_buffer_is_never_taken_from_the_checkpoint() -> None:
    state = of_state({**Model().state_dict(), "angles": torch.ones(2)})
    with pytest.raises(CheckpointMismatchError, match=r"Not in the model \(1\):\n  angles"):
        plan(recorded(Model), state)
    assert actions(plan(recorded(Model), state, strict=False))["angles"] is Action.INIT


def test_reinit_is_a_list_of_globs_that_must_each_name_something() -> None:
    state = of_state(Model().state_dict())
    made = actions(plan(recorded(Model), state, reinit=["body.*"]))
    assert made["body.weight"] is made["body.bias"] is Action.INIT
    assert made["head.weight"] is Action.LOAD
    with pytest.raises(OptionError, match=r"reinit='nose\.\*' names no tensor"):
        plan(recorded(Model), state, reinit=["body.*", "nose.*"])
    with pytest.raises(TypeError, match=r"reinit=\['body\.\*'\]"):
        plan(recorded(Model), state, reinit="body.*")


def test_reinit_of_one_name_of_a_tie_is_refused() -> None:
    saved = header(embedding__weight=(4, 2), head__weight=(4, 2))
    with pytest.raises(OptionError, match=r"head\.weight, which is tied to embedding\.weight: .*Untie them"):
        plan(recorded(Tied), saved, reinit=["head.*"])
    made = plan(recorded(Tied), saved, reinit=["embedding.weight", "head.weight"])
    assert actions(made) == {"embedding.weight": Action.INIT}
    assert made.unexpected == ()


def test_tensors_that_nobody_gives_a_value_are_named() -> None:
    class Garbage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.never = nn.Parameter(torch.empty(3))
            self.partial = nn.Parameter(torch.empty(4))
            self.whole = nn.Parameter(torch.empty(4))
            with torch.no_grad():
                self.partial[:2] = 1
                self.whole[:2] = 1
                self.whole[2:] = 1

    with pytest.raises(UninitializedTensorError) as caught:
        plan(recorded(Garbage), None)
    message = str(caught.value)
    assert "  never" in message
    assert "  partial" in message
    assert "  whole" not in message
    with pytest.raises(UninitializedTensorError, match=r"(?s)  partial.*folder/model\.safetensors"):
        plan(recorded(Garbage), header(never=(3,)), strict=False)
    made = actions(plan(recorded(Garbage), header(never=(3,), partial=(4,)), strict=False))
    assert made == {"never": Action.LOAD, "partial": Action.LOAD, "whole": Action.INIT}


def test_meta_tensors_of_others_are_told_apart() -> None:
    model = recorded(Model)
    model.alien = nn.Parameter(torch.ones(2, device="meta"))
    with pytest.raises(UninitializedTensorError, match=r"(?s)1 tensors are on the meta device but were not.*  alien"):
        plan(model, None)
    state = of_state({**Model().state_dict(), "alien": torch.ones(2)})
    assert actions(plan(model, state))["alien"] is Action.LOAD


def test_views_of_one_storage_are_one_group() -> None:
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            both = torch.zeros(4)
            self.left = nn.Parameter(both[:2])
            self.right = nn.Parameter(both[2:])
            self.alone = nn.Parameter(torch.zeros(1))

    groups = storage_groups(plan(recorded(Views), None).entries)
    assert sorted(groups.values()) == [[0, 1], [2]]


def test_a_plan_can_be_read() -> None:
    saved = header(torch.bfloat16, embedding__weight=(4, 2), other=(1,))
    assert repr(plan(recorded(Tied), saved, strict=False)) == (
        "Plan: 1 tensors: 1 loaded; 1 cast; 1 unexpected checkpoint keys\n"
        "  embedding.weight = head.weight[4, 2] float32: loaded from embedding.weight, cast from bfloat16"
    )
    assert repr(plan(recorded(Model), None)).startswith("Plan: 5 tensors: ")
    many = nn.ModuleList([recorded(Model) for _ in range(5)])
    assert repr(plan(many, None)).endswith("\n  … 15 more tensors …")


class Scalar(nn.Module):
    def __init__(self, shape: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(shape))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))


def test_a_scalar_takes_the_element_of_a_tensor_with_one_dimension() -> None:
    made = plan(recorded(Scalar), header(scale=(1,), count=()), reinit=["count"])
    assert [(entry.action, entry.spec.shape) for entry in made.entries if entry.spec] == [(Action.LOAD, ())]
    for shape in ((1, 1), (2,)):
        with pytest.raises(CheckpointMismatchError, match=r"scale is \(\) in the model"):
            plan(recorded(Scalar), header(scale=shape, count=()), reinit=["count"])


def test_a_tensor_with_one_dimension_takes_no_scalar_as_in_plain_pytorch() -> None:
    state = {"scale": torch.ones(()), "count": torch.tensor(0)}
    with pytest.raises(RuntimeError, match="size mismatch for scale"):
        Scalar((1,)).load_state_dict(state)
    with pytest.raises(CheckpointMismatchError, match=r"convert=\{'scale': lambda s: s\['scale'\]\.view\(1\)\}, or"):
        plan(recorded(lambda: Scalar((1,))), of_state(state))  # type: ignore[arg-type]


@pytest.mark.parametrize("mmap", [True, False])
def test_the_element_is_the_scalars_value_in_ties_and_in_what_is_computed_from_it(tmp_path: Path, mmap: bool) -> None:
    class Derived(Scalar):
        def __init__(self) -> None:
            super().__init__()
            self.also = self.scale
            self.doubled = nn.Parameter(self.scale.detach() * 2)

    state = {"scale": torch.tensor([4.5]), "also": torch.tensor(4.5), "count": torch.tensor([7])}
    torch.save(state, tmp_path / "m.pt")
    with deferred_init():
        model = Derived()
    materialize(model, checkpoint=tmp_path / "m.pt", mmap=mmap, reinit=["doubled"])
    assert model.scale.shape == model.count.shape == ()
    assert (model.scale.item(), model.count.item(), model.doubled.item()) == (4.5, 7, 9.0)


def test_every_name_of_a_tie_is_in_the_reinit_that_is_offered() -> None:
    with pytest.raises(CheckpointMismatchError) as caught:
        plan(recorded(Tied), header(embedding__weight=(5, 2)))
    assert 'reinit=["embedding.weight", "head.weight"]' in str(caught.value)
