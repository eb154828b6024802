"""What strict=False refuses all the same, and the ordinary uses of it that go through."""

from __future__ import annotations

import re

import pytest

from fabric_init.errors import CheckpointMismatchError
from fabric_init.planning.hints.strict_false_mistakes import in_part
from fabric_init.planning.plan import Action
from tests.planning.headers import Header, matching_of, plan_of, tree

Shapes = dict[str, tuple[int, ...]]
BODY: Shapes = {f"body.layers.{i}.{name}": (8, 8) for i in range(2) for name in ("a.weight", "b.weight")}


def lenient(model: Shapes, checkpoint: Shapes, **wanted: object) -> dict[str, Action]:
    made = plan_of(tree(model), Header(checkpoint), strict=False, **wanted)
    return {entry.slot.name: entry.action for entry in made.entries}


def refusal(model: Shapes, checkpoint: Shapes) -> str:
    with pytest.raises(CheckpointMismatchError) as caught:
        plan_of(tree(model), Header(checkpoint), strict=False)
    return str(caught.value)


@pytest.mark.parametrize(
    ("missing", "unexpected"),
    [
        ({"score.weight": (2, 8)}, {"lm_head.weight": (100, 8)}),
        ({"layers.0.q.lora_A": (2, 8), "layers.0.q.lora_B": (8, 2)}, {}),
        ({"score.weight": (2, 8)}, {"body.layers.0.rotary_emb.inv_freq": (4,), "embeddings.position_ids": (1, 512)}),
        ({"body.layers.0.a.bias": (8,)}, {"body.layers.0.norm.running_mean": (8,), "body.n.num_batches_tracked": ()}),
        (  # DistilBERT's and RoBERTa's pretraining heads have layers like those of a new classifier
            {"pre_classifier.weight": (8, 8), "pre_classifier.bias": (8,), "classifier.weight": (2, 8)},
            {"vocab_transform.weight": (8, 8), "vocab_transform.bias": (8,), "vocab_layer_norm.weight": (8,)},
        ),
        (
            {"classifier.dense.weight": (8, 8), "classifier.dense.bias": (8,), "classifier.out_proj.weight": (2, 8)},
            {"lm_head.dense.weight": (8, 8), "lm_head.dense.bias": (8,), "lm_head.bias": (100,)},
        ),
        ({}, {"old.weight": (8, 8)}),
        ({"body.fc_norm.weight": (8,), "body.fc_norm.bias": (8,)}, {"body.norm.weight": (8,), "body.norm.bias": (8,)}),
        ({"classifier.weight": (2, 8), "classifier.bias": (2,)}, {"score.weight": (2, 8), "score.bias": (2,)}),
        ({"body.new.weight": (8, 8)}, {"body.old.weight": (8, 8)}),
        ({"classifier.weight": (9, 8), "classifier.bias": (9,)}, {"decoder.weight": (9, 8), "decoder.bias": (9,)}),
        ({"body.final.weight": (8, 8)}, {f"body.layers.{i}.{n}.weight": (8, 8) for i in (2, 3) for n in "ab"}),
        ({f"body.layers.2.{n}.weight": (8, 8) for n in "ab"}, {"body.x.weight": (8, 8), "body.y.bias": (8,)}),
        (
            {f"body.layers.2.{n}.weight": (8, 8) for n in "ab"},
            {f"decoder.layers.{i}.{n}.weight": (8, 8) for i in range(2) for n in "ab"},
        ),
    ],
    ids=[
        "a new head",
        "adapters",
        "buffers",
        "statistics",
        "DistilBERT",
        "RoBERTa",
        "nothing missing",
        "ViT-MAE",
        "a head of the old one's shape",
        "a layer of a shape that another had",
        "a decoder and a classifier",
        "dropped layers",
        "new layers",
        "new layers, and a decoder that is dropped",
    ],
)
def test_the_ordinary_uses_go_through(missing: Shapes, unexpected: Shapes) -> None:
    actions = lenient(BODY | missing, BODY | unexpected)
    assert {name for name, action in actions.items() if action is Action.INIT} == missing.keys()


