"""Text generation: sampling, the cache of keys and values, and the window.

Shapes: B sequences, T positions, L layers, H heads, D head size, S room of the cache in positions, V vocabulary.

A full context cannot slide where positions are learned, so with every kind of positions its older half is dropped and
the rest computed again at positions from 0: one long pass per block_size / 2 tokens, with and without a cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor

from ..errors import InputError

if TYPE_CHECKING:
    from ..config.gpt import GPTConfig
    from ..data.decoding import Stream
    from ..data.tokenizer import Tokenizer

Prompt = TypeVar("Prompt", str, Tensor, list[int])


class Writer(Protocol):
    """A model that can generate text: what `generate` needs of GPT and GPTBatched."""

    config: Any  # has block_size and vocab_size
    tokenizer: Tokenizer | None
    training: bool

    @property
    def device(self) -> torch.device:
        """The device of the weights."""

    def make_cache(self, batch: int, room: int) -> Any:
        """Allocate a cache for `room` positions of `batch` sequences; it has `clear()`."""

    def features(self, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the input of the head: ids [B, T] to [B, T, C]; with a `cache`, after the positions in it."""

    def logits(self, features: Tensor) -> Tensor:
        """Compute logits [B, V] from features [B, C]."""

    def train(self, mode: bool = True) -> Any:
        """Switch between training and evaluation."""


SLACK = 128
"""Positions that a layer with a window has room for beyond it: so rarely is the window moved to the front."""


class LayerCache:
    """Keys and values of one layer, [B, H, S, D] each, of which the first `length` positions are filled.

    A layer with a window has room for little more, and forgets what no later position sees.
    """

    def __init__(self, keys: Tensor, values: Tensor, window: int | None) -> None:
        self.keys, self.values, self.window, self.length = keys, values, window, 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k and v [B, H, T, D]; return them after those of the earlier positions that are kept."""
        start, new = self.length, k.size(2)
        if self.window is not None and start + new > self.keys.size(2):
            if start:
                k = torch.cat((self.keys.narrow(2, 0, start), k), dim=2)
                v = torch.cat((self.values.narrow(2, 0, start), v), dim=2)
            self.length = min(self.window, k.size(2))
            self.keys.narrow(2, 0, self.length).copy_(k[:, :, -self.length :])
            self.values.narrow(2, 0, self.length).copy_(v[:, :, -self.length :])
            return k, v
        self.length += new
        self.keys.narrow(2, start, new).copy_(k)
        self.values.narrow(2, start, new).copy_(v)
        return self.keys.narrow(2, 0, self.length), self.values.narrow(2, 0, self.length)


class Cache:
    """Keys and values of all layers, allocated once."""

    def __init__(self, config: GPTConfig, batch: int, room: int, weight: Tensor) -> None:
        def layer(window: int | None) -> LayerCache:
            positions = room if window is None else min(room, window + SLACK)
            shape = (2, batch, config.kv_heads, positions, config.head_width)
            keys, values = torch.empty(shape, dtype=weight.dtype, device=weight.device)
            return LayerCache(keys, values, window if positions < room else None)

        self.layers = [layer(window) for window in config.windows]
        self.length = 0
        self.real: Tensor | None = None  # [B, length], false at padding; None without any

    def seen(self, real: Tensor | None, ids: Tensor) -> Tensor | None:
        """Append the mask of new ids [B, T]; return that of all positions so far, None without padding.

        Raises: InputError for padding after an id where a layer has a window: it would not know what to forget.
        """
        if real is None and self.real is None:
            return None
        past = ids.new_ones((len(ids), self.length), dtype=torch.bool) if self.real is None else self.real
        new = torch.ones_like(ids, dtype=torch.bool) if real is None else real
        seen = torch.cat((past, new), dim=1)
        has_window = any(layer.window is not None for layer in self.layers)
        if real is not None and has_window and bool((seen[:, :-1] & ~seen[:, 1:]).any()):
            raise InputError(
                "attention_mask: found padding after an id, expected padding before the ids of each row alone: the "
                "cache of this model keeps nothing outside its sliding windows. Move it, or leave the cache out."
            )
        self.real = seen
        return seen

    def clear(self) -> None:
        """Forget every position, but keep the memory."""
        self.length, self.real = 0, None
        for layer in self.layers:
            layer.length = 0


def generate(
    model: Writer,
    prompt: Prompt,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    use_cache: bool = True,
    attention_mask: Tensor | None = None,
) -> Prompt:
    """Continue a prompt by `max_new_tokens` tokens; the result begins with the prompt and has its type.

    A text needs `model.tokenizer`; an empty one starts like a new text (see `start_ids`). A tensor holds ids,
    [T] or [B, T]; a list holds ids. Temperature 0 takes the likeliest id. Ids that the tokenizer lacks (padding rows of
    the vocabulary) are never drawn. Randomness comes from `generator`, else from `seed`, else from the system, and
    never from torch's global generator. `attention_mask` [B, T] is true at the real ids of prompts of several lengths;
    new ids also come after the padding.

    Raises: InputError for an empty prompt of ids, an id outside the vocabulary, or a setting out of range.
    """
    ids = _prompt_ids(model, prompt)
    real = None if attention_mask is None else attention_mask.to(ids.device, torch.bool)
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    new = list(_tokens(model, ids, real, max_new_tokens, use_cache, generator or _generator(seed), **sampling))
    if isinstance(prompt, str):
        text = text_after(_tokenizer(model), ids[0].tolist())
        return prompt + "".join(text.push(int(i)) for i in new) + text.flush()
    if isinstance(prompt, Tensor):
        tail = torch.stack(new, dim=-1).to(prompt) if new else prompt.new_empty((*prompt.shape[:-1], 0))
        return torch.cat([prompt, tail.view(*prompt.shape[:-1], -1)], dim=-1)
    return prompt + [int(i) for i in new]


def stream(
    model: Writer,
    prompt: str | Tensor | Sequence[int],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    use_cache: bool = True,
) -> Iterator[int]:
    """Yield each new id as soon as it is drawn; the arguments are those of `generate`, for one sequence.

    The model is in eval mode while the iterator is alive; its mode is restored when the iterator ends or is closed.

    Raises: InputError at the first id, as `generate`, or when the prompt holds several sequences.
    """
    ids = _prompt_ids(model, prompt)
    if ids.size(0) != 1:
        raise InputError(f"prompt: found {ids.size(0)} sequences, expected 1 to stream. Use generate for several.")
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    for new in _tokens(model, ids, None, max_new_tokens, use_cache, generator or _generator(seed), **sampling):
        yield int(new)


def start_ids(tokenizer: Tokenizer) -> list[int]:
    """Ids to start from without a prompt: GPT-2's end of text, which separates documents, else a line break."""
    if tokenizer.kind == "gpt2":
        return [tokenizer.vocab_size - 1]
    try:
        return [int(i) for i in tokenizer.encode("\n")] or [0]
    except InputError:
        return [0]  # a vocabulary without line breaks: its first character


