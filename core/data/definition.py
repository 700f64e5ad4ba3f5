"""Look at a Hugging Face tokenizer definition before the library `tokenizers` does.

The library is native code: a definition can make it panic, abort the process, or take all memory or time. So its
numbers are checked here, and then it is used once in a process of its own, whose memory and time are limited.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..console.files import LARGEST
from ..errors import InputError

LARGEST_ID = 2**24 - 1
"""The largest id of a token: above every vocabulary in use, and small enough for a table of them."""

TRIAL = Path(__file__).with_name("hf_trial.py")
_MEMORY, _PER_BYTE = 512 * 2**20, 32  # bytes that a trial may use, and more for each byte of the definition
_SECONDS, _BYTES_PER_SECOND = 4, 2**20  # of CPU time, and another one for so many bytes
_PATIENCE = 10  # times as long on the clock, on a machine that is busy

_tried: dict[str, str] = {}
"""What is wrong with each definition that this process has tried, by the SHA-256 of its JSON; "" for nothing."""


def sound_definition(definition: Mapping[str, Any], where: str) -> str:
    """Check a definition, and give it as JSON for the library.

    Raises: InputError with what is wrong with it, or what it did to the process that tried it.
    """
    if fault := _fault(definition):
        raise InputError(f"{where}: not a Hugging Face tokenizer ({fault}).")
    try:
        text = json.dumps(definition)
    except (RecursionError, ValueError) as error:
        raise InputError(f"{where}: not a Hugging Face tokenizer ({error}).") from error
    if len(text) > 2 * LARGEST:
        raise InputError(f"{where}: a definition of {len(text):,} characters, and at most {2 * LARGEST:,} are read.")
    digest = hashlib.sha256(text.encode()).hexdigest()
    if digest not in _tried:
        _tried[digest] = _trial(text.encode())
    if _tried[digest]:
        raise InputError(f"{where}: not a Hugging Face tokenizer ({_tried[digest]}).")
    return text


def _fault(definition: Mapping[str, Any]) -> str:
    """What is wrong with the numbers of a definition, in a clause; what else is wrong with it, the library says."""
    model, added = definition.get("model"), definition.get("added_tokens") or []
    if not isinstance(model, dict):
        return f"model is {type(model).__name__}, expected an object"
    vocab = model.get("vocab")
    if not isinstance(vocab, (dict, list)):
        return f"model.vocab is {type(vocab).__name__}, expected tokens"
    if not isinstance(added, list) or not all(isinstance(token, dict) for token in added):
        return "added_tokens is not a list of objects"
    ids = [*(vocab.values() if isinstance(vocab, dict) else ()), *(token.get("id") for token in added)]
    for found in ids:
        if type(found) is not int or not 0 <= found <= LARGEST_ID:
            return f"a token has the id {str(found)[:40]}, expected a whole number from 0 to {LARGEST_ID:,}"
    for name in ("dropout", "unk_id"):
        value = model.get(name)
        if value is not None and (type(value) not in (int, float) or not math.isfinite(value) or value < 0):
            return f"model.{name} is {str(value)[:40]}, expected a number of at least 0"
    return ""


def _trial(text: bytes) -> str:
    """Use a definition in a process of its own; what is wrong with it, or what became of the process."""
    memory, seconds = _MEMORY + _PER_BYTE * len(text), _SECONDS + len(text) // _BYTES_PER_SECOND
    words = [sys.executable, "-P", str(TRIAL), str(memory), str(seconds)]
    paths = os.pathsep.join(path for path in sys.path if path)  # where this process finds the library
    alone = {**os.environ, "PYTHONPATH": paths, "TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
    try:
        done = subprocess.run(words, input=text, capture_output=True, env=alone, timeout=_PATIENCE * seconds)
    except subprocess.TimeoutExpired:
        return f"a short text takes it more than {_PATIENCE * seconds} seconds"
    except OSError as error:
        return f"it cannot be tried in a process of its own: {error.strerror}"
    if done.returncode and done.returncode == -getattr(signal, "SIGXCPU", 0):
        return f"a short text takes it more than {seconds} seconds"
    if done.returncode:
        return f"it ends the process that tries it, which may use {memory >> 20} MiB"
    return str(json.loads(done.stdout)["error"] or "")
