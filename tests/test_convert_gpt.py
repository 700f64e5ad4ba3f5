"""Conversions between our GPT, nanoGPT and Hugging Face GPT-2: the same logits, and the same bytes there and back."""

from __future__ import annotations

import base64
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from core.errors import CheckpointDamaged, CheckpointError, CheckpointMismatch
from core.model import GPT
from tests.conversions import converted, hf_logits, index_of, tensors_of, worst
from tests.helpers import SMALL, config, manager, started, train_and_save


@pytest.fixture
def nanogpt(shared) -> Path:
    return shared / "fixtures/nanogpt_char_biasFalse"


@pytest.fixture
def hf(shared) -> Path:
    return shared / "fixtures/hf_gpt2"


def our_logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    model = GPT.load(folder)[0].eval()
    with torch.no_grad():
        return model(ids)[0]


def expected(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    found = load_file(folder / "expected.safetensors")
    return found["input_ids"].long(), found["logits_fp32"]


# nanoGPT


@pytest.mark.parametrize("file", ["ckpt.pt", "ckpt_orig_mod.pt"])
def test_nanogpt_becomes_a_bundle_and_a_folder_of_hugging_face_with_the_same_logits(nanogpt, tmp_path, file):
    ids, logits = expected(nanogpt)
    converted(nanogpt / file, tmp_path / "bundle", "bundle", meta=nanogpt / "meta.pkl")
    assert (our_logits(tmp_path / "bundle", ids) - logits).abs().max() < 1e-5
    converted(nanogpt / file, tmp_path / "hf", "hf", meta=nanogpt / "meta.pkl")
    assert worst(hf_logits(tmp_path / "hf", ids), logits) < 2e-6
    converted(tmp_path / "bundle", tmp_path / "hf2", "hf")
    assert tensors_of(tmp_path / "hf") == tensors_of(tmp_path / "hf2")


def test_nanogpt_brings_its_optimizer_step_best_loss_and_vocabulary(nanogpt, tmp_path):
    converted(nanogpt / "ckpt.pt", tmp_path / "b", "bundle", meta=nanogpt / "meta.pkl")
    state = json.loads((tmp_path / "b/training_state.json").read_text())
    source = torch.load(nanogpt / "ckpt.pt", weights_only=True)
    assert state["step"] == source["iter_num"] == 40
    assert state["best"] == {"step": 40, "val_loss": float(source["best_val_loss"])}
    chars = json.loads((tmp_path / "b/tokenizer.json").read_text())["chars"]
    meta = pickle.loads((nanogpt / "meta.pkl").read_bytes())
    assert chars == [meta["itos"][k] for k in range(meta["vocab_size"])]
    made = torch.load(tmp_path / "b/optimizer.pt", weights_only=True)
    assert [len(group["params"]) for group in made["param_groups"]] == [
        len(group["params"]) for group in source["optimizer"]["param_groups"]
    ]
    names = [name for group in made["param_groups"] for name in group["param_names"]]
    assert names[0] == "token_embedding_table.weight" and len(names) == len(made["state"])
    for number, entry in source["optimizer"]["state"].items():
        for key, value in entry.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(made["state"][number][key]))


def test_training_goes_on_from_nanogpts_moments_as_it_would_have_there(nanogpt, tmp_path):
    """The next AdamW update of our model is the one that the moments of the file ask for."""
    converted(nanogpt / "ckpt.pt", tmp_path / "root/b", "bundle", meta=nanogpt / "meta.pkl")
    made = manager(tmp_path / "root", "b")
    model, optimizer, step = made.initialize_for_training({"device": "cpu"}, "char", None, 1e-3)
    assert step == 40
    source = torch.load(nanogpt / "ckpt.pt", weights_only=True)["optimizer"]["state"][0]
    (found,) = [optimizer.state[p] for n, p in model.named_parameters() if n == "token_embedding_table.weight"]
    assert torch.equal(found["exp_avg"], source["exp_avg"]) and float(found["step"]) == float(source["step"])


