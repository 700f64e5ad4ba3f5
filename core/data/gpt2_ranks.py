"""Find the 50,256 ranks of GPT-2's byte pairs, and check them before use."""

from __future__ import annotations

import base64
import binascii
import contextlib
import functools
import hashlib
import json
import os
import tempfile
import threading
from pathlib import Path

from ..bundle.storage import DISK
from ..bundle.tokenizer_state import GPT2_FINGERPRINT as FINGERPRINT
from ..bundle.tokenizer_state import ranks_fault
from ..console.files import read_regular
from ..console.words import tell
from ..errors import InputError

COUNT = 50_256

URL = "https://openaipublic.blob.core.windows.net/encodings/r50k_base.tiktoken"
OLD_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/encoder.json"
"""What tiktoken's "gpt2" downloads: the same ranks in OpenAI's first format."""

BESIDE = Path(__file__).resolve().parents[2] / "data" / "gpt2.tiktoken"
PATIENCE = 15.0
"""Seconds a download may take, name resolution included."""


def find_ranks(bpe_file: Path | None = None) -> dict[bytes, int]:
    """Find GPT-2's ranks on this machine, else download them into tiktoken's cache.

    Raises: InputError as `local_ranks`, and when there is no file at all, naming every place.
    """
    if (found := local_ranks(bpe_file)) is not None:
        return found
    cache = cache_folder()
    data, reason = _download(URL, PATIENCE)
    if hashlib.sha256(data).hexdigest() != FINGERPRINT:
        raise InputError(
            f"gpt2: its {COUNT:,} ranks are not in any of the three places, --bpe_file ({bpe_file or 'not given'}), "
            f"{BESIDE} (missing) and tiktoken's cache {cache or '(switched off)'} (missing), and {URL} gave none "
            f"({reason or 'other bytes than expected'}): fetch that address where there is a network and name the "
            "file with --bpe_file."
        )
    if kept := _cached():
        _keep(kept[0], data)
    return parse_ranks(data, URL)


def local_ranks(bpe_file: Path | None = None) -> dict[bytes, int] | None:
    """Find GPT-2's ranks without a network: the given file, data/gpt2.tiktoken, tiktoken's cache; None in none of them.

    Raises: InputError for a file that was given, or lies in data/, with other content.
    """
    for path in (bpe_file, BESIDE):
        if path is not None and (path == bpe_file or path.exists()):
            return read_ranks(path)
    for path in _cached():
        # A damaged file in the cache does not belong to the user: a download replaces it.
        with contextlib.suppress(InputError):
            return read_ranks(path)
    return None


def keep_given(bpe_file: Path | None) -> None:
    """Copy a file of --bpe_file to data/gpt2.tiktoken, where later runs find it; once, and only GPT-2's own ranks.

    A folder that cannot be written, or another file, changes nothing: this run has its ranks.
    """
    if bpe_file is None or BESIDE.exists():
        return
    with contextlib.suppress(InputError, OSError):
        data = lines_of(read_ranks(bpe_file))
        BESIDE.parent.mkdir(exist_ok=True)
        with DISK.published(BESIDE) as staged:
            DISK.write(staged, data)
        tell(f"GPT-2's ranks are in {BESIDE} from now on; --bpe_file is not needed again")


def _cached() -> list[Path]:
    """Where tiktoken keeps the ranks of either format; empty where its cache is switched off."""
    cache = cache_folder()
    return [cache / hashlib.sha1(url.encode()).hexdigest() for url in (URL, OLD_URL)] if cache else []


def read_ranks(path: Path) -> dict[bytes, int]:
    """Read and check a file of GPT-2's ranks: tiktoken's format, or encoder.json (also called vocab.json).

    Raises: InputError that describes what the file holds instead.
    """
    try:
        return parse_ranks(read_regular(path), str(path))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}. GPT-2's ranks are expected here (r50k_base.tiktoken).") from error


def parse_ranks(data: bytes, where: str) -> dict[bytes, int]:
    """Parse and check GPT-2's ranks.

    Raises: InputError with the line that is not a rank, or the wrong number of ranks, or the wrong fingerprint.
    """
    if hashlib.sha256(data).hexdigest() == FINGERPRINT:  # the file itself, of which every line is known
        lines = (line.split() for line in data.splitlines())
        return {binascii.a2b_base64(token): int(rank) for token, rank in lines}
    ranks = _parse_json(data, where) if data[:1] == b"{" else parse_lines(data, where)
    if len(ranks) != COUNT or sorted(ranks.values()) != list(range(COUNT)):
        raise InputError(f"{where}: {len(ranks):,} ranks, expected GPT-2's {COUNT:,}, numbered from 0 without a gap.")
    if fault := ranks_fault(ranks, COUNT):
        raise InputError(f"{where}: {fault}.")
    found = fingerprint(ranks)
    if found != FINGERPRINT:
        raise InputError(
            f"{where}: {COUNT:,} ranks, but not GPT-2's (fingerprint {found[:12]}, expected {FINGERPRINT[:12]})."
        )
    return ranks


def fingerprint(ranks: dict[bytes, int]) -> str:
    """SHA-256 of the ranks in order, written as a tiktoken file."""
    return hashlib.sha256(lines_of(ranks)).hexdigest()


def lines_of(ranks: dict[bytes, int]) -> bytes:
    """The ranks in order, as a tiktoken file has them."""
    lines = (b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in sorted(ranks.items(), key=lambda r: r[1]))
    return b"".join(lines)


def cache_folder() -> Path | None:
    """The folder where tiktoken keeps what it has downloaded; None where its cache is switched off."""
    named = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR"))
    if named is None:
        return Path(tempfile.gettempdir()) / "data-gym-cache"
    return Path(named) if named else None


def parse_lines(data: bytes, where: str) -> dict[bytes, int]:
    """Parse a file of tiktoken: on each line a token in base64 and its rank.

    Raises: InputError with the line that is not a rank.
    """
    ranks = {}
    for number, line in enumerate(data.splitlines(), start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise InputError(
                f"{where}: line {number} is {line[:40]!r}, expected a token in base64 and its rank."
            ) from None
    return ranks


def _parse_json(data: bytes, where: str) -> dict[bytes, int]:
    """OpenAI's encoder.json writes each byte of a token as one printable character."""
    try:
        entries = json.loads(data)
        byte_of = printable_bytes()
        return {bytes(byte_of[c] for c in token): int(r) for token, r in entries.items() if token != "<|endoftext|>"}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{where}: not GPT-2's encoder.json ({error}).") from error


@functools.cache
def printable_bytes() -> dict[str, int]:
    """Printable bytes stand for themselves, the others for the characters from U+0100 on, in order."""
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def _download(url: str, patience: float) -> tuple[bytes, str]:
    """The bytes at a URL, or none and the reason, within `patience` seconds."""
    import urllib.request  # takes as long as reading the ranks

    result = [(b"", f"no answer within {patience:g} seconds")]

    def fetch() -> None:
        try:
            with urllib.request.urlopen(url, timeout=patience) as response:
                result[0] = (response.read(), "")
        except (OSError, ValueError) as error:
            result[0] = (b"", str(getattr(error, "reason", error)))

    # Name resolution and a server that sends bytes slowly have no timeout; a daemon thread can be abandoned.
    thread = threading.Thread(target=fetch, daemon=True)
    thread.start()
    thread.join(patience)
    return result[0]


def _keep(path: Path, data: bytes) -> None:
    # A cache that cannot be written costs the next run a download, not this run its tokens.
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with DISK.published(path) as staged:
            DISK.write(staged, data)
