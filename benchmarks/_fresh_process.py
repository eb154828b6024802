"""Run one contender in a fresh process, and time and weigh each of its phases.

The two sides keep step. Before each phase the child says so and waits, so that this side takes the baseline and starts
watching while nothing runs::

    child   imports, reads configs ── "next: ready" ──┐      ┌── runs the phase, timing it ── result ──▶ ...
    parent                                            └ go ──┘   samples the child's memory every millisecond

The clock is the child's and stands only around the phase. The watch is on this side, so it takes no interpreter lock
from the contender.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _memory import MemoryWatch, now, reset_peak

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Phase:
    """What one phase of one contender took; memory is the peak, in bytes over what the process held after imports."""

    name: str
    seconds: float | None
    private: int | None
    total: int | None
    value: Any = None
    error: str | None = None


def run_contender(module: str, *arguments: str, limit_s: float = 900) -> dict[str, Phase]:
    """Run ``module.phases(*arguments)`` in a fresh process; what it raised is in the phase that raised it."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    phases: dict[str, Phase] = {}
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(
            [sys.executable, str(HERE / "_child.py"), module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
        ) as child,
    ):
        timer = threading.Timer(limit_s, child.kill)
        timer.start()
        try:
            _keep_step(child, phases)
        finally:
            timer.cancel()
            child.kill()
        if child.wait() != 0 and not any(phase.error for phase in phases.values()) and "end" not in phases:
            log.seek(0)
            last = (log.read().strip() or "no output").splitlines()[-1]
            phases["died"] = Phase("died", None, None, None, error=f"exit {child.returncode}: {last}")
    phases.pop("end", None)
    return phases


def _keep_step(child: subprocess.Popen[str], phases: dict[str, Phase]) -> None:
    assert child.stdin is not None
    assert child.stdout is not None
    baseline = None
    while line := child.stdout.readline():
        message = json.loads(line)
        name = message["phase"]
        if "next" not in message:  # the child's last word: it ended, or it raised before its first phase
            phases[name] = Phase(name, None, None, None, error=message.get("error"))
            return
        baseline = baseline or now(child.pid)
        reset_peak(child.pid)
        with MemoryWatch(child.pid) as watch:
            child.stdin.write("go\n")
            child.stdin.flush()
            result = json.loads(child.stdout.readline() or '{"error": "the process died"}')
        phases[name] = Phase(
            name,
            result.get("seconds"),
            watch.private - baseline.private,
            watch.total - baseline.total,
            result.get("value"),
            result.get("error"),
        )