def test_a_likely_rename_is_an_error_with_both_ways_on() -> None:
    model = BODY | {"vision_tower.weight": (2, 8), "vision_tower.bias": (2,)}
    checkpoint = BODY | {"vision_model.weight": (2, 8), "vision_model.bias": (2,)}
    said = refusal(model, checkpoint)
    assert said.startswith("folder/model.safetensors: strict=False would give 2 tensors new values, but the checkpoint")
    assert r'Likely: rename={r"^vision_model\.": "vision_tower."} would match all 2 missing keys' in said
    assert 'reinit=["vision_tower.*"]' in said
    assert "Missing (2):\n  vision_tower.weight" in said
    assert "Not in the model (2):\n  vision_model.weight" in said
    assert set(lenient(model, checkpoint, rename={r"^vision_model\.": "vision_tower."}).values()) == {Action.LOAD}
    assert lenient(model, checkpoint, reinit=["vision_tower.*"])["vision_tower.bias"] is Action.INIT
    drop = re.search(r"rename=(lambda key: .*)\.$", said, re.MULTILINE)
    assert drop is not None
    assert lenient(model, checkpoint, rename=eval(drop[1]))["vision_tower.bias"] is Action.INIT


def test_a_prefix_on_a_part_is_an_error() -> None:
    model = BODY | {"encoder.a.weight": (4, 4), "encoder.b.weight": (4, 4)}
    checkpoint = BODY | {"module.encoder.a.weight": (4, 4), "module.encoder.b.weight": (4, 4)}
    assert "rename=" in refusal(model, checkpoint)


def test_q_k_and_v_apart_in_the_file_are_an_error_with_the_conversion() -> None:
    apart: Shapes = {f"body.layers.{i}.{name}.weight": (8, 8) for i in range(2) for name in ("q", "k", "v")}
    joined: Shapes = {f"body.layers.{i}.qkv.weight": (24, 8) for i in range(2)}
    assert "convert=[Fuse(['q.weight', 'k.weight', 'v.weight'], into='qkv.weight')]" in refusal(
        BODY | joined, BODY | apart
    )


def test_an_unclear_assignment_is_an_error_without_a_proposal() -> None:
    said = refusal(
        BODY | {f"x.{n}.weight": (4, 4) for n in ("red", "blue", "green")},
        BODY | {f"x.{n}.weight": (4, 4) for n in "uvw"},
    )
    assert "Ambiguous" in said
    assert "Likely" not in said
    assert 'reinit=["x.*"]' in said


@pytest.mark.parametrize(
    ("missing", "unexpected"),
    [
        ("encoder.q_proj.weight", "encoder.to_q.weight"),
        ("encoder.norm.weight", "encoder.layer_norm.weight"),
        ("encoder.probe.weight", "probe.weight"),
        ("probe.weight", "encoder.probe.weight"),
        ("encoder.probe.weight", "encoder.probe.base_layer.weight"),
        ("encoder.0.weight", "encoder.1.weight"),
        ("vision_tower.weight", "vision_model.weight"),
    ],
)
def test_one_tensor_is_enough_where_the_names_are_related(missing: str, unexpected: str) -> None:
    assert "Likely: rename=" in refusal(BODY | {missing: (4, 4)}, BODY | {unexpected: (4, 4)})


def test_three_tensors_are_enough_whatever_their_names() -> None:
    missing: Shapes = {f"encoder.{n}.weight": (4, 4) for n in "abc"}
    assert "Likely: rename=" in refusal(
        BODY | missing, BODY | {name.replace("encoder", "tower"): shape for name, shape in missing.items()}
    )


def test_layers_whose_numbers_may_be_shifted_are_an_error_without_a_proposal() -> None:
    model: Shapes = {f"layers.{i}.{n}.weight": (8, 8) for i in range(4) for n in "ab"}
    checkpoint: Shapes = {f"layers.{i}.{n}.weight": (8, 8) for i in range(1, 5) for n in "ab"}
    said = refusal(model, checkpoint)
    assert "Ambiguous" in said
    assert "Likely" not in said