def test_nanogpt_comes_back_from_a_bundle_bit_for_bit_with_its_optimizer(nanogpt, tmp_path):
    converted(nanogpt / "ckpt.pt", tmp_path / "b", "bundle")
    converted(tmp_path / "b", tmp_path / "back.pt", "nanogpt", include_optimizer=True)
    first, second = (torch.load(p, weights_only=True) for p in (nanogpt / "ckpt.pt", tmp_path / "back.pt"))
    assert list(first["model"]) == list(second["model"])
    assert all(torch.equal(first["model"][name], tensor) for name, tensor in second["model"].items())
    head, table = (second["model"][name] for name in ("lm_head.weight", "transformer.wte.weight"))
    assert head.data_ptr() == table.data_ptr()
    for number, entry in first["optimizer"]["state"].items():
        assert all(torch.equal(entry[key], second["optimizer"]["state"][number][key]) for key in entry)
    assert second["model_args"] == {name: first["model_args"][name] for name in second["model_args"]}
    assert second["iter_num"] == 40 and second["best_val_loss"] == float(first["best_val_loss"])
    params = [group["params"] for group in second["optimizer"]["param_groups"]]
    assert params == [group["params"] for group in first["optimizer"]["param_groups"]]


def test_an_optimizer_that_nanogpt_has_not_is_refused(tmp_path):
    fields = {"tied_head": True, "head_bias": False, "bias": False}
    made, model, optimizer = started(tmp_path, "a", config={**SMALL, **fields})  # norms have biases, qkv has none
    train_and_save(made, model, optimizer, 1)
    with pytest.raises(CheckpointMismatch, match=r"no moments for .*bias, which is filled in; nanoGPT has groups of"):
        converted(tmp_path / "a", tmp_path / "a.pt", "nanogpt", include_optimizer=True)
    made, model, optimizer = started(tmp_path, "b", config={**SMALL, **fields, "bias": True})
    train_and_save(made, model, optimizer, 1)
    converted(tmp_path / "b", tmp_path / "b.pt", "nanogpt", include_optimizer=True)
    content = torch.load(tmp_path / "b.pt", weights_only=True)
    shapes = [t.ndim for name, t in content["model"].items() if name != "lm_head.weight"]
    groups = [len(group["params"]) for group in content["optimizer"]["param_groups"]]
    assert groups == [sum(n >= 2 for n in shapes), sum(n < 2 for n in shapes)]


def test_a_vocabulary_that_does_not_fit_or_is_no_data_is_refused(nanogpt, tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path(tmp_path / "ran").touch, ())

    def error(content) -> str:
        path = tmp_path / "meta.pkl"
        path.write_bytes(pickle.dumps(content))
        with pytest.raises(CheckpointError) as caught:
            converted(nanogpt / "ckpt.pt", tmp_path / "b", "bundle", meta=path)
        assert not (tmp_path / "b").exists()
        return str(caught.value).removeprefix(f"{path}: ")

    few = {"itos": {0: "a", 1: "b"}, "stoi": {"a": 0, "b": 1}}
    assert error(few) == "2 characters, but the model has 34 rows. It is the vocabulary of another model."
    assert "expected a character for each id from 0" in error({"itos": {0: "a", 2: "b"}})
    assert "its stoi is not its itos turned round" in error({**few, "stoi": {"a": 1, "b": 0}})
    assert "expected vocab_size, itos and stoi by name" in error(Evil())
    assert not (tmp_path / "ran").exists()


