"""The model's mathematics, against an independent plain implementation and the outputs of upstream programs."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from core.config.gpt import ACTIVATIONS, GPTConfig
from core.errors import InputError
from core.families.gpt import shapes
from core.model import GPT

SMALL = {"block_size": 12, "vocab_size": 37, "n_embd": 24, "n_head": 3, "n_layer": 2, "dropout": 0.0}
SWITCHES = ("tied_head", "head_bias", "norm_bias", "mlp_bias", "bias", "proj_bias")


def make(seed: int = 0, **fields) -> GPT:
    """A small model whose biases and norms are not neutral, so that leaving one out shows."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**{**SMALL, **fields}))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)
    return model


def plain_logits(state: dict[str, torch.Tensor], config: GPTConfig, ids: list[int]) -> torch.Tensor:
    """Logits [T, V] of one sequence in float64: one head and one query at a time, from the formulas."""
    w = {name: tensor.double() for name, tensor in state.items()}

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * w[f"{name}.weight"] + w.get(f"{name}.bias", 0.0)

    def activate(x):
        if config.activation == "relu":
            return x.clamp(min=0)
        if config.activation == "gelu":
            return x * (1 + torch.erf(x / math.sqrt(2))) / 2
        return x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2

    x = w["token_embedding_table.weight"][ids] + w["position_embedding_table.weight"][: len(ids)]
    size = config.n_embd // config.n_head
    for i in range(config.n_layer):
        block = f"blocks.{i}"
        q, k, v = linear(norm(x, f"{block}.ln1"), f"{block}.sa.qkv").chunk(3, dim=-1)
        mixed = torch.zeros_like(q)
        for head, t in itertools.product(range(config.n_head), range(len(ids))):
            columns = slice(head * size, (head + 1) * size)
            weights = (k[: t + 1, columns] @ q[t, columns] / math.sqrt(size)).softmax(0)
            mixed[t, columns] = weights @ v[: t + 1, columns]
        x = x + linear(mixed, f"{block}.sa.proj")
        x = x + linear(activate(linear(norm(x, f"{block}.ln2"), f"{block}.fwd.net.0")), f"{block}.fwd.net.2")
    return linear(norm(x, "ln_f"), "lm_head")


CASES = [
    {"activation": activation, **dict(zip(SWITCHES, values, strict=True))}
    for activation, values in itertools.product(ACTIVATIONS, [(False,) * 6, (True,) * 6])
] + [{name: True, "head_bias": name == "head_bias", "mlp_bias": name == "mlp_bias"} for name in SWITCHES]


@pytest.mark.parametrize("fields", CASES, ids=lambda f: "-".join(k if v is True else str(v) for k, v in f.items() if v))
def test_logits_equal_a_plain_implementation(fields):
    model = make(**fields)
    ids = torch.randint(37, (2, 12))
    logits, loss = model(ids)
    assert loss is None and logits.shape == (2, 12, 37)
    expected = torch.stack([plain_logits(model.state_dict(), model.config, row.tolist()) for row in ids])
    torch.testing.assert_close(logits.double(), expected, atol=2e-4, rtol=1e-5)


@pytest.mark.parametrize("values", list(itertools.product([False, True], repeat=6)))
def test_names_and_shapes_are_those_of_the_format(values):
    config = GPTConfig(**SMALL, **dict(zip(SWITCHES, values, strict=True)))
    model = GPT(config)
    assert {name: tuple(t.shape) for name, t in model.state_dict().items()} == shapes(config)
    assert list(model.buffers()) == []
    tied = model.lm_head.weight is model.token_embedding_table.weight
    assert tied == config.tied_head


def test_loss_is_the_mean_over_targets_that_count():
    model = make()
    ids, targets = torch.randint(37, (2, 12)), torch.randint(37, (2, 12))
    targets[0, :5] = -1
    logits, loss = model(ids, targets)
    counted = targets != -1
    chosen = logits.log_softmax(-1)[counted].gather(-1, targets[counted][:, None])
    torch.testing.assert_close(loss, -chosen.mean())


def test_too_long_a_sequence_names_both_lengths():
    with pytest.raises(InputError, match=r"found 13 positions, expected at most block_size 12"):
        make()(torch.zeros(1, 13, dtype=torch.int64))


def test_dropout_acts_in_training_only():
    model = make(dropout=0.5)
    ids = torch.randint(37, (2, 12))
    assert not torch.equal(model(ids)[0], model(ids)[0])
    model.eval()
    assert torch.equal(model(ids)[0], model(ids)[0])


def test_initial_weights_have_the_deviations_of_gpt2():
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=8, n_embd=192, n_head=6, vocab_size=500, bias=True))
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert p.eq(0).all(), name
        elif "ln" in name:
            assert p.eq(1).all(), name
        else:
            added = name.endswith(("proj.weight", "net.2.weight"))
            assert p.std().item() == pytest.approx(0.02 / 4 if added else 0.02, rel=0.02), name
            assert abs(p.mean().item()) < 0.001, name


@pytest.mark.parametrize("tied", [False, True])
def test_meta_model_takes_the_tensors_of_another(tied):
    source = make(tied_head=tied)
    before = torch.get_rng_state()
    with torch.device("meta"):
        model = GPT(source.config)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.is_meta for p in model.parameters())
    tensors = source.state_dict()
    model.load_state_dict(tensors, assign=True)
    model.retie()
    assert model.blocks[0].sa.qkv.weight.data_ptr() == tensors["blocks.0.sa.qkv.weight"].data_ptr()
    assert (model.lm_head.weight is model.token_embedding_table.weight) == tied
    ids = torch.randint(37, (2, 12))
    assert torch.equal(model(ids)[0], source(ids)[0])


@pytest.mark.parametrize("rows", [1, 7, 32, 33])
@pytest.mark.parametrize("bias", [False, True])
def test_the_quick_kernel_of_few_rows_computes_the_same(rows, bias):
    torch.manual_seed(0)
    layer = make(bias=bias, n_embd=96).blocks[0].sa.qkv
    x = torch.randn(1, rows, 96)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias), atol=1e-5, rtol=1e-5)


def test_bfloat16_weights_give_bfloat16_logits():
    model = make().bfloat16().eval()
    with torch.no_grad():
        logits = model(torch.randint(37, (1, 12)))[0]
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()
