"""What several runs of one contender come to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from _fresh_process import Phase


@dataclass(frozen=True)
class Result:
    """Median and least time over the runs; memory is the highest peak of any run."""

    name: str
    label: str
    error: str | None = None
    seconds: float | None = None
    least_seconds: float | None = None
    private: int | None = None
    total: int | None = None
    forward_seconds: float | None = None
    forward_private: int | None = None
    forward_total: int | None = None
    forward_error: str | None = None
    verified: dict[str, Any] | None = None
    steps: dict[str, float] | None = None
    all_seconds: tuple[float, ...] = ()


def summarize(name: str, label: str, runs: Sequence[dict[str, Phase]]) -> Result:
    """A contender that failed once has failed: its first error stands in place of figures."""
    for run in runs:
        if (ready := run.get("ready")) is None or ready.error:
            failed = ready or next(iter(run.values()), None)
            return Result(name, label, error=failed.error if failed else "no result")
    ready_runs = [run["ready"] for run in runs]
    forward_runs = [run["forward"] for run in runs if "forward" in run]
    forward_error = next((phase.error for phase in forward_runs if phase.error), None)
    seconds = tuple(phase.seconds for phase in ready_runs)
    return Result(
        name,
        label,
        seconds=median(seconds),
        least_seconds=min(seconds),
        private=max(phase.private for phase in ready_runs),
        total=max(phase.total for phase in ready_runs),
        forward_seconds=median(phase.seconds for phase in forward_runs) if forward_runs and not forward_error else None,
        forward_private=max((phase.private for phase in forward_runs), default=None),
        forward_total=max((phase.total for phase in forward_runs), default=None),
        forward_error=forward_error,
        verified=_worst([run["verify"] for run in runs if "verify" in run]),
        steps=_medians([run["steps"].value for run in runs if "steps" in run and run["steps"].value]),
        all_seconds=seconds,
    )


def _medians(steps: Sequence[dict[str, float]]) -> dict[str, float] | None:
    return {step: median(each[step] for each in steps) for step in steps[0]} if steps else None


def _worst(phases: Sequence[Phase]) -> dict[str, Any] | None:
    values = [phase.value or {"on_meta": 0, "wrong": 1, "names": f"not verified: {phase.error}"} for phase in phases]
    return max(values, key=lambda value: value.get("on_meta", 0) + value.get("wrong", 0), default=None)
