"""Checkpoints of other programs opened in memory: logits, what stays mapped, moments, checksums, tokenizers."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.containers.tensors.reading import Gatherer
from core.containers.tensors.views import concatenate, filled, permute, slice_axis
from core.conversion.plan import Options
from core.errors import CheckpointDamaged, CheckpointMismatch
from core.loading.views import TensorMaker
from core.pretrained import open_gpt
from tests.conftest import ROOT
from tests.makers import nanogpt_files
from tests.makers.conversions import Scratch, converted, expected, worst
from tests.makers.doors import tensor_at
from tests.makers.models import flip
from tests.makers.small_gpts import SmallGPT

LECTURE = {"n_head": 4, "activation": "gelu", "attention_scale": "head_size", "norm_placement": "before"}


def nanogpt(path: Path, small: SmallGPT, prefix: str = "", **more) -> Path:
    torch.save({"model": small.nanogpt(prefix), "model_args": small.sizes, "iter_num": 7, **more}, path)
    return path


def hf(folder: Path, small: SmallGPT) -> Path:
    converted(nanogpt(folder.with_suffix(".pt"), small), folder, "hf")
    return folder


def close(model, small: SmallGPT) -> bool:
    ids = small.ids()
    with torch.no_grad():
        return worst(model(ids)[0].double(), small.logits(ids)) < 1e-6


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module."])
def test_a_file_of_nanogpt_computes_its_logits(tmp_path, prefix, seed):
    small = SmallGPT(seed=seed, bias=seed == 1, n_head=2 + 2 * (seed == 2))
    opened = open_gpt(nanogpt(tmp_path / "ckpt.pt", small, prefix))
    model = opened.model
    assert close(model, small) and opened.program == "nanoGPT" and model.step == 7 and not model.training
    assert model.lm_head.weight is model.token_embedding_table.weight and model.config.tied_head


def test_a_folder_of_transformers_and_a_state_dict_of_the_lecture_compute_the_same(tmp_path):
    small = SmallGPT()
    assert close(open_gpt(hf(tmp_path / "hf", small)).model, small)
    torch.save(small.lecture(), tmp_path / "lecture.pt")
    with pytest.raises(CheckpointMismatch, match=r"lecture\.pt: nothing in the file shows its .*--attention_scale"):
        open_gpt(tmp_path / "lecture.pt")
    small.weights = {name: t for name, t in small.weights.items() if not name.endswith("c_attn.bias")}
    opened = open_gpt(tmp_path / "lecture.pt", Options(choices={**LECTURE, "norm_eps": 1e-5}))
    assert close(opened.model, small)


def test_the_fixtures_of_other_programs_compute_what_they_computed(shared):
    for place in ("hf_gpt2", "hf_gpt2_sharded"):
        ids, logits = expected(shared / "fixtures/hf_gpt2")
        with torch.no_grad():
            assert worst(open_gpt(shared / "fixtures" / place).model(ids)[0], logits) < 1e-5
    ids, logits = expected(shared / "fixtures/nanogpt_char_biasFalse")
    opened = open_gpt(shared / "fixtures/nanogpt_char_biasFalse/ckpt_orig_mod.pt")
    with torch.no_grad():
        assert worst(opened.model(ids)[0], logits) < 1e-5
    assert opened.model.tokenizer.kind == "char"


MODELS = ("llama3_ropescaling", "mistral_window", "olmo2", "qwen3_headdim", "smollm2_tied")


LITGPT = ("gemma2", "phi", "qwen3")


@pytest.mark.parametrize(
    "place",
    [
        *(f"eras/hf_{name}" for name in MODELS),
        *(f"eras/litgpt_{name}/lit_model.pth" for name in LITGPT),
        "fixtures/hf_qwen2_tied",
    ],
)
def test_a_decoder_of_another_program_computes_its_logits(shared, place):
    path = shared / place
    ids, logits = expected(path if path.is_dir() else path.parent)
    found = open_gpt(path).model
    with torch.no_grad():
        assert worst(found(ids)[0], logits) < 1e-5


def mapped(model, size: int) -> set[str]:
    """The parameters whose memory is a file of this size."""
    return {name for name, p in model.named_parameters() if p.untyped_storage().nbytes() == size}


def test_equal_and_transposed_layouts_stay_mapped_and_others_are_read_once(tmp_path):
    folder = hf(tmp_path / "hf", SmallGPT())
    file = folder / "model.safetensors"
    before, model = file.read_bytes(), open_gpt(folder).model
    assert mapped(model, len(before)) == dict(model.named_parameters()).keys()
    assert model.blocks[0].fwd.net[0].weight.stride() == (1, 128)  # transposed where it lies
    with torch.no_grad():
        model.ln_f.weight.fill_(3.0)
    assert file.read_bytes() == before
    torch.save(SmallGPT().lecture(), tmp_path / "lecture.pt")
    model = open_gpt(tmp_path / "lecture.pt", Options(choices={**LECTURE, "norm_eps": 1e-5})).model
    names = dict(model.named_parameters()).keys()
    assert names - mapped(model, (tmp_path / "lecture.pt").stat().st_size) == {
        f"blocks.{i}.sa.qkv.weight" for i in range(2)
    }


def test_a_transposed_matrix_of_float16_is_read_in_order(tmp_path):
    small = SmallGPT()
    small.weights = {name: tensor.half() for name, tensor in small.weights.items()}
    model = open_gpt(hf(tmp_path / "hf", small)).model
    kept = mapped(model, (tmp_path / "hf/model.safetensors").stat().st_size)
    assert "ln_f.weight" in kept and "blocks.0.fwd.net.0.weight" not in kept
    assert torch.equal(model.blocks[0].fwd.net[0].weight, small.weights["h.0.mlp.c_fc.weight"])
    assert model.blocks[0].fwd.net[0].weight.is_contiguous()


def test_a_model_that_trains_has_memory_of_its_own_in_fp32(tmp_path):
    small = SmallGPT()
    for name, tensor in small.weights.items():
        small.weights[name] = tensor.bfloat16()
    path = nanogpt(tmp_path / "ckpt.pt", small)
    kept, trained = open_gpt(path).model, open_gpt(path, training=True).model
    assert {p.dtype for p in kept.parameters()} == {torch.bfloat16}
    assert mapped(trained, path.stat().st_size) == set() and {p.dtype for p in trained.parameters()} == {torch.float32}
    assert trained.lm_head.weight is trained.token_embedding_table.weight
    assert all(torch.equal(p.float(), q) for p, q in zip(kept.parameters(), trained.parameters(), strict=True))
    assert {p.dtype for p in open_gpt(path, dtype=torch.float16).model.parameters()} == {torch.float16}


@pytest.mark.parametrize("order", [nanogpt_files.TODAY, nanogpt_files.SORTED])
def test_the_moments_come_along_by_name_bit_for_bit(tmp_path, order):
    marks = nanogpt_files.ckpt(tmp_path / "ckpt.pt", order=order, layers=2)
    assert open_gpt(tmp_path / "ckpt.pt").optimizer is None
    opened = open_gpt(tmp_path / "ckpt.pt", training=True)
    state, shapes = opened.optimizer, {name: p.shape for name, p in opened.model.named_parameters()}
    names = [name for group in state["param_groups"] for name in group["param_names"]]
    assert set(names) == shapes.keys() and [g["weight_decay"] for g in state["param_groups"]] == [0.1, 0.0]
    numbers = {"blocks.1.sa.qkv.weight": "transformer.h.1.attn.c_attn.weight", "ln_f.weight": "transformer.ln_f.weight"}
    for ours, theirs in numbers.items():
        entry = state["state"][names.index(ours)]
        assert torch.equal(entry["exp_avg"], torch.full(shapes[ours], float(marks[theirs])))
        assert entry["step"] == 40


def test_damage_is_named_and_what_is_not_read_is_not_compared(tmp_path):
    nanogpt_files.ckpt(tmp_path / "ckpt.pt", order=nanogpt_files.TODAY)
    moment = tensor_at(tmp_path / "ckpt.pt", "optimizer.state.0.exp_avg")
    weight = tensor_at(tmp_path / "ckpt.pt", "model.transformer.wpe.weight")
    flip(tmp_path / "ckpt.pt", moment + 5)
    open_gpt(tmp_path / "ckpt.pt")
    with pytest.raises(CheckpointDamaged, match=r"ckpt\.pt: optimizer\.state\.0\.exp_avg is damaged \(CRC32"):
        open_gpt(tmp_path / "ckpt.pt", training=True)
    flip(tmp_path / "ckpt.pt", weight + 5)
    with pytest.raises(CheckpointDamaged, match=r"ckpt\.pt: model\.transformer\.wpe\.weight is damaged \(CRC32"):
        open_gpt(tmp_path / "ckpt.pt")
    open_gpt(tmp_path / "ckpt.pt", verify=False)


def test_weights_of_integers_and_models_that_gpt_does_not_compute_are_refused(tmp_path, shared):
    small = SmallGPT()
    small.weights["h.0.mlp.c_fc.weight"] = small.weights["h.0.mlp.c_fc.weight"].to(torch.int8)
    with pytest.raises(CheckpointMismatch, match=r"ckpt\.pt: blocks\.0\.fwd\.net\.0\.weight is int8, expected float32"):
        open_gpt(nanogpt(tmp_path / "ckpt.pt", small))
    path = shared / "fixtures/modded_small_16e2da07_d128h1_opt/state_step000005.pt"
    with pytest.raises(CheckpointMismatch, match=r"state_step000005\.pt: .* is not computed by GPT\. load_pretrained"):
        open_gpt(path)


def test_the_vocabulary_of_nanogpt_is_found_where_its_sample_py_finds_it(tmp_path):
    run, characters = tmp_path / "out", "".join(map(chr, range(97, 126)))
    run.mkdir()
    path = nanogpt(run / "ckpt.pt", SmallGPT(), config={"dataset": "letters"})
    assert open_gpt(path).model.tokenizer is None
    dataset = tmp_path / "data/letters"
    dataset.mkdir(parents=True)
    (dataset / "meta.pkl").write_bytes(pickle.dumps({"itos": dict(enumerate(characters))}))
    opened = open_gpt(path)
    assert opened.model.tokenizer.chars == list(characters)
    assert f"its vocabulary is taken from {dataset / 'meta.pkl'}" in opened.notes
    (run / "meta.pkl").write_bytes(pickle.dumps({"itos": dict(enumerate(characters[:5]))}))
    opened = open_gpt(path)  # one of another size is passed over, and that is said
    assert opened.model.tokenizer.chars == list(characters)
    assert any("meta.pkl: 5 characters, but the model has 29 rows" in note for note in opened.notes)
    assert open_gpt(path, tokenizer=False).model.tokenizer is None


def test_a_tokenizer_beside_a_file_is_taken_if_it_fits(tmp_path):
    path = nanogpt(tmp_path / "ckpt.pt", SmallGPT())
    for count, kind in ((29, "char"), (30, None)):
        state = {"token_kind": "char", "chars": [chr(97 + i) for i in range(count)]}
        (tmp_path / "tokenizer.json").write_text(json.dumps(state))
        opened = open_gpt(path)
        assert getattr(opened.model.tokenizer, "kind", None) == kind
    assert f"{tmp_path / 'tokenizer.json'} is not its tokenizer: 30 tokens, and the model has 29 rows" in opened.notes


@settings(max_examples=40, deadline=None)
@given(data=st.data(), dtype=st.sampled_from(["float32", "float16"]), writable=st.booleans())
def test_any_view_becomes_the_tensor_of_its_elements(tmp_path_factory, data, dtype, writable):
    scratch = Scratch(tmp_path_factory.mktemp("views") / "numbers")
    kind = {"float32": "<f4", "float16": "<f2"}[dtype]
    views = []
    for name in "abc":
        array = np.arange(24, dtype=kind).reshape(4, 6) + 24 * len(views)
        view = scratch.put(name, array, dtype)
        views.append(permute(view, (1, 0)) if data.draw(st.booleans()) else view)
        start = data.draw(st.integers(0, 2))
        views[-1] = slice_axis(views[-1], 0, start, start + data.draw(st.integers(0, 2)))
    half = concatenate([views[0], filled(dtype, views[0].shape)])
    rows = [view for view in views if view.shape[1] == views[0].shape[1]]
    whole = data.draw(st.sampled_from([*views, concatenate(rows), half]))
    with Gatherer() as gatherer:
        elements = b"".join(piece.tobytes() for piece in gatherer.pieces(whole))
    with TensorMaker(writable=writable) as maker:
        made, cast = maker.tensor(whole), maker.tensor(whole, torch.float64)
        assert maker.tensor(whole) is made
    numbers = np.frombuffer(elements, kind).reshape(whole.shape)
    assert made.dtype == getattr(torch, dtype) and np.array_equal(made.numpy(), numbers)
    assert np.array_equal(cast.numpy(), numbers.astype("f8"))


MEMORY = """
import sys
sys.path.insert(0, {root!r})
import torch
import core.pretrained
from core.networks.generation import stream
def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
next(stream(core.pretrained.open_gpt({tiny!r}, device="cpu").model, [1, 2], 1))  # what is imported on demand
before = peak()
model = core.pretrained.open_gpt({path!r}, device="cpu").model
next(stream(model, [1, 2], 1))
print("PEAK", (peak() - before) / sum(p.numel() * p.element_size() for p in model.parameters()))
"""


@pytest.mark.full
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize("program", ["transposed", "in heads"])
def test_memory_is_that_of_the_weights(tmp_path, program):
    small = SmallGPT(n_layer=4, n_head=8, n_embd=768, vocab_size=5000, block_size=64)
    if program == "transposed":
        path = hf(tmp_path / "hf", small)
    else:
        path = tmp_path / "b.pt"
        torch.save({"model": small.lecture(), "config": {**LECTURE, "norm_eps": 1e-5, "n_head": 8}}, path)
    tiny = nanogpt(tmp_path / "ckpt.pt", SmallGPT())
    code = MEMORY.format(root=str(ROOT), path=str(path), tiny=str(tiny))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split("PEAK")[1]) < (1.1 if program == "transposed" else 1.5)


def test_tensors_that_repeat_their_bytes_are_not_unfolded(tmp_path):
    """Each is small enough by itself, and all together are 1,000 times the file."""
    small = SmallGPT(n_layer=100, n_head=1, n_embd=256, block_size=4, vocab_size=9, bias=False)
    for name, tensor in small.weights.items():
        small.weights[name] = torch.zeros(1).expand(tensor.shape) if tensor.dim() > 1 else tensor
    path = nanogpt(tmp_path / "ckpt.pt", small)
    with pytest.raises(CheckpointDamaged, match=r"ckpt\.pt: its \d+ tensors share bytes .* and unfold to \d+ bytes"):
        open_gpt(path, training=True)
