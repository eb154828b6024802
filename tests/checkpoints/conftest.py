"""Readers of every format, with files that the format's own library wrote."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # the helpers here: importlib mode does not make them importable
