"""Keys to names, and the renames that an error message proposes."""

from __future__ import annotations

import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fabric_init.checkpoints import rename_keys
from fabric_init.errors import CheckpointMismatchError, OptionError
from fabric_init.planning.hints.renames import likely_renames

Shapes = dict[str, torch.Size]


def bert(
    prefix: str = "",
    block: str = "encoder.layer",
    attention: str = "attention.self",
    norm: str = "weight bias",
    n: int = 12,
) -> Shapes:
    names = {f"{prefix}embeddings.word.weight": torch.Size((100, 8))}
    scale, shift = norm.split()
    for i in range(n):
        for part in ("query", "key", "value"):
            names[f"{prefix}{block}.{i}.{attention}.{part}.weight"] = torch.Size((8, 8))
        names[f"{prefix}{block}.{i}.norm.{scale}"] = names[f"{prefix}{block}.{i}.norm.{shift}"] = torch.Size((8,))
    return names


def suggested(model: Shapes, checkpoint: Shapes) -> list[str]:
    missing = {name: shape for name, shape in model.items() if name not in checkpoint}
    unexpected = {key: shape for key, shape in checkpoint.items() if key not in model}
    return [str(suggestion) for suggestion in likely_renames(missing, unexpected)]


def test_no_rename_keeps_every_key_in_order() -> None:
    assert list(rename_keys(["b", "a"], None).items()) == [("b", "b"), ("a", "a")]


def test_a_mapping_is_regex_to_replacement_applied_in_order() -> None:
    rename = {r"^model\.": "", r"layer(\d+)": r"layers.\1", "gamma$": "weight"}
    assert rename_keys(["model.layer3.gamma", "x"], rename) == {"model.layer3.gamma": "layers.3.weight", "x": "x"}


def test_a_callable_renames_and_drops() -> None:
    assert rename_keys(["a.x", "b.x"], lambda key: None if key.startswith("b") else key[2:]) == {"a.x": "x"}


def test_two_keys_on_one_name_are_refused_with_all_three_names() -> None:
    with pytest.raises(CheckpointMismatchError, match=r"both 'a\.w' and 'b\.w' to 'w'"):
        rename_keys(["a.w", "b.w"], {r"^\w\.": ""})


@pytest.mark.parametrize(("pattern", "replacement"), [("(", ""), ("a", r"\1"), ("a", r"\g<no>"), ("a", "\\")])
def test_an_invalid_regex_or_replacement_is_named(pattern: str, replacement: str) -> None:
    with pytest.raises(OptionError, match="is not a valid regular expression") as caught:
        rename_keys([], {pattern: replacement})
    assert repr(pattern) in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_a_rename_of_the_wrong_type_is_named() -> None:
    with pytest.raises(OptionError, match="is not a valid regular expression"):
        rename_keys(["a"], {"a": None})  # type: ignore[dict-item]
    with pytest.raises(OptionError, match="returned 3"):
        rename_keys(["a"], lambda key: 3)  # type: ignore[arg-type,return-value]
    with pytest.raises(TypeError, match=r"rename must be a mapping of regex .* or a callable, got 'model\.'") as caught:
        rename_keys(["a"], "model.")  # type: ignore[arg-type]
    assert r"rename={'^model\\.': ''} drops a prefix" in str(caught.value)


@pytest.mark.parametrize(
    ("model", "checkpoint", "expected"),
    [
        (bert(), bert("model."), [r'rename={r"^model\.": ""} would match all 61 missing keys']),
        (bert(), bert("0.auto_model."), [r'rename={r"^0\.auto_model\.": ""} would match all 61 missing keys']),
        (bert("bert."), bert(), ['rename={"^": "bert."} would match all 61 missing keys']),
        (bert("bert."), bert("roberta."), [r'rename={r"^roberta\.": "bert."} would match all 61 missing keys']),
        (bert(block="h"), bert(), [r'rename={r"^encoder\.layer\.": "h."} would match all 60 missing keys']),
        (bert(attention="sa"), bert(), [r'rename={r"\.attention\.self\.": ".sa."} would match all 36 missing keys']),
        (bert(), bert(attention="attn"), [r'rename={r"\.attn\.": ".attention.self."} would match all 36 missing keys']),
        (bert(), bert(attention="attention"), [r'rename={r"\.attention\.": ".attention.self."} would match all 36 missing keys']),  # noqa: E501
        (
            {f"layers.{i}.w": torch.Size((1,)) for i in range(4)},
            {f"layer{i}.w": torch.Size((1,)) for i in range(4)},
            [r'rename={r"^layer(\d+)\.": r"layers.\1."} would match all 4 missing keys'],
        ),
        ({"l.b": torch.Size((1,))}, {"l": torch.Size((1,))}, ['rename={"^l$": "l.b"} would match all 1 missing key']),
        ({"a.b": torch.Size((1,))}, {"c.d": torch.Size((2,))}, []),
        ({}, {}, []),
    ],
)  # fmt: skip
def test_a_likely_rename_is_found_and_counted(model: Shapes, checkpoint: Shapes, expected: list[str]) -> None:
    assert suggested(model, checkpoint) == expected


def test_renames_that_are_needed_together_are_suggested_in_their_order() -> None:
    model, checkpoint = bert(), bert("bert.", norm="gamma beta")
    suggestions = likely_renames(model, checkpoint)
    assert suggestions[0].pattern == r"^bert\."
    assert sum(suggestion.matches for suggestion in suggestions) == len(model)
    rename = {suggestion.pattern: suggestion.replacement for suggestion in suggestions}
    assert set(rename_keys(checkpoint, rename).values()) == set(model)


def test_a_rename_whose_shapes_disagree_is_not_suggested() -> None:
    assert suggested(bert(), {key: torch.Size((3, 3, 3)) for key in bert("model.")}) == []


NAMES = st.lists(st.sampled_from(["a", "b", "0", "1", "w", "c.d", "$x", "\\1"]), min_size=1, max_size=4).map(".".join)
SHAPES = st.dictionaries(NAMES, st.sampled_from([torch.Size((1,)), torch.Size((2,))]), max_size=12)


@given(SHAPES, SHAPES)
def test_what_is_suggested_can_be_passed_to_rename_and_does_what_it_says(missing: Shapes, unexpected: Shapes) -> None:
    missing = {name: shape for name, shape in missing.items() if name not in unexpected}
    suggestions = likely_renames(missing, unexpected)
    names = rename_keys(unexpected, {suggestion.pattern: suggestion.replacement for suggestion in suggestions})
    met = [name for key, name in names.items() if missing.get(name) == unexpected[key]]
    assert len(met) == sum(suggestion.matches for suggestion in suggestions)


def test_a_hundred_thousand_keys_take_seconds_and_not_hours() -> None:
    model, checkpoint = bert(n=20_000), bert("model.", n=20_000)
    start = time.process_time()
    assert suggested(model, checkpoint) == [rf'rename={{r"^model\.": ""}} would match all {len(model)} missing keys']
    one = torch.Size((1,))
    suggested({f"x{i}.weight": one for i in range(100_000)}, {f"{i}y.weight.z": one for i in range(100_000)})
    assert time.process_time() - start < 15
