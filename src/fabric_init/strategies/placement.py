"""From a Lightning strategy to the placement that fills models for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.fabric.strategies.strategy import Strategy

from fabric_init.errors import FabricInitError
from fabric_init.filling.agreement import Agreement, AllRanks, Alone
from fabric_init.filling.placement import Placement

_factories: dict[type[Strategy], Callable[[Any], Placement]] = {}


def register_placement(strategy: type[Strategy], factory: Callable[[Any], Placement]) -> None:
    """Make models of ``strategy`` fillable: ``factory(strategy_instance)`` gives their placement.

    Holds for exactly this class: a subclass may well place tensors elsewhere, and registers for itself.
    """
    _factories[strategy] = factory


def agreement_of(strategy: Strategy) -> Agreement:
    """How the ranks of a strategy keep in step while a model is built and filled."""
    return AllRanks() if getattr(strategy, "world_size", 1) > 1 else Alone()


def placement_of(strategy: Strategy) -> Placement:
    """The placement of a strategy.

    Raises:
        FabricInitError: none is registered for its class.
    """
    factory = _factories.get(type(strategy))
    if factory is None:
        known = ", ".join(sorted(cls.__name__ for cls in _factories))
        raise FabricInitError(
            f"fabric_init cannot build models without values for {type(strategy).__name__} yet (it can for: {known}). "
            "Use init_module() without empty_init or checkpoint, or register a placement for the strategy."
        )
    return factory(strategy)
