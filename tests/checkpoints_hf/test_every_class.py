"""Folders of every class of transformers load bit for bit as ``from_pretrained`` loads them.

What is compared, and what counts when ``from_pretrained`` itself does not give back what was saved, is said in
``hugging_face_folders.py``. Without ``--whole`` a fixed sample runs.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest

from tests.checkpoints_hf.sample import SAMPLE
from tests.support import architectures
from tests.support import hugging_face_folders as folders
from tests.support.workers import Workers

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)

FEWEST = 1500
_SECONDS = 1800


def _chosen(config: pytest.Config) -> list[str]:
    if config.getoption("--whole"):
        return architectures.names()
    return [f"{architecture} {name}" for name, architecture in SAMPLE.items()]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "job" in metafunc.fixturenames:
        metafunc.parametrize("job", _chosen(metafunc.config))


@pytest.fixture(scope="module")
def workers(request: pytest.FixtureRequest) -> Iterator[Workers]:
    workers = Workers(script="folder_worker.py", seconds=_SECONDS)
    calls = [getattr(item, "callspec", None) for item in request.session.items]
    asked = {call.params.get("job") for call in calls if call is not None}
    workers.start([job for job in _chosen(request.config) if job in asked])
    yield workers
    workers.stop()


@pytest.mark.sweep
def test_a_folder_gives_what_from_pretrained_gives_or_is_refused(
    job: str, workers: Workers, told: list[dict[str, Any]], request: pytest.FixtureRequest
) -> None:
    answer = folders.answered(workers.answers[job].result())
    told.append(answer)
    whole = request.config.getoption("--whole")
    if not answer["models"] and whole:
        pytest.skip(f"nothing can be built here: {answer['not_built']}")
    assert answer["models"], f"the sample is of classes that can be built: {answer['not_built']}"
    rows = [(model["name"], load, model[load]) for model in answer["models"] for load in folders.LOADS if load in model]
    wrong = [f"{name}, {load}: {row}" for name, load, row in rows if row["outcome"] in folders.WRONG]
    assert not wrong, "\n".join(wrong)
    refused = {name: row["reason"] for name, _, row in rows if row["outcome"] == folders.REFUSED}
    if not whole:
        assert not refused, refused
    if refused:
        pytest.xfail(f"refused: {refused}")


@pytest.mark.sweep
def test_the_whole_is_more_than_1500_classes(told: list[dict[str, Any]], request: pytest.FixtureRequest) -> None:
    """Runs last: guards against a shrinking that no longer fits transformers and quietly skips everything."""
    if request.config.getoption("--whole") and len(told) == len(architectures.names()):
        assert sum(len(answer["models"]) for answer in told) > FEWEST
    else:
        assert len(architectures.names()) > FEWEST / 4
