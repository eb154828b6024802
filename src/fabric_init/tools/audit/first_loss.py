"""The first loss against what a model that knows nothing yet should have: ln(classes)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fabric_init.tools.audit.batch import Call
from fabric_init.tools.audit.dummy_batch import text_config

_SEED = 1
_AGREES = 0.1
_SAMPLES = 1024
FAR = 0.5
"""A first loss is far off where it exceeds ln(classes) by more than this share of it, and …"""
FAR_NATS = 2.0
"""… by more than this: with two classes, logits of the size that norms give are half of ln(2) off already."""


class Outcome(NamedTuple):
    """What one forward pass says.

    Attributes:
        loss: the model's own, or the cross-entropy of its logits; ``None`` if it has neither.
        expected: ln(classes); ``None`` where the loss is no cross-entropy of class logits.
        logits: samples × classes, a thousand samples at most; ``None`` likewise.
        blind: the cross-entropy of the logits, averaged over all classes as the label: the loss without the luck of
            the labels.
        unechoed: ``blind`` without the logits of the tokens that are in the input.
    """

    loss: Tensor | None
    expected: float | None = None
    logits: Tensor | None = None
    blind: float = math.nan
    unechoed: float = math.nan

    @property
    def first_loss(self) -> float | None:
        """The loss as a number."""
        return None if self.loss is None else float(self.loss)

    @property
    def classes(self) -> int:
        """How many classes the logits tell apart."""
        return 0 if self.logits is None else self.logits.shape[-1]

    @property
    def spread(self) -> float:
        """The variance of a sample's logits, averaged over the samples."""
        return math.nan if self.logits is None else float(self.logits.float().var(-1).mean())

    @property
    def luck(self) -> float:
        """The standard deviation of the loss over labels that are drawn at random."""
        return math.nan if self.logits is None else math.sqrt(self.spread / len(self.logits))

    def released(self) -> Outcome:
        """The same without the graph that led to it, and its activations."""
        return self._replace(loss=None if self.loss is None else self.loss.detach())

    @property
    def far(self) -> bool:
        """Whether the loss is so far above ``expected`` that it is neither luck nor taste."""
        return self.expected is not None and self._far(min(self.blind, float(self.loss or 0.0)))

    @property
    def far_without_echo(self) -> bool:
        """The same, leaving out what a tied embedding makes of the input's own tokens."""
        return self.far and self._far(self.unechoed)

    def _far(self, loss: float) -> bool:
        assert self.expected is not None
        return not math.isfinite(loss) or loss - self.expected > max(FAR * self.expected, FAR_NATS)


def outcome_of(model: nn.Module, call: Call, output: Any) -> Outcome:
    """Find loss and logits in what ``model`` returned for ``call``."""
    loss, logits = _loss_in(output), _logits_in(output)
    if logits is None:
        return Outcome(loss)
    labels = call.labels
    if labels is None:
        logits = _classes_last(logits, model)
        if loss is not None or not _are_classes(logits.shape[-1], model):
            return Outcome(loss)
        generator = torch.Generator().manual_seed(_SEED)
        labels = torch.randint(logits.shape[-1], logits.shape[:-1], generator=generator).to(logits.device)
    own = _cross_entropies(logits, labels)
    if not own:
        return Outcome(loss)
    rows, entropy = own[0]
    if loss is None:
        loss = entropy
    elif not any(torch.isclose(loss.detach().float(), one.detach(), rtol=_AGREES, atol=_AGREES) for _, one in own):
        return Outcome(loss)  # of another kind: what to expect of it is not known
    some = _some(rows.detach())
    flat = some.reshape(-1, some.shape[-1])
    return Outcome(loss, math.log(flat.shape[-1]), flat, _blind(flat), _blind(_without_echo(some, call)))


def _loss_in(output: Any) -> Tensor | None:
    found = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    candidates = [found, *(output if isinstance(output, (tuple, list)) else [output])]
    scalars = [one for one in candidates if isinstance(one, Tensor) and one.numel() == 1 and one.is_floating_point()]
    return scalars[0].squeeze() if scalars else None


def _logits_in(output: Any) -> Tensor | None:
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    candidates = [found] if found is not None else output if isinstance(output, (tuple, list)) else [output]
    usable = (one for one in candidates if isinstance(one, Tensor) and one.is_floating_point() and one.dim() >= 2)
    logits = next(usable, None)
    return logits if logits is not None and logits.shape[-1] > 1 else None


def _classes_last(logits: Tensor, model: nn.Module) -> Tensor:
    """Class maps (rows × classes × height × width) with their classes last."""
    if logits.dim() == 4 and not _are_classes(logits.shape[-1], model) and _are_classes(logits.shape[1], model):
        return logits.movedim(1, -1)
    return logits


def _are_classes(size: int, model: nn.Module) -> bool:
    """Whether the model's config knows so many classes. Without labels, nothing else tells logits from features."""
    config = getattr(model, "config", None)
    if config is None or getattr(config, "problem_type", None) in ("regression", "multi_label_classification"):
        return False
    known = [getattr(config, "num_labels", None), getattr(text_config(config), "vocab_size", None)]
    return size in known


def _cross_entropies(logits: Tensor, labels: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Logits with the classes last, and their cross-entropy: as they stand, and with the labels one token ahead."""
    if labels.is_floating_point() or labels.dtype is torch.bool:
        return []
    if logits.shape[:-1] != labels.shape:
        logits = logits.movedim(1, -1)
        if logits.shape[:-1] != labels.shape:
            return []
    classes = logits.shape[-1]
    pairs = [(logits, labels)]
    if labels.dim() == 2 and labels.shape[1] > 1:
        pairs.append((logits[:, :-1], labels[:, 1:]))
    if int(labels.max()) >= classes:
        return []
    return [(rows, cross_entropy(rows.reshape(-1, classes).float(), ids.reshape(-1).long())) for rows, ids in pairs]


def _some(logits: Tensor) -> Tensor:
    """At most about :data:`_SAMPLES` of the samples: they tell as much as all, and copies of them cost little."""
    logits = logits[:_SAMPLES]
    return logits[:, : -(-_SAMPLES // len(logits))] if logits.dim() > 2 else logits


def _blind(logits: Tensor) -> float:
    values = logits.float()
    finite = values.masked_fill(values == -math.inf, math.nan)
    return float((values.logsumexp(-1) - finite.nanmean(-1)).mean())


def _without_echo(logits: Tensor, call: Call) -> Tensor:
    """``logits`` of -inf for the tokens that are in the same row of the input."""
    ids = [*call.args, *call.kwargs.values()]
    ids = [one for one in ids if isinstance(one, Tensor) and one is not call.labels and one.dtype is torch.int64]
    if logits.dim() != 3:
        return logits
    masked = logits.clone()
    for one in ids:
        if one.dim() == 2 and len(one) == len(logits) and int(one.min()) >= 0 and int(one.max()) < logits.shape[-1]:
            index = one[:, None, :].expand(-1, logits.shape[1], -1)
            masked.scatter_(-1, index, -math.inf)
    left = (masked > -math.inf).sum(-1)
    return masked if int(left.min()) * 2 >= masked.shape[-1] else logits  # in a small vocabulary, all are in the input
