"""Where training starts: a bundle that is resumed, the weights of another model, or fresh ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..bundle.bundle import TOKENIZER, Bundle
from ..bundle.commit import CONFIG, MODEL
from ..bundle.contradictions import fits_characters
from ..bundle.tokenizer_state import describe, same_vocabulary
from ..config.gpt import EDITABLE, GPTConfig, same_architecture
from ..containers.json_files import parse_json
from ..data.tokenizer import Tokenizer, make_char, named_tokenizer
from ..errors import CheckpointMismatch, InputError
from ..loading.tensors import load_model
from ..model import GPT
from ..networks.device import resolve_device

ANOTHER = "Leave --tokenization out, or train under another --model_name."

SAME = {
    "gpt2": "add --tokenization gpt2.",
    "hf": "add --tokenization FILE.json, the tokenizer that it was trained with.",
    "char": "its characters are those of its text. Train on that text, or leave --init_from_model out.",
}
"""How a run comes to the tokenizer of another model, by its kind."""


def given_fields(config: GPTConfig | Mapping[str, Any]) -> dict[str, Any]:
    """The fields a caller asked for: all of a mapping, and of a GPTConfig those that are not the default."""
    if not isinstance(config, GPTConfig):
        return dict(config)
    default = GPTConfig().to_dict()
    return {name: value for name, value in config.to_dict().items() if default.get(name) != value}


def find_tokenizer(tokenization: str | Tokenizer, text: str | None) -> Tokenizer:
    """Make the tokenizer of a new model: char (of the text), gpt2, or a Hugging Face tokenizers JSON file."""
    if not isinstance(tokenization, str):
        return tokenization
    if tokenization != "char":
        return named_tokenizer(tokenization)
    if not text:
        raise InputError("tokenization char: found no text, expected the text whose characters are the vocabulary.")
    return make_char([text])


def model_vocab_size(tokenizer: Tokenizer) -> int:
    """Rows of the embedding: the characters, or a BPE vocabulary padded to a multiple of 128 for fast kernels."""
    return tokenizer.vocab_size if tokenizer.kind == "char" else math.ceil(tokenizer.vocab_size / 128) * 128


def resume(bundle: Bundle, given: dict[str, Any], tokenization: str | Tokenizer) -> GPT:
    """Load the model of a bundle to train on; batch_size, dropout and device may be given anew."""
    return _load(bundle, given, tokenization, with_optimizer=True)


def prepare(bundle: Bundle, given: dict[str, Any], tokenization: str | Tokenizer, advice: str = ANOTHER) -> None:
    """Check what a run is given against a bundle, and let batch_size, dropout and device be what it wishes.

    Raises: CheckpointMismatch for another architecture or tokenizer.
    """
    refuse_other_architecture(bundle, given)
    refuse_other_tokenizer(bundle, tokenization, advice)
    _wish(bundle, given)


def _load(
    bundle: Bundle, given: dict[str, Any], tokenization: str | Tokenizer, advice: str = ANOTHER, *, with_optimizer: bool
) -> GPT:
    prepare(bundle, given, tokenization, advice)
    return load_model(bundle, writable=True, with_optimizer=with_optimizer).train()


def from_weights(bundle: Bundle, given: dict[str, Any], tokenizer: Tokenizer) -> GPT:
    """Load another model's weights as step 0 of a new one; tokenizer and architecture must be the same."""
    kind = (bundle.tokenizer or {}).get("token_kind")
    advice = "A new model from its weights reads text as it does: " + SAME.get(str(kind), SAME["char"])
    model = _load(bundle, given, tokenizer, advice, with_optimizer=False)
    model.step = 0
    return model


def _wish(bundle: Bundle, given: dict[str, Any]) -> None:
    if bundle.config is not None:
        wishes = {name: given[name] for name in EDITABLE if name in given}
        bundle.config = GPTConfig.from_dict({**bundle.config.to_dict(), **wishes}, str(bundle.path(CONFIG)))