def test_a_vocabulary_of_characters_goes_to_hugging_face_and_back(nanogpt, tmp_path):
    from transformers import AutoTokenizer

    converted(nanogpt / "ckpt.pt", tmp_path / "hf", "hf", meta=nanogpt / "meta.pkl")
    meta = pickle.loads((nanogpt / "meta.pkl").read_bytes())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = "".join(meta["stoi"])
    assert tokenizer(text)["input_ids"] == list(range(34)) and tokenizer.decode(range(34)) == text
    with pytest.raises(Exception, match=r"Missing \[UNK\] token"):
        tokenizer("\u4e2d")
    converted(tmp_path / "hf", tmp_path / "b", "bundle")
    assert json.loads((tmp_path / "b/tokenizer.json").read_text()) == {"token_kind": "char", "chars": list(text)}
    assert GPT.load(tmp_path / "b")[1]["token_kind"] == "char"


def test_a_tokenizer_of_hugging_face_goes_into_a_bundle_and_back(hf, tmp_path):
    from tests.test_tokenizer import hf_definition

    folder = Path(shutil.copytree(hf, tmp_path / "hf"))
    definition = hf_definition()
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    converted(folder, tmp_path / "b", "bundle")
    made = json.loads((tmp_path / "b/tokenizer.json").read_text())
    assert made == {"token_kind": "hf", "definition": definition}
    assert GPT.load(tmp_path / "b")[0].tokenizer.kind == "hf"
    converted(tmp_path / "b", tmp_path / "back", "hf")
    assert json.loads((tmp_path / "back/tokenizer.json").read_text()) == definition


# Hugging Face


@pytest.mark.parametrize("folder", ["hf_gpt2", "hf_gpt2_sharded"])
def test_hugging_face_gpt2_becomes_a_bundle_with_the_same_logits(shared, tmp_path, folder):
    ids, logits = expected(shared / "fixtures/hf_gpt2")
    converted(shared / "fixtures" / folder, tmp_path / "b", "bundle")
    assert json.loads((tmp_path / "b/config.json").read_text())["activation"] == "gelu_tanh"
    assert (our_logits(tmp_path / "b", ids) - logits).abs().max() < 1e-5
    converted(tmp_path / "b", tmp_path / "hf", "hf")
    assert worst(hf_logits(tmp_path / "hf", ids), logits) < 2e-6
    assert tensors_of(tmp_path / "hf") == tensors_of(shared / "fixtures" / folder)


def test_names_as_the_first_files_of_gpt2_have_them_without_prefix_and_with_masks(hf, tmp_path):
    folder = tmp_path / "gpt2"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_head": 4, "n_layer": 3, "n_ctx": 64}))
    tensors = {name.removeprefix("transformer."): t for name, t in load_file(hf / "model.safetensors").items()}
    masks = {f"h.{i}.attn.bias": torch.ones(64, 64).tril()[None, None].clone() for i in range(3)}
    save_file({**tensors, **masks}, folder / "model.safetensors")
    plan = converted(folder, tmp_path / "b", "bundle")
    assert plan["dropped"] == dict.fromkeys(masks, "the causal mask")
    ids, logits = expected(hf)
    assert (our_logits(tmp_path / "b", ids) - logits).abs().max() < 1e-5
    converted(folder, tmp_path / "hf", "hf")
    assert tensors_of(tmp_path / "hf") == tensors_of(hf)


def test_gpt2s_own_tokenizer_is_known_by_its_tokens(shared):
    from core.vocabulary import _state_of

    tokens = {"!": 0, "\u0120t": 256, "\u0120the": 262, "\u0120gazed": 50255, "<|endoftext|>": 50256}
    vocab = {**{f"other {k}": k for k in range(50257) if k not in tokens.values()}, **tokens}
    definition = {"model": {"type": "BPE", "vocab": vocab, "merges": ["a b"] * 50000}}
    assert _state_of(definition) == {"token_kind": "gpt2"}
    vocab["\u0120the"] = 1
    assert _state_of(definition)["token_kind"] == "hf"
    ranks = [line.split() for line in (shared / "data/gpt2.tiktoken").read_bytes().splitlines()]
    numbers = {base64.b64decode(token): int(number) for token, number in ranks}
    assert [numbers[word] for word in (b"!", b" t", b" the", b" gazed")] == [0, 256, 262, 50255]


