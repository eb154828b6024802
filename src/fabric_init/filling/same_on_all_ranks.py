"""What replicas of a model have in common before it is loaded: DDP's constructor sends them rank 0's tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parameter import is_lazy

from fabric_init.checkpoints.tensor_checksums import tensor_checksum
from fabric_init.distributed.agreement import Agreement, digest_of
from fabric_init.distributed.checked_broadcast import CheckedBroadcast
from fabric_init.filling.init_missing import initialize_some
from fabric_init.guard.waiting_tensors import waits
from fabric_init.planning.digest import init_lines
from fabric_init.planning.tensors import Kind, registered_tensors
from fabric_init.recording.tensor.wrappers import is_wrapper

_WHAT = "sending the values of rank 0 to the replicas"


def send_what_differs(model: nn.Module, is_sent: Callable[[str, Kind], bool], agreement: Agreement) -> None:
    """Give those tensors rank 0's values that the ranks of torch's default group have, or would initialize, otherwise.

    Tensors that wait for a load, and have the same init on all ranks, wait on.

    Args:
        model: A model of which something waits.
        is_sent: Whether rank 0 sends a tensor of this name and kind, if it differs.
        agreement: Of these ranks.
    """
    rules = init_lines(model)
    found: dict[str, str] = {}
    for name, kind, tensor in registered_tensors(model):
        if is_sent(name, kind) and not is_lazy(tensor) and not is_wrapper(tensor):
            found[name] = rules.get(name) or tensor_checksum(tensor)
    if agreement.alike(digest_of(found)):
        return
    theirs = agreement.from_rank_zero(found)
    names = agreement.from_all([name for name in theirs if theirs[name] != found.get(name)])
    agreement.run_together(_WHAT, lambda: initialize_some(model, names))
    held = {name: tensor for name, _, tensor in registered_tensors(model)}
    sent = agreement.from_rank_zero([name for name in names if not waits(held[name])])  # no own init: a load is to come
    with CheckedBroadcast(_WHAT) as ranks, torch.no_grad():
        for name in sent:
            buffer = torch.empty(held[name].size(), dtype=held[name].dtype, device=ranks.device)
            if dist.get_rank() == 0:
                buffer.copy_(held[name])
            ranks.roll_call()
            ranks.broadcast(buffer)
            held[name].copy_(buffer)
        ranks.roll_call()
