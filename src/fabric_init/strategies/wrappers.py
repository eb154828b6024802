"""What Fabric and its strategies put around a user's model, and how to come back to it."""

from __future__ import annotations

from typing import cast

from lightning.fabric.wrappers import _FabricModule
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from fabric_init.filling.guard import initialise_rest, release, settle
from fabric_init.filling.report import InitReport, report_of
from fabric_init.strategies.binding import choose_own_init, is_bound

_wrappers: list[type[nn.Module]] = [_FabricModule, DistributedDataParallel, FullyShardedDataParallel]


def register_wrapper(wrapper: type[nn.Module]) -> None:
    """A class of modules that keep the user's model as ``.module``."""
    if wrapper not in _wrappers:
        _wrappers.append(wrapper)


def original(model: nn.Module) -> nn.Module:
    """The module that the user built, without what Fabric, its strategy and torch.compile put around it."""
    while True:
        if isinstance(model, tuple(_wrappers)):
            model = cast(nn.Module, model.module)
        elif isinstance(compiled := getattr(model, "_orig_mod", None), nn.Module):
            model = compiled
        else:
            return model


def init_missing(model: nn.Module) -> None:
    """Run the model's own recorded init for whatever is still unfilled, also of what ``setup`` returned.

    A model that its strategy has not sharded yet gets it in ``setup``.

    Raises:
        UninitializedTensorError: the model's own code never gives some tensor a value.
    """
    model = original(model)
    if is_bound(model):
        choose_own_init(model)
    else:
        initialise_rest(model)


def init_report(model: nn.Module) -> InitReport:
    """What every tensor of ``model`` got, from where. Also takes what ``setup`` returned.

    Raises:
        FabricInitError: the model was not built in a recorded block.
    """
    model = original(model)
    report = report_of(model)
    waiting = {id(row) for row in settle(model)}
    release(model)
    report.rows = [row for row in report.rows if row.status != "unfilled" or id(row) in waiting]
    return report
