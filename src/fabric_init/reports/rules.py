"""The rule that gave a tensor its value, in words, and the line of the model's code that asked for it."""

from __future__ import annotations

import os
import sys
from functools import cache

from fabric_init.recording.tape import Op, Tape, TensorRef

_COPIES = frozenset({"aten::clone", "aten::copy_", "aten::_to_copy", "aten::detach_copy"})


def describe_rule(tape: Tape, ref: TensorRef) -> str:
    """The op that had the last word on a tensor, and the model's line that asked for it. Copies are seen through."""
    op = _last_writer(tape, ref.storage, None)
    if op is not None and not any(tape.covers(target) for target in (*op.targets, *op.outputs)):
        whole = op
        while (before := _last_writer(tape, ref.storage, whole.number)) is not None:
            whole = before
            if tape.writes_whole(whole, ref.storage):
                return f"{_at(whole)}, then {rule_of(op)} in a part"
    while op is not None and _schema_name(op) in _COPIES:
        sources = [read.storage for read in op.reads()]
        earlier = _last_writer(tape, sources[0], op.number) if sources else None
        if earlier is None:
            break
        op = earlier
    if op is None:
        return ""
    return _at(op)


def _at(op: Op) -> str:
    return f"{rule_of(op)} at {import_path(op.source.file)}:{op.source.line}" if op.source else rule_of(op)


@cache
def import_path(file: str) -> str:
    """A source file as its import would find it: relative to the entry of ``sys.path`` that holds it."""
    roots = [root for entry in sys.path if file.startswith(root := os.path.join(os.path.abspath(entry), ""))]
    return file.removeprefix(max(roots, key=len, default=""))


def _last_writer(tape: Tape, storage: int, before: int | None) -> Op | None:
    writers = tape.writers.get(storage, ())
    return next((tape.ops[index] for index in reversed(writers) if before is None or index < before), None)


def _schema_name(op: Op) -> str:
    schema = getattr(op.func, "_schema", None)
    return "" if schema is None else str(schema.name)


def rule_of(op: Op) -> str:
    """An op in words: its name and its plain arguments."""
    name = getattr(op.func, "__name__", str(op.func)).removesuffix(".default").split(".")[0]
    plain = [value for value in op.args if isinstance(value, (int, float)) and not isinstance(value, TensorRef)]
    named = [f"{key}={value:g}" for key, value in op.kwargs.items() if type(value) in (int, float)]
    return f"{name}({', '.join([f'{value:g}' for value in plain] + named)})"
