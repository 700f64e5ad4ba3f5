"""Run a script that shows each step though no terminal is there.

python tests/makers/talkative.py SCRIPT ARGUMENTS...
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))

from core.console import progress

if __name__ == "__main__":
    progress.LINES_EVERY = 0.0
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
