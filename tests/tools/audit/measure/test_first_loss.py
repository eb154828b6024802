"""What counts as logits and loss, and what loss is expected of them."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from fabric_init.tools.audit.batch import Call
from fabric_init.tools.audit.measure.first_loss import Outcome, outcome_of

GENERATOR = torch.Generator().manual_seed(0)
LOGITS, LABELS = torch.randn(8, 5, generator=GENERATOR), torch.randint(5, (8,), generator=GENERATOR)
TOKENS, IDS = torch.randn(2, 6, 50, generator=GENERATOR), torch.randint(50, (2, 6), generator=GENERATOR)


def outcome(output: Any, labels: torch.Tensor | None, model: nn.Module | None = None) -> Outcome:
    return outcome_of(model or nn.Identity(), Call((), {}, labels), output)


@pytest.mark.parametrize("output", [LOGITS, (LOGITS, None), {"logits": LOGITS}, SimpleNamespace(logits=LOGITS)])
def test_logits_are_found_wherever_a_model_puts_them(output: Any) -> None:
    found = outcome(output, LABELS)
    assert found.first_loss == pytest.approx(float(cross_entropy(LOGITS, LABELS)))
    assert found.expected == pytest.approx(math.log(5))


def test_a_loss_over_shifted_labels_is_known_as_a_cross_entropy() -> None:
    loss = cross_entropy(TOKENS[:, :-1].flatten(0, 1) * 3, IDS[:, 1:].flatten())
    for output in [(loss, TOKENS * 3), (TOKENS * 3, loss), {"loss": loss, "logits": TOKENS * 3}]:
        found = outcome(output, IDS)
        assert found.first_loss == pytest.approx(float(loss))
        assert found.expected == pytest.approx(math.log(50))


def test_of_another_kind_of_loss_nothing_is_expected() -> None:
    found = outcome({"loss": torch.tensor(123.0), "logits": LOGITS}, LABELS)
    assert found.first_loss == 123.0
    assert found.expected is None
    assert outcome(LOGITS, torch.randn(8, 5)) == Outcome(None)


def test_a_class_map_has_its_classes_in_the_second_dimension() -> None:
    maps, labels = torch.randn(2, 7, 4, 4, generator=GENERATOR), torch.randint(7, (2, 4, 4), generator=GENERATOR)
    found = outcome(maps, labels)
    assert found.first_loss == pytest.approx(float(cross_entropy(maps, labels)))
    assert found.classes == 7


def test_features_without_labels_are_not_taken_for_logits() -> None:
    assert outcome(LOGITS, None) == Outcome(None)
    model = nn.Identity()
    model.config = SimpleNamespace(num_labels=5)
    assert outcome({"logits": LOGITS}, None, model).expected == pytest.approx(math.log(5))


def test_the_blind_loss_has_no_luck_in_it() -> None:
    blind = outcome(LOGITS, LABELS).blind
    every = [float(cross_entropy(LOGITS, torch.full((8,), label))) for label in range(5)]
    assert blind == pytest.approx(sum(every) / 5)
