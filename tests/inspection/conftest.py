"""What writes checkpoints of every format lies beside the tests of readers."""

from __future__ import annotations

import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS / name) for name in ("checkpoints", "distributed", "fuzz")]
