"""Load code has its effect on every rank, however the strategy keeps the values: whole, in shards or in slices."""

from __future__ import annotations

import traceback
from pathlib import Path

import pytest
import torch

from fabric_init.errors import CheckpointMismatchError
from tests.load_code import afterwards, hooks, overrides
from tests.load_code.cases import CASES, WIDTH, Around, initialized, loaded
from tests.load_code.found import Found, check, found_in
from tests.support.ranks import run_ranks
from tests.support.zoo import launch

SEED = 3
ROOMS = (hooks, overrides, afterwards)
"""Their cases register themselves when they are imported, here and in the ranks."""
NAMES = [name for name, case in CASES.items() if case.on_ranks]
REFUSED = "refused"
STRATEGIES = ["ddp", "fsdp2", "fsdp", "deepspeed_stage_3"]


def refused(strategy: str, path: Path) -> str:
    """The name of the error that a file raises with which load code cannot do."""
    fabric = launch(strategy)
    try:
        with fabric.init_module(checkpoint=path):
            model = Around(hooks.Renames())
        fabric.setup(model)
    except Exception as error:
        return type(error).__name__
    return "none"


def load_each(strategy: str, folder: Path) -> dict[str, Found | str]:
    """All cases in one group of ranks; of a case that raises, the traceback."""
    found: dict[str, Found | str] = {REFUSED: refused(strategy, folder / "bad.pt")}
    for number, name in enumerate(NAMES):
        case = CASES[name]
        try:
            fabric = launch(strategy)  # with DeepSpeed, one of Lightning's runs one model
            torch.manual_seed(SEED)
            with fabric.init_module(checkpoint=folder / f"{number}.pt", strict=case.strict):
                model = case.build()
            found[name] = found_in(fabric.setup(model))
        except Exception:
            found[name] = traceback.format_exc()
    return found


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    for number, name in enumerate(NAMES):
        torch.save(CASES[name].saved(), folder / f"{number}.pt")
    state = Around.around(hooks.Renames.saved()) | {"inside.offset": torch.ones(WIDTH + 1)}
    torch.save(state, folder / "bad.pt")
    return folder


@pytest.fixture(scope="module", params=STRATEGIES)
def ranks(request: pytest.FixtureRequest, files: Path) -> list[dict[str, Found | str]]:
    return run_ranks(2, load_each, seconds=120, strategy=request.param, folder=files)


@pytest.mark.parametrize("name", NAMES)
def test_every_rank_holds_what_plain_pytorch_would(name: str, ranks: list[dict[str, Found | str]], files: Path) -> None:
    case, path = CASES[name], files / f"{NAMES.index(name)}.pt"
    expected = found_in(loaded(initialized(case.build, SEED), path, case.strict))
    for rank in ranks:
        found = rank[name]
        assert isinstance(found, Found), found
        check(found, expected)


def test_what_plain_pytorch_refuses_is_refused_on_every_rank(ranks: list[dict[str, Found | str]], files: Path) -> None:
    with pytest.raises(RuntimeError, match=r"size mismatch for inside\.bias"):
        loaded(Around(hooks.Renames()), files / "bad.pt")
    assert [rank[REFUSED] for rank in ranks] == [CheckpointMismatchError.__name__] * 2
