"""Shared by the tests of the harness."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # evaluation_fakes, which child processes import as well
