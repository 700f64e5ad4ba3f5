"""A task of three classes that a toy model learns in seconds: does the premise hold, not hold, or not say?

One character somewhere in the premise decides; everything else is chance.
"""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

CLASSES = ("entailment", "neutral", "contradiction")
LETTERS = "fogsealy"
SAYS = {"entailment": "+", "neutral": "?", "contradiction": "-"}
CHARACTERS = ["\n", " ", *LETTERS, *SAYS.values(), '"', ",", "é", "t"]
"""Of the tokenizer that needs no extra."""

TOKENS = ["<|endoftext|>", "[UNK]", *CHARACTERS[2:]]
"""Of the Hugging Face tokenizer: the same ids."""


def rows(number: int, seed: int = 0) -> list[dict[str, str]]:
    """Premise, hypothesis and label of made-up rows; the premise has quotes, commas and letters beyond ASCII."""
    draw = random.Random(seed)
    made = []
    for _ in range(number):
        label = draw.choice(CLASSES)
        premise = draw.sample(LETTERS, draw.randint(1, 5)) + draw.sample(CHARACTERS[-4:], 1)
        premise.insert(draw.randrange(len(premise) + 1), SAYS[label])
        hypothesis = "".join(draw.sample(LETTERS, draw.randint(1, 3)))
        made.append({"premise": "".join(premise), "hypothesis": hypothesis, "label": label})
    return made


def write(path: Path, content: list[dict[str, str]]) -> Path:
    """Write rows as the ending of the file says."""
    with path.open("w", encoding="utf-8", newline="") as file:
        if path.suffix == ".jsonl":
            file.writelines(json.dumps(row) + "\n" for row in content)
        elif path.suffix == ".csv":
            table = csv.DictWriter(file, list(content[0]))
            table.writeheader()
            table.writerows(content)
        else:
            file.writelines("\t".join(line) + "\n" for line in (content[0], *(row.values() for row in content)))
    return path


def dataset(folder: Path, ending: str = "jsonl", sizes: tuple[int, int, int] = (480, 60, 90)) -> Path:
    """A folder with a train, a validation and a test file."""
    folder.mkdir()
    for seed, (split, size) in enumerate(zip(("train", "validation", "test"), sizes, strict=True)):
        write(folder / f"{split}.{ending}", rows(size, seed))
    return folder


def tokenizer_json(path: Path, kind: str) -> Path:
    """A tokenizer of characters: `char`, of a checkpoint of ours, or `hf`, of Hugging Face."""
    definition = {"token_kind": "char", "chars": CHARACTERS} if kind == "char" else _hugging_face()
    path.write_text(json.dumps(definition), encoding="utf-8")
    return path


def _hugging_face() -> dict:
    model = {"type": "WordLevel", "vocab": {token: i for i, token in enumerate(TOKENS)}, "unk_token": "[UNK]"}
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": 0, "content": "<|endoftext|>", **special}],
        "normalizer": None,
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "."}, "behavior": "Isolated", "invert": False},
        "post_processor": None,
        "decoder": None,
        "model": model,
    }
