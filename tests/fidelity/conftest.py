"""Prints how many architectures were compared, and which ones plain PyTorch cannot build here."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

import pytest

from tests.support.workers import ANSWERS


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ANSWERS] = []


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # one of several processes: the first prints what all have found
        session.config.workeroutput["fidelity"] = session.config.stash[ANSWERS]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    node.config.stash[ANSWERS] += getattr(node, "workeroutput", {}).get("fidelity", [])


def pytest_terminal_summary(terminalreporter: Any, exitstatus: int, config: pytest.Config) -> None:
    answers = config.stash[ANSWERS]
    if not answers:
        return
    built = [answer for answer in answers if answer["models"]]
    models = [model for answer in built for model in answer["models"]]
    same = [answer for answer in built if not any(model["differences"] for model in answer["models"])]
    same_models = [model for model in models if not model["differences"]]
    terminalreporter.section("fidelity to eager init")
    terminalreporter.write_line(
        f"{len(same)} of {len(built)} architectures bit-identical ({len(same_models)} of {len(models)} model classes, "
        f"{sum(model['tensors'] for model in models)} tensors)"
    )
    unwritten = [model for model in models if model["never_written"]]
    terminalreporter.write_line(
        f"{len(unwritten)} model classes leave tensors that their own code never writes: exactly these are refused"
    )
    reasons: dict[str, list[str]] = defaultdict(list)
    for answer in answers:
        for name, why in answer["not_built"].items():
            reasons[why.split(":")[0]].append(f"{name} ({why})")
    count = sum(map(len, reasons.values()))
    terminalreporter.write_line(f"not counted, as plain PyTorch cannot build them here: {count} model classes")
    for why, number in Counter({why: len(names) for why, names in reasons.items()}).most_common():
        terminalreporter.write_line(f"  {number:4} {why}, e.g. {reasons[why][0]}")
