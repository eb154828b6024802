"""Parts of a checkpoint and some of its layers, as ``rename=``; and what is said when they are not there."""

from __future__ import annotations

import re
from typing import Any

import pytest

from fabric_init.checkpoints import Layers, Part, rename_keys
from fabric_init.errors import CheckpointMismatchError

KEYS = ["model.embed.w", *(f"model.layers.{i}.mlp.{i}.w" for i in range(12)), "model.norm.w", "head.w"]


def test_a_part_loses_its_prefix_and_drops_the_rest() -> None:
    assert rename_keys(["encoder.a", "decoder.a", "encoders.a"], Part("encoder.")) == {"encoder.a": "a"}


def test_a_part_may_go_into_a_submodule() -> None:
    assert rename_keys(["encoder.a", "b"], Part("encoder.", into="left.")) == {"encoder.a": "left.a"}
    assert rename_keys(["a", "b.c"], Part("", into="encoder.")) == {"a": "encoder.a", "b.c": "encoder.b.c"}


def test_chosen_layers_are_numbered_anew_and_what_is_no_layer_stays() -> None:
    assert rename_keys(KEYS, Layers([0, 4, 8])) == {
        "model.embed.w": "model.embed.w",
        "model.layers.0.mlp.0.w": "model.layers.0.mlp.0.w",
        "model.layers.4.mlp.4.w": "model.layers.1.mlp.4.w",
        "model.layers.8.mlp.8.w": "model.layers.2.mlp.8.w",
        "model.norm.w": "model.norm.w",
        "head.w": "head.w",
    }


def test_the_first_layers_are_a_range_and_a_mapping_goes_onto_any_layer() -> None:
    first = rename_keys(KEYS, Layers(range(8)))
    assert all(key == name for key, name in first.items())
    assert len(first) == 8 + 3
    mapped = rename_keys(KEYS, Layers({0: 3, 1: 2}, at="model.layers.{}"))
    assert mapped["model.layers.0.mlp.0.w"] == "model.layers.3.mlp.0.w"
    assert mapped["model.layers.1.mlp.1.w"] == "model.layers.2.mlp.1.w"
    assert "model.layers.2.mlp.2.w" not in mapped


@pytest.mark.parametrize("at", ["h.{}", "h.{}.", ".h.{}"])
def test_layers_lie_between_dots(at: str) -> None:
    others = ["xh.0.w", "h.0x.w", f"h.{'9' * 5000}.w"]
    keys = ["h.0", "x.h.1.w", "h.10.w", *others]
    assert rename_keys(keys, Layers([1], at=at)) == {"x.h.1.w": "x.h.0.w"} | {key: key for key in others}


def test_renames_in_a_list_are_applied_in_order() -> None:
    rename = [Part("model."), Layers([1, 0]), {"^": "body."}, lambda key: None if key.endswith("norm.w") else key]
    assert rename_keys(KEYS, rename) == {
        "model.embed.w": "body.embed.w",
        "model.layers.0.mlp.0.w": "body.layers.1.mlp.0.w",
        "model.layers.1.mlp.1.w": "body.layers.0.mlp.1.w",
    }


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        (Part("encodr."), "Part('encodr.'): no key begins so; they begin with 'model.' (14), 'head.' (1)"),
        ([Part("head."), Part("model.")], "Part('model.'): no key begins so; they begin with 'w' (1)"),
        ([Part("head."), Part("w"), Part("")], None),
        (Layers([0, 12, 40]), "Layers([0, 12, 40], at='layers.{}'): there is no layer 12, 40; there are 12, 0 to 11"),
        (Layers(range(2), at="h.{}"), "no key has 'h.{}' in it; layers seem to be at 'model.layers.{}'"),
        ([Part("head."), Layers([0])], "no key has 'layers.{}' in it; no key has a number between dots"),
    ],
)
def test_a_part_or_layer_that_is_not_there_is_named(rename: Any, message: str | None) -> None:
    if message is None:
        assert rename_keys(KEYS, rename) == {"head.w": ""}
        return
    with pytest.raises(CheckpointMismatchError, match=re.escape(message)):
        rename_keys(KEYS, rename)


@pytest.mark.parametrize("chosen", [[], [0, 0], {0: 1, 1: 1}, range(0)])
def test_layers_are_chosen_once(chosen: Any) -> None:
    with pytest.raises(ValueError, match="name at least one layer, and each once"):
        Layers(chosen)


@pytest.mark.parametrize("at", ["layers.", "layers.{}.experts.{}"])
def test_the_place_of_the_number_is_marked_once(at: str) -> None:
    with pytest.raises(ValueError, match=r"at should have one \{\} where the number is"):
        Layers([0], at=at)
