"""Compare the first loss with ln(classes), the loss of a model that predicts all classes alike."""

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
"""A first loss is far off if it exceeds ln(classes) by more than this share of it, and …"""
FAR_NATS = 2.0
"""… by more than this: with two classes, logits of the size that norms give are half of ln(2) off already."""


class Outcome(NamedTuple):
    """The loss and the logits of a forward pass.

    Attributes:
        loss: that of the model, or the cross-entropy of its logits; ``None`` if there is neither.
        expected: ln(classes); ``None`` if the loss is no cross-entropy of class logits.
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
        """The number of classes of the logits."""
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
        """Return the outcome without the autograd graph and its activations."""
        return self._replace(loss=None if self.loss is None else self.loss.detach())

    @property
    def far(self) -> bool:
        """Whether the loss is far above ``expected``, beyond chance."""
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
    elif not any(torch.isclose(loss.detach().float(), each.detach(), rtol=_AGREES, atol=_AGREES) for _, each in own):
        return Outcome(loss)  # of another kind: what to expect of it is not known
    some = _some(rows.detach())
    flat = some.reshape(-1, some.shape[-1])
    return Outcome(loss, math.log(flat.shape[-1]), flat, _blind(flat), _blind(_without_echo(some, call)))


def _loss_in(output: Any) -> Tensor | None:
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    candidates = [loss, *(output if isinstance(output, (tuple, list)) else [output])]
    scalars = [
        each for each in candidates if isinstance(each, Tensor) and each.numel() == 1 and each.is_floating_point()
    ]
    return scalars[0].squeeze() if scalars else None


def _logits_in(output: Any) -> Tensor | None:
    by_name = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    candidates = [by_name] if by_name is not None else output if isinstance(output, (tuple, list)) else [output]
    usable = (each for each in candidates if isinstance(each, Tensor) and each.is_floating_point() and each.dim() >= 2)
    logits = next(usable, None)
    return logits if logits is not None and logits.shape[-1] > 1 else None


def _classes_last(logits: Tensor, model: nn.Module) -> Tensor:
    """Return class maps (rows × classes × height × width) with the classes last."""
    if logits.dim() == 4 and not _are_classes(logits.shape[-1], model) and _are_classes(logits.shape[1], model):
        return logits.movedim(1, -1)
    return logits


def _are_classes(size: int, model: nn.Module) -> bool:
    """Return whether the config has this number of classes; without labels nothing else distinguishes logits."""
    config = getattr(model, "config", None)
    if config is None or getattr(config, "problem_type", None) in ("regression", "multi_label_classification"):
        return False
    known = [getattr(config, "num_labels", None), getattr(text_config(config), "vocab_size", None)]
    return size in known


def _cross_entropies(logits: Tensor, labels: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return logits with the classes last and their cross-entropy: as they are, and with labels shifted by a token."""
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
    """Return at most about :data:`_SAMPLES` samples, which are representative and cheap to copy."""
    logits = logits[:_SAMPLES]
    return logits[:, : -(-_SAMPLES // len(logits))] if logits.dim() > 2 else logits


def _blind(logits: Tensor) -> float:
    values = logits.float()
    finite = values.masked_fill(values == -math.inf, math.nan)
    return float((values.logsumexp(-1) - finite.nanmean(-1)).mean())


def _without_echo(logits: Tensor, call: Call) -> Tensor:
    """Return ``logits`` with -inf for the tokens in the same row of the input."""
    ids = [*call.args, *call.kwargs.values()]
    ids = [each for each in ids if isinstance(each, Tensor) and each is not call.labels and each.dtype is torch.int64]
    if logits.dim() != 3:
        return logits
    masked = logits.clone()
    for tokens in ids:
        same_rows = tokens.dim() == 2 and len(tokens) == len(logits)
        if same_rows and int(tokens.min()) >= 0 and int(tokens.max()) < logits.shape[-1]:
            index = tokens[:, None, :].expand(-1, logits.shape[1], -1)
            masked.scatter_(-1, index, -math.inf)
    left = (masked > -math.inf).sum(-1)
    return masked if int(left.min()) * 2 >= masked.shape[-1] else logits  # in a small vocabulary, all are in the input
