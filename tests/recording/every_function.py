"""Call functions of torch in many ways, on plain and on recorded tensors, which give the same, or an error of ours.

python -m tests.recording.every_function GROUP     # prints what it calls, and lines that begin with FAULT

It is run in a process of its own, as a function that takes a null pointer for memory ends the process.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fabric_init import FabricInitError, deferred_init

Call = tuple[str, Callable[..., Any]]
ROWS = torch.tensor([0, 1])


def _three(*values: float) -> float:
    return 3.0


ARGUMENTS: dict[str, Callable[[Tensor], tuple[Any, ...]]] = {
    "t": lambda t: (t,),
    "t, t": lambda t: (t, t),
    "t, t, t": lambda t: (t, t, t),
    "t, 0": lambda t: (t, 0),
    "t, f": lambda t: (t, _three),
    "t, t, f": lambda t: (t, t, _three),
    "t, t, t, f": lambda t: (t, t, t, _three),
    "t, size": lambda t: (t, (2, 2)),
    "t, 0, 1": lambda t: (t, 0, 1),
    "t, 0, rows": lambda t: (t, 0, ROWS),
    "t, 0, rows, t": lambda t: (t, 0, ROWS, t),
    "t, 0, rows, 1.0": lambda t: (t, 0, ROWS, 1.0),
    "t, rows": lambda t: (t, ROWS),
    "t, mask": lambda t: (t, t > 0.5),
    "t, mask, 1.0": lambda t: (t, t > 0.5, 1.0),
    "t, mask, t": lambda t: (t, t > 0.5, t),
    "t, real": lambda t: (t, torch.ones(2, 2)),
    "real, t": lambda t: (torch.ones(2, 2), t),
    "[t, t]": lambda t: ([t, t],),
    "[t], [t]": lambda t: ([t], [t]),
    "t, dtype": lambda t: (t, torch.float64),
    "t, slice, 3.0": lambda t: (t, slice(0, 1), 3.0),
    "t, storage": lambda t: (t, torch.ones(4).untyped_storage()),
}

_NO_CALL_OF_A_USER = {
    *dir(object),
    *("__torch_function__", "__torch_dispatch__", "_make_subclass", "_make_wrapper_subclass", "_make_dtensor"),
    *("__setstate__", "_fix_weakref", "_set_cdata", "_free_weak_ref", "_weak_ref", "_new_with_weak_ptr", "_expired"),
    *("_shared_decref", "_shared_incref", "_cdata", "_python_dispatch", "_is_view", "_view_func_unsafe"),
    *("_reduce_ex_internal", "cuda", "xpu", "mps", "hpu"),
    *("__delitem__", "_set_from_file", "_write_file"),  # these end a process of plain PyTorch
} - {"__format__"}
_NOT_THE_SAME_TWICE = {
    *("data_ptr", "_data_ptr", "const_data_ptr"),
    *("empty_like", "new_empty", "new_empty_strided", "empty", "_empty_affine_quantized", "_sparse_mask_projection"),
    *("_weight_norm", "_weight_norm_interface", "_compute_linear_combination"),  # read past what they are given
    *("cond", "svdvals", "lstsq"),  # torch takes other kernels for subclasses, which differ in the last bit
}
REFUSED_BY_TORCH = {
    *("_to_dlpack", "_to_dlpack_versioned", "sparse_coo_tensor", "_shape_as_tensor", "_saturate_weight_to_fp16"),
    *("fbgemm_linear_quantize_weight", "fbgemm_pack_gemm_matrix_fp16", "new", "new_tensor", "_typed_storage"),
}
"""These ask in C++ for memory and are known to nobody of ours: torch says so, in words of its own."""
_WORDS_OF_TORCH = (
    "Cannot access data pointer",
    "data is not allocated yet",
    "Cannot copy out of meta tensor",
    "to a storage on different device",
)


def _methods(kind: type, get: Callable[[Tensor], Any] = lambda t: t) -> Iterator[Call]:
    def call(name: str) -> Callable[..., Any]:
        return lambda t, *rest: getattr(get(t), name)(*rest)

    for name in dir(kind):
        yield f"{kind.__name__}.{name}", call(name)


def _of_memory() -> Iterator[Call]:
    """Yield what hands out memory, or takes it, past the dispatcher."""
    yield from _methods(torch.UntypedStorage, lambda t: t.untyped_storage())
    yield from _methods(torch.TypedStorage, lambda t: t.storage())
    for name in (
        *("apply_", "map_", "map2_", "numpy", "tolist", "__array__", "__dlpack__", "set_", "is_set_to"),
        *("share_memory_", "storage", "type"),
    ):
        yield f"Tensor.{name}", getattr(Tensor, name)
    for function in (torch._C._to_dlpack, torch._C._to_dlpack_versioned, torch.from_dlpack, torch.frombuffer):
        yield function.__name__, function
    for function in (np.asarray, np.array, np.from_dlpack, memoryview, bytes, list, float, complex):
        yield function.__name__, function
    for function in (torch.Tensor, torch.FloatTensor, torch.tensor, torch.asarray, torch.as_tensor):
        yield function.__name__, function


def _of_tensors() -> Iterator[Call]:
    for name in dir(Tensor):
        value = getattr(Tensor, name)
        if callable(value):
            yield f"Tensor.{name}", value
        elif hasattr(value, "__get__"):
            yield f"Tensor.{name}", value.__get__


def _of_torch() -> Iterator[Call]:
    functions = torch._C._VariableFunctions
    yield from ((f"torch.{name}", value) for name in dir(functions) if callable(value := getattr(functions, name)))
    for function in torch.overrides.get_testing_overrides():
        name = torch.overrides.resolve_name(function)
        if name and not name.startswith("torch.Tensor."):
            yield name, function


GROUPS: dict[str, Callable[[], Iterator[Call]]] = {"memory": _of_memory, "Tensor": _of_tensors, "torch": _of_torch}


def values() -> Tensor:
    return torch.linspace(0.25, 1.0, 4).view(2, 2)


class WithTable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(1), persistent=False)
        self.table = values()


class WithParameter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(values())


def in_block(function: Callable[..., Any], arguments: Callable[[Tensor], tuple[Any, ...]]) -> Any:
    with deferred_init(rng="eager"):
        return called(function, arguments, values())


def after_block(function: Callable[..., Any], arguments: Callable[[Tensor], tuple[Any, ...]]) -> Any:
    with deferred_init(rng="eager"):
        model = WithTable()
    return called(function, arguments, model.table)


def waiting(function: Callable[..., Any], arguments: Callable[[Tensor], tuple[Any, ...]]) -> Any:
    with deferred_init(rng="eager"):
        model = WithParameter()
    return called(function, arguments, model.weight.data)


STATES = (in_block, after_block, waiting)


def called(function: Callable[..., Any], arguments: Callable[[Tensor], tuple[Any, ...]], tensor: Tensor) -> Any:
    """Return what a call returns, and what it leaves in the tensors that it was given."""
    torch.manual_seed(0)
    given = arguments(tensor)
    return [_plain(function(*given)), _plain(tensor), _plain([each for each in given if isinstance(each, Tensor)])]


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        value = value.detach().dequantize() if value.is_quantized else value.detach()
        value = (value if value.layout == torch.strided else value.to_dense()).resolve_conj().resolve_neg()
        return [str(value.dtype), list(value.shape), repr(value.tolist())]
    if isinstance(value, (np.ndarray, torch.UntypedStorage, torch.TypedStorage)):
        return repr(value.tolist())
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if hasattr(value, "__next__"):
        return _plain(list(value))
    plain = (int, float, str, bool, complex, torch.dtype, torch.device, type(None))
    return repr(value) if isinstance(value, plain) else type(value).__name__


def _is_ours(error: BaseException | None) -> bool:
    while error is not None and not isinstance(error, FabricInitError):
        error = error.__cause__ or error.__context__
    return error is not None


def check(name: str, function: Callable[..., Any], arguments: str) -> Iterator[str]:
    """Yield what is wrong with one call on recorded tensors, if plain PyTorch can make it at all."""
    short, make = name.rpartition(".")[2], ARGUMENTS[arguments]
    is_compared = short not in _NOT_THE_SAME_TWICE
    print(f"{name}({arguments})", flush=True)
    try:
        expected = called(function, make, values())
    except Exception:
        is_compared = False  # but the calls below may not end the process
    for state in STATES:
        try:
            found = state(function, make)
        except Exception as error:
            by_torch = short in REFUSED_BY_TORCH and any(words in str(error) for words in _WORDS_OF_TORCH)
            if is_compared and not by_torch and not _is_ours(error):
                yield f"{name}({arguments}), {state.__name__}: {type(error).__name__}: {str(error)[:300]}"
        else:
            if is_compared and found != expected:
                yield f"{name}({arguments}), {state.__name__}: {found} and not {expected}"


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for name, function in dict(GROUPS[sys.argv[1]]()).items():
        if name.rpartition(".")[2] not in _NO_CALL_OF_A_USER and "cudnn" not in name and "miopen" not in name:
            for arguments in ARGUMENTS:
                for fault in check(name, function, arguments):
                    print("FAULT", fault, flush=True)
    print("the end")


if __name__ == "__main__":
    main()
