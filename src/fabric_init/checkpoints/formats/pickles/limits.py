"""Limit the memory that a pickle of ``torch.save`` asks for, before torch's ``weights_only`` unpickler allocates it.

That unpickler runs no code of the file's, but it makes calls that take memory of whatever size they are given:
``bytearray(10**12)`` is a few bytes of a pickle. Here nothing is called; the sizes of the calls are added up.
"""

from __future__ import annotations

import io
import math
import pickle
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable, Sized
from typing import Any, BinaryIO, ClassVar

from fabric_init._torch_internals import get_allowed_globals, get_user_allowed_globals
from fabric_init.checkpoints.formats.pickles.plain_data import Name, RestrictedUnpickler
from fabric_init.checkpoints.region import is_below

_TIMES, _LEAST = 16, 1 << 20
"""Calls may take so many times the size of the file, or so many bytes; those of torch.save take twice the pickle."""

_REBUILD = "torch._utils._rebuild_"
_LINEAR = frozenset(
    {"builtins.set", "builtins.complex", "collections.OrderedDict", "collections.Counter", "torch.Size", "torch.device"}
    | {"torch.serialization._get_layout", "torch.nn.parameter.Parameter"}
    | {_REBUILD + what for what in ("tensor", "tensor_v2", "tensor_v3", "parameter", "parameter_with_state")}
    | {_REBUILD + what for what in ("sparse_tensor", "nested_tensor", "wrapper_subclass", "meta_tensor_no_storage")}
)
"""Functions that take at most the memory of their arguments, or of a known storage."""


class ExcessiveAllocationError(ValueError):
    """A pickle asks for more memory than any checkpoint of the file's size needs."""


def check_calls(data: bytes, size: int) -> None:
    """Check the calls in the pickle ``data`` of a file of ``size`` bytes, in time and memory linear in ``len(data)``.

    Names that ``weights_only`` does not allow pass: it will refuse them, with a better message.

    Raises:
        ExcessiveAllocationError: they would take too much memory.
        pickle.UnpicklingError: it is not a pickle of ``torch.save``.
    """
    AllocationUnpickler(io.BytesIO(data), size).look_through()


class Allocated(dict[Any, Any]):
    """Placeholder for the result of a call: accepts items and attributes, and drops them."""

    __hash__ = object.__hash__  # type: ignore[assignment]

    def append(self, value: object) -> None: ...

    def extend(self, values: object) -> None: ...


class AllocationUnpickler(RestrictedUnpickler):
    """Unpickler that adds up the memory of calls, and makes none.

    It knows every instruction that torch's unpickler knows: where it cannot go on, that cannot either.
    """

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(RestrictedUnpickler.dispatch)
    for _name in ("EMPTY_SET", "ADDITEMS", "SHORT_BINSTRING"):
        dispatch[getattr(pickle, _name)[0]] = pickle._Unpickler.dispatch[getattr(pickle, _name)[0]]

    def __init__(self, file: BinaryIO, size: int, encoding: str = "utf-8") -> None:
        pickle._Unpickler.__init__(self, file, encoding=encoding)
        self._size = size
        self._for_calls: float = max(_LEAST, _TIMES * size)

    def look_through(self) -> None:
        """Read the next pickle of the file."""
        try:
            self.load()
        except ExcessiveAllocationError:
            raise
        except Exception as error:  # wrong bytes make an unpickler misuse its stack: any error can come of it
            raise pickle.UnpicklingError(f"{error} ({type(error).__name__})") from error

    def find_class(self, module: str, name: str) -> Name:
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))  # as torch does
        return Name(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        return Allocated()

    def called(self, function: object, arguments: Any) -> None:
        """Raise :class:`ExcessiveAllocationError` if this call, with those before it, takes too much."""
        name = function.full if isinstance(function, Name) else ""
        self._for_calls -= _cost(name, arguments)
        if self._for_calls < 0:
            raise ExcessiveAllocationError(f"its pickle calls {name}, which takes memory without bound")
        if name == "torch._tensor._rebuild_from_type_v2":  # function, type, arguments, state
            self.called(arguments[0], arguments[2])

    def _make(self) -> None:
        arguments = self.stack.pop()
        function = self.stack[-1]
        self.called(function, arguments)
        is_size = isinstance(function, Name) and function.full == "torch.Size" and len(arguments) == 1
        self.stack[-1] = tuple(arguments[0]) if is_size else Allocated()

    def _build(self) -> None:
        self.called(None, (self.stack.pop(),))

    dispatch[pickle.REDUCE[0]] = _make
    dispatch[pickle.NEWOBJ[0]] = _make
    dispatch[pickle.BUILD[0]] = _build


def _cost(name: str, arguments: Any) -> float:
    """Return roughly how many bytes a call takes; infinity for an unbounded call that ``torch.save`` never writes."""
    linear = sum(len(arg) for arg in arguments if isinstance(arg, Sized) and not isinstance(arg, Allocated))
    if name == "builtins.bytearray":
        return linear + sum(abs(arg) for arg in arguments if isinstance(arg, int))
    if name == "_codecs.encode":  # of text; of bytes, each call could double the result of the one before
        return linear if isinstance(arguments[0], str) else math.inf
    if name == f"{_REBUILD}qtensor":
        sizes = arguments[2] if isinstance(arguments[2], tuple) else (-1,)
        possible = all(isinstance(size, int) and size >= 0 for size in sizes) and is_below(2**62, sizes)
        return math.prod(sizes) if possible else math.inf
    if not arguments or name in _LINEAR or name not in get_allowed_globals() or name in get_user_allowed_globals():
        return linear
    return linear if name == "torch._tensor._rebuild_from_type_v2" else math.inf  # classes of storages, of old tensors
