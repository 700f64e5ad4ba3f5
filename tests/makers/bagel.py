"""BAGEL for tests: its names and counts at small widths, as training keeps it and as the original is published."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import safetensors.torch
import torch

from tests.makers.dcp_folders import Writer

Shape = tuple[int, ...]
WIDTH, VOCABULARY, KV, HEAD, FFN = 8, 32, 4, 2, 12
VISION, CHANNELS, PATCH = 6, 3, 2
COPIED = ("config.json", "llm_config.json", "vit_config.json", "tokenizer.json", "vocab.json", "merges.txt")


def language(layers: int = 28) -> Iterator[tuple[str, Shape]]:
    """The 788 tensors of the language model: every layer twice, once for what it writes and once for what it draws."""
    at = "language_model.model"
    yield f"{at}.embed_tokens.weight", (VOCABULARY, WIDTH)
    for i in range(layers):
        layer = f"{at}.layers.{i}"
        for moe in ("", "_moe_gen"):
            for word, rows in (("q", WIDTH), ("k", KV), ("v", KV)):
                yield f"{layer}.self_attn.{word}_proj{moe}.weight", (rows, WIDTH)
                yield f"{layer}.self_attn.{word}_proj{moe}.bias", (rows,)
            yield f"{layer}.self_attn.o_proj{moe}.weight", (WIDTH, WIDTH)
            yield f"{layer}.self_attn.q_norm{moe}.weight", (HEAD,)
            yield f"{layer}.self_attn.k_norm{moe}.weight", (HEAD,)
            yield f"{layer}.mlp{moe}.gate_proj.weight", (FFN, WIDTH)
            yield f"{layer}.mlp{moe}.up_proj.weight", (FFN, WIDTH)
            yield f"{layer}.mlp{moe}.down_proj.weight", (WIDTH, FFN)
            yield f"{layer}.input_layernorm{moe}.weight", (WIDTH,)
            yield f"{layer}.post_attention_layernorm{moe}.weight", (WIDTH,)
    yield f"{at}.norm.weight", (WIDTH,)
    yield f"{at}.norm_moe_gen.weight", (WIDTH,)
    yield "language_model.lm_head.weight", (VOCABULARY, WIDTH)


def vision(layers: int, is_linear: bool) -> Iterator[tuple[str, Shape]]:
    """The vision model: 16 tensors a layer and 5 more; its patches by a convolution, or linear."""
    at = "vit_model.vision_model"
    patches = (VISION, PATCH * PATCH * CHANNELS) if is_linear else (VISION, CHANNELS, PATCH, PATCH)
    yield f"{at}.embeddings.patch_embedding.weight", patches
    yield f"{at}.embeddings.patch_embedding.bias", (VISION,)
    yield f"{at}.embeddings.position_embedding.weight", (16, VISION)
    sides = {"fc1": (10, VISION), "fc2": (VISION, 10)}
    for i in range(layers):
        for norm in ("layer_norm1", "layer_norm2"):
            yield f"{at}.encoder.layers.{i}.{norm}.weight", (VISION,)
            yield f"{at}.encoder.layers.{i}.{norm}.bias", (VISION,)
        for word in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield f"{at}.encoder.layers.{i}.self_attn.{word}.weight", (VISION, VISION)
            yield f"{at}.encoder.layers.{i}.self_attn.{word}.bias", (VISION,)
        for word, shape in sides.items():
            yield f"{at}.encoder.layers.{i}.mlp.{word}.weight", shape
            yield f"{at}.encoder.layers.{i}.mlp.{word}.bias", shape[:1]
    yield f"{at}.post_layernorm.weight", (VISION,)
    yield f"{at}.post_layernorm.bias", (VISION,)


def rest() -> Iterator[tuple[str, Shape]]:
    """The 14 tensors that connect the models."""
    for name, shape in (
        ("connector.fc1", (WIDTH, VISION)),
        ("connector.fc2", (WIDTH, WIDTH)),
        ("time_embedder.mlp.0", (WIDTH, 4)),
        ("time_embedder.mlp.2", (WIDTH, WIDTH)),
        ("vae2llm", (WIDTH, 4)),
        ("llm2vae", (4, WIDTH)),
    ):
        yield f"{name}.weight", shape
        yield f"{name}.bias", shape[:1]
    yield "latent_pos_embed.pos_embed", (9, WIDTH)
    yield "vit_pos_embed.pos_embed", (9, WIDTH)


def tensors(layers: int, seed: int, dtype: torch.dtype, *, is_linear: bool) -> dict[str, torch.Tensor]:
    """A model with so many layers of vision."""
    generator = torch.Generator().manual_seed(seed)
    shapes = dict([*language(), *vision(layers, is_linear), *rest()])
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def trained(seed: int) -> dict[str, torch.Tensor]:
    """What training keeps: 26 layers of vision, in float32, patches by a convolution."""
    return tensors(26, seed, torch.float32, is_linear=False)


def write_step(folder: Path, model: dict[str, torch.Tensor], ema: dict[str, torch.Tensor] | None, ranks: int) -> Path:
    """A step as BAGEL's training saves it, sharded along rows."""
    for name, weights in (("model_sharded", model), ("ema_sharded", ema)):
        if weights is None:
            continue
        writer = Writer(folder / name, ranks)
        for tensor, value in weights.items():
            part = -(-len(value) // ranks)
            cuts = [(first, min(part, len(value) - first)) for first in range(0, len(value), part)]
            tail = (0,) * (value.dim() - 1)
            writer.count = 0
            writer.tensor(tensor, value, [((first, *tail), (rows, *value.shape[1:])) for first, rows in cuts])
        writer.close()
    for rank in range(ranks):
        torch.save({"state": {}, "param_groups": []}, folder / f"optimizer_rank{rank:05}.pt")
    about = {"train_steps": 2, "world_size": ranks, "checkpoint_type": "sharded", "has_ema": ema is not None}
    (folder / "metadata.json").write_text(json.dumps(about))
    return folder


def write_original(folder: Path, model: dict[str, torch.Tensor], files: int = 2) -> Path:
    """The published model: an index and its files, configs and tokenizer."""
    folder.mkdir()
    names = sorted(model)
    places = {}
    for k in range(files):
        file = f"model-{k + 1:05}-of-{files:05}.safetensors"
        mine = names[k::files]
        safetensors.torch.save_file({name: model[name] for name in mine}, folder / file, {"format": "pt"})
        places |= dict.fromkeys(mine, file)
    total = sum(t.nbytes for t in model.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in COPIED:
        (folder / name).write_text(json.dumps({"name": name}))
    (folder / "README.md").write_text("not copied")
    return folder