def text_after(tokenizer: Tokenizer, ids: Sequence[int]) -> Stream:
    """Begin to decode what follows ids; some tokenizers decode a token differently at the start of a text."""
    text = tokenizer.stream()
    for i in ids:
        text.push(i)
    return text


def until(pieces: Iterable[str], stops: Sequence[str]) -> Iterator[str]:
    """Pass text on up to the first of the `stops`, which is left out; what may be the beginning of one is held back.

    What `pieces` makes is not asked for beyond that.
    """
    held = ""
    for piece in pieces:
        held += piece
        if ends := [at for stop in stops if (at := held.find(stop)) >= 0]:
            yield held[: min(ends)]
            return
        open_ends = (size for stop in stops for size in range(1, len(stop)) if held.endswith(stop[:size]))
        sent = len(held) - max(open_ends, default=0)
        yield held[:sent]
        held = held[sent:]
    yield held


def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one id per row of logits [B, V]: int64 [B].

    First the `top_k` likeliest ids are kept, then the fewest of these whose probabilities reach `top_p`. One uniform
    number per row, drawn on the CPU, decides, so that a seed draws the same on every device.
    """
    if temperature == 0:
        return logits.argmax(-1)
    ids = None
    # The largest logit becomes 0 first: divided by a tiny temperature, no other number would stay finite.
    logits = (logits.float() - logits.amax(-1, keepdim=True)) / max(temperature, 1e-30)
    if top_k is not None:
        logits, ids = logits.topk(min(top_k, logits.size(-1)))
    elif top_p is not None and top_p < 1:
        logits, ids = logits.sort(descending=True)
    mass = logits.softmax(-1).cumsum(-1, dtype=torch.float64)
    drawn = torch.rand((len(logits), 1), dtype=torch.float64, generator=generator).to(mass.device)
    total = mass[:, -1:]
    if top_p is not None and top_p < 1:
        total = mass.gather(-1, (mass < top_p * total).sum(-1, keepdim=True))
    chosen = torch.searchsorted(mass, drawn * total, right=True).clamp_(max=logits.size(-1) - 1)
    return (chosen if ids is None else ids.gather(-1, chosen)).squeeze(-1)


def _generator(seed: int | None) -> torch.Generator:
    """A generator that starts from a seed, or from the system's randomness."""
    generator = torch.Generator()
    if seed is None:
        generator.seed()
        return generator
    return generator.manual_seed(seed)


