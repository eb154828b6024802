"""What a reader of the figures has to know about where they were taken, and nothing that names the machine."""

from __future__ import annotations

import os
import platform
from importlib import metadata

PACKAGES = ("fabric_init", "torch", "lightning", "transformers", "accelerate", "deepspeed", "safetensors")


def environment() -> dict[str, str]:
    return {
        "cores": str(os.cpu_count()),
        "python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES},
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
