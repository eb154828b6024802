"""What torch's functions and modules return in a block: the geometry and the values of plain PyTorch, or an error.

The calls are torch's own samples. Many functions are made of operators in C++, which change tensors in place.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fabric_init import UninitializedTensorError
from fabric_init.recording.mode import RecordMode
from tests.support.ranks import run_ranks
from tests.support.torch_samples import call_of, modules, operators

ALWAYS = frozenset({"stft", "istft", "nn.functional.embedding_bag", "tensor_split", "linalg.svdvals", "linalg.cond"})
LEFT_OUT = {
    "as_strided_partial_views": "reads outside of the memory",
    "empty": "has no values",
    "new_empty": "has no values",
    "native_batch_norm": "returns statistics that batch norm does not",
    "_native_batch_norm": "returns statistics that batch norm does not",
    "nonzero_static": "has other strides where it is empty",
    "nn_functional_rms_norm 4": "has other strides where it is empty",
    "addbmm": "in place, torch gives a matrix of one element the shape of the result, and no values",
    "linalg_lstsq": "last bits differ from call to call",
    "nn_functional_batch_norm_without_cudnn": "refuses its own samples, which are complex, on the CPU but not on meta",
    "norm_nuc": "last bits: torch also computes the vectors for tensors of a subclass",
    "torch_ops_aten": "runs on CUDA alone",
    "masked_scatter 3": "refuses its own sample in place",
    "nn.CTCLoss": "is refused",
    "nn.FractionalMaxPool3d": "refuses its own sample",
    "nn.LinearCrossEntropyLoss": "last bits",
    "nn.LSTM": "last bits",
}


def geometry(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    stride = value.stride() if value.layout == torch.strided else None
    return tuple(value.shape), stride, value.dtype, value.requires_grad


def bits(tensor: Tensor) -> Tensor:
    plain = tensor.detach().resolve_conj().resolve_neg().reshape(-1)
    return plain.clone(memory_format=torch.contiguous_format).as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def outcome(call: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    try:
        return tree_leaves(call())
    except Exception as error:
        return error


def difference(call: Callable[[], Any]) -> str:
    expected = outcome(call)
    with RecordMode("eager"):
        found = outcome(call)
        geometries = [] if isinstance(found, Exception) else [geometry(value) for value in found]
    if isinstance(expected, Exception):
        return "" if isinstance(found, Exception) else f"no error, as in plain PyTorch: {expected}"
    if isinstance(found, Exception):
        return f"an error: {found!r}"
    if str(geometries) != str([geometry(value) for value in expected]):
        return f"{geometries} instead of {[geometry(value) for value in expected]}"
    for one, other in zip(expected, found, strict=True):
        if isinstance(one, Tensor) and one.layout == torch.strided and one.numel():
            with suppress(UninitializedTensorError):  # memory that nobody writes, in plain PyTorch as well
                if not torch.equal(bits(one), bits(other)):
                    return "other values"
    return ""


def _named(name: str) -> bool:
    return any(name == left_out or name.startswith((f"{left_out} ", f"{left_out}_")) for left_out in LEFT_OUT)


def differences(calls: Iterable[tuple[str, Callable[[], Any] | None]]) -> dict[str, str]:
    warnings.simplefilter("ignore")
    found = {name: difference(call) for name, call in calls if call is not None and not _named(name)}
    assert len(found) > 40
    return {name: text for name, text in found.items() if text}


def of_operators(how: str, every: int, at_most: int) -> dict[str, str]:
    samples = operators(every, ALWAYS, at_most)
    return differences((name, call_of(entry, sample, how)) for name, entry, sample in samples)


def of_modules(at_most: int) -> dict[str, str]:
    return differences(modules(at_most))


@pytest.mark.sweep
@pytest.mark.parametrize("how", ["plain", "in place", "out"])
def test_functions_return_what_they_return_in_plain_pytorch(how: str, whole: bool) -> None:
    every, at_most, seconds = (1, 12, 600) if whole else (7, 4, 60)
    assert run_ranks(1, of_operators, seconds=seconds, how=how, every=every, at_most=at_most) == [{}]


@pytest.mark.sweep
def test_modules_return_what_they_return_in_plain_pytorch(whole: bool) -> None:
    at_most, seconds = (1000, 600) if whole else (2, 60)
    assert run_ranks(1, of_modules, seconds=seconds, at_most=at_most) == [{}]
