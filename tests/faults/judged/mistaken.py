"""train.py with a mistake: no file is made durable. The referee must find it."""

from __future__ import annotations

import runpy
import sys

from core.bundle.storage import Storage

if __name__ == "__main__":
    Storage.sync_content = lambda self, fd: None
    sys.argv[0] = "train.py"
    runpy.run_path("train.py", run_name="__main__")