@torch.inference_mode()
def _tokens(
    model: Writer,
    ids: Tensor,
    real: Tensor | None,
    max_new_tokens: int,
    use_cache: bool,
    generator: torch.Generator,
    **sampling: Any,
) -> Iterator[Tensor]:
    """Yield the ids [B] of each new position that follows ids [B, T]; `sampling` goes to `sample`."""
    check_settings(max_new_tokens, **sampling)
    block_size = model.config.block_size
    drawable = model.config.vocab_size
    if model.tokenizer is not None:
        drawable = min(drawable, model.tokenizer.vocab_size)
    if real is not None:
        ids, real = _padded_left(ids, real, block_size - max_new_tokens)
    window = ids[:, -block_size:]
    room = min(block_size, window.size(1) + max_new_tokens)
    cache = model.make_cache(len(ids), room) if use_cache else None
    was_training = model.training
    model.train(False)
    try:
        unseen = window  # positions that are not in the cache yet
        for _ in range(max_new_tokens):
            if window.size(1) > block_size:
                window = unseen = window[:, -max(1, block_size // 2) :]
                if cache is not None:
                    cache.clear()
            padded = {"attention_mask": real} if real is not None and (cache is None or unseen is window) else {}
            hidden = model.features(window if cache is None else unseen, cache=cache, **padded)
            logits = model.logits(hidden[:, -1])
            new = sample(logits[:, :drawable], generator=generator, **sampling)
            unseen = new[:, None]
            window = torch.cat([window, unseen], dim=1)
            real = None if real is None else torch.cat([real, real.new_ones(len(real), 1)], dim=1)
            yield new
    finally:
        model.train(was_training)


def _padded_left(ids: Tensor, real: Tensor, room: int) -> tuple[Tensor, Tensor]:
    """Move the real ids of each row to its end, so that new ids follow all of them in one column.

    Raises: InputError for a mask of another shape, a row without ids, or one that is too long.
    """
    if real.shape != ids.shape or not bool(real.any(1).all()):
        raise InputError(
            f"attention_mask: found shape {tuple(real.shape)} for ids of {tuple(ids.shape)}, expected the same, with a "
            "real id in every row."
        )
    if ids.size(1) > room:
        raise InputError(
            f"prompt: found {ids.size(1)} positions, expected at most {room}, with room for the new tokens."
        )
    order = real.to(torch.uint8).argsort(dim=1, stable=True)
    return ids.gather(1, order), real.gather(1, order)


def check_settings(max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Check the settings of a generation.

    Raises: InputError naming the setting, its value and what is allowed.
    """
    if max_new_tokens < 0:
        raise InputError(f"max_new_tokens: found {max_new_tokens}, expected at least 0.")
    if not 0 <= temperature < float("inf"):
        raise InputError(f"temperature: found {temperature}, expected 0 (the likeliest token) or a number above it.")
    if top_k is not None and top_k < 1:
        raise InputError(f"top_k: found {top_k}, expected at least 1; leave it out to draw from all tokens.")
    if top_p is not None and not 0 < top_p <= 1:
        raise InputError(f"top_p: found {top_p}, expected a number above 0 and at most 1.")


def _tokenizer(model: Writer) -> Tokenizer:
    if model.tokenizer is None:
        raise InputError("prompt: found a text, but this model has no tokenizer. Set model.tokenizer, or give ids.")
    return model.tokenizer


def _prompt_ids(model: Writer, prompt: str | Tensor | Sequence[int]) -> Tensor:
    """Turn a prompt into ids [B, T] on the model's device."""
    if isinstance(prompt, str):
        tokenizer = _tokenizer(model)
        prompt = [int(i) for i in tokenizer.encode(prompt)] or start_ids(tokenizer)
    ids = torch.as_tensor(prompt, dtype=torch.int64, device=model.device)
    if ids.dim() == 1:
        ids = ids[None]
    vocab_size = model.config.vocab_size
    if ids.dim() != 2 or ids.numel() == 0:
        raise InputError(f"prompt: found ids of shape {tuple(ids.shape)}, expected [T] or [B, T] with T at least 1.")
    if ids.min() < 0 or ids.max() >= vocab_size:
        wrong = ids[(ids < 0) | (ids >= vocab_size)][0].item()
        raise InputError(f"prompt: found id {wrong}, expected ids from 0 to {vocab_size - 1}. Is this its tokenizer?")
    return ids
