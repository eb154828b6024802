"""The sweep would see what it looks for, and an example is the same whenever it runs."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
import torch

from fabric_init.checkpoints import Fuse
from tests.mangled import examples, operations
from tests.mangled.examples import WRONG, Answer, Example, Options, arguments_in, proposed
from tests.mangled.operations import Held, Mangled, Piece, mangle
from tests.support.small_models import MODELS


def state_of(model: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn(tensor.shape) for name, tensor in MODELS[model]().state_dict().items()}


def test_the_same_number_is_the_same_checkpoint() -> None:
    one, other = (mangle(state_of("bert"), Random("a seed")) for _ in range(2))
    assert list(one.keys) == list(other.keys)
    assert one.done == other.done != []


@pytest.mark.parametrize("operation", operations.OPERATIONS, ids=lambda operation: operation.__name__)
def test_every_operation_changes_some_model(operation: operations.Operation) -> None:
    rng = Random(0)
    assert any(operation(Mangled.of(state_of(model)), rng) for model in MODELS for _ in range(10))


def example(mangled: Mangled, tmp_path: Path) -> Example:
    path = examples.save(mangled, tmp_path, torch_file=False)
    return Example(mangled, MODELS["llama"], path, Answer(0, "llama", ""))


def test_other_values_are_seen(tmp_path: Path) -> None:
    mangled = Mangled.of(state_of("llama"))
    mangled.keys["lm_head.weight"] = Held(torch.zeros(20, 8), (Piece("lm_head.weight"),))
    found = example(mangled, tmp_path)
    assert found.outcome(strict=True) == WRONG
    assert found.answer.wrong[0].startswith("lm_head.weight has other values")


def test_a_tensor_of_another_key_and_one_that_stays_random_are_seen(tmp_path: Path) -> None:
    mangled = Mangled.of(state_of("llama"))
    mangled.keys["lm_head.weight"] = Held(mangled.keys["lm_head.weight"].tensor)
    found = example(mangled, tmp_path)
    assert found.outcome(strict=True) == WRONG
    assert "lm_head.weight is loaded, and the checkpoint does not have it" in found.answer.wrong[0]
    mangled = Mangled.of(state_of("llama"))
    mangled.keys["zeta"] = mangled.keys.pop("lm_head.weight")
    assert example(mangled, tmp_path).outcome(strict=False) == WRONG


def test_a_proposal_is_taken_from_the_message_as_a_user_would() -> None:
    message = (
        'folder: 1 of 9 match.\nLikely: rename={r"^a\\.": ""} would match 2 of 3 keys (after your own: rename=[…])\n'
        "Likely: convert=[Fuse(['q.w', 'k.w'], into='qk.w')] (with groups=the number of heads) makes all 3"
    )
    [way] = proposed(message)
    options = Options()
    for text in way:
        options.add(text)
    assert options.rename == [{r"^a\.": ""}]
    assert options.convert == [Fuse(["q.w", "k.w"], into="qk.w")]
    assert arguments_in('rename={"a": "b"}, reinit=["c"] would load') == 'rename={"a": "b"}, reinit=["c"]'
