from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fabric_init.tools.inspect import TensorRow, fold, fold_names


def row(key: str, *shape: int) -> TensorRow:
    return TensorRow(key, shape, "float32", 4, ("m.safetensors",))


def unfolded(name: str) -> list[str]:
    """What a name with braces stands for, as a shell would have it."""
    parts = re.split(r"(\{[^}]*\})", name)
    return ["".join(one) for one in itertools.product(*map(alternatives, parts))]


def alternatives(part: str) -> list[str]:
    if not part.startswith("{"):
        return [part]
    if step := re.fullmatch(r"\{(\d+),(\d+)\.\.(\d+)\}", part):
        first, second, last = map(int, step.groups())
        return [str(number) for number in range(first, last + 1, second - first)]
    found = []
    for run in part[1:-1].split(","):
        first, _, last = run.partition("..")
        found += [str(number) for number in range(int(first), int(last or first) + 1)]
    return found


def test_layers_of_one_shape_are_one_line() -> None:
    rows = [row(f"layers.{layer}.{name}.weight", 4, 2) for layer in range(12) for name in ("up", "down")]
    assert [(one.name, len(one.rows)) for one in fold(rows)] == [
        ("layers.{0..11}.up.weight", 12),
        ("layers.{0..11}.down.weight", 12),
    ]


def test_a_layer_of_another_shape_is_a_line_of_its_own() -> None:
    rows = [row(f"layers.{layer}.weight", 2 if layer == 3 else 4) for layer in range(6)]
    assert [one.name for one in fold(rows)] == ["layers.{0..2,4..5}.weight", "layers.3.weight"]


def test_experts_in_layers_are_one_line_where_they_are_in_all_of_them() -> None:
    whole = [f"layers.{layer}.experts.{expert}.w" for layer in range(1, 5) for expert in range(8)]
    assert fold_names(whole) == ["layers.{1..4}.experts.{0..7}.w"]
    assert fold_names(whole[:-1]) == ["layers.{1..3}.experts.{0..7}.w", "layers.4.experts.{0..6}.w"]


def test_every_second_layer_is_written_with_its_step() -> None:
    assert fold_names(f"blocks.{number}.w" for number in range(0, 32, 2)) == ["blocks.{0,2..30}.w"]


def test_a_gap_after_the_first_number_is_not_written_like_a_step() -> None:
    assert fold_names(["0", "2", "3"]) == ["{0,2,3}"]
    assert fold_names(["0", "2", "3", "4"]) == ["{0,2,3..4}"]


@pytest.mark.parametrize("keys", [["a.01.b"], ["a.#.b", "a.1.b"], ["a.²"], ["1"], [""]])
def test_what_only_looks_like_a_number_stays_as_it_is(keys: list[str]) -> None:
    assert fold_names(keys) == keys


PART = st.sampled_from(["0", "1", "2", "3", "7", "10", "a", "b"])


@given(st.lists(st.lists(PART, min_size=1, max_size=4).map(".".join), unique=True, max_size=40))
def test_folded_names_stand_for_exactly_what_was_folded(keys: list[str]) -> None:
    assert sorted(key for name in fold_names(keys) for key in unfolded(name)) == sorted(keys)
    folded = fold([row(key, 2) for key in keys])
    for one in folded:
        assert sorted(member.key for member in one.rows) == sorted(unfolded(one.name))
