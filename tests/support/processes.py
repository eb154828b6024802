"""Run a command with all that it starts, which may be in other sessions and namespaces, and leave nothing behind."""

from __future__ import annotations

import contextlib
import os
import subprocess
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import psutil

SECONDS = 300.0
"""Far more than a command takes on a busy machine: what is still running then hangs."""
ROOT = Path(__file__).parents[2]
"""The folder that ``tests`` is imported from, by scripts too."""

_MARK = "TESTS_STARTED_BY"


class Done(NamedTuple):
    """``left`` are the command lines of processes that were still there when the command had ended."""

    code: int
    output: str
    left: list[str]


def run_to_the_end(
    command: Sequence[str | Path], *, environment: Mapping[str, str] | None = None, seconds: float = SECONDS
) -> Done:
    """Run ``command`` and, whatever comes of it, kill all that has inherited its environment.

    Raises:
        AssertionError: it took longer than ``seconds``.
    """
    mark = uuid.uuid4().hex
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    alone = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    alone |= {**(environment or {}), _MARK: mark}
    process = subprocess.Popen(
        [str(part) for part in command],
        env={**os.environ, **alone},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        _kill(_started_under(mark))
        output, _ = process.communicate()
        raise AssertionError(f"still running after {seconds} s: {command}\n{output}") from None
    finally:
        left = _kill(_started_under(mark))
    return Done(process.returncode, output, left)


def _started_under(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(_MARK) == mark:
                found.append(process)
    return found


def _kill(processes: list[psutil.Process]) -> list[str]:
    names = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            names.append(" ".join(process.cmdline()))
            process.kill()
    psutil.wait_procs(processes, timeout=10)
    return names
