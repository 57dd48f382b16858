"""Where data, runs and caches lie."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "data"
RUNS = Path(os.environ.get("DIVA_LAB_RUNS", ROOT / "runs"))
CACHE = Path(os.environ.get("DIVA_LAB_CACHE", Path.home() / ".cache" / "diva-lab"))
