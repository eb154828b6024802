"""Weights that mean something only with a scale are refused by name, whatever else is said."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fabric_init.errors import CheckpointMismatchError
from tests.planning.headers import Header, plan_of, tree

FP8 = torch.float8_e4m3fn
MODEL = {"a.weight": (4, 4), "norm.weight": (4,)}


@pytest.mark.parametrize(
    ("keys", "dtypes"),
    [
        ({"a.weight_scale_inv": (1, 1)}, {"a.weight": FP8}),
        ({"a.weight_scale": (), "a.input_scale": ()}, {"a.weight": FP8}),
        ({"a.scale_weight": ()}, {"a.weight": FP8}),
        ({"a.SCB": (4,)}, {"a.weight": torch.int8}),
    ],
    ids=["DeepSeek", "compressed-tensors", "ComfyUI", "bitsandbytes"],
)
@pytest.mark.parametrize(
    "wanted",
    [
        {},
        {"strict": False},
        {"rename": lambda key: key if key in MODEL else None},
        {"rename": lambda key: key if key in MODEL else None, "strict": False},
    ],
    ids=["strict", "not strict", "scales dropped", "scales dropped, not strict"],
)
def test_a_scaled_weight_is_refused_by_name(keys: Any, dtypes: Any, wanted: Any) -> None:
    with pytest.raises(CheckpointMismatchError) as caught:
        plan_of(tree(MODEL), Header({**MODEL, **keys}, dtypes), **wanted)
    said = str(caught.value)
    assert said.startswith("folder/model.safetensors is quantized: 1 of its weights are")
    assert f"a.weight ({str(dtypes['a.weight']).removeprefix('torch.')}), scaled by {next(iter(keys))}" in said
    assert "Dequantize the file once" in said
    assert "strict=False gives" not in said
    assert "Transpose" not in said


def test_packed_weights_are_refused_by_name() -> None:
    keys = {"norm.weight": (4,), "a.qweight": (2, 4), "a.scales": (1, 4), "a.qzeros": (1, 2)}
    for strict in (True, False):
        with pytest.raises(CheckpointMismatchError, match=r"a\.qweight \(int32\), scaled by a\.scales"):
            plan_of(tree(MODEL), Header(keys, {"a.qweight": torch.int32, "a.qzeros": torch.int32}), strict=strict)


def test_weights_of_one_tensor_for_all_experts_have_their_scale_beside_them() -> None:
    shapes = {"experts.gate_up_proj": (2, 4, 4)}
    with pytest.raises(CheckpointMismatchError, match=r"scaled by experts\.gate_up_proj_scale_inv"):
        plan_of(
            tree(shapes), Header(shapes | {"experts.gate_up_proj_scale_inv": (2, 1, 1)}, {"experts.gate_up_proj": FP8})
        )


def test_a_model_that_takes_the_scale_and_a_weight_that_is_initialized_afresh_are_no_matter() -> None:
    scaled = MODEL | {"a.weight_scale": (1,)}
    plan_of(tree(scaled), Header(scaled, {"a.weight": FP8}))
    plan_of(tree(MODEL), Header(scaled, {"a.weight": FP8}), reinit=["a.*"], strict=False)


def test_plain_float8_without_a_scale_and_a_float_beside_something_called_scale_are_cast_as_ever() -> None:
    plan_of(tree(MODEL), Header(MODEL, {"a.weight": FP8}))
    both = MODEL | {"a.weight_scale": (4,)}
    plan_of(tree(MODEL), Header(both), strict=False)
