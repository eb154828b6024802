"""A proposal has been tried: it breaks no match, brings more, and leaves no doubt which key is meant for what."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest
import torch

from fabric_init.checkpoints import Fuse, Split, Stack, Transpose, Unstack
from fabric_init.errors import CheckpointMismatchError
from fabric_init.planning.hints.proposals import proposals
from fabric_init.planning.plan import Action
from fabric_init.planning.recorded_load.converted import converted
from tests.planning.headers import Header, matching_of, plan_of, tree

Shapes = dict[str, tuple[int, ...]]


def message(model: Shapes, checkpoint: Shapes, **wanted: Any) -> str:
    with pytest.raises(CheckpointMismatchError) as caught:
        plan_of(tree(model), Header(checkpoint), **wanted)
    return str(caught.value)


def follow(model: Shapes, checkpoint: Shapes, said: str) -> set[str]:
    """Return what is still missing or unexpected when all that a message proposes is passed."""
    names = {"Fuse": Fuse, "Split": Split, "Stack": Stack, "Transpose": Transpose, "Unstack": Unstack}
    rename = [eval(text) for text in re.findall(r"Likely: rename=(\{.*?\}) would", said)]
    convert = [one for text in re.findall(r"Likely: convert=(\[.*\])[ ,]", said) for one in eval(text, names)]
    found = matching_of(tree(model), converted(Header(checkpoint), convert), rename=rename)  # type: ignore[arg-type]
    return {slot.name for slot in found.missing} | set(found.unexpected) | {m.key for m in found.misfits}


def test_a_rename_that_would_unmatch_others_is_limited_to_the_layers_that_need_it() -> None:
    model: Shapes = {f"{i}.weight": (3, 3) for i in range(1, 4)} | {"0._orig_mod.weight": (3, 3)}
    checkpoint: Shapes = {f"{i}.weight": (3, 3) for i in range(4)}
    assert not follow(model, checkpoint, message(model, checkpoint))
    model |= {f"{i}.bias": (3,) for i in range(1, 4)} | {"0._orig_mod.bias": (3,)}
    checkpoint |= {f"{i}.bias": (3,) for i in range(4)}
    said = message(model, checkpoint)
    assert r'Likely: rename={r"^(0)\.": r"\1._orig_mod."} would match all 2 missing keys' in said
    assert not follow(model, checkpoint, said)


def test_a_prefix_that_would_unmatch_others_is_limited_to_the_names_that_need_it() -> None:
    model: Shapes = {"body.weight": (3, 3), "model.head.weight": (2, 3), "model.head.bias": (2,)}
    checkpoint: Shapes = {"body.weight": (3, 3), "head.weight": (2, 3), "head.bias": (2,)}
    said = message(model, checkpoint)
    assert not follow(model, checkpoint, said), said


def test_a_rename_that_nothing_can_limit_is_not_proposed() -> None:
    # once the user has renamed too much, to take it back would unmatch the other
    model: Shapes = {f"{module}.{name}": (3,) for module in ("0._orig_mod", "1") for name in ("weight", "bias")}
    checkpoint: Shapes = {f"{module}.{name}": (3,) for module in "01" for name in ("weight", "bias")}
    said = message(model, checkpoint, rename={r"^(\d+)\.": r"\1._orig_mod."})
    assert "Likely" not in said
    assert "strict=False gives" not in said


def test_a_proposal_counts_what_it_brings_beside_the_users_own_rename() -> None:
    model: Shapes = {"a.weight": (2, 2), "gate.weight": (3, 3)}
    checkpoint: Shapes = {"net.a.weight": (2, 2), "net.w1.weight": (3, 3)}
    said = message(model, checkpoint, rename={r"^net\.": ""})
    assert r'rename={r"^w1\.": "gate."} would match all 1 missing key (after your own: rename=[yours, …])' in said
    assert plan_of(tree(model), Header(checkpoint), rename=[{r"^net\.": ""}, {r"^w1\.": "gate."}]).unexpected == ()


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (("to_q", "to_k", "to_v"), ("q_proj", "k_proj", "v_proj")),
        (("norm_q", "norm_k"), ("q_norm", "k_norm")),
        (("query", "key", "value"), ("wq", "wk", "wv")),
        (("value", "key", "query"), ("to_q", "to_k", "to_v")),
    ],
)
def test_q_k_and_v_go_by_their_letters(theirs: tuple[str, ...], ours: tuple[str, ...]) -> None:
    model: Shapes = {f"layers.{i}.attn.{name}.weight": (8, 8) for i in range(2) for name in ours}
    checkpoint: Shapes = {f"layers.{i}.attn.{name}.weight": (8, 8) for i in range(2) for name in theirs}
    model["norm.weight"] = checkpoint["norm.weight"] = (8,)
    found = proposals(matching_of(tree(model), Header(checkpoint)), Header(checkpoint))
    assert found.ambiguous == ()
    rename: dict[str, str] = {}
    for text in found.likely:
        rename |= eval(text.removeprefix("rename=").partition(" would")[0])
    loaded = plan_of(tree(model), Header(checkpoint), rename=rename).entries
    letters = {"query": "q", "key": "k", "value": "v"}
    for entry in loaded:
        if "attn" in entry.slot.name:
            key = entry.keys[0].split(".")[-2]
            letter = letters.get(key, key.replace("norm", "").replace("to", "").strip("_"))
            assert letter in entry.slot.name.split(".")[-2].replace("norm", ""), entry


def test_where_names_do_not_say_which_is_which_both_sides_are_listed_and_nothing_is_proposed() -> None:
    model: Shapes = {f"attn.{name}.weight": (8, 8) for name in ("red", "green", "blue")} | {"norm.weight": (8,)}
    checkpoint: Shapes = {f"attn.{name}.weight": (8, 8) for name in "xyz"} | {"norm.weight": (8,)}
    said = message(model, checkpoint)
    assert "Likely" not in said
    [line] = [line for line in said.splitlines() if line.startswith("Ambiguous")]
    for name in ("attn.x.weight", "attn.y.weight", "attn.z.weight", "attn.red.weight", "attn.blue.weight"):
        assert name in line


def test_two_copies_of_the_weights_in_one_file_leave_it_open_which_is_meant() -> None:
    model: Shapes = {"a.weight": (2, 2), "b.weight": (3, 2)}
    checkpoint: Shapes = {f"{copy}.{name}": shape for copy in ("student", "teacher") for name, shape in model.items()}
    said = message(model, checkpoint)
    assert "Ambiguous" in said
    assert "Likely" not in said


def test_a_bias_is_no_weight_and_extra_state_no_scalar() -> None:
    assert "Likely" not in message({"a.weight": (4,), "b.c": (1,)}, {"a.bias": (4,), "b.c": (1,)})
    assert "Likely" not in message({"a.scale": (), "b.c": (1,)}, {"a._extra_state": (), "b.c": (1,)})


def experts(names: dict[str, tuple[int, ...]], block: str = "mlp", layers: int = 2, number: int = 3) -> Shapes:
    return {
        f"layers.{i}.{block}.experts.{expert}.{name}.weight": shape
        for i in range(layers)
        for expert in range(number)
        for name, shape in names.items()
    } | {f"layers.{i}.{block}.gate.weight": (number, 4) for i in range(layers)}


STACKED: Shapes = {
    name: shape
    for i in range(2)
    for name, shape in {
        f"layers.{i}.mlp.gate.weight": (3, 4),
        f"layers.{i}.mlp.experts.gate_up_proj": (3, 10, 4),
        f"layers.{i}.mlp.experts.down_proj": (3, 4, 5),
    }.items()
}


@pytest.mark.parametrize(
    "checkpoint",
    [
        experts({"gate_proj": (5, 4), "up_proj": (5, 4), "down_proj": (4, 5)}),
        experts({"down_proj": (4, 5), "up_proj": (5, 4), "gate_proj": (5, 4)}),
        experts({"w1": (5, 4), "w2": (4, 5), "w3": (5, 4)}, block="block_sparse_moe"),
    ],
    ids=["as they are called", "in another order", "in another block, by numbers"],
)
def test_experts_that_are_apart_in_the_file_are_fused_and_stacked(checkpoint: Shapes) -> None:
    said = message(STACKED, checkpoint)
    assert "Stack('experts.{}.gate_up_proj', into='experts.gate_up_proj')" in said
    assert not follow(STACKED, checkpoint, said), said
    first, second = ("w1", "w3") if "w1" in said else ("gate_proj", "up_proj")
    assert f"Fuse(['experts.{{}}.{first}.weight', 'experts.{{}}.{second}.weight']" in said


def test_experts_that_are_stacked_in_the_file_are_taken_apart() -> None:
    model = experts({"gate_proj": (5, 4), "up_proj": (5, 4), "down_proj": (4, 5)})
    said = message(model, STACKED)
    assert "Unstack('experts.down_proj', into='experts.{}.down_proj.weight')" in said
    assert not follow(model, STACKED, said), said


def test_experts_of_which_one_is_missing_are_not_stacked() -> None:
    checkpoint = experts({"gate_proj": (5, 4), "up_proj": (5, 4), "down_proj": (4, 5)}, number=2)
    assert "Likely" not in message(STACKED, checkpoint | {f"layers.{i}.mlp.gate.weight": (3, 4) for i in range(2)})


def test_a_transpose_is_proposed_for_shapes_and_not_for_dtypes() -> None:
    model: Shapes = {"a.weight": (4, 4), "b.weight": (2, 3)}
    int8 = {"a.weight": torch.int8}
    with pytest.raises(CheckpointMismatchError) as caught:
        plan_of(tree(model), Header(model, int8))
    assert "Transpose" not in str(caught.value)
    del model["a.weight"]
    said = message(model, {"b.weight": (3, 2)})
    assert "Likely: convert=[Transpose(['b.weight'])]" in said
    assert "reinit" not in said, "the conversion keeps the values"
    assert not follow(model, {"b.weight": (3, 2)}, said)


def test_square_tensors_leave_it_open_what_is_transposed() -> None:
    said = message({"a.weight": (4, 4), "b.weight": (2, 3)}, {"a.weight": (4, 4), "b.weight": (3, 2)})
    assert "Likely" not in said
    assert "Ambiguous: convert=[Transpose(['b.weight'])] makes them fit" in said
    assert "with all of them it is convert=[Transpose(['b.weight', 'a.weight'])]" in said


def test_a_transpose_leaves_alone_what_fits() -> None:
    model: Shapes = {"a.proj.weight": (4, 3, 5, 5), "b.proj.weight": (2, 3)}
    said = message(model, model | {"b.proj.weight": (3, 2)})
    assert "Likely: convert=[Transpose(['b.proj.weight'])]" in said


def test_what_agrees_in_shape_alone_is_named_and_not_proposed() -> None:
    said = message({"a.weight": (2, 2), "b.weight": (3, 3)}, {"a.weight": (2, 2), "c.weight": (3, 3)})
    assert "Likely" not in said
    assert "Alike in shape alone: c.weight in the checkpoint, b.weight in the model." in said


def test_a_transpose_that_mends_some_leaves_the_way_out_for_the_rest() -> None:
    said = message({"a.weight": (2, 3), "b.weight": (5, 5)}, {"a.weight": (3, 2), "b.weight": (7, 5)})
    assert "Transpose(['a.weight'])" in said
    assert "reinit=[" in said


def test_twenty_thousand_keys_take_seconds() -> None:
    one = (1,)
    model: Shapes = {f"layers.{i}.w.{name}": one for i in range(10_000) for name in ("weight", "bias")}
    checkpoint: Shapes = {f"model.layers.{i}.w.{name}": one for i in range(10_000) for name in ("weight", "bias")}
    recorded = tree(model)
    start = time.process_time()
    with pytest.raises(CheckpointMismatchError, match=r"all 20000 missing keys"):
        plan_of(recorded, Header(checkpoint))
    assert time.process_time() - start < 20


def test_actions_after_the_proposal_are_loads() -> None:
    made = plan_of(tree({"b.weight": (3, 3)}), Header({"a.weight": (3, 3)}), rename={r"^a\.": "b."})
    assert {entry.action for entry in made.entries} == {Action.LOAD}
