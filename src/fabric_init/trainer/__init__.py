"""Trainers of Lightning and of Hugging Face: recorded models are filled where these take them."""

from fabric_init.trainer.fill_model import FillModel

__all__ = ["FillModel"]
