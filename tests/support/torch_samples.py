"""Torch's own samples of calls of its functions and modules. Importing them changes flags of torch: only on ranks."""

from __future__ import annotations

import sys
import types
import unittest
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

Call = Callable[[], Any]


def _let_torch_import_its_tests() -> None:
    """Stand in for ``expecttest``, a class of which torch's own test cases are made, and which we do not need."""
    if "expecttest" not in sys.modules:
        stand_in = types.ModuleType("expecttest")
        stand_in.TestCase = unittest.TestCase  # type: ignore[attr-defined]
        sys.modules["expecttest"] = stand_in


def new(tensor: Tensor) -> Tensor:
    """Return a tensor that is made and written here, so that a block records it."""
    if tensor.layout != torch.strided or tensor.is_nested or tensor.is_quantized:
        return tensor
    overlaps = any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.size(), strict=True))
    stride = torch.empty(tensor.size()).stride() if overlaps else tensor.stride()
    return torch.empty_strided(tensor.size(), stride, dtype=tensor.dtype).copy_(tensor)


def operators(every: int, always: frozenset[str], at_most: int) -> Iterator[tuple[str, Any, Any]]:
    """Yield name, entry and sample for one in ``every`` of torch's functions, and for those named in ``always``."""
    _let_torch_import_its_tests()
    from torch.testing._internal.common_methods_invocations import op_db

    for number, entry in enumerate(op_db):
        if number % every and entry.name not in always:
            continue
        dtype = next((each for each in (torch.float32, torch.int64) if each in entry.dtypes), torch.complex64)
        for index, sample in enumerate(islice(entry.sample_inputs("cpu", dtype), at_most)):
            yield f"{entry.formatted_name} {index}", entry, sample


def call_of(entry: Any, sample: Any, how: str) -> Call | None:
    """Return the call of a sample: ``plain``, ``in place`` or with ``out=``; ``None`` where there is no such one."""

    def given() -> tuple[Any, list[Any], dict[str, Any]]:
        values = tree_map_only(Tensor, new, (sample.input, list(sample.args), sample.kwargs))
        return values  # type: ignore[no-any-return]

    def plain() -> Any:
        first, rest, options = given()
        return entry(first, *rest, **options)

    def in_place() -> Any:
        first, rest, options = given()
        return entry.inplace_variant(first, *rest, **options), first

    if how == "plain":
        return plain
    if how == "in place":
        return None if entry.inplace_variant is None else in_place
    try:
        result = plain() if entry.supports_out else None
    except (RuntimeError, NotImplementedError):
        return None
    if not isinstance(result, Tensor) or result.layout != torch.strided:
        return None

    def out() -> Any:
        first, rest, options = given()
        target = torch.empty(0, dtype=result.dtype)
        return entry(first, *rest, **options, out=target), target

    return out


def modules(at_most: int) -> Iterator[tuple[str, Call]]:
    """Yield name and call for torch's samples of each of its modules, in training and evaluation."""
    _let_torch_import_its_tests()
    from torch.testing._internal.common_modules import module_db

    for entry in module_db:
        for training in (True, False):
            samples = entry.module_inputs_func(
                entry, device="cpu", dtype=torch.float32, requires_grad=False, training=training
            )
            for index, sample in enumerate(islice(samples, at_most)):
                if sample.forward_input is not None:
                    yield f"{entry.name} {training} {index}", _module_call(entry.module_cls, sample, training)


def _module_call(kind: type, sample: Any, training: bool) -> Call:
    def call() -> Any:
        built = kind(*sample.constructor_input.args, **sample.constructor_input.kwargs).train(training)
        given, options = tree_map_only(Tensor, new, (sample.forward_input.args, sample.forward_input.kwargs))
        return [built(*given, **options), *built.parameters(), *built.buffers()]

    return call
