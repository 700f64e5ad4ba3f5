"""This project's GPT as a kind of model: how it starts, resumes, learns and reads its data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..bundle.bundle import OPTIMIZER, TOKENIZER, Bundle
from ..bundle.commit import CONFIG, MODEL
from ..bundle.contradictions import fits_characters
from ..bundle.evolution import notes
from ..bundle.storage import DISK
from ..bundle.tokenizer_state import describe, same_vocabulary
from ..config.decoders import arch_of_config, complete
from ..config.gpt import EDITABLE, GPTConfig, same_architecture
from ..containers.json_files import parse_json
from ..data.corpus import Corpus
from ..data.dataloader import DataLoader
from ..data.tokenizer import Tokenizer, make_char, named_tokenizer
from ..errors import CheckpointMismatch, InputError
from ..loading.mapped import Owner
from ..loading.optimizer import configure_optimizer
from ..loading.tensors import load_model, load_optimizer, say_without_moments
from ..model import GPT
from ..networks.device import resolve_device
from .kind import Origin, Request, Say, Source, arch_of, refuse_other_fields
from .origin import from_origin, optimizer_of_origin
from .presets import GPT_HEAD, GPT_ON_CPU, GPT_ON_CUDA

ANOTHER = "Leave --tokenization out, or train under another --model_name."

SAME = {
    "gpt2": "add --tokenization gpt2.",
    "hf": "add --tokenization FILE.json, the tokenizer it was trained with.",
    "symbols": "its symbols are those of its dataset. Train on that, or leave --init_from_model out.",
    "char": "its characters are those of its text. Train on that text, or leave --init_from_model out.",
}
"""How a run gets the tokenizer of another model, by the tokenizer's kind."""

EXACT = ("char", "symbols")
"""Kinds of tokenizers of which a model has one row for each id."""


@dataclass(frozen=True)
class GptKind:
    """A GPT on one device, or a copy on each rank; a new one has the choices of `arch`."""

    arch: str = "gpt"

    autocasts = True

    def preset(self, on_cpu: bool) -> dict[str, Any]:
        """A small model on a CPU, the defaults of GPTConfig on CUDA."""
        return dict(GPT_ON_CPU if on_cpu else GPT_ON_CUDA)

    def refuse_contradictions(self, bundle: Bundle, given: Mapping[str, Any]) -> None:
        """Raise CheckpointMismatch when given fields are not those of a step; only headers are read."""
        refuse_other_architecture(bundle, given)

    def new(self, request: Request, folder: Path, source: Source, say: Say) -> GPT:
        """Make a model at step 0: initialised, or with the weights of a step or of another program's checkpoint."""
        tokenizer = find_tokenizer(request.tokenizer, request.text)
        alone = config_alone(folder, request.given, tokenizer, say, self.arch)
        if isinstance(source, Origin):
            model = from_origin(source, {**alone, **request.given}, tokenizer, say)
        elif source is None:
            values = {**GPT_HEAD, **request.preset, **alone, **request.given}
            model = fresh(values if alone else complete(self.arch, values), tokenizer, request.seed)
        else:
            if self.arch != "gpt":
                arch_of(source, self.arch)
            kind = (source.tokenizer or {}).get("token_kind")
            advice = "A new model from its weights reads text as it does: " + SAME.get(str(kind), SAME["char"])
            given = {**alone, **request.given}
            positions = _fewer_positions(source, given)
            _prepare(source, replace(request, given=given, tokenizer=tokenizer), advice)
            model = load_model(source, writable=True, with_optimizer=False).train()
            model.step = 0
            if positions is not None:
                before, name = model.config.block_size, request.init_from_model or source.folder.name
                say(f"block_size: the first {positions} of the {before} positions of {name}, the others are cropped")
                crop_positions(model, positions)
        return self._placed(model)

    def _placed(self, model: GPT) -> GPT:
        """Move a new model to where it trains."""
        return model

    def load(self, bundle: Bundle, request: Request, say: Say) -> GPT:
        """Load the model of a step to train on."""
        refuse_stray_config(bundle)
        for line in notes(str(bundle.path(CONFIG)), bundle.config, bundle.state):
            say(line)
        _prepare(bundle, request)
        return self._loaded(bundle)

    def _loaded(self, bundle: Bundle) -> GPT:
        return load_model(bundle, writable=True, with_optimizer=True).train()

    def optimizer(self, model: GPT, request: Request, source: Source, say: Say) -> torch.optim.AdamW:
        """Make AdamW, with the moments of the step that is resumed, or of another program's checkpoint."""
        if isinstance(source, Origin):
            return optimizer_of_origin(source, model, request, say)
        if source is None:
            return configure_optimizer(model, request.learning_rate, request.weight_decay)
        state = self._state(source)
        say_without_moments(source, state, say)
        where = source.path(OPTIMIZER)
        try:
            optimizer = configure_optimizer(
                model,
                request.learning_rate,
                request.weight_decay,
                state,
                lambda line: say(f"{where}: {line}"),
                Owner(source.optimizer is not None and source.optimizer.source.filled is not None),
            )
        except CheckpointMismatch as error:
            raise CheckpointMismatch(f"{where}: {error}") from error
        self._fill(source, model, optimizer)
        return optimizer

    def _state(self, bundle: Bundle) -> dict[str, Any] | None:
        return load_optimizer(bundle)

    def _fill(self, bundle: Bundle, model: GPT, optimizer: torch.optim.AdamW) -> None:
        """Fill in what `_state` leaves out."""

    def loader(self, corpus: Corpus, model: GPT, seed: int) -> DataLoader:
        """Make batches of [batch_size, block_size]."""
        config = model.config
        return DataLoader(
            corpus.train, corpus.val, block_size=config.block_size, batch_size=config.batch_size, seed=seed
        )


