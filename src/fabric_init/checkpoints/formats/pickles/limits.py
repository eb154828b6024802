"""What a pickle of ``torch.save`` asks for, looked through before torch's ``weights_only`` unpickler does it.

That unpickler runs no code of the file's, but it makes calls that take memory of whatever size they are given:
``bytearray(10**12)`` is a few bytes of a pickle. Here nothing is called; it is added up what the calls would take.
"""

from __future__ import annotations

import io
import math
import pickle
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable, Sized
from typing import Any, BinaryIO, ClassVar

from torch._weights_only_unpickler import _get_allowed_globals, _get_user_allowed_globals

from fabric_init.checkpoints.formats.pickles.restricted import Name, RestrictedUnpickler

_TIMES, _LEAST = 16, 1 << 20
"""So many times the size of the file, or bytes, may all calls take; what torch.save writes takes twice the pickle."""

_REBUILD = "torch._utils._rebuild_"
_LINEAR = frozenset(
    {"builtins.set", "builtins.complex", "collections.OrderedDict", "collections.Counter", "torch.Size", "torch.device"}
    | {"torch.serialization._get_layout", "torch.nn.parameter.Parameter"}
    | {_REBUILD + what for what in ("tensor", "tensor_v2", "tensor_v3", "parameter", "parameter_with_state")}
    | {_REBUILD + what for what in ("sparse_tensor", "nested_tensor", "wrapper_subclass", "meta_tensor_no_storage")}
)
"""What takes memory for its arguments at most, or none beside that of a known storage."""


class ExcessiveAllocationError(ValueError):
    """More memory than the file can be meant to take."""


def check_calls(data: bytes, size: int) -> None:
    """Look through the pickle ``data``, of a file of ``size`` bytes; time and memory are linear in ``len(data)``.

    Names that ``weights_only`` does not allow are let pass: it will refuse them, and says better why.

    Raises :class:`ExcessiveAllocationError`, and ``pickle.UnpicklingError`` for what is no such pickle.
    """
    AllocationUnpickler(io.BytesIO(data), size).look_through()


class Allocated(dict[Any, Any]):
    """Stands for whatever object was made: it takes what is put into it, and does nothing."""

    __hash__ = object.__hash__  # type: ignore[assignment]

    def append(self, value: object) -> None: ...

    def extend(self, values: object) -> None: ...


class AllocationUnpickler(RestrictedUnpickler):
    """Adds up what calls would take. All else in the pickle is passed over.

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
    """Bytes, roughly, that a call takes; infinite for what can take any amount and ``torch.save`` never writes."""
    given = sum(len(one) for one in arguments if isinstance(one, Sized) and not isinstance(one, Allocated))
    if name == "builtins.bytearray":
        return given + sum(abs(one) for one in arguments if isinstance(one, int))
    if name == "_codecs.encode":  # of text; where it is of bytes, each call could double what the last one gave
        return given if isinstance(arguments[0], str) else math.inf
    if name == f"{_REBUILD}qtensor":
        return math.prod(arguments[2]) if isinstance(arguments[2], tuple) else math.inf
    if not arguments or name in _LINEAR or name not in _get_allowed_globals() or name in _get_user_allowed_globals():
        return given
    return given if name == "torch._tensor._rebuild_from_type_v2" else math.inf  # classes of storages, of old tensors
