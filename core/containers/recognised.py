"""Formats that are recognised and not read: what each is, and the command of its own program. A table, no reader.

In a command, {path} is the file or folder, {folder} what holds it, {name} its own name and {stem} that without its
ending, quoted for a shell; {text} is the path as Python writes it.
"""

from __future__ import annotations

import re
import shlex
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..console.commands import typed
from .pickles.inert import as_text


@dataclass(frozen=True, slots=True)
class Row:
    """A format: what it is, what to do, and how it is told."""

    what: str
    command: str
    begins: tuple[bytes, ...] = ()  # the file does, without blanks and with words in lower case
    record: str = ""  # the name of the first file in a zip is this regular expression
    names: tuple[str, ...] = ()  # each of these is the name of something in the folder

    def said(self, path: Path) -> str:
        """What to do with a file or folder of the format, in a sentence."""
        words = {"path": path, "folder": path.parent, "name": path.name, "stem": path.stem}
        quoted = {word: shlex.quote(str(value)) for word, value in words.items()}
        return typed(self.command).format(**quoted, text=repr(str(path)))


_PAGE = "Download the file again: the server sent a page in its place."
_TO_HF = "writes a folder of Hugging Face"

FILES = (
    Row(
        "a Git LFS pointer, not the file itself",
        "Fetch the file with git lfs pull. In a clone, git -C {folder} lfs pull --include {name} does that.",
        (b"version https://git-lfs",),
    ),
    Row("a web page", _PAGE, (b"<!doctype", b"<html")),
    Row("an XML text", "Download the file again: the server may have sent an error in its place.", (b"<?xml",)),
    Row(
        "an HDF5 file, as Keras and h5py write",
        "keras.models.load_model({text}) of Keras, or h5py.File, reads it; torch.save writes what they give.",
        (b"\x89HDF\r\n\x1a\n",),
    ),
    Row(
        "a numpy array",
        "torch.save(torch.from_numpy(numpy.load({text})), 'array.pt') makes a torch file of it.",
        (b"\x93NUMPY",),
    ),
    Row(
        "a GGUF file of llama.cpp",
        "Take the folder that convert_hf_to_gguf.py made it from, or write one by transformers: "
        "AutoModelForCausalLM.from_pretrained({text}, gguf_file=...).save_pretrained(OUT).",
        (b"GGUF", b"ggml", b"lmgg", b"ggjt", b"tjgg", b"fmgg"),
    ),
    Row(
        "a model of llm.c",
        f"In a clone of llm.c: python dev/eval/export_hf.py --input {{path}} --output {{stem}}_hf {_TO_HF}.",
        (struct.pack("<i", 20240326),),
    ),
    Row(
        "a state of llm.c's optimizer",
        "The model is the model_*.bin beside it, in {folder}: python dev/eval/export_hf.py of llm.c takes that.",
        (struct.pack("<i", 20240327),),
    ),
    Row(
        "tokens for training, not a model",
        "python train.py --dataset_dir {folder} trains on them.",
        (struct.pack("<i", 20240520), struct.pack("<i", 20240801)),
    ),
    Row("a model of llama2.c", "Take the .pt or the folder that export.py of llama2.c was given.", (b"24ka",)),
    Row("a gzip file", "Unpack it first: gunzip {path} does that.", (b"\x1f\x8b",)),
    Row("a Zstandard file", "Unpack it first: unzstd {path} does that.", (b"\x28\xb5\x2f\xfd",)),
    Row("a bzip2 file", "Unpack it first: bunzip2 {path} does that.", (b"BZh",)),
    Row("an xz file", "Unpack it first: unxz {path} does that.", (b"\xfd7zXZ\0",)),
    Row("a 7-Zip file", "Unpack it first: 7z x {path} does that.", (b"7z\xbc\xaf\x27\x1c",)),
    Row(
        "an archive of numpy arrays (npz)",
        'python -c "import numpy, torch; torch.save({{k: torch.from_numpy(v) for k, v in numpy.load({text}).items()}}, '
        "'weights.pt')\" makes a torch file of it.",
        record=r".*\.npy",
    ),
    Row(
        "a model of Keras",
        "keras.saving.load_model({text}) of Keras reads it; torch.save writes the arrays of its get_weights().",
        record=r"metadata\.json|config\.json|model\.weights\.h5",
    ),
)
"""By the first bytes, under any name."""

_JOINED = "torch.save({{k: v for f in sorted(glob.glob('*_model_*.pt')) for k, v in torch.load(f).items()}}, 'all.bin')"

