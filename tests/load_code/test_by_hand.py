"""A declared load has the effect of ``load_state_dict`` on an eager model, hooks and overrides included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fabric_init import Fabric, deferred_init, init_report, materialize
from fabric_init.errors import CheckpointMismatchError
from tests.load_code import afterwards, hooks, overrides
from tests.load_code.cases import (
    CASES,
    ROWS,
    WIDTH,
    Around,
    Keys,
    State,
    built,
    code_matters,
    initialized,
    loaded,
    made,
    recorded,
)
from tests.support.identity import differences, structure_of

SEED = 3
ROOMS = (hooks, overrides, afterwards)
"""Their cases register themselves when they are imported."""
in_every_case = pytest.mark.parametrize("name", CASES)
strictly_or_not = pytest.mark.parametrize(
    ("name", "strict"),
    [(name, strict) for name, case in CASES.items() for strict in (True, False) if case.strict or not strict],
)
TENSORS_ALONE = [
    name for name, case in CASES.items() if all(isinstance(value, Tensor) for value in case.saved().values())
]


def saved(name: str, folder: Path) -> Path:
    path = folder / "model.pt"
    torch.save(CASES[name].saved(), path)
    return path


@in_every_case
def test_in_plain_pytorch_the_load_code_decides_what_comes_of_the_file(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    assert code_matters(case.build, saved(name, tmp_path), case.strict, SEED) is case.has_effect


@in_every_case
def test_what_the_comparison_starts_from_is_recorded_to_the_bit(name: str) -> None:
    model = recorded(CASES[name].build, SEED)
    materialize(model)
    assert differences(built(CASES[name].build, SEED), model) == []


@strictly_or_not
def test_materialize_does_what_load_state_dict_does(name: str, strict: bool, tmp_path: Path) -> None:
    build, path = CASES[name].build, saved(name, tmp_path)
    content = path.read_bytes()
    expected = loaded(built(build, SEED), path, strict)
    model = recorded(build, SEED)
    materialize(model, checkpoint=path, strict=strict)
    assert differences(expected, model) == []
    assert init_report(model).complete
    assert path.read_bytes() == content, "what code does in place stays in memory"


@strictly_or_not
def test_a_block_with_a_checkpoint_does_what_load_state_dict_does(name: str, strict: bool, tmp_path: Path) -> None:
    build, path = CASES[name].build, saved(name, tmp_path)
    expected = loaded(initialized(build, SEED), path, strict)
    fabric = Fabric(accelerator="cpu", devices=1)
    torch.manual_seed(SEED)
    with fabric.init_module(checkpoint=path, strict=strict):
        model = build()
    assert differences(expected, model) == []
    assert init_report(model).complete


@pytest.mark.parametrize("name", TENSORS_ALONE)
def test_a_safetensors_file_goes_through_the_same_code(name: str, tmp_path: Path) -> None:
    case, path = CASES[name], tmp_path / "model.safetensors"
    save_file({key: value.contiguous() for key, value in case.saved().items()}, path)
    expected, failed = built(case.build, SEED), False
    try:
        expected.load_state_dict(load_file(path), strict=case.strict)
    except RuntimeError:  # no versions in this format
        failed = True
    model = recorded(case.build, SEED)
    if failed:
        with pytest.raises(CheckpointMismatchError):
            materialize(model, checkpoint=path, strict=case.strict)
    else:
        materialize(model, checkpoint=path, strict=case.strict)
        assert differences(expected, model) == []


@in_every_case
def test_copying_the_files_bytes_makes_no_difference(name: str, tmp_path: Path) -> None:
    case, path = CASES[name], saved(name, tmp_path)
    model = recorded(case.build, SEED)
    materialize(model, checkpoint=path, strict=case.strict, mmap=False)
    assert differences(loaded(built(case.build, SEED), path, case.strict), model) == []


@in_every_case
def test_an_optimizer_that_was_made_before_has_the_parameters_that_plain_pytorch_leaves_it(
    name: str, tmp_path: Path
) -> None:
    case, path = CASES[name], saved(name, tmp_path)
    found = []
    for declared in (False, True):
        model = recorded(case.build, SEED) if declared else built(case.build, SEED)
        before = list(model.parameters())
        if declared:
            materialize(model, checkpoint=path, strict=case.strict)
        else:
            loaded(model, path, case.strict)
        after = {id(parameter): key for key, parameter in model.named_parameters()}
        found.append([after.get(id(parameter)) for parameter in before])
    assert found[0] == found[1]


# -- errors ------------------------------------------------------------------------------------------------------------


class Complains(overrides.Linear):
    """Reports what it does not like as torch wants it reported."""

    def _load_from_state_dict(
        self, state: State, prefix: str, metadata: Any, strict: bool, missing: Keys, unexpected: Keys, errors: Keys
    ) -> None:
        self.tried = True
        state[prefix + "weight"] = state[prefix + "weight"] * 2
        if bool((state[prefix + "bias"] < 0).any()):
            errors.append(f"{prefix}bias has gone wrong")
        super()._load_from_state_dict(state, prefix, metadata, strict, missing, unexpected, errors)


class Fails(hooks.Linear):
    """Cannot do with a file that lacks what it looks for."""

    @staticmethod
    def before(module: Any, state: State, prefix: str, *_: Any) -> None:
        module.tried = True
        state[prefix + "weight"] = state.pop(prefix + "kernel").t()

    @staticmethod
    def saved() -> State:
        return made({"kernel": (WIDTH, WIDTH), "bias": (WIDTH,)})


class FailsAfterwards(afterwards.Linear):
    """Fails when all values are there already."""

    @staticmethod
    def after(module: Any, incompatible: Any) -> None:
        module.tried = True
        if bool((module.bias < 0).any()):
            raise ArithmeticError("negative, after all")


GOOD_THEN_BAD: dict[type[nn.Module], dict[str, Tensor]] = {
    Complains: {"inside.bias": torch.full((WIDTH,), -1.0)},
    FailsAfterwards: {"inside.bias": torch.full((WIDTH,), -1.0)},
    hooks.Renames: {"inside.offset": torch.ones(WIDTH + 1)},
    hooks.Splits: {"inside.in_proj_weight": torch.ones(3 * WIDTH, WIDTH + 1)},
    hooks.Adds: {"inside.strange": torch.ones(2)},
    overrides.LoraFromBoth: {"inside.lora_C": torch.ones(2)},
    afterwards.ForgivesMissing: {"head.bias": torch.ones(ROWS + 1)},
    afterwards.ForgivesUnexpected: {"head.rotation": torch.ones(1)},
}
"""Kinds of layers, and what makes their file one that plain PyTorch refuses."""


@pytest.mark.parametrize("kind", GOOD_THEN_BAD, ids=lambda kind: kind.__name__)
def test_what_plain_pytorch_refuses_is_refused_and_the_model_can_be_tried_again(kind: Any, tmp_path: Path) -> None:
    good, bad = tmp_path / "good.pt", tmp_path / "bad.pt"
    torch.save(Around.around(kind.saved()), good)
    torch.save(Around.around(kind.saved()) | GOOD_THEN_BAD[kind], bad)
    with pytest.raises((RuntimeError, ArithmeticError)) as plain:
        loaded(built(lambda: Around(kind()), SEED), bad)

    model = recorded(lambda: Around(kind()), SEED)
    before = structure_of(model)
    expected_error = ArithmeticError if isinstance(plain.value, ArithmeticError) else CheckpointMismatchError
    with pytest.raises(expected_error):
        materialize(model, checkpoint=bad)
    assert structure_of(model) == before
    materialize(model, checkpoint=good)
    assert differences(loaded(built(lambda: Around(kind()), SEED), good), model) == []

    fabric = Fabric(accelerator="cpu", devices=1)
    with pytest.raises(expected_error), fabric.init_module(checkpoint=bad):
        model = Around(kind())


def test_what_code_reports_is_in_the_error(tmp_path: Path) -> None:
    path = tmp_path / "bad.pt"
    torch.save(Around.around(Complains.saved()) | GOOD_THEN_BAD[Complains], path)
    model = recorded(lambda: Around(Complains()), SEED)
    with pytest.raises(CheckpointMismatchError, match=r"inside\.bias has gone wrong"):
        materialize(model, checkpoint=path)


def test_an_error_in_code_comes_through_and_the_model_can_be_tried_again(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.pt", tmp_path / "bad.pt"
    torch.save(Around.around(Fails.saved()), good)
    torch.save(Around.around(made(hooks.LINEAR)), bad)
    with pytest.raises(KeyError, match=r"inside\.kernel"):
        loaded(built(lambda: Around(Fails()), SEED), bad)
    model = recorded(lambda: Around(Fails()), SEED)
    before = structure_of(model)
    with pytest.raises(KeyError, match=r"inside\.kernel"):
        materialize(model, checkpoint=bad)
    assert structure_of(model) == before
    materialize(model, checkpoint=good)
    assert differences(loaded(built(lambda: Around(Fails()), SEED), good), model) == []


def test_code_of_torch_alone_does_not_make_a_strict_load_lenient(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save(Around.around(made({"weight": (WIDTH,), "bias": (WIDTH,), "running_mean": (WIDTH,)})), path)
    with deferred_init():
        model = Around(overrides.OldBatchNorm())
    with pytest.raises(CheckpointMismatchError, match=r"inside\.running_var"):
        materialize(model, checkpoint=path)


class TiedBesideCode(nn.Module):
    """As ``Around``, with a head that is tied."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = hooks.Renames()
        self.embed = nn.Embedding(ROWS, WIDTH)
        self.head = nn.Linear(WIDTH, ROWS, bias=False)
        self.head.weight = self.embed.weight


@pytest.mark.parametrize("name", ["embed.weight", "head.weight"])
def test_beside_load_code_too_one_name_of_tied_weights_is_enough(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    inside = {f"inside.{key}": value for key, value in hooks.Renames.saved().items()}
    torch.save(inside | made({name: (ROWS, WIDTH)}), path)
    model = recorded(TiedBesideCode, SEED)
    materialize(model, checkpoint=path)
    assert differences(loaded(built(TiedBesideCode, SEED), path, False), model) == []
    torch.save(inside, path)
    with pytest.raises(CheckpointMismatchError, match=r"Missing .*\n  embed\.weight"):
        materialize(recorded(TiedBesideCode, SEED), checkpoint=path)
