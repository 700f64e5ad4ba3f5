"""Print in numbers what the suite of faults looks at, and what it finds lost.

python -m tests.faults [PART ...] [--json]

Exit code 1 when anything is lost. FAULTS_EXAMPLES=N lets the random lives be N.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed

from tests.faults.parts import PARTS, look
from tests.faults.tally import Tally


def main(argv: list[str]) -> int:
    """Run the parts side by side and print their counts."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--json", action="store_true", help="one JSON document instead of a table")
    args = parser.parse_args(argv)
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"{', '.join(sorted(unknown))}: no such part. There are {', '.join(PARTS)}.")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    names = args.parts or list(PARTS)
    found: dict[str, dict] = {}
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=spawn, max_tasks_per_child=1) as pool:
        running = {pool.submit(look, name): name for name in names}
        for future in as_completed(running):
            name = running[future]
            try:
                tally, why, seconds = future.result()
            except Exception as error:
                tally, why, seconds = Tally(losses=[f"ended in {error!r}"]), None, 0.0
            found[name] = {"counts": dict(tally.counts), "losses": tally.losses, "left_out": why, "seconds": seconds}
            if not args.json:
                print(f"{PARTS[name]} ({name}, {seconds:.0f} s):\n  {why or tally}", flush=True)
                print("".join(f"  LOST: {loss}\n" for loss in tally.losses[:10]), end="", flush=True)
    losses = sum(len(part["losses"]) for part in found.values())
    if args.json:
        print(json.dumps({"losses": losses, "parts": found}, indent=2))
    else:
        print(f"{losses} losses")
    return 1 if losses else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