def given_fields(config: GPTConfig | Mapping[str, Any]) -> dict[str, Any]:
    """The fields that a caller specified: all of a mapping; of a GPTConfig, those that differ from the default."""
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
    return tokenizer.vocab_size if tokenizer.kind in EXACT else math.ceil(tokenizer.vocab_size / 128) * 128


def _fewer_positions(bundle: Bundle, given: dict[str, Any]) -> int | None:
    """Take a block_size below that of a step out of the given fields; None where none is given."""
    if bundle.config is None or not 0 < given.get("block_size", 0) < bundle.config.block_size:
        return None
    return int(given.pop("block_size"))


def crop_positions(model: GPT, positions: int) -> None:
    """Cut the positions of a model, and their table, down to the first ones, which compute what they computed."""
    table = model.position_embedding_table
    if table is not None:
        table.weight = torch.nn.Parameter(table.weight.detach()[:positions].clone())
        table.num_embeddings = positions
    model.config = GPTConfig.from_dict({**model.config.to_dict(), "block_size": positions}, "config of the new model")


def _prepare(bundle: Bundle, request: Request, advice: str = ANOTHER) -> None:
    """Check a run's request against a bundle, and apply its batch_size, dropout and device.

    Raises: CheckpointMismatch for another architecture or tokenizer.
    """
    refuse_other_architecture(bundle, request.given)
    refuse_other_tokenizer(bundle, request.tokenizer, advice)
    if bundle.config is not None:
        wishes = {name: request.given[name] for name in EDITABLE if name in request.given}
        bundle.config = GPTConfig.from_dict({**bundle.config.to_dict(), **wishes}, str(bundle.path(CONFIG)))


def fresh(fields: dict[str, Any], tokenizer: Tokenizer, seed: int) -> GPT:
    """Initialise a new model, the same for the same seed, and leave the caller's random state alone."""
    known = {name: value for name, value in fields.items() if name in GPTConfig.__dataclass_fields__}
    config = GPTConfig.from_dict({"vocab_size": model_vocab_size(tokenizer), **known}, "config of the new model")
    few = config.vocab_size < tokenizer.vocab_size
    if few or (tokenizer.kind in EXACT and not fits_characters(tokenizer.vocab_size, config.vocab_size)):
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
    folder: Path, given: Mapping[str, Any], tokenizer: Tokenizer, say: Callable[[str], None], arch: str = "gpt"
) -> dict[str, Any]:
    """Read a config.json that stands without weights: the architecture of a new model.

    A head that it does not name is that of a config's defaults, not of new models.

    Raises: CheckpointMismatch when a given field, another `arch`, or a tokenizer.json beside it, contradicts it.
    """
    path, alone = folder / CONFIG, folder / TOKENIZER
    if not path.exists():
        return {}
    values = parse_json(DISK.read(path), str(path))
    config = GPTConfig.from_dict(values, str(path))
    refuse_other_fields(path, config.architecture(), given)
    found = arch_of_config(config)
    if arch not in ("gpt", found):
        kind = "GPT" if found == "gpt" else f"GPT ({found})"
        raise CheckpointMismatch(
            f"{path}: it describes a {kind}, this run has --arch {arch}. Remove the file, or train under another "
            "--model_name."
        )
    say(f"{path}: no weights beside it; training a new model of this architecture")
    if alone.exists():
        recorded = parse_json(DISK.read(alone), str(alone))
        if not same_vocabulary(recorded, tokenizer.state()):
            raise CheckpointMismatch(
                f"{alone}: {describe(recorded)}; this run has {describe(tokenizer.state())}. "
                "Remove the file, or use its tokenizer."
            )
    return {**{name: getattr(config, name) for name in GPT_HEAD}, **values}


def refuse_stray_config(bundle: Bundle) -> None:
    """Raise CheckpointMismatch when the next save would replace a config.json that is not the single file's."""
    path = bundle.folder / CONFIG
    if bundle.single is None or bundle.config is None or (bundle.folder / MODEL).exists() or not path.exists():
        return
    if not same_architecture(parse_json(DISK.read(path), str(path)), bundle.config.to_dict()):
        raise CheckpointMismatch(
            f"{path}: not the config of {bundle.single}, which is used, and without weights of its own. The next "
            "save would replace it; move it away, or train under another --model_name."
        )


def refuse_other_architecture(bundle: Bundle, given: Mapping[str, Any]) -> None:
    """Raise CheckpointMismatch when a given field differs from the checkpoint's."""
    if bundle.config is not None:
        refuse_other_fields(bundle.path(CONFIG), bundle.config.architecture(), given)


def refuse_other_tokenizer(bundle: Bundle, tokenization: str | Tokenizer, advice: str = ANOTHER) -> None:
    """Raise CheckpointMismatch when a tokenizer is not, or cannot be, the checkpoint's."""
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
    """Raise CheckpointMismatch for a tokenizer of another size, where the checkpoint recorded none."""
    if isinstance(tokenization, str) or bundle.config is None:
        return
    rows = bundle.config.vocab_size
    if model_vocab_size(tokenization) != rows and tokenization.vocab_size != rows:
        raise CheckpointMismatch(
            f"{bundle.path(TOKENIZER)}: no tokenizer is recorded; the model has {rows} ids, this run's tokenizer "
            f"{tokenization.vocab_size}. Name its text with --input_file, or its tokenizer with --tokenization."
        )
