"""Conversions that an error message proposes: only where names and shapes both say so."""

from __future__ import annotations

import pytest
import torch

from fabric_init.checkpoints import Transpose
from fabric_init.planning.hints.conversions import likely_conversions, transposing

Shapes = dict[str, torch.Size]


def attention(*names: str, heads: tuple[int, ...] = (8, 4, 4, 8), layers: int = 2) -> Shapes:
    return {
        f"layers.{i}.attn.{name}.weight": torch.Size((rows, 8))
        for i in range(layers)
        for name, rows in zip(names, heads, strict=True)
    }


APART = attention("q_proj", "k_proj", "v_proj", "o_proj")
BY_HEAD = " (with groups=the number of heads if q, k and v take turns there)"


def sorted_by_name(shapes: Shapes) -> Shapes:
    return dict(sorted(shapes.items()))


def test_q_k_v_are_fused_in_the_order_that_the_name_gives_whatever_the_files_order() -> None:
    joined = attention("qkv_proj", heads=(16,))
    assert likely_conversions(joined, sorted_by_name(APART)) == [
        "convert=[Fuse(['q_proj.weight', 'k_proj.weight', 'v_proj.weight'], into='qkv_proj.weight')]"
        f"{BY_HEAD} makes all 2 missing tensors"
    ]


def test_and_split_with_their_sizes() -> None:
    joined = attention("query_key_value", heads=(16,))
    missing = attention("query", "key", "value", "out")
    into = "['query.weight', 'key.weight', 'value.weight']"
    assert likely_conversions(missing, joined) == [
        f"convert=[Split('query_key_value.weight', into={into}, sizes=[8, 4, 4])]{BY_HEAD} makes 6 of 8 missing tensors"
    ]


def test_gate_and_up_are_found_beside_down() -> None:
    apart = attention("down_proj", "gate_proj", "up_proj", heads=(8, 12, 12))
    assert likely_conversions(attention("gate_up_proj", heads=(24,)), apart) == [
        "convert=[Fuse(['gate_proj.weight', 'up_proj.weight'], into='gate_up_proj.weight')] makes all 2 missing tensors"
    ]


@pytest.mark.parametrize(
    "joined",
    [
        attention("qkv_proj", heads=(15,)),  # the shapes do not add up
        attention("c_attn", heads=(16,)),  # the name does not say in which order
        attention("kv_proj", heads=(16,)),
        {"layers.0.mixer.qkv_proj.weight": torch.Size((16, 8))},  # in another place
        {"layers.0.attn.qkv_proj.weight": torch.Size((16, 9))},
        {"qkv": torch.Size(())},
    ],
)
def test_nothing_is_proposed_on_a_guess(joined: Shapes) -> None:
    assert likely_conversions(joined, APART) == []
    assert likely_conversions(APART, joined) == []


def test_keys_to_transpose_go_by_their_ends_unless_others_end_so_too() -> None:
    keys = [f"h.{i}.attn.c_attn.weight" for i in range(3)]
    assert transposing(keys, keys) == Transpose(["c_attn.weight"])
    assert transposing(keys[:2], keys) == Transpose(keys[:2])
