"""Real processes over gloo: every test here starts its ranks with :func:`ranks.run_ranks`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # the helpers here: importlib mode does not make them importable
