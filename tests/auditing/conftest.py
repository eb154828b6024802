"""Makes ``models``, and the fidelity tests' ``architectures``, importable here."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "fidelity")]