def test_a_bin_file_in_a_folder_is_read_without_running_anything(hf, tmp_path):
    folder = tmp_path / "old"
    folder.mkdir()
    shutil.copy(hf / "config.json", folder)
    shutil.copy(hf / "pytorch_model.bin.ref", folder / "pytorch_model.bin")
    converted(folder, tmp_path / "b", "bundle")
    made = torch.load(tmp_path / "b/model.pt", weights_only=True)
    source = torch.load(hf / "pytorch_model.bin.ref", weights_only=True)
    assert torch.equal(made["blocks.1.fwd.net.0.weight"], source["transformer.h.1.mlp.c_fc.weight"].t())
    assert torch.equal(made["ln_f.bias"], source["transformer.ln_f.bias"])
    with pytest.raises(CheckpointMismatch, match=r"no config\.json beside it, and n_head is not in the tensors"):
        converted(hf / "pytorch_model.bin.ref", tmp_path / "d", "bundle")


def test_hugging_face_gpt2_is_refused_by_nanogpt_for_its_activation(hf, tmp_path):
    with pytest.raises(CheckpointMismatch) as caught:
        converted(hf, tmp_path / "ckpt.pt", "nanogpt")
    assert str(caught.value) == (
        f"{hf}: it computes the tanh form of GELU (gelu_new), nanoGPT the exact GELU: other logits. --to bundle and "
        "--to hf keep it."
    )


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("activation_function", "silu", "activation_function is 'silu'; our GPT computes gelu, "),
        ("scale_attn_by_inverse_layer_idx", True, "scale_attn_by_inverse_layer_idx is True; our GPT computes False."),
        ("layer_norm_epsilon", 1e-6, "layer_norm_epsilon is 1e-06; our GPT has 1e-05."),
        ("n_head", 5, "n_head is 5"),
    ],
)
def test_what_our_gpt_does_not_compute_is_refused_by_field(hf, tmp_path, field, value, message):
    folder = Path(shutil.copytree(hf, tmp_path / "hf"))
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, field: value}))
    with pytest.raises(CheckpointMismatch) as caught:
        converted(folder, tmp_path / "b", "bundle")
    assert message in str(caught.value) and not (tmp_path / "b").exists()


# Ours


def zero_head_bias(source: Path, target: Path) -> Path:
    folder = Path(shutil.copytree(source, target))
    weights = torch.load(folder / "model.pt", weights_only=True)
    weights["lm_head.bias"].zero_()
    torch.save(weights, folder / "model.pt")
    return folder


def test_a_lecture_bundle_becomes_hugging_face_with_the_same_logits_once_its_head_has_no_bias(shared, tmp_path):
    source = shared / "fixtures/lecture_char/bundle"
    ids, logits = expected(shared / "fixtures/lecture_char")
    bias = torch.load(source / "model.pt", weights_only=True)["lm_head.bias"]
    with pytest.raises(CheckpointMismatch) as caught:
        converted(source, tmp_path / "hf", "hf")
    assert str(caught.value) == (
        f"{source}: lm_head.bias has values other than 0, and HF GPT-2 has no bias in its head: it would compute other "
        "logits. --to safetensors and --to bundle keep it."
    )
    plan = converted(zero_head_bias(source, tmp_path / "zero"), tmp_path / "hf", "hf")
    assert worst(hf_logits(tmp_path / "hf", ids), logits - bias) < 2e-6
    assert plan["dropped"]["lm_head.bias"] == "all zeros; HF GPT-2 has no bias in its head"
    made = json.loads((tmp_path / "hf/config.json").read_text())
    assert (made["activation_function"], made["tie_word_embeddings"], made["dtype"]) == ("relu", False, "float32")
    assert made["torch_dtype"] == made["dtype"] and "trained for 30 steps" in (tmp_path / "hf/README.md").read_text()


