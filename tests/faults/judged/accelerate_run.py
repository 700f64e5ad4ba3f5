"""The run with accelerate that saves through ours, made to print the step that it goes on from."""

from __future__ import annotations

import runpy

from core.adapters.accelerate import AcceleratorCheckpoints

load = AcceleratorCheckpoints.load


def say_where(self: AcceleratorCheckpoints, **values: object) -> int:
    """Load, and print the step."""
    step = load(self, **values)
    print(f"resumed at step {step}", flush=True)
    return step


if __name__ == "__main__":
    AcceleratorCheckpoints.load = say_where
    runpy.run_module("tests.adapters.accelerate_run", run_name="__main__")
