"""Write checkpoints with the real DeepSpeed, on the CPU, for every stage: ``run_ranks(2, save_each, folder=…)``."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

SAVED = (("0", "bf16"), ("1", "bf16"), ("2", "fp32"), ("3", "bf16"), ("3", "fp32"))
"""Stage and precision; each is a folder of its own."""


class Model(nn.Module):
    """Odd sizes, two groups of parameters, a tie, frozen parameters, buffers of two dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 5)
        self.inner = nn.Linear(5, 9)
        self.norm = nn.LayerNorm(9)
        self.frozen = nn.Linear(9, 3).requires_grad_(False)
        self.down = nn.Linear(3, 5, bias=False)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.scale = nn.Parameter(torch.tensor([0.5]))
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("stats", torch.linspace(0, 1, 9))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.inner(self.embedding(tokens)))
        return self.head(self.down(self.frozen(hidden))) * self.scale


def save(stage: int, precision: str, folder: Path) -> None:
    """Two steps of training, a checkpoint, and beside it what the trained parameters are."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    torch.manual_seed(0)
    model = Model()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [one for one in trained if one.dim() > 1], "weight_decay": 0.1},
        {"params": [one for one in trained if one.dim() <= 1], "weight_decay": 0.0},
    ]
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": precision == "bf16"},
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(groups, lr=1e-2), config=config)
    tokens = torch.randint(0, 7, (4,), generator=torch.Generator().manual_seed(dist.get_rank()))
    for _ in range(2):
        engine.backward(engine(tokens).float().pow(2).mean())
        engine.step()
    engine.save_checkpoint(str(folder), tag="step2")
    state = {}
    for name, parameter in engine.module.named_parameters(remove_duplicate=False):
        master = safe_get_full_fp32_param(parameter) if stage and parameter.requires_grad else None
        if master is None:
            with deepspeed.zero.GatheredParameters([parameter], enabled=stage == 3):
                master = parameter.data
                state[name] = master.detach().clone()
        else:
            state[name] = master.detach().clone()
    state |= {name: buffer.clone() for name, buffer in engine.module.named_buffers()}
    if dist.get_rank() == 0:
        torch.save(state, folder / "expected.pth")
    dist.barrier()


def save_each(folder: Path) -> None:
    """Write a folder for each of ``SAVED``."""
    dist.init_process_group("gloo")
    for stage, precision in SAVED:
        save(int(stage), precision, folder / f"zero{stage}-{precision}")