@pytest.mark.parametrize("part", ["bundle", "legacy/latest.pt", "legacy/final.pt", "bundle_v2_bf16"])
def test_lecture_files_become_bundles_with_the_same_logits(shared, tmp_path, part):
    ids, logits = expected(shared / "fixtures/lecture_char")
    converted(shared / "fixtures/lecture_char" / part, tmp_path / "b", "bundle")
    found = our_logits(tmp_path / "b", ids)
    assert (found - logits).abs().max() < (0.05 if "bf16" in part else 1e-5)
    assert found.dtype == torch.float32


def test_our_own_models_of_every_shape_go_to_hugging_face_and_back(tmp_path):
    cases = [
        {"bias": False, "tied_head": True, "head_bias": False},
        {"bias": True, "tied_head": False, "head_bias": False, "activation": "gelu_tanh"},
        {"bias": False, "norm_bias": False, "mlp_bias": False, "head_bias": True, "activation": "relu"},
    ]
    for k, fields in enumerate(cases):
        model = GPT(config(**fields)).eval()
        if model.config.head_bias:
            torch.nn.init.zeros_(model.lm_head.bias)
        model.save_checkpoint_bundle(tmp_path / f"m{k}", step=7)
        ids = torch.arange(12).reshape(1, 12)
        with torch.no_grad():
            logits = model(ids)[0]
        converted(tmp_path / f"m{k}", tmp_path / f"hf{k}", "hf", shard_size=20_000)
        assert worst(hf_logits(tmp_path / f"hf{k}", ids), logits) < 2e-6
        index = index_of(tmp_path / f"hf{k}")
        assert index["metadata"]["total_size"] == sum(len(t[2]) for t in tensors_of(tmp_path / f"hf{k}").values())
        converted(tmp_path / f"hf{k}", tmp_path / f"back{k}", "bundle")
        assert (our_logits(tmp_path / f"back{k}", ids) - logits).abs().max() < 1e-5
        first, second = tensors_of(tmp_path / f"m{k}/model.pt"), tensors_of(tmp_path / f"back{k}/model.pt")
        assert all(second[name] == tensor for name, tensor in first.items() if name != "lm_head.bias")
        assert all(not any(second[name][2]) for name in second.keys() - first.keys())


def test_nanogpt_refuses_a_head_of_its_own_and_gets_zero_biases(tmp_path):
    GPT(config(head_bias=False)).save_checkpoint_bundle(tmp_path / "untied")
    with pytest.raises(CheckpointMismatch) as caught:
        converted(tmp_path / "untied", tmp_path / "ckpt.pt", "nanogpt")
    assert str(caught.value).endswith(
        "its head is not its token table, and nanoGPT has one tensor for both. --to bundle and --to hf keep two."
    )
    GPT(config(head_bias=False, tied_head=True)).save_checkpoint_bundle(tmp_path / "tied")
    converted(tmp_path / "tied", tmp_path / "ckpt.pt", "nanogpt")
    made = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    assert made["model_args"]["bias"] and not made["model"]["transformer.h.0.attn.c_attn.bias"].any()


# Options


def test_the_head_can_be_untied_and_tied_again(nanogpt, tmp_path):
    ids, logits = expected(nanogpt)
    converted(nanogpt / "ckpt.pt", tmp_path / "hf", "hf", tied=False)
    assert worst(hf_logits(tmp_path / "hf", ids), logits) < 2e-6
    assert json.loads((tmp_path / "hf/config.json").read_text())["tie_word_embeddings"] is False
    assert "lm_head.weight" in tensors_of(tmp_path / "hf")
    converted(nanogpt / "ckpt.pt", tmp_path / "b", "bundle", tied=False)
    model = GPT.load(tmp_path / "b")[0]
    assert not model.config.tied_head and model.lm_head.weight is not model.token_embedding_table.weight
    assert model.lm_head.weight.data_ptr() != model.token_embedding_table.weight.data_ptr()
    converted(tmp_path / "hf", tmp_path / "tied", "hf", tied=True)
    assert "lm_head.weight" not in tensors_of(tmp_path / "tied")
    assert worst(hf_logits(tmp_path / "tied", ids), logits) < 2e-6


