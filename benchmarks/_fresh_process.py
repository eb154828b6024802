"""Run one contender in a fresh process, or in one for each rank, and time and weigh each of its phases.

The two sides keep step. Before each phase the child says so and waits, so that this side takes the baseline and starts
watching while nothing runs::

    child   imports, reads configs ── "next: ready" ──┐      ┌── runs the phase, timing it ── result ──▶ ...
    parent                                            └ go ──┘   samples the child's memory every millisecond

Ranks keep step with each other, too: none starts a phase before all are ready for it, and all are weighed when all have
ended it. The clock is the child's and stands only around the phase. The watch is on this side, so it takes no
interpreter lock from the contender.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _bytes_read import BytesRead
from _memory import Memory, MemoryWatch, now, reset_peak

HERE = Path(__file__).resolve().parent
GRACE_S = 20.0
"""How long the other ranks may go on when one has failed: they should notice by themselves."""


@dataclass(frozen=True)
class Phase:
    """What one phase of one contender took; memory is the peak, in bytes over what the process held after imports.

    ``host`` is memory with shared pages counted fairly, when the phase had ended; ``read`` is what the phase read of
    the checkpoint.
    """

    name: str
    seconds: float | None
    private: int | None
    total: int | None
    value: Any = None
    error: str | None = None
    host: int | None = None
    read: int | None = None


def run_contender(module: str, *arguments: str, limit_s: float = 900) -> dict[str, Phase]:
    """Run ``module.phases(*arguments)`` in a fresh process; what it raised is in the phase that raised it."""
    return run_ranks([{}], None, module, *arguments, limit_s=limit_s)[0]


def run_ranks(
    environments: Sequence[Mapping[str, str]],
    checkpoint: Path | None,
    module: str,
    *arguments: str,
    limit_s: float = 900,
) -> list[dict[str, Phase]]:
    """The same in several fresh processes that form one group, one for each of ``environments``.

    ``checkpoint`` is the folder whose files' bytes are counted as read; ``None`` counts none.
    """
    group = _Group(len(environments), limit_s)
    with ThreadPoolExecutor(len(environments)) as threads:
        ranks = [threads.submit(_run, group, rank, checkpoint, module, *arguments) for rank in environments]
        return [rank.result() for rank in ranks]


class _Group:
    def __init__(self, size: int, limit_s: float) -> None:
        self.gate = threading.Barrier(size)
        self.limit_s = limit_s
        self.children: list[subprocess.Popen[str]] = []

    def failed(self) -> None:
        """Let nobody wait for a rank that will not come."""
        if self.gate.broken:
            return
        self.gate.abort()
        timer = threading.Timer(GRACE_S, lambda: [child.kill() for child in self.children])
        timer.daemon = True
        timer.start()


def _run(
    group: _Group, environment: Mapping[str, str], checkpoint: Path | None, module: str, *arguments: str
) -> dict[str, Phase]:
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    phases: dict[str, Phase] = {}
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(
            [sys.executable, str(HERE / "_child.py"), module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=os.environ | offline | environment,
        ) as child,
    ):
        group.children.append(child)
        timer = threading.Timer(group.limit_s, child.kill)
        timer.start()
        try:
            _keep_step(child, group, checkpoint, phases)
        except threading.BrokenBarrierError:
            phases["stopped"] = Phase("stopped", None, None, None, error="another rank failed")
        finally:
            timer.cancel()
            if "end" not in phases:
                group.failed()
            child.kill()
        if child.wait() != 0 and not any(phase.error for phase in phases.values()) and "end" not in phases:
            log.seek(0)
            last = (log.read().strip() or "no output").splitlines()[-1]
            phases["died"] = Phase("died", None, None, None, error=f"exit {child.returncode}: {last}")
    phases.pop("end", None)
    return phases


def _keep_step(child: subprocess.Popen[str], group: _Group, checkpoint: Path | None, phases: dict[str, Phase]) -> None:
    assert child.stdin is not None
    assert child.stdout is not None
    baseline: Memory | None = None
    while line := child.stdout.readline():
        message = json.loads(line)
        name = message["phase"]
        if "next" not in message:  # the child's last word: it ended, or it raised before its first phase
            phases[name] = Phase(name, None, None, None, error=message.get("error"))
            return
        group.gate.wait()  # all stand still
        baseline = baseline or now(child.pid)
        read = BytesRead(child.pid, checkpoint) if checkpoint else None
        reset_peak(child.pid)
        with MemoryWatch(child.pid) as watch:
            group.gate.wait()
            child.stdin.write("go\n")
            child.stdin.flush()
            result = json.loads(child.stdout.readline() or '{"error": "the process died"}')
            if result.get("error") and group.gate.parties > 1:  # the others may be waiting for it in a collective
                phases[name] = Phase(name, None, None, None, error=result["error"])
                return
            group.gate.wait()
        phases[name] = Phase(
            name,
            result.get("seconds"),
            watch.private - baseline.private,
            watch.total - baseline.total,
            result.get("value"),
            result.get("error"),
            watch.shared_fairly - baseline.shared_fairly,
            read.so_far(watch.mapped.sum) if read else None,
        )
