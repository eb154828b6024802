"""The names that options take, here and on the command line, whose help should not wait for torch."""

from __future__ import annotations

from typing import Literal

Io = Literal["auto", "local", "broadcast"]
"""Each rank reads what it keeps, or rank 0 reads for all."""

StrategyName = Literal[
    "auto",
    "single_device",
    "ddp",
    "fsdp",
    "fsdp2",
    "deepspeed_stage_1",
    "deepspeed_stage_2",
    "deepspeed_stage_3",
]
"""A strategy, by Fabric's names."""

PrecisionName = Literal["bf16-true", "16-true", "32-true", "64-true", "bf16-mixed", "16-mixed"]
"""A precision, by Fabric's names."""

OptimizerName = Literal["adamw", "adam", "adagrad", "rmsprop", "sgd-momentum", "sgd", "none"]
"""An optimizer, by the states that it keeps."""
