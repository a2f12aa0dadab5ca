"""Makes ``fake_cells`` importable: test folders are no packages."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

_spec = importlib.util.spec_from_file_location("fake_cells", Path(__file__).with_name("fake_cells.py"))
assert _spec is not None and _spec.loader is not None
sys.modules["fake_cells"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sys.modules["fake_cells"])
