"""Accumulate gradients in shards over micro-steps: forked.py RANKS tests.makers.micro_steps_ranks ROOT.

Each rank writes after which gradients were reduced, and which differ from those of one process, to ROOT/<rank>.json.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import distributed

from core.config.gpt import GPTConfig
from core.model import GPT
from core.networks.distributed import World, whole

MICRO_STEPS = 3


def main(words: list[str]) -> int:
    distributed.init_process_group("gloo")
    world = World.joined("fsdp")
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=16, dropout=0.0))
    batches = torch.randint(16, (MICRO_STEPS, world.size, 4, 8))
    alone = [model(ids, ids)[1] for ids in batches.flatten(0, 1)]
    (sum(alone) / world.size).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    world.spread(model, "cpu")
    reduced = []
    for number, batch in enumerate(batches):
        ids = batch[world.rank]
        with world.without_sync(model, last=number == MICRO_STEPS - 1):
            model(ids, ids)[1].backward()
        reduced.append(any(p.grad is not None for p in model.parameters()))  # a shard's gradient comes with a reduction
    unlike = [n for n, p in model.named_parameters() if not torch.allclose(whole(p.grad), expected[n], atol=1e-6)]
    Path(words[0], f"{world.rank}.json").write_text(json.dumps({"reduced": reduced, "unlike": unlike}))
    distributed.barrier()
    distributed.destroy_process_group()
    return 0
