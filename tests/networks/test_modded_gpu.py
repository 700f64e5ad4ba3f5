"""On CUDA, compiled flex attention computes what SDPA does, in fp32 and within bf16's rounding, and it trains."""

from __future__ import annotations

import pytest
import torch

from core.model import GPTBatched
from tests.makers import modded_reference as reference
from tests.makers.modded_models import END, VARIANTS, apart, packed, random_checkpoint, random_flex
from tests.makers.modded_upstream import CASES, case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and this machine has none"),
    # Triton's and inductor's own notices are not ours to fix.
    pytest.mark.filterwarnings("default"),
]
each_variant = pytest.mark.parametrize("variant", VARIANTS)

FP32 = 2e-3  # kernels of a GPU add in another order, and exponentials are its own
TEXT = packed(700, (0, 40, 128, 300))  # padded to 768 inside; windows of 1 and 3 blocks cut


@pytest.fixture(autouse=True)
def whole_fp32():
    """Products of fp32 in fp32, not in TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def on_gpu(variant, kernel, dtype=torch.float32):
    model = random_flex(variant).to("cuda", dtype)
    model.kernel = kernel
    return model


@each_variant
@pytest.mark.parametrize("window", [1, 3, None, "full"])
@torch.no_grad()
def test_compiled_flex_attention_equals_sdpa_and_the_reference(variant, window):
    ids = TEXT.cuda()
    flex, sdpa = (on_gpu(variant, kernel)(ids, window=window)[0].cpu() for kernel in ("flex", "sdpa"))
    assert apart(flex, sdpa) < FP32
    weights = random_checkpoint(variant)[1]
    features = reference.hidden(weights, TEXT.numpy(), END, window)
    assert apart(flex, reference.logits(weights, features)) < FP32
    assert torch.equal(flex, on_gpu(variant, "auto")(ids, window=window)[0].cpu()), "auto is flex attention on CUDA"


@each_variant
@torch.no_grad()
def test_bf16_stays_within_its_rounding(variant):
    ids = TEXT.cuda()
    exact = random_flex(variant)(TEXT, window=3)[0]
    found = {kernel: on_gpu(variant, kernel, torch.bfloat16)(ids, window=3)[0].cpu() for kernel in ("flex", "sdpa")}
    rounding = apart(found["sdpa"], exact)
    assert 0 < rounding < 2
    assert apart(found["flex"], exact) < 1.5 * rounding
    assert (found["flex"] - exact).abs().mean() < 1.2 * (found["sdpa"] - exact).abs().mean()


@pytest.mark.parametrize(("folder", "file", "name"), CASES)
@torch.no_grad()
def test_upstreams_own_logits_on_a_gpu(shared, folder, file, name):
    one = case(shared, folder, file, name)
    logits, loss = one.flex().cuda()(one.ids.cuda(), one.targets.cuda(), window=one.window)
    assert apart(logits.cpu()[one.positions], one.expected["logits_fp32"]) < FP32
    assert loss.item() == pytest.approx(one.facts["loss_fp32"], rel=1e-4)
    rounded, _ = one.flex(assign=True).cuda()(one.ids.cuda(), window=one.window)
    assert apart(rounded.cpu()[one.positions], one.expected["logits_bf16run"]) < one.facts["max_abs_bf16_vs_fp32"] * 1.5


@each_variant
def test_one_training_step_is_that_of_sdpa_and_lowers_the_loss(variant):
    ids = TEXT.cuda()
    losses, gradients = {}, {}
    for kernel in ("flex", "sdpa"):
        model = on_gpu(variant, kernel).train()
        loss = model(ids, ids.roll(-1), window=3)[1]
        loss.backward()
        gradients[kernel] = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        torch.optim.SGD(model.parameters(), lr=1e-2).step()
        with torch.no_grad():
            losses[kernel] = [loss.item(), model(ids, ids.roll(-1), window=3)[1].item()]
    for name, expected in gradients["sdpa"].items():
        assert apart(gradients["flex"][name].cpu(), expected.cpu()) < 1e-2 * expected.abs().max().item(), name
    assert losses["flex"] == pytest.approx(losses["sdpa"], rel=1e-3)
    assert losses["flex"][1] < losses["flex"][0]


@each_variant
def test_batches_compute_and_continue_as_on_a_cpu(variant):
    flex = random_flex(variant)
    here, there = (GPTBatched.from_pretrained_gpt(model, window=1).eval() for model in (flex, random_flex(variant)))
    there.cuda()
    tokens = torch.stack([packed(200, (0,), seed) for seed in range(3)])
    real = torch.ones_like(tokens)
    real[0, :70], real[1, 150:] = 0, 0
    with torch.no_grad():
        expected = here(tokens, attention_mask=real)[0]
        found = there(tokens.cuda(), attention_mask=real.cuda())[0].cpu()
    assert apart(found[real.bool()], expected[real.bool()]) < FP32
    settings = {"temperature": 0, "attention_mask": real}
    written = there.generate(tokens.cuda(), 8, **settings, use_cache=True)
    assert written.tolist() == there.generate(tokens.cuda(), 8, **settings, use_cache=False).tolist()
