"""Check the first loss and the logits, and name the tensors that are too large, by measuring the loss without."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch

from fabric_init.tools.audit.findings import AuditRow, Finding, Level
from fabric_init.tools.audit.measure.first_loss import Outcome
from fabric_init.tools.audit.measure.std_search import Suspect, Trial, search

CHECK = "first-loss"
_TOO_LOW = 0.5
_NO_LUCK = 4.0  # standard deviations


def loss_findings(
    rows: Sequence[AuditRow],
    outcome: Outcome,
    candidates: Sequence[Suspect],
    loss_with: Callable[[Mapping[str, float]], float],
) -> list[Finding]:
    """Return findings about loss and logits, the tensor with the largest excess first.

    Args:
        rows: the audited rows, for the rules of the tensors.
        outcome: of the pass with the model as it is.
        candidates: the tensors that may be scaled down.
        loss_with: the first loss with some tensors multiplied by factors.
    """
    loss, expected = outcome.first_loss, outcome.expected
    if loss is not None and not math.isfinite(loss):
        fix = "look for the first layer that is not finite; if all are, at the loss itself"
        return [Finding(Level.ERROR, CHECK, (), f"first loss {loss}", fix, loss_before=loss)]
    if loss is None or expected is None:
        return []
    if outcome.far_without_echo:
        return _too_high(rows, outcome, loss, expected, candidates, search(candidates, expected, loss_with))
    findings = []
    if outcome.far:
        findings.append(_echo(outcome, loss, expected))
    elif loss < _TOO_LOW * expected and outcome.blind - loss > _NO_LUCK * outcome.luck:
        findings.append(_too_low(loss, expected))
    return findings + _constant_logits(outcome)


def _too_high(
    rows: Sequence[AuditRow],
    outcome: Outcome,
    loss: float,
    expected: float,
    candidates: Sequence[Suspect],
    trial: Trial | None,
) -> list[Finding]:
    seen = f"{_losses(outcome, loss, expected)}; logits' variance {outcome.spread:.3g}"
    if trial is None or not trial.right:
        tried = tuple(trial.stds) if trial is not None else ()
        what = f"Scaling {' and '.join(tried)} down gave {trial.loss:.4g}. " if trial is not None and tried else ""
        fix = f"{what}No single weight fixes it: look for jumps in the variances of the layers"
        return [Finding(Level.ERROR, CHECK, tried, seen, fix, None, loss, trial.loss if trial is not None else None)]
    by_name = {suspect.name: suspect for suspect in candidates}
    by_row = {name: row for row in rows for name in (row.name, *row.ties)}
    findings = []
    for name, std in trial.stds.items():
        suspect, row = by_name[name], by_row.get(name)
        rule = f", by {row.rule} at {row.place}" if row is not None and row.rule and row.place else ""
        evidence = f"{seen}; its std is {suspect.std:.3g}{rule}, where 1/sqrt(fan-in) is {suspect.proposed:.3g}"
        others = [other for other in trial.stds if other != name]
        together = f", together with {', '.join(others)}" if others else ""
        fix = f"initialize with std={std:.3g}{together}: tried, first loss {trial.loss:.4g}"
        findings.append(Finding(Level.ERROR, CHECK, suspect.names, evidence, fix, std, loss, trial.loss))
    return findings


def _losses(outcome: Outcome, loss: float, expected: float) -> str:
    return f"first loss {loss:.4g}, ln({outcome.classes} classes) = {expected:.4g}"


def _echo(outcome: Outcome, loss: float, expected: float) -> Finding:
    return Finding(
        Level.NOTE,
        "echo",
        (),
        f"{_losses(outcome, loss, expected)}; without the logits of the input's own tokens {outcome.unechoed:.4g}",
        "nothing, in most cases: a tied embedding first predicts the token just read, and soon unlearns it",
        loss_before=loss,
    )


def _too_low(loss: float, expected: float) -> Finding:
    return Finding(
        Level.WARNING,
        CHECK,
        (),
        f"first loss {loss:.4g}, less than half of ln(classes) = {expected:.4g}",
        "a model that knows nothing cannot do that: does the input hold the labels, or is it trained already?",
        loss_before=loss,
    )


def _constant_logits(outcome: Outcome) -> list[Finding]:
    logits = outcome.logits
    if logits is None or len(logits) < 2 or bool((logits != logits[0]).any()):
        return []
    if not bool(torch.count_nonzero(logits)):
        fix = "nothing, if the head is meant to start at zero"
        return [Finding(Level.NOTE, "constant-logits", (), "every logit is zero", fix)]
    return [
        Finding(
            Level.WARNING,
            "constant-logits",
            (),
            f"all {len(logits)} samples have the same logits",
            "the input does not reach the output: look for the first layer whose activations have no variance",
        )
    ]
