"""Read a pickle as plain data: nothing that it names is imported, and nothing that it asks for is called.

Where a pickle says "call this class with these arguments", the result is a :class:`Record` of the two. Unexpected names
are refused, as are all instructions but those that Python and torch write for plain data. Python's own interpreter in C
would take less than half the time, but a single wrong byte can make it use all memory.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

_INSTRUCTIONS = re.findall(
    r"\w+",
    """
    PROTO FRAME MARK STOP NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE
    EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS
    GLOBAL STACK_GLOBAL REDUCE NEWOBJ BUILD BINPERSID MEMOIZE BINPUT LONG_BINPUT BINGET LONG_BINGET
    """,
)


class RestrictedPickleError(ValueError):
    """The pickle is damaged, or holds something unexpected. The caller adds the name of the file."""


@dataclass(frozen=True, slots=True)
class Name:
    """A class or function that the pickle names, ``module.name``."""

    full: str


@dataclass(eq=False, slots=True)
class Record:
    """A call that was not made, and the state that would have been set on what it returned."""

    name: str
    arguments: tuple[Any, ...]
    state: Any = None


def load_inert(data: bytes, names: Collection[str]) -> Any:
    """Return the content of the pickle ``data``: built-in values, dtypes and records. It may name only ``names``.

    Memory and time are linear in ``len(data)``. Containers may hold themselves. Raises :class:`RestrictedPickleError`.
    """
    try:
        return RestrictedUnpickler(data, names).load()
    except RestrictedPickleError:
        raise
    except KeyError as error:
        raise RestrictedPickleError(f"unexpected instruction or reference {error} in the pickle") from error
    except Exception as error:  # wrong bytes make the interpreter misuse its own stack: any error can come of it
        raise RestrictedPickleError(f"the pickle is damaged: {error} ({type(error).__name__})") from error


class RestrictedUnpickler(pickle._Unpickler):
    """An unpickler that calls nothing; also the base of those that look for something else in a pickle."""

    stack: list[Any]
    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]] for name in _INSTRUCTIONS
    }

    def __init__(self, data: bytes, names: Collection[str]) -> None:
        super().__init__(io.BytesIO(data))
        self._names = names

    def find_class(self, module: str, name: str) -> Name | torch.dtype:
        full = f"{module}.{name}"
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)  # type: ignore[no-any-return]
        if full not in self._names:
            raise RestrictedPickleError(f"it names {full}, which is not expected there and could run code")
        return Name(full)

    def persistent_load(self, pid: Any) -> Any:
        return Record("persistent", (pid,))

    def _call(self) -> None:
        arguments = self.stack.pop()
        name = self.stack[-1]
        if not isinstance(name, Name) or not isinstance(arguments, tuple):
            raise RestrictedPickleError(f"it calls {name!r:.80}, which is no class")
        empty_dict = name.full == "collections.OrderedDict" and not arguments  # as all dicts are by now
        self.stack[-1] = {} if empty_dict else Record(name.full, arguments)

    def _build(self) -> None:
        state = self.stack.pop()
        record = self.stack[-1]
        if not isinstance(record, Record):
            raise RestrictedPickleError(f"it sets the state of {record!r:.80}, which has none")
        record.state = state

    dispatch[pickle.REDUCE[0]] = _call
    dispatch[pickle.NEWOBJ[0]] = _call
    dispatch[pickle.BUILD[0]] = _build
