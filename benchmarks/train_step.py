"""Training speed at nanoGPT's CPU setting: our `fit` against a loop in nanoGPT's way, eager and compiled.

4 layers, 4 heads, 128 wide, block 64, batch 12, fp32, no dropout (karpathy/nanoGPT, README, "I only have a macbook").
Both train in one process and take turns; medians are compared. Needs a text, and for --compile a C++ compiler.

    python benchmarks/train_step.py --input_file tinyshakespeare.txt
    python benchmarks/train_step.py --input_file tinyshakespeare.txt --nanogpt CLONE    # its own model.py beside ours
    python benchmarks/train_step.py --input_file tinyshakespeare.txt --loss             # 2,000 steps of each, 3 minutes
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.rows import Row, hand_over
from core.config.gpt import GPTConfig
from core.data.corpus import find_source, open_corpus
from core.data.dataloader import DataLoader
from core.loading.optimizer import configure_optimizer
from core.model import GPT
from core.training.fit import fit
from core.training.schedule import Schedule

LAYERS, HEADS, WIDTH, BLOCK, BATCH = 4, 4, 128, 64, 12
BARS = {"eager": 1.02, "compiled": 1.02}
README_LOSS = 1.88
BETAS = (0.9, 0.99)  # of its config/train_shakespeare_char.py
COSINE = Schedule("cosine", 1e-3, 100, 2000, 1e-4)


class PlainBlock(nn.Module):
    """A transformer block as nanoGPT computes it: no biases, dropout modules at 0."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(WIDTH, bias=False)
        self.c_attn = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.c_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.resid_dropout = nn.Dropout(0.0)
        self.ln_2 = nn.LayerNorm(WIDTH, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH, bias=False),
            nn.GELU(),
            nn.Linear(4 * WIDTH, WIDTH, bias=False),
            nn.Dropout(0.0),
        )

    def forward(self, x):
        b, t, c = x.size()
        q, k, v = self.c_attn(self.ln_1(x)).split(c, dim=2)
        q, k, v = (part.view(b, t, HEADS, c // HEADS).transpose(1, 2) for part in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=0, is_causal=True)
        x = x + self.resid_dropout(self.c_proj(y.transpose(1, 2).contiguous().view(b, t, c)))
        return x + self.mlp(self.ln_2(x))


class PlainGPT(nn.Module):
    """nanoGPT's model at this size: learned positions, tied head."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab_size, WIDTH), nn.Embedding(BLOCK, WIDTH)
        self.drop = nn.Dropout(0.0)
        self.h = nn.ModuleList(PlainBlock() for _ in range(LAYERS))
        self.ln_f = nn.LayerNorm(WIDTH, bias=False)
        self.lm_head = nn.Linear(WIDTH, vocab_size, bias=False)
        self.wte.weight = self.lm_head.weight

    def forward(self, idx, targets):
        positions = torch.arange(0, idx.size(1), dtype=torch.long, device=idx.device)
        x = self.drop(self.wte(idx) + self.wpe(positions))
        for block in self.h:
            x = block(x)
        logits = self.lm_head(self.ln_f(x))
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)


def nanogpt_model(clone: Path, vocab_size: int) -> nn.Module:
    """The model of a nanoGPT clone itself."""
    sys.path.insert(0, str(clone))
    from model import GPT as NanoGPT
    from model import GPTConfig as NanoConfig

    with contextlib.redirect_stdout(io.StringIO()):
        return NanoGPT(NanoConfig(BLOCK, vocab_size, LAYERS, HEADS, WIDTH, 0.0, False))


class NanoLoop:
    """nanoGPT's training loop: batches by torch.stack, AdamW as it makes it on a CPU, the loss read at every step."""

    def __init__(self, model: nn.Module, tokens: np.ndarray, compile: bool) -> None:
        self.model, self.tokens, self.step = model, tokens, 0
        decayed = [p for p in model.parameters() if p.dim() >= 2]
        others = [p for p in model.parameters() if p.dim() < 2]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=BETAS)
        self.scaler = torch.amp.GradScaler("cpu", enabled=False)
        self.forward = torch.compile(model) if compile else model
        self.batch = self.get_batch()

    def get_batch(self):
        starts = torch.randint(len(self.tokens) - BLOCK, (BATCH,))
        x = torch.stack([torch.from_numpy(self.tokens[i : i + BLOCK].astype(np.int64)) for i in starts])
        y = torch.stack([torch.from_numpy(self.tokens[i + 1 : i + 1 + BLOCK].astype(np.int64)) for i in starts])
        return x.to("cpu"), y.to("cpu")

    def run(self, steps: int) -> None:
        for _ in range(steps):
            for group in self.optimizer.param_groups:
                group["lr"] = COSINE.at(self.step)
            loss = self.forward(*self.batch)[1]
            self.batch = self.get_batch()
            self.scaler.scale(loss).backward()
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad(set_to_none=True)
            loss.item()
            self.step += 1


class OurLoop:
    """Our `fit`, as train.py calls it, without a folder to save in."""

    def __init__(self, model: GPT, loader: DataLoader, compile: bool) -> None:
        self.model, self.loader, self.compile = model, loader, compile
        self.optimizer = configure_optimizer(model, 1e-3)
        for group in self.optimizer.param_groups:
            group["betas"] = BETAS

    def run(self, steps: int) -> None:
        with contextlib.redirect_stderr(io.StringIO()):
            fit(
                self.model,
                data_loader=self.loader,
                optimizer=self.optimizer,
                max_iters=self.model.step + steps,
                schedule=COSINE,
                eval_interval=10**9,
                eval_iters=1,
                compile=self.compile,
                progress=False,
            )


def our_model(vocab_size: int) -> GPT:
    fields = {"tied_head": True, "head_bias": False, "norm_bias": False, "mlp_bias": False, "bias": False}
    sizes = {"n_layer": LAYERS, "n_head": HEADS, "n_embd": WIDTH, "block_size": BLOCK, "batch_size": BATCH}
    return GPT(GPTConfig(**fields, **sizes, dropout=0.0, vocab_size=vocab_size))


def compare_losses(ours: OurLoop, rival: NanoLoop) -> None:
    """Train both for 2,000 steps and measure them on the same 200 validation batches."""
    batches = DataLoader(ours.loader.train, ours.loader.val, block_size=BLOCK, batch_size=BATCH, seed=1337)
    for name, loop in (("ours", ours), ("nanoGPT-style loop", rival)):
        start = time.perf_counter()
        loop.run(2000)
        seconds = time.perf_counter() - start
        with torch.inference_mode():
            losses = [loop.model.eval()(*batches.val_batch(i))[1].item() for i in range(200)]
        print(f"{name}: validation loss {statistics.mean(losses):.4f} after 2,000 steps, {seconds:.0f} s")
    print(f"nanoGPT's README: {README_LOSS}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input_file", required=True)
    parser.add_argument("--nanogpt", type=Path, help="a clone of karpathy/nanoGPT, for its own model.py")
    parser.add_argument("--steps", type=int, default=100, help="per turn")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seed", type=int, default=1337, help="of the weights and of our batches")
    parser.add_argument("--loss", action="store_true", help="train both for 2,000 steps and compare the losses")
    args = parser.parse_args()
    corpus = open_corpus(find_source(args.input_file, None, None, ""))
    loader = DataLoader(corpus.train, corpus.val, block_size=BLOCK, batch_size=BATCH, seed=args.seed)
    vocab_size = corpus.tokenizer.vocab_size
    torch.manual_seed(args.seed)
    tokens = np.concatenate(corpus.train.arrays)
    if args.loss:
        peer = nanogpt_model(args.nanogpt, vocab_size) if args.nanogpt else PlainGPT(vocab_size)
        compare_losses(OurLoop(our_model(vocab_size), loader, False), NanoLoop(peer, tokens, False))
        return
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {args.repeats} turns of {args.steps} steps")
    rows = []
    for mode, bar in BARS.items():
        compiled = mode == "compiled"
        ours = OurLoop(our_model(vocab_size), loader, compiled)
        rivals = {"nanoGPT-style loop": NanoLoop(PlainGPT(vocab_size), tokens, compiled)}
        if args.nanogpt:
            rivals["nanoGPT's own model"] = NanoLoop(nanogpt_model(args.nanogpt, vocab_size), tokens, compiled)
        loops = {"ours": ours, **rivals}
        speeds: dict[str, list[float]] = {name: [] for name in loops}
        for turn in range(args.repeats + 1):
            for name, loop in loops.items():
                start = time.perf_counter()
                loop.run(args.steps)
                speed = args.steps * BATCH * BLOCK / (time.perf_counter() - start)
                if turn:  # the first turn warms up, or compiles
                    speeds[name].append(speed)
        for name, values in speeds.items():
            spread = f"({min(values):,.0f} to {max(values):,.0f})"
            line = f"{mode:9} {name:20} {statistics.median(values):9,.0f} tokens/s {spread}"
            if name != "ours":
                ratio = statistics.median(a / b for a, b in zip(speeds["ours"], values, strict=True))
                ours, peer = (f"{statistics.median(those):,.0f} tokens/s" for those in (speeds["ours"], values))
                rows.append(Row(f"training step, {mode}, {name}", ratio, bar, "x", True, ours, peer))
            print(line)
        assert all(math.isfinite(value) for values in speeds.values() for value in values)
    hand_over(rows)


if __name__ == "__main__":
    main()
