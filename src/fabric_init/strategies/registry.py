"""Which class of ours a strategy of Lightning gets, so that it can record models."""

from __future__ import annotations

from lightning.fabric.strategies.strategy import Strategy

from fabric_init.errors import FabricInitError
from fabric_init.strategies.mixin import DeferredInitMixin

_instead: dict[type[Strategy], type[DeferredInitMixin]] = {}


def register_strategy(ours: type[DeferredInitMixin], instead_of: type[Strategy]) -> None:
    """Let :class:`fabric_init.Fabric` use ``ours`` wherever it meets an instance of exactly ``instead_of``.

    Args:
        ours: A subclass of ``instead_of`` without attributes of its own that only ``__init__`` sets.
        instead_of: The class of the strategy that users choose, by name or instance.
    """
    _instead[instead_of] = ours


def with_deferred_init(strategy: Strategy) -> Strategy:
    """Return the strategy itself, now of the class that was registered for it."""
    ours = _instead.get(type(strategy))
    if ours is not None:
        strategy.__class__ = ours  # the same object, which the accelerator, launcher and precision know already
    return strategy


def require_deferred_init(strategy: Strategy) -> DeferredInitMixin:
    """Return the strategy, if it can record models.

    Raises:
        FabricInitError: It does not have the mixin, and no strategy is registered for its class.
    """
    if isinstance(strategy, DeferredInitMixin):
        return strategy
    known = ", ".join(sorted(cls.__name__ for cls in _instead))
    raise FabricInitError(
        f"fabric_init cannot build models without values for {type(strategy).__name__} yet (it can for: {known}). "
        "Use init_module() without empty_init or checkpoint, or register a strategy (fabric_init.strategies."
        "register_strategy) that says where it keeps tensors."
    )
