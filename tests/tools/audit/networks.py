"""Small models whose init is known to be right, or wrong in one known way."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Classifier(nn.Module):
    """Linear layers with rectifiers between them; ``std`` overwrites what torch gives their weights."""

    def __init__(self, widths: Sequence[int] = (64, 96, 96, 10), std: float | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))
        self.activation = nn.ReLU()
        self.dropout = nn.Dropout(0.5)
        if std is not None:
            for layer in self.layers:
                nn.init.normal_(layer.weight, std=std)

    def forward(self, x: Tensor) -> Tensor:
        *hidden, last = self.layers
        for layer in hidden:
            x = self.dropout(self.activation(layer(x)))
        return last(x)


def images_and_labels(inputs: int = 64, classes: int = 10, rows: int = 32) -> tuple[Tensor, Tensor]:
    """Standard normal inputs (rows × inputs) and labels that have nothing to do with them."""
    generator = torch.Generator().manual_seed(0)
    inputs_ = torch.randn(rows, inputs, generator=generator)
    return inputs_, torch.randint(classes, (rows,), generator=generator)


def t5_config() -> Any:
    """T5 v1.1: gated feed-forward, logits that are not scaled down, its real width, a small vocabulary.

    Its head is tied to the embedding: the constructor reads ``tie_word_embeddings=False`` as "v1.1", and ties anyway.
    """
    from transformers import T5Config

    sizes = {"vocab_size": 1000, "d_model": 512, "num_layers": 1, "num_heads": 2, "d_ff": 64, "d_kv": 16}
    return T5Config(feed_forward_proj="gated-gelu", decoder_start_token_id=0, tie_word_embeddings=False, **sizes)


def t5(fixed: bool = False) -> nn.Module:
    """transformers' T5 v1.1 with an untied head of std 1, or with the std that brings it right."""
    from transformers import T5ForConditionalGeneration

    config = t5_config()
    config.tie_word_embeddings = False
    model = T5ForConditionalGeneration(config)
    if fixed:
        nn.init.normal_(model.lm_head.weight, std=1 / math.sqrt(512))
    return model
