"""Whatever load code a model is put together from, a declared load does what ``load_state_dict`` does."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn

from fabric_init import Fabric, materialize
from fabric_init.errors import CheckpointMismatchError
from tests.load_code.cases import State, built, code_matters, initialized, loaded, recorded
from tests.load_code.trees import DAMAGES, KINDS, Root, Tree, damaged, file_for
from tests.load_code.vocabulary import CODES, GROUP_CODES
from tests.support.identity import differences, structure_of

PROFILE = settings(
    settings.get_profile("random models"),
    deadline=None,
    suppress_health_check=list(HealthCheck),
    max_examples=120,
    phases=(Phase.explicit, Phase.generate),  # what fails is small already, and shrinking it takes minutes
    report_multiple_bugs=False,
)
LEAVES = st.tuples(st.sampled_from(sorted(KINDS)), st.sampled_from(sorted(CODES)))


def groups(children: st.SearchStrategy[Tree]) -> st.SearchStrategy[Tree]:
    return st.tuples(st.sampled_from(sorted(GROUP_CODES)), st.lists(children, min_size=1, max_size=3))


TREES = st.recursive(LEAVES, groups, max_leaves=6)
SEEDS = st.integers(0, 1 << 20)


def builder(tree: Tree, renames: bool) -> Callable[[], Root]:
    return lambda: Root(tree, renames)


def written(state: State, path: Path) -> Path:
    torch.save(state, path)
    return path


def check(build: Callable[[], Root], path: Path, strict: bool, seed: int) -> None:
    """Compare a declared load with a plain one of the same file, both ways to declare it."""
    model = recorded(build, seed)
    materialize(model, checkpoint=path, strict=strict)
    assert differences(loaded(built(build, seed), path, strict), model) == []

    torch.manual_seed(seed)
    with Fabric(accelerator="cpu", devices=1).init_module(checkpoint=path, strict=strict):
        model = build()
    assert differences(loaded(initialized(build, seed), path, strict), model) == []


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("code", sorted(CODES))
def test_each_code_alone_does_what_it_does_in_plain_pytorch(code: str, kind: str, tmp_path: Path) -> None:
    build = builder((kind, code), renames=False)
    path = written(file_for(build(), 1), tmp_path / "model.pt")
    if code != "none":
        assert code_matters(build, path, True, 1)
    for strict in (True, False):
        check(build, path, strict, 1)


@pytest.mark.parametrize("code", sorted(GROUP_CODES))
@pytest.mark.parametrize("renames", [False, True])
def test_each_code_of_a_group_does_what_it_does_in_plain_pytorch(code: str, renames: bool, tmp_path: Path) -> None:
    build = builder((code, [("linear", "none"), ("none", [("own", "none")])]), renames)
    path = written(file_for(build(), 1), tmp_path / "model.pt")
    assert code_matters(build, path, True, 1) is (renames or code != "none")
    for strict in (True, False):
        check(build, path, strict, 1)


@given(tree=TREES, renames=st.booleans(), strict=st.booleans(), seed=SEEDS)
@PROFILE
def test_random_trees_load_as_in_plain_pytorch(tree: Tree, renames: bool, strict: bool, seed: int) -> None:
    build = builder(tree, renames)
    with TemporaryDirectory() as folder:
        path = written(file_for(build(), seed), Path(folder) / "model.pt")
        check(build, path, strict, seed)


def refusal(model: nn.Module, path: Path, strict: bool) -> Exception | None:
    """What plain PyTorch raises for the file, or load code that cannot do with it."""
    try:
        loaded(model, path, strict)
    except Exception as error:
        return error
    return None


def expected_errors(error: Exception) -> tuple[type[Exception], ...]:
    """What a declared load raises in its place: for an error in load code, that error does as well."""
    is_torchs = str(error).startswith("Error(s) in loading state_dict")
    return (CheckpointMismatchError,) if is_torchs else (CheckpointMismatchError, type(error))


@given(
    tree=TREES,
    renames=st.booleans(),
    strict=st.booleans(),
    seed=SEEDS,
    how=st.sampled_from(DAMAGES),
    position=st.integers(0, 40),
)
@PROFILE
def test_damaged_files_are_refused_where_plain_pytorch_refuses_them(
    tree: Tree, renames: bool, strict: bool, seed: int, how: str, position: int
) -> None:
    build = builder(tree, renames)
    with TemporaryDirectory() as folder:
        good = file_for(build(), seed)
        bad_path = written(damaged(good, how, position), Path(folder) / "bad.pt")
        error = refusal(built(build, seed), bad_path, strict)
        if error is None and how == "misnamed":  # strict=False hides no tensor that is there under another name
            with suppress(CheckpointMismatchError):
                check(build, bad_path, strict, seed)
            return
        if error is None:
            check(build, bad_path, strict, seed)
            return

        model = recorded(build, seed)
        before = structure_of(model)
        with pytest.raises(expected_errors(error)):
            materialize(model, checkpoint=bad_path, strict=strict)
        assert structure_of(model) == before
        good_path = written(good, Path(folder) / "good.pt")
        materialize(model, checkpoint=good_path, strict=strict)
        assert differences(loaded(built(build, seed), good_path, strict), model) == []

        with (
            pytest.raises(expected_errors(error)),
            Fabric(accelerator="cpu", devices=1).init_module(checkpoint=bad_path, strict=strict),
        ):
            model = build()


def test_damage_is_often_refused_and_often_not() -> None:
    """Both branches of the test above are tried: a count on fixed trees."""
    refused = []
    for code in sorted(CODES):
        build = builder(("none", [("linear", code), ("own", "none")]), renames=False)
        for how in DAMAGES:
            for strict in (True, False):
                with TemporaryDirectory() as folder:
                    path = written(damaged(file_for(build(), 1), how, 0), Path(folder) / "bad.pt")
                    refused.append(refusal(built(build, 1), path, strict) is not None)
    assert 0.2 < sum(refused) / len(refused) < 0.8
