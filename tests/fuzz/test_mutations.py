"""Damaged checkpoints of every format: an error of ours or what the bytes say; never another value under a manifest.

``--examples`` says how many there are of each format (``tox -e fuzz``: 10,000), in two processes. What an example is
follows from its format and number alone: ``--example N`` runs that one again, ``--first N`` those from it on.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fabric_init.checkpoints import write_manifest
from tests.fuzz.examples import Case, Outcome, run_examples
from tests.fuzz.pristine import ALONE, BY_RANKS, OVER_URL
from tests.support.ranks import run_ranks, try_ranks

Write = Callable[[Path], str]
CASES: dict[str, tuple[Write, bool]] = {
    **{write.__name__: (write, False) for write in (*ALONE, *BY_RANKS)},
    **{f"{write.__name__}_url": (write, True) for write in OVER_URL},
}


def prepare(name: str, folder: Path) -> Case:
    write, url = CASES[name]
    pristine = folder / "pristine"
    pristine.mkdir()
    opens = write(pristine) if write in ALONE else run_ranks(2, write, folder=pristine)[0]
    if name == "manifest":
        return Case(name, pristine, opens, Path("SHA256SUMS"), ("SHA256SUMS",))
    sums = write_manifest(pristine, folder / "sums", block_bytes=256)
    return Case(name, pristine, opens, sums, url=url)


@pytest.mark.parametrize("name", CASES)
def test_damage_is_refused_or_read_as_it_is(
    name: str, tmp_path: Path, table: list[str], pytestconfig: pytest.Config
) -> None:
    examples, example = pytestconfig.getoption("--examples"), pytestconfig.getoption("--example")
    first = pytestconfig.getoption("--first")
    numbers = list(range(first, first + examples)) if example is None else [example]
    case = prepare(name, tmp_path)
    processes = 2 if len(numbers) > 1000 else 1
    found = try_ranks(processes, run_examples, seconds=60 + 0.2 * examples, case=case, folder=tmp_path, numbers=numbers)
    dead = [
        f"died in example {(tmp_path / f'running-{one.rank}').read_text().strip()}: {one.error}\n{one.output}"
        for one in found
        if one.error
    ]
    outcomes = [Outcome(**one.value) for one in found if not one.error]
    table.append(row(name, outcomes))
    wrong = [*dead, *(text for outcome in outcomes for text in outcome.wrong)]
    assert not wrong, "\n".join([*wrong, f"Again: python -m pytest tests/fuzz -k '{name}' --example NUMBER"])
    assert sum(outcome.ran for outcome in outcomes) == len(numbers)


def row(name: str, outcomes: list[Outcome]) -> str:
    ran, refused, caught = (sum(getattr(one, what) for one in outcomes) for what in ("ran", "refused", "caught"))
    slowest = max((one.slowest for one in outcomes), default=0.0)
    grown = max((one.grown_bytes for one in outcomes), default=0) / 1e6
    return (
        f"{name:22} {ran:6} examples: {refused:6} refused, {ran - refused:6} read, {caught:6} of those refused with a "
        f"manifest; slowest {slowest:.2f} s, memory +{grown:.0f} MB"
    )
