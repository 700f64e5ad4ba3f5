"""Open a torch file of any version, and recognize other files that are mistaken for one."""

from __future__ import annotations

import codecs
import os
from typing import BinaryIO

from ...errors import CheckpointDamaged, CheckpointError
from ..blocks import read_at
from ..pickles.inert import as_text
from ..recognised import NEVER_WRITTEN, file_kind, other_kind
from .storages import TorchArchive
from .stream import MAGIC, open_torch_stream
from .zip import open_torch_zip

_HEAD = 512  # bytes: one block of a tar

_LONGEST_HEADER = 1 << 27
"""Bytes of a safetensors header, whose length is in the first eight bytes, before its JSON."""

_TAR_OF_TORCH = (b"sys_info", b"pickle", b"storages", b"tensors")


def open_torch_file(file: BinaryIO, where: str, unpack: bool = False) -> TorchArchive:
    """Read the contents of a torch file without its tensors; `where` is its path, for messages.

    With `unpack`, tensors may be packed in it, deflated or within a pickle, where the caller can unpack them.

    Raises: CheckpointDamaged when it is cut off, contradicts itself or is not recognized; CheckpointError with the kind
        that it seems to be when it is another kind of file.
    """
    size = file.seek(0, os.SEEK_END)
    if not size:
        raise CheckpointDamaged(f"{where}: empty (0 bytes), expected a torch file.")
    head = read_at(file, 0, min(size, _HEAD), where)
    if head.startswith(b"PK") or head == b"P":
        if file_kind(head) is not None:
            raise _other_kind(head, where)
        return open_torch_zip(file, where, unpack)
    if (head[0] == 0x80 and head[1:2] <= b"\5") or head.startswith(b"L%dL" % MAGIC):
        return open_torch_stream(file, where, unpack)
    raise _other_kind(head, where)


def _other_kind(head: bytes, where: str) -> CheckpointError:
    """Make the error that describes a file by its first bytes."""
    begins = f"it begins with {as_text(head[:8])}"
    if head[:100].rstrip(b"\0").removeprefix(b"./") in _TAR_OF_TORCH:
        return CheckpointError(
            f"{where}: torch's tar format from before version 0.1.10, expected a zip or stream file of torch. "
            "Load and save it again with an old torch."
        )
    if head[257:262] == b"ustar":
        return CheckpointError(f"{where}: a tar archive, expected a torch file. Unpack it first.")
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < _LONGEST_HEADER:
        return CheckpointError(f"{where}: a safetensors file, expected a torch file. Convert it first.")
    if said := other_kind(head, where, "a torch file"):
        return CheckpointError(said)
    if _is_text(head):
        text = as_text(head.decode("utf-8", "ignore"), 60)
        return CheckpointError(f"{where}: not a torch zip file: a text file that begins with {text}.")
    known = r"a zip with b'PK', an older file with b'\x80'."
    if not any(head):
        return CheckpointDamaged(f"{where}: not a torch zip file: {begins}, {known} {NEVER_WRITTEN}")
    return CheckpointDamaged(
        f"{where}: not a torch zip file: {begins}, {known} Numbers without a header, as in a .data file of TensorFlow, "
        "have no names or shapes: give the folder that they are from to its own program."
    )


def _is_text(head: bytes) -> bool:
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)  # the last character may be cut
    except UnicodeDecodeError:
        return False
    return all(c.isprintable() or c.isspace() for c in text)
