"""Stop at the edge of a step: SIGINT and SIGTERM become a flag that the training loop reads."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType
from typing import Any


class StopSignal:
    """While the block runs, the first SIGINT or SIGTERM asks to stop; a second SIGINT raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.requested: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a third would only break the way out
            raise KeyboardInterrupt
        self.requested = signal.Signals(number).name
        print(f"\n{self.requested}: finishing this step, then saving (Ctrl-C again ends at once)", file=sys.stderr)
