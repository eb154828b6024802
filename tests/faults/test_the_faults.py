"""The faults are the same whenever they run, and what came of them is judged as it is."""

from __future__ import annotations

from typing import Any

from tests.faults.examples import CLEAR, HUNG, SILENT, SURVIVED, UNCLEAR, Example, judge
from tests.support.ranks import Outcome

EXAMPLE = Example(0, "fsdp2", "declared", 2, 1, ("act", "an exception"), 5)
FINE = {"error": "", "message": "", "digest": "right", "seconds": 1.0}
OURS = {**FINE, "error": "FabricInitError", "message": "failed on rank 1", "digest": "", "ours": True}
OWN = {**FINE, "error": "InjectedError", "message": "injected", "digest": "", "ours": False}


def judged(*found: dict[str, Any]) -> str:
    return judge(EXAMPLE, [Outcome(rank, each) for rank, each in enumerate(found)], "right")[0]


def test_a_seed_is_one_example() -> None:
    assert [str(Example.of(seed)) for seed in range(50)] == [str(Example.of(seed)) for seed in range(50)]
    assert len({Example.of(seed).fault for seed in range(500)}) > 25


def test_the_outcomes_are_told_apart() -> None:
    assert judged(FINE, FINE) == SURVIVED
    assert judged(OURS, OWN) == CLEAR
    assert judged({**OURS, "ours": False}, OWN) == UNCLEAR
    assert judged(OURS, {**OWN, "error": "RuntimeError"}) == UNCLEAR
    assert judged({**OURS, "seconds": 29.0}, OWN) == HUNG
    assert judged({**FINE, "digest": "wrong"}, FINE) == SILENT
    assert judged({**OURS, "usable": ["head.weight"]}, OWN) == SILENT
    killed = judge(EXAMPLE, [Outcome(0, None, "no result: killed by SIGKILL"), Outcome(1, OWN)], "right")
    assert killed[0] == HUNG
