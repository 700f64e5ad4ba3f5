"""A task of three classes that a toy model learns in seconds: does the premise hold, not hold, or not say?

One word somewhere in the premise decides; everything else is chance.
"""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

CLASSES = ("entailment", "neutral", "contradiction")
WORDS = ("sun", "sea", "fox", "owl", "oak", "ice", "sky", "fog")
SAYS = {"entailment": "surely", "neutral": "perhaps", "contradiction": "never"}
VOCABULARY = ["<|endoftext|>", "[UNK]", *WORDS, *SAYS.values(), "the", '"', "a,b", "é"]


def rows(number: int, seed: int = 0) -> list[dict[str, str]]:
    """Premise, hypothesis and label of made-up rows; the premise has quotes, commas and letters beyond ASCII."""
    draw = random.Random(seed)
    made = []
    for _ in range(number):
        label = draw.choice(CLASSES)
        words = draw.sample(WORDS, draw.randint(1, 5)) + draw.sample(['"', "a,b", "é", "the"], 1)
        words.insert(draw.randrange(len(words) + 1), SAYS[label])
        hypothesis = " ".join(draw.sample(WORDS, draw.randint(1, 3)))
        made.append({"premise": " ".join(words), "hypothesis": hypothesis, "label": label})
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


def tokenizer_json(path: Path) -> Path:
    """A Hugging Face tokenizer of whole words."""
    model = {"type": "WordLevel", "vocab": {w: i for i, w in enumerate(VOCABULARY)}, "unk_token": "[UNK]"}
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    definition = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": 0, "content": "<|endoftext|>", **special}],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": model,
    }
    path.write_text(json.dumps(definition), encoding="utf-8")
    return path
