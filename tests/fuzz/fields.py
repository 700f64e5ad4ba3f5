"""Wrong values in every field of a model's files: what a script makes of them is an error of ours, or nothing."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from core.errors import CheckpointError
from tests.fuzz.mutations import sealed
from tests.makers.models import TEXT

SIZES = [*("--n_layer", "1", "--n_head", "2", "--n_embd", "8"), *("--block_size", "8", "--batch_size", "2")]
CONFIG, TOKENIZER, STATE, OPTIMIZER = "config.json", "tokenizer.json", "training_state.json", "optimizer.pt"
FIVE = ("model.pt", CONFIG, TOKENIZER, STATE, OPTIMIZER)

NUMBERS: tuple[Any, ...] = (-1, 0, 2**70, 10**4000, 1.5, float("nan"), float("inf"))
WRONG: tuple[Any, ...] = (None, True, *NUMBERS, "", "x\x1b\0\ud800", [], [None], {}, {"x": None})
"""Values that are no value of most fields, one of each kind."""

Path_ = tuple[Any, ...]


def paths_in(value: Any, path: Path_ = ()) -> Iterator[Path_]:
    """The path of every entry of a document, the document itself not among them; of long lists the first three."""
    entries = value.items() if isinstance(value, dict) else enumerate(value[:3]) if isinstance(value, list) else ()
    for key, inner in entries:
        yield (*path, key)
        yield from paths_in(inner, (*path, key))


def changed(document: Any, path: Path_, value: Any) -> Any:
    """A copy of a document with another value at a path."""
    made = copy.deepcopy(document)
    inner = made
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return made


def trained_folder(root: Path) -> Path:
    """A working folder with a text, and below checkpoints/ a model m of four steps, one of them kept."""
    import train

    (root / "text.txt").write_text(TEXT * 20)
    place = ["--model_name", "m", "--checkpoint_root", str(root / "checkpoints"), "--device", "cpu"]
    place += ["--input_file", str(root / "text.txt")]
    saves = ["--max_iters", "4", "--save_interval", "2", "--eval_interval", "2", "--eval_iters", "1", "--keep", "1"]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        assert train.main([*place, *SIZES, *saves]) == 0
    return root / "checkpoints/m"


def documents(folder: Path) -> dict[str, Any]:
    """The documents of a model: three of JSON, and its optimizer's state."""
    found = {name: json.loads((folder / name).read_text()) for name in (CONFIG, TOKENIZER, STATE)}
    return {**found, OPTIMIZER: torch.load(folder / OPTIMIZER, weights_only=True)}


def write(folder: Path, name: str, document: Any, *, old: bool) -> None:
    """Put a document in the place of a file; checksums fit, or (old) are those of no format that has them."""
    if name == OPTIMIZER:
        torch.save(document, folder / name)
    elif name != STATE:
        (folder / name).write_text(json.dumps(document))
    state = document if name == STATE else json.loads((folder / STATE).read_text())
    if old:
        state = {key: value for key, value in state.items() if key not in ("format_version", "integrity")}
        (folder / STATE).write_text(json.dumps(state))
        return
    files = (state.get("integrity") or {}).get("files") if isinstance(state.get("integrity"), dict) else None
    if name != STATE and isinstance(files, dict):
        data = (folder / name).read_bytes()
        files[name] = {**files[name], "size": len(data), "crc32": f"{zlib.crc32(data):08x}"}
        files[name].pop("digest", None)
    try:
        (folder / STATE).write_bytes(sealed(state))
    except (TypeError, AttributeError, KeyError):  # there is nothing to seal
        (folder / STATE).write_text(json.dumps(state))


def views(folder: Path, other: Path, out: Path) -> dict[str, Callable[[], object]]:
    """What looks at a model, and what uses it, by name."""
    import convert_checkpoints
    import generate
    import inspect_model
    import train

    name = ["--model_name", folder.name, "--checkpoint_root", str(folder.parent)]
    sizes = ["--eval_iters", "1", "--max_iters", "5", "--input_file", str(other.parent.parent / "text.txt")]
    here, there = str(folder), str(other)
    return {
        "inspect": lambda: inspect_model.main([here]),
        "inspect --json": lambda: inspect_model.main([here, "--json", "--verify"]),
        "history": lambda: inspect_model.main([here, "--history"]),
        "models": lambda: inspect_model.main([str(folder.parent)]),
        "html": lambda: inspect_model.main([here, "--html", str(out / "x.html")]),
        "diff": lambda: inspect_model.main(["--diff", here, there, "--moments"]),
        "convert": lambda: convert_checkpoints.main([here, str(out / "x.pt"), "--to", "pt", "--include_optimizer"]),
        "to bundle": lambda: convert_checkpoints.main([here, str(out / "bundle"), "--to", "bundle", "--dry_run"]),
        "generate": lambda: generate.main([*name, "--max_new_tokens", "1", "--seed", "1"]),
        "train": lambda: train.main([*name, *sizes]),
    }


def fault(view: Callable[[], object]) -> BaseException | None:
    """What a view raises that is no error of ours; its output goes nowhere."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            view()
        except (CheckpointError, SystemExit):
            return None
        except Exception as error:
            return error
    return None
