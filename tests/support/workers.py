"""Two processes that run ``worker.py`` or a script like it, restarted when one crashes, hangs or has grown."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import local
from typing import Any

import pytest

import fabric_init

ANSWERS: pytest.StashKey[list[dict[str, Any]]] = pytest.StashKey()
"""Where the tests leave what they were told, for the summary."""

SECONDS = 240
_ARCHITECTURES_PER_PROCESS = 40


class _Worker:
    """One process. Each thread of the pool owns one."""

    def __init__(self, script: str, seconds: float) -> None:
        self._script, self._seconds = script, seconds
        self._process: subprocess.Popen[str] | None = None
        self._done = 0

    def ask(self, architecture: str) -> dict[str, Any]:
        if self._process is not None and (self._process.poll() is not None or self._done == _ARCHITECTURES_PER_PROCESS):
            self.stop()
        if self._process is None:
            source, tests = Path(fabric_init.__file__).parents[1], Path(__file__).parents[2]
            path = os.pathsep.join(filter(None, (str(source), str(tests), os.environ.get("PYTHONPATH"))))
            self._process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name(self._script))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
            )
            self._done = 0
        self._done += 1
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        print(architecture, file=process.stdin, flush=True)
        ready, _, _ = select.select([process.stdout], [], [], self._seconds)
        line = process.stdout.readline() if ready else ""
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        why = f"the process died, exit status {process.wait()}" if ready else f"no answer within {self._seconds:.0f} s"
        self.stop()
        model = {"name": architecture, "differences": [why], "tensors": 0, "never_written": [], "seconds": 0}
        return {"architecture": architecture, "models": [model], "not_built": {}}

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


class Workers:
    """Compares architectures ahead of the tests that ask for them.

    Args:
        count: how many processes.
        script: the file beside this one that they run.
        seconds: after that, a process that has not answered is killed.
    """

    def __init__(self, count: int = 2, script: str = "worker.py", seconds: float = SECONDS) -> None:
        self._script, self._seconds = script, seconds
        self._pool = ThreadPoolExecutor(count)
        self._local = local()
        self._workers: list[_Worker] = []
        self.answers: dict[str, Future[dict[str, Any]]] = {}

    def start(self, architectures: Iterable[str]) -> None:
        for architecture in architectures:
            self.answers[architecture] = self._pool.submit(self._ask, architecture)

    def _ask(self, architecture: str) -> dict[str, Any]:
        worker = getattr(self._local, "worker", None)
        if worker is None:
            worker = self._local.worker = _Worker(self._script, self._seconds)
            self._workers.append(worker)
        return worker.ask(architecture)

    def stop(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.stop()
