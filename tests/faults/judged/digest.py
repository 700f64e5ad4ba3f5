"""Print a digest of the weights, the optimizer's state and our log of a trainer's folder: python digest.py FOLDER

The newest checkpoint in it counts: a bundle of ours, a checkpoint-N of transformers, or step=N.ckpt of Lightning.
"""

from __future__ import annotations

import hashlib
import re
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save


def newest(folder: Path) -> list[Path]:
    """The files of the newest checkpoint."""
    if tops := sorted(folder.rglob("training_state.json")):
        top = min(tops, key=lambda path: len(path.parts)).parent
        kept = re.compile(r"^(step_|\.|aside_)")
        return [path for path in sorted(top.rglob("*")) if not kept.match(path.relative_to(top).parts[0])]
    steps = {
        int(m[1]): path for path in folder.rglob("*") if (m := re.fullmatch(r"(?:.*[-=])(\d+)(\.ckpt)?", path.name))
    }
    found = steps[max(steps)]
    return sorted(found.rglob("*")) if found.is_dir() else [found]


def add(digest, where: str, value) -> None:
    """Add the tensors and numbers of nested values."""
    if isinstance(value, torch.Tensor):
        digest.update(f"{where} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    elif isinstance(value, dict):
        for key, inner in sorted(value.items(), key=lambda item: str(item[0])):
            add(digest, f"{where}.{key}", inner)
    elif isinstance(value, (list, tuple)):
        for number, inner in enumerate(value):
            add(digest, f"{where}.{number}", inner)
    elif isinstance(value, (bool, int, float)):
        digest.update(f"{where} {value}".encode())


def main(folder: Path) -> str:
    """The digest."""
    digest = hashlib.sha256()
    if (result := folder / "result.pt").exists():  # what the runs of our adapters write at their end
        add(digest, "", torch.load(result, weights_only=False))
        return digest.hexdigest()
    for path in newest(folder):
        if path.suffix == ".safetensors":
            add(digest, path.name, load_file(path))
        elif path.suffix == ".ckpt":
            held = torch.load(path, weights_only=True)
            add(digest, "", [held["state_dict"], held["optimizer_states"]])
        elif path.name in ("model.pt", "optimizer.pt", "also.pt"):
            add(digest, path.name, torch.load(path, weights_only=True))
        elif path.name == ".metadata":
            with tempfile.NamedTemporaryFile() as whole:
                dcp_to_torch_save(path.parent, whole.name)
                add(digest, path.parent.name, torch.load(whole.name, weights_only=True))
        elif path.name == "metrics.jsonl":
            digest.update(path.read_bytes())
    return digest.hexdigest()


if __name__ == "__main__":
    print(main(Path(sys.argv[1])))