FOLDERS = (
    Row(
        "a checkpoint of DeepSpeed's ZeRO",
        "python {path}/zero_to_fp32.py {path} OUT joins the parts of its ranks; take OUT.",
        names=(r"zero_to_fp32\.py", r"global_step\d+"),
    ),
    Row(
        "one step of DeepSpeed's ZeRO, in parts of its ranks",
        "python {folder}/zero_to_fp32.py {folder} OUT -t {name} joins them; take OUT.",
        names=(r"(?:bf16_|fp16_)?zero_pp_rank_\d+_mp_rank_\d+_(?:optim|model)_states\.pt",),
    ),
    Row(
        "one step of GPT-NeoX, a file for each layer",
        "In a clone of GPT-NeoX: python tools/ckpts/convert_neox_to_hf.py --input_dir {path} --config_file CONFIG.yml "
        f"--output_dir OUT {_TO_HF}.",
        names=(r"layer_\d+-model_\d+-model_states\.pt",),
    ),
    Row(
        "a model of Meta in parts of several ranks",
        "python -m transformers.models.llama.convert_llama_weights_to_hf --input_dir {path} --output_dir OUT "
        f"(transformers 4) {_TO_HF}.",
        names=(r"consolidated\.0*[1-9]\d*\.pth",),
    ),
    Row(
        "the output of a recipe of torchtune, in parts",
        f'Join them in {{path}}: python -c "import glob, torch; {_JOINED}"; take all.bin.',
        names=(r"(?:hf|meta|torchtune)_model_\d+(?:_\d+)?\.pt",),
    ),
    Row(
        "a checkpoint of TensorFlow",
        "tf.train.load_checkpoint({text}) of TensorFlow reads it; of GPT-2, python -m "
        "transformers.models.gpt2.convert_gpt2_original_tf_checkpoint_to_pytorch --gpt2_checkpoint_path {path} "
        f"--pytorch_dump_folder_path OUT (transformers 4) {_TO_HF}.",
        names=(r".+\.data-\d{5}-of-\d{5}", r".+\.index"),
    ),
    Row(
        "a SavedModel of TensorFlow",
        "tf.saved_model.load({text}) of TensorFlow reads it; torch.save writes its arrays.",
        names=(r"saved_model\.pb",),
    ),
    Row(
        "a checkpoint of Orbax (JAX)",
        "orbax.checkpoint.PyTreeCheckpointer().restore({text}) of Orbax reads it; torch.save writes its arrays.",
        names=(r"_CHECKPOINT_METADATA|_METADATA|manifest\.ocdbt|ocdbt\.process_\d+",),
    ),
    Row(
        "weights of Flax",
        "AutoModelForCausalLM.from_pretrained({text}, from_flax=True).save_pretrained(OUT) of transformers 4 writes "
        "those of torch.",
        names=(r"flax_model\.msgpack",),
    ),
    Row(
        "a torch file that was unpacked",
        "(cd {folder} && zip -0 -r {name}.pt {name}) packs it again.",
        names=(r"data\.pkl", r"data|version"),
    ),
    Row(
        "a model of Keras that was unpacked",
        "(cd {path} && zip -r ../{name}.keras .) packs it again; keras.saving.load_model of Keras reads that.",
        names=(r"metadata\.json", r"model\.weights\.h5"),
    ),
)
"""By the names in a folder that is no checkpoint of a known kind."""


def file_kind(head: bytes) -> Row | None:
    """The row of a file that begins with these bytes."""
    words, record = head.lstrip().lower(), _first_record(head)
    for row in FILES:
        if any(head.startswith(start) or words.startswith(start) for start in row.begins):
            return row
        if record and row.record and re.fullmatch(row.record, record):
            return row
    return None


def folder_kind(names: Iterable[str]) -> Row | None:
    """The row of a folder that holds these names."""
    names = list(names)
    return next((row for row in FOLDERS if all(_has(wanted, names) for wanted in row.names)), None)


def other_kind(head: bytes, where: str, expected: str) -> str:
    """A sentence about a file that begins with these bytes, and is not the expected one; "" where no row fits."""
    row = file_kind(head)
    if row is None:
        return ""
    return f"{where}: {row.what}, not {expected}: it begins with {as_text(head[:8])}. {row.said(Path(where))}"


def answer_in_place(head: bytes, where: str) -> str:
    """A sentence about a JSON text under the name of a checkpoint."""
    text = as_text(head.decode("utf-8", "ignore").strip(), 60)
    return (
        f"{where}: a JSON text, not a checkpoint, that begins with {text}: what a server answered in the place of the "
        "file. Download it again, logged in where it asks for that."
    )


NEVER_WRITTEN = (
    "These zeros were never written: a full disk, lost power, or a download that did not finish. Copy or download it "
    "again."
)


def _first_record(head: bytes) -> str:
    """The name of the first file in a zip; "" for what is none."""
    length = int.from_bytes(head[26:28], "little")
    return head[30 : 30 + length].decode("utf-8", "replace") if head.startswith(b"PK\3\4") else ""


def _has(wanted: str, names: list[str]) -> bool:
    return any(re.fullmatch(wanted, name) for name in names)
