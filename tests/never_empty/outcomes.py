"""What became of one cell of the table."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fabric_init import FabricInitError
from tests.never_empty.targets import Target
from tests.never_empty.ways import Case, Way

OURS = (
    "UninitializedTensorError",
    "RecordingError",
    "neither loaded nor initialized",
    "failed in the TorchScript interpreter",  # which drops the message of an error that is raised in Python
    "its data is not allocated yet",  # torch's, for `plain.data = recorded`, which passes no code of ours
    "a null pointer",  # a storage without memory says so by itself
    "Not available for 'meta' device type",
)
RIGHT, REFUSED = "right", "refused"


def outcome(way: Way, build: Callable[[], Target], expected: Any) -> str:
    """Return ``RIGHT`` or ``REFUSED`` (by an error of ours) of one ``way``, or what went wrong."""
    return outcome_again(way, Case(build()), expected)


def outcome_again(way: Way, case: Case, expected: Any = None) -> str:
    """Return the same for a model that is there already, which has to be refused twice if it is refused."""
    first = _once(way, case, expected)
    if first != REFUSED:
        return first
    if not torch.equal(case.real, torch.ones_like(case.real)):
        return "a refused write has changed the real tensor"
    again = _once(way, case, expected)
    return REFUSED if again == REFUSED else f"refused, and then {again}"


def _once(way: Way, case: Case, expected: Any) -> str:
    try:
        found = run(way, case)
        return RIGHT if _same(found, expected) else f"garbage: {found!r}, not {expected!r}"  # asks for what waits, too
    except Exception as error:
        return REFUSED if _is_ours(error) else f"somebody else's error: {type(error).__name__}: {str(error)[:300]}"


def run(way: Way, case: Case) -> Any:
    """Return what ``way`` gets out of ``case``, without torch's warnings about torch.jit and its compilers."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return way(case)


def _is_ours(error: BaseException) -> bool:
    return any(isinstance(e, FabricInitError) or any(name in str(e) for name in OURS) for e in _chain(error))


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    work: list[BaseException | None] = [error]
    while work:
        one = work.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            work += [one.__cause__, one.__context__]
            yield one


def _same(found: Any, expected: Any) -> bool:
    if isinstance(expected, Tensor):
        if not isinstance(found, Tensor) or (found.shape, found.dtype) != (expected.shape, expected.dtype):
            return False
        return bool(torch.allclose(found.detach(), expected.detach(), rtol=1e-5, atol=1e-6))
    if isinstance(expected, np.ndarray):
        return found.dtype == expected.dtype and np.allclose(found, expected)
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(_same(found[key], expected[key]) for key in expected)
    if isinstance(expected, (list, tuple)):
        return len(found) == len(expected) and all(map(_same, found, expected))
    if isinstance(expected, float):
        return math.isclose(found, expected, rel_tol=1e-5, abs_tol=1e-6)
    return bool(found == expected)