@pytest.mark.parametrize(("mine", "its"), [("", "student."), ("student.", "")])
def test_a_layer_with_another_number_and_a_prefix_may_be_the_missing_one(mine: str, its: str) -> None:
    leaves: Shapes = {f"conv.{leaf}": (8,) for leaf in ("weight", "bias", "running_mean")}
    model = BODY | {f"{mine}down{i}.{leaf}": shape for i in (1, 2) for leaf, shape in leaves.items()}
    there = BODY | {f"{mine}down2.{leaf}": shape for leaf, shape in leaves.items()}
    said = refusal(model, there | {f"{its}down8.{leaf}": shape for leaf, shape in leaves.items()})
    assert f"Ambiguous, by names and shapes alike: {its}down8.conv.weight" in said
    second_copy = {f"{its}down2.{leaf}": shape for leaf, shape in leaves.items()}
    assert lenient(model, there | second_copy)[f"{mine}down1.conv.bias"] is Action.INIT


def test_as_many_elements_in_the_same_modules_are_an_error_though_nothing_can_be_proposed() -> None:
    model = BODY | {"moe.experts.w13": (3, 4, 10), "moe.experts.w2": (3, 5, 4)}
    parts: Shapes = {
        f"moe.experts.{e}.{name}": s for e in range(3) for name, s in {"x": (5, 4), "y": (5, 4), "z": (4, 5)}.items()
    }
    said = refusal(model, BODY | parts)
    assert "and the checkpoint has as much that no tensor takes, in the same modules" in said
    assert "Missing (2):\n  moe.experts.w13\n  moe.experts.w2" in said
    assert "Not in the model (9):" in said
    assert 'reinit=["moe.*"]' in said
    assert lenient(model, BODY | parts, reinit=["moe.*"])["moe.experts.w2"] is Action.INIT


def test_the_strict_message_does_not_advise_what_would_be_refused() -> None:
    model = BODY | {"moe.experts.w13": (3, 4, 10)}
    with pytest.raises(CheckpointMismatchError) as caught:
        plan_of(tree(model), Header(BODY | {f"moe.experts.{e}.x": (10, 4) for e in range(3)}))
    assert "strict=False gives" not in str(caught.value)
    assert "say with convert= or rename=" in str(caught.value)


def test_lists_are_cut_with_a_count() -> None:
    model = BODY | {f"gate.{i}.weight": (3, 3) for i in range(30)}
    said = refusal(model, BODY | {f"w1.{i}.weight": (3, 3) for i in range(30)})
    assert "Missing (30):" in said
    assert said.count("… and 10 more") == 2


def test_a_layer_that_is_loaded_in_part_is_named() -> None:
    model: Shapes = {f"layers.{i}.a.{name}": (8,) for i in range(4) for name in ("weight", "bias")}
    checkpoint: Shapes = {
        name: shape for name, shape in model.items() if name not in ("layers.3.a.weight", "layers.3.a.bias")
    }
    del checkpoint["layers.0.a.bias"], checkpoint["layers.1.a.bias"]
    expected = ["layers.{}.a: weight, but not bias (2 times)", "layers: others of it, but nothing of 3"]
    found = matching_of(tree(model), Header(checkpoint))
    assert in_part(found.entries, [slot.name for slot in found.missing]) == expected
    made = plan_of(tree(model), Header(checkpoint), strict=False)
    assert made.notes == (f"loaded in part: {'; '.join(expected)}",)
    with pytest.raises(
        CheckpointMismatchError, match=r"Loaded in part \(2\):\n  layers\.\{\}\.a: weight, but not bias"
    ):
        plan_of(tree(model), Header(checkpoint))


def test_adapters_beside_a_loaded_weight_are_no_part_of_it() -> None:
    model: Shapes = {"q.weight": (8, 8), "q.lora_A": (2, 8)}
    assert plan_of(tree(model), Header({"q.weight": (8, 8)}), strict=False).notes == ()
