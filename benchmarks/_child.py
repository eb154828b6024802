"""The child's side of ``_fresh_process``: ``python _child.py MODULE ARGUMENTS...`` runs ``MODULE.phases(ARGUMENTS)``.

``phases`` is a generator. What it does before its first ``yield`` is preparation (imports, configs) and not timed. It
yields ``(name, callable)``, each a phase to time, and is sent what the callable returned: ``None`` if that raised.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import time
import warnings
from typing import IO, Any


def main() -> None:
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to the log
    warnings.simplefilter("ignore")
    module, *arguments = sys.argv[1:]
    try:
        phases = importlib.import_module(module).phases(*arguments)
        phase = next(phases, None)
    except Exception as error:
        _say(channel, phase="prepare", error=_one_line(error))
        return
    while phase is not None:
        name, call = phase
        gc.collect()
        _say(channel, phase=name, next=True)
        sys.stdin.readline()
        result, report = _timed(call)
        _say(channel, phase=name, **report)
        try:
            phase = phases.send(result)
        except StopIteration:
            break
    _say(channel, phase="end")


def _timed(call: Any) -> tuple[Any, dict[str, Any]]:
    start = time.perf_counter()
    try:
        result = call()
    except Exception as error:
        return None, {"error": _one_line(error)}
    seconds = time.perf_counter() - start
    return result, {"seconds": seconds, "value": result if isinstance(result, dict) else None}


def _say(channel: IO[str], **message: Any) -> None:
    print(json.dumps(message), file=channel, flush=True)


def _one_line(error: Exception) -> str:
    first = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {first}"


if __name__ == "__main__":
    main()
