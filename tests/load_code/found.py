"""What a model holds on one rank, put together from all ranks: plain data, which a rank can send."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from tests.support.identity import structure_of
from tests.support.zoo import assert_same, inner, named, ties, weights, whole


class Found(NamedTuple):
    """What a model holds."""

    weights: dict[str, Tensor]
    plain_tensors: dict[str, Tensor]
    attributes: dict[str, dict[str, str]]
    trained: set[str]
    ties: set[frozenset[str]]


def found_in(model: nn.Module) -> Found:
    """Gather what ``model`` holds, under the names that its user knows; each rank must ask for it."""
    values = weights(model)
    model = inner(model)
    return Found(
        values,
        plain_tensors(model),
        {as_users_know(name): module["attributes"] for name, module in structure_of(model).items()},
        {name for name, value in named(model, "named_parameters") if value.requires_grad},
        ties(model),
    )


def as_users_know(name: str) -> str:
    """A module's name without the wrappers of FSDP, which come before what is in them."""
    return ".".join(part for part in name.split(".") if part != "_fsdp_wrapped_module")


def plain_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that modules of these tests keep as plain attributes; strategies keep some of their own."""
    return {
        f"{as_users_know(name)}.{attribute}": whole(value)
        for name, module in model.named_modules()
        for attribute, value in vars(module).items()
        if isinstance(value, Tensor) and "tests." in type(module).__module__
    }


def check(found: Found, expected: Found) -> None:
    """Assert that ``found`` has all that is ``expected``, bit for bit; strategies add attributes."""
    assert_same(found.weights, expected.weights)
    assert_same(found.plain_tensors, expected.plain_tensors)
    for name, attributes in expected.attributes.items():
        for attribute, value in attributes.items():
            got = found.attributes[name].get(attribute)
            assert got == value, f"{name}.{attribute} is {got}, not {value}"
    assert found.trained == expected.trained
    assert found.ties == expected.ties