def test_the_vocabulary_is_cropped_and_padded(hf, tmp_path):
    ids, logits = expected(hf)
    converted(hf, tmp_path / "wide", "hf", vocab_size=256)
    assert tensors_of(tmp_path / "wide")["transformer.wte.weight"][1] == (256, 48)
    found = hf_logits(tmp_path / "wide", ids)
    assert worst(found[..., :211], logits) < 2e-6 and not found[..., 211:].any()
    converted(tmp_path / "wide", tmp_path / "same", "hf", vocab_size=211)
    assert tensors_of(tmp_path / "same") == tensors_of(hf)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64", "float32"])
def test_a_cast_rounds_as_torch_does(hf, tmp_path, dtype):
    converted(hf, tmp_path / "x.pt", "pt", dtype=dtype)
    made = torch.load(tmp_path / "x.pt", weights_only=True)
    for name, tensor in load_file(hf / "model.safetensors").items():
        assert torch.equal(made[name], tensor.to(getattr(torch, dtype)))
    if dtype == "bfloat16":
        converted(hf, tmp_path / "folder", "hf", dtype=dtype)
        assert hf_logits(tmp_path / "folder", expected(hf)[0]).dtype == torch.bfloat16


def test_odd_numbers_are_cast_as_torch_casts_them_and_what_is_too_large_is_refused(tmp_path):
    bits = torch.randint(-(2**31), 2**31, (200_000,), dtype=torch.int64).to(torch.int32)
    odd = bits.view(torch.float32)
    odd[odd.abs() > 3.3e38] = 1.0  # finite, and beyond bf16: the last of these tests
    odd[:4] = torch.tensor([float("nan"), float("inf"), -0.0, 3.3895e38])
    torch.save({"odd": odd}, tmp_path / "odd.pt")
    converted(tmp_path / "odd.pt", tmp_path / "b.pt", "pt", dtype="bfloat16")
    made = torch.load(tmp_path / "b.pt", weights_only=True)["odd"]
    wanted = odd.to(torch.bfloat16)
    assert torch.equal(made.isnan(), wanted.isnan())
    assert torch.equal(made[~made.isnan()].view(torch.int16), wanted[~made.isnan()].view(torch.int16))
    torch.save({"large": torch.tensor([1.0, 7e4])}, tmp_path / "large.pt")
    with pytest.raises(CheckpointMismatch, match=r"large holds 70000, which is beyond float16. Keep the dtype"):
        converted(tmp_path / "large.pt", tmp_path / "c.pt", "pt", dtype="float16")
    assert not (tmp_path / "c.pt").exists()


# Safetensors and torch files of anything


def test_safetensors_and_torch_files_of_anything_become_each_other(tmp_path):
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(7, 5, generator=generator)
    content = {
        "a.weight": table,
        "tied": table,
        "turned": torch.randn(4, 6, generator=generator).t(),
        "part": torch.arange(100).reshape(10, 10)[2:5, ::3],
        "half": torch.randn(3).to(torch.bfloat16),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "flags": torch.tensor([True, False]),
        "wide": torch.tensor([1, 2], dtype=torch.uint32),
        "eight": torch.ones(3).to(torch.float8_e4m3fn),
    }
    torch.save(content, tmp_path / "x.pt")
    plan = converted(tmp_path / "x.pt", tmp_path / "y.safetensors", "safetensors")
    assert plan["dropped"] == {"tied": "tied to a.weight, and safetensors has no tied tensors"}
    made = load_file(tmp_path / "y.safetensors")

    def same(a: torch.Tensor, b: torch.Tensor) -> bool:
        if a.dtype != b.dtype or a.shape != b.shape:
            return False
        return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))

    assert made.keys() == content.keys() - {"tied"}
    assert all(same(made[name], content[name].contiguous()) for name in made)
    converted(tmp_path / "y.safetensors", tmp_path / "z.pt", "pt")
    again = torch.load(tmp_path / "z.pt", weights_only=True, mmap=True)
    assert all(same(again[name], made[name]) for name in made)
    converted(tmp_path / "x.pt", tmp_path / "t.pt", "pt")
    tied = torch.load(tmp_path / "t.pt", weights_only=True)
    assert tied["tied"].data_ptr() == tied["a.weight"].data_ptr() and list(tied) == list(content)
    converted(tmp_path / "x.pt", tmp_path / "u.safetensors", "safetensors", tied=False)
    assert torch.equal(load_file(tmp_path / "u.safetensors")["tied"], table)


