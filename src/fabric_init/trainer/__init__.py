"""Lightning's ``Trainer``: models are recorded where they are built, and filled before its strategy takes them."""

from fabric_init.trainer.fill_model import FillModel

__all__ = ["FillModel"]
