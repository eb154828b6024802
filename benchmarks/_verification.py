"""Count the tensors of a built model that do not hold what they should.

Not only what is left on meta: an allocated tensor that nobody wrote looks like any other, so every value is compared
with the reference weights, and every non-persistent buffer with an eager build's.
"""

from __future__ import annotations

from typing import Literal

import torch
from _workload import INIT_OVER_CHECKPOINT, Workload
from safetensors.torch import load_file

Expected = Literal["checkpoint", "init", "like init"]


def count_unfilled(model: torch.nn.Module, workload: Workload, expected: Expected) -> dict[str, int | str]:
    """``like init``: drawn by the same rule, by another random stream, so compared by moments and not bit by bit."""
    reference = load_file(workload.safetensors)
    if expected != "checkpoint":
        reference = {name: weight * INIT_OVER_CHECKPOINT for name, weight in reference.items()}
    buffers = torch.load(workload.buffers, weights_only=True)
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))

    on_meta = [name for name, tensor in tensors.items() if tensor.is_meta]
    absent = [name for name in reference | buffers if name not in tensors]
    wrong = [
        name
        for name, tensor in tensors.items()
        if not tensor.is_meta and not _holds(tensor.detach(), name, reference, buffers, expected)
    ]
    return {
        "tensors": len(reference | buffers),
        "on_meta": len(on_meta),
        "wrong": len(wrong) + len(absent),
        "names": ", ".join([*on_meta, *wrong, *absent][:4]),
    }


def _holds(
    tensor: torch.Tensor,
    name: str,
    reference: dict[str, torch.Tensor],
    buffers: dict[str, torch.Tensor],
    expected: Expected,
) -> bool:
    want = buffers.get(name, reference.get(name))
    if want is None or tensor.shape != want.shape or tensor.dtype != want.dtype:
        return False
    if expected == "like init" and name in reference and want.float().std() > 0:
        return same_moments(tensor.float(), want.float())
    return torch.equal(tensor, want)


def same_moments(got: torch.Tensor, want: torch.Tensor) -> bool:
    """Whether both look like draws from one distribution."""
    deviation = want.std()
    return bool(
        got.isfinite().all()
        and (got.mean() - want.mean()).abs() < 0.05 * deviation
        and (got.std() - deviation).abs() < 0.05 * deviation
    )