def test_files_in_shards_have_a_correct_index_and_go_along_with_config_and_tokenizer(hf, tmp_path):
    (tmp_path / "in").mkdir()
    source = Path(shutil.copytree(hf, tmp_path / "in/hf"))
    (source / "vocab.json").write_text("{}")
    converted(source, tmp_path / "out", "safetensors", shard_size=30_000)
    index = index_of(tmp_path / "out")
    files = sorted({*index["weight_map"].values()})
    assert len(files) > 3 and files == sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert all(load_file(tmp_path / "out" / file).keys() for file in files)
    assert all(name in load_file(tmp_path / "out" / file) for name, file in index["weight_map"].items())
    assert (tmp_path / "out/vocab.json").read_text() == "{}"
    assert tensors_of(tmp_path / "out") == tensors_of(hf)
    assert (hf_logits(tmp_path / "out", expected(hf)[0]) - expected(hf)[1]).abs().max() < 1e-5


def test_train_starts_from_a_converted_model_and_its_optimizer_state_stays_out_of_safetensors(nanogpt, tmp_path):
    converted(nanogpt / "ckpt.pt", tmp_path / "x.safetensors", "safetensors")
    assert "transformer.wte.weight" in load_file(tmp_path / "x.safetensors")
    with pytest.raises(CheckpointMismatch, match="an optimizer state is more than tensors"):
        converted(nanogpt / "ckpt.pt", tmp_path / "y.safetensors", "safetensors", include_optimizer=True)
    converted(nanogpt / "ckpt.pt", tmp_path / "z.pt", "pt", include_optimizer=True)
    made = torch.load(tmp_path / "z.pt", weights_only=True)
    assert made.keys() == {"model", "optimizer"} and len(made["optimizer"]["state"]) == 21


def test_a_bundle_keeps_its_history_of_training_and_optimizer(tmp_path):
    made, model, optimizer = started(tmp_path, "dante")
    train_and_save(made, model, optimizer, 3, val_loss=lambda step: 4.0 - step / 10)
    converted(tmp_path / "dante", tmp_path / "copy", "bundle")
    first, second = (torch.load(tmp_path / n / "optimizer.pt", weights_only=True) for n in ("dante", "copy"))
    assert first["param_groups"] == second["param_groups"]
    assert all(torch.equal(first["state"][k]["exp_avg"], second["state"][k]["exp_avg"]) for k in first["state"])
    states = [json.loads((tmp_path / n / "training_state.json").read_text()) for n in ("dante", "copy")]
    assert states[0]["best"] == states[1]["best"] and states[1]["step"] == 3
    assert GPT.load(tmp_path / "copy")[2] == 3


def test_damage_in_the_source_is_found_before_anything_is_visible(nanogpt, tmp_path):
    path = Path(shutil.copy(nanogpt / "ckpt.pt", tmp_path / "ckpt.pt"))
    from core.containers.open import open_container

    spec = open_container(path).tensors["model.transformer.h.1.mlp.c_fc.weight"]
    data = bytearray(path.read_bytes())
    data[spec.offset + 5] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointDamaged, match=r"h\.1\.mlp\.c_fc\.weight is damaged \(CRC32 .*Nothing was written"):
        converted(path, tmp_path / "out", "bundle")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ckpt.pt"]