def fresh(fields: dict[str, Any], tokenizer: Tokenizer, seed: int) -> GPT:
    """Initialise a new model, the same for the same seed, without touching the caller's random state."""
    known = {name: value for name, value in fields.items() if name in GPTConfig.__dataclass_fields__}
    config = GPTConfig.from_dict({"vocab_size": model_vocab_size(tokenizer), **known}, "config of the new model")
    few = config.vocab_size < tokenizer.vocab_size
    if few or (tokenizer.kind == "char" and not fits_characters(tokenizer.vocab_size, config.vocab_size)):
        raise CheckpointMismatch(
            f"vocab_size is {config.vocab_size}, but the tokenizer has {tokenizer.vocab_size} ids. "
            f"Set it to {'at least ' if few else ''}{tokenizer.vocab_size}, or leave it out."
        )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = GPT(config)
    model.tokenizer = tokenizer
    return model.to(resolve_device(config.device, "config of the new model"))


def config_alone(
    folder: Path, given: dict[str, Any], tokenizer: Tokenizer, say: Callable[[str], None]
) -> dict[str, Any]:
    """Read a config.json that stands without weights: the architecture of a new model.

    Raises: CheckpointMismatch when a given field, or a tokenizer.json beside it, contradicts it.
    """
    path, alone = folder / CONFIG, folder / TOKENIZER
    if not path.exists():
        return {}
    values = parse_json(path.read_bytes(), str(path))
    _refuse_other_fields(path, GPTConfig.from_dict(values, str(path)), given)
    say(f"{path}: no weights beside it; training a new model of this architecture")
    if alone.exists():
        recorded = parse_json(alone.read_bytes(), str(alone))
        if not same_vocabulary(recorded, tokenizer.state()):
            raise CheckpointMismatch(
                f"{alone}: {describe(recorded)}; this run has {describe(tokenizer.state())}. "
                "Remove the file, or use its tokenizer."
            )
    return values


def refuse_stray_config(bundle: Bundle) -> None:
    """Raise CheckpointMismatch when the next save would replace a config.json that does not belong to a single file."""
    path = bundle.folder / CONFIG
    if bundle.single is None or bundle.config is None or (bundle.folder / MODEL).exists() or not path.exists():
        return
    if not same_architecture(parse_json(path.read_bytes(), str(path)), bundle.config.to_dict()):
        raise CheckpointMismatch(
            f"{path}: is not the config of {bundle.single}, which is used, and has no weights of its own. The next "
            "save would replace it; move it away, or train under another --model_name."
        )


def refuse_other_architecture(bundle: Bundle, given: dict[str, Any]) -> None:
    """Raise CheckpointMismatch when a given field is not the checkpoint's."""
    if bundle.config is not None:
        _refuse_other_fields(bundle.path(CONFIG), bundle.config, given)


def _refuse_other_fields(where: Path, config: GPTConfig, given: dict[str, Any]) -> None:
    found = config.architecture()
    faults = [
        f"{name} is {given[name]} here and {found[name]} in the checkpoint"
        for name in given
        if name in found and given[name] != found[name]
    ]
    if faults:
        raise CheckpointMismatch(f"{where}: {'; '.join(faults)}. Leave it out, or train under another --model_name.")


def refuse_other_tokenizer(bundle: Bundle, tokenization: str | Tokenizer, advice: str = ANOTHER) -> None:
    """Raise CheckpointMismatch when a tokenizer is not the checkpoint's, or cannot be."""
    if bundle.tokenizer is None:
        _refuse_other_size(bundle, tokenization)
        return
    if isinstance(tokenization, str):
        same, wanted = bundle.tokenizer.get("token_kind") == tokenization, tokenization
    else:
        same, wanted = same_vocabulary(bundle.tokenizer, tokenization.state()), describe(tokenization.state())
    if not same:
        raise CheckpointMismatch(
            f"{bundle.path(TOKENIZER)}: the model was trained with {describe(bundle.tokenizer)}; "
            f"this run has {wanted}. {advice}"
        )


def _refuse_other_size(bundle: Bundle, tokenization: str | Tokenizer) -> None:
    """Nothing says which tokenizer it was; one of another size it was not."""
    if isinstance(tokenization, str) or bundle.config is None:
        return
    rows = bundle.config.vocab_size
    if model_vocab_size(tokenization) != rows and tokenization.vocab_size != rows:
        raise CheckpointMismatch(
            f"{bundle.path(TOKENIZER)}: no tokenizer is recorded; the model has {rows} ids, this run's tokenizer "
            f"{tokenization.vocab_size}. Give the text or the tokenizer it was trained with."
        )
