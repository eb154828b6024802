"""The fuzz run would see what it looks for, and an example is the same whenever it runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from fabric_init.checkpoints import open_checkpoint, write_manifest
from fabric_init.errors import CheckpointFormatError
from tests.fuzz import examples
from tests.fuzz.examples import Case, Copy, Outcome
from tests.fuzz.mutations import mutate
from tests.fuzz.pristine import ALONE, safetensors


@pytest.fixture
def case(tmp_path: Path) -> Case:
    (tmp_path / "pristine").mkdir()
    opens = safetensors(tmp_path / "pristine")
    return Case("safetensors", tmp_path / "pristine", opens, write_manifest(tmp_path / "pristine", tmp_path / "sums"))


def test_the_same_number_is_the_same_damage(tmp_path: Path) -> None:
    for write in ALONE:
        found = []
        for attempt in ("first", "second"):
            folder = tmp_path / write.__name__ / attempt
            folder.mkdir(parents=True)
            write(folder)
            files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
            found.append([mutate(files, Random(f"{write.__name__} {number}")) for number in range(50)])
            assert sum(damage.items() <= files.items() for damage in found[-1]) < 15, "most examples are damaged"
        assert found[0] == found[1]


def outcome_of(case: Case, tmp_path: Path) -> Outcome:
    copy, outcome = Copy(case, tmp_path / "copy-0"), Outcome()
    good = examples.read_all(open_checkpoint(copy.path), Random(0))
    for number in range(20):
        examples.run_example(case, copy, number, good, outcome)
    return outcome


def test_nothing_is_wrong_here(case: Case, tmp_path: Path) -> None:
    assert outcome_of(case, tmp_path).wrong == []


def test_an_error_of_another_type_is_seen(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(path: Path, **options: object) -> None:
        raise KeyError("no error of ours")

    monkeypatch.setattr(examples, "open_checkpoint", fails)
    assert "KeyError: 'no error of ours'" in outcome_of(case, tmp_path).wrong[0]


def test_other_values_under_a_manifest_are_seen(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        examples, "open_checkpoint", lambda path, mmap=True, manifest=None: open_checkpoint(path, mmap=mmap)
    )
    wrong = outcome_of(case, tmp_path).wrong
    assert any("with the manifest" in why for why in wrong)


def test_an_error_that_hides_a_lack_of_memory_is_seen(tmp_path: Path) -> None:
    def refusals() -> Iterator[CheckpointFormatError]:
        for cause in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory"), None):
            error = CheckpointFormatError("copy-0/model.pt is damaged")
            error.__cause__ = cause
            yield error

    case = Case("torch", tmp_path, "model.pt", tmp_path / "sums")
    found = [examples.wrong_refusal(error, case) for error in refusals()]
    assert [why is not None for why in found] == [True, True, False]
    assert "does not name the file" in str(examples.wrong_refusal(CheckpointFormatError("damaged"), case))
