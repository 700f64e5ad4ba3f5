"""Files that the programs themselves wrote: each is recognised, with every number of its architecture."""

from __future__ import annotations

import json
import struct

import pytest

from core.containers.torch_files.file import open_torch_file
from core.families.identify import identify, weights_key


def opened(path):
    """The tensors of a fixture below the key of its weights, their storages, and the config beside them."""
    config = None
    if path.suffix == ".safetensors":
        data = path.read_bytes()
        (size,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + size])
        header.pop("__metadata__", None)
        shapes, storages = {name: tuple(entry["shape"]) for name, entry in header.items()}, None
    else:
        with path.open("rb") as file:
            content = open_torch_file(file, str(path))
        shapes = {name: spec.shape for name, spec in content.tensors.items()}
        storages = {name: spec.storage for name, spec in content.tensors.items()}
        config = next(
            (content.content[k] for k in ("model_args", "model_config", "config") if k in content.content), None
        )
    if config is None and (path.parent / "config.json").exists():
        config = json.loads((path.parent / "config.json").read_text())
    key = weights_key(shapes)
    shapes = {name[len(key) :]: shape for name, shape in shapes.items() if name.startswith(key)}
    storages = storages and {name: storages[key + name] for name in shapes}
    return identify(shapes, config, storages), key


LECTURE = {
    "key": "", "family": "lecture", "program": "our GPT, lecture style", "n_layer": 3, "n_head": 4, "n_kv_head": 4,
    "head_size": 12, "n_embd": 48, "n_ffn": 192, "vocab_size": 40, "head_rows": 40, "padding": "", "block_size": 32,
    "positions": "learned", "norm": "LayerNorm", "activation": "ReLU", "gated": False, "tied_head": False,
    "biases": "proj mlp norm head", "parameters": 89896, "parameters_without_embeddings": 89896 - 72 * 48,
    "from_config": (),
}  # fmt: skip
GPT2 = {
    "key": "", "family": "hf_gpt2", "program": "Hugging Face GPT-2", "n_layer": 3, "n_head": 4, "n_kv_head": 4,
    "head_size": 12, "n_embd": 48, "n_ffn": 192, "vocab_size": 211, "block_size": 64, "positions": "learned",
    "activation": "GELU, tanh form", "tied_head": True, "biases": "qkv proj mlp norm", "parameters": 98112,
    "parameters_without_embeddings": 98112 - 275 * 48, "from_config": ("n_head", "n_kv_head", "head_size"),
}  # fmt: skip
LLAMA = {
    "key": "", "family": "hf_llama", "program": "Hugging Face Llama", "n_layer": 3, "n_head": 8, "n_kv_head": 2,
    "head_size": 8, "n_embd": 64, "n_ffn": 176, "vocab_size": 320, "block_size": 128, "positions": "rotary",
    "norm": "RMSNorm", "activation": "SwiGLU", "gated": True, "tied_head": False, "biases": "", "parameters": 173504,
    "parameters_without_embeddings": 173504 - 320 * 64,
}  # fmt: skip
QWEN2 = {
    **LLAMA, "family": "hf_qwen2", "program": "Hugging Face Qwen2", "n_layer": 2, "n_head": 4, "n_kv_head": 2,
    "head_size": 16, "n_ffn": 128, "tied_head": True, "biases": "qkv", "parameters": 94784,
    "parameters_without_embeddings": 94784 - 320 * 64,
}  # fmt: skip
MEGATRON_LLAMA = {
    **LLAMA, "key": "model_state_dict.", "family": "megatron_llama",
    "program": "Megatron export with local names, Llama style", "n_layer": 2, "vocab_size": 256, "block_size": 64,
    "padding": "250 tokens + 6 padding rows (a multiple of 128)", "parameters": 121152,
    "parameters_without_embeddings": 121152 - 256 * 64,
}  # fmt: skip
MEGATRON_TE = {**MEGATRON_LLAMA, "program": "Megatron export with Transformer Engine names, Llama style"}
SMALL = {
    "key": "model.", "family": "modded_small", "program": "modded-nanogpt train_gpt.py, 2025-06",
    "prefix": "_orig_mod.", "n_layer": 12, "n_head": 1, "n_kv_head": 1, "head_size": 128, "n_embd": 128, "n_ffn": 512,
    "vocab_size": 512, "head_rows": 512, "block_size": None, "positions": "rotary", "norm": "RMSNorm without weights",
    "activation": "ReLU squared", "tied_head": False, "biases": "",
    "parameters": 11 * 4 * 128**2 + 12 * 8 * 128**2 + 5 * 512 * 128 + 60,
    "parameters_without_embeddings": 11 * 4 * 128**2 + 12 * 8 * 128**2 + 512 * 128 + 60, "from_config": (),
}  # fmt: skip
NANOGPT = {
    "key": "model.", "family": "nanogpt", "program": "nanoGPT", "n_layer": 3, "n_head": 4, "head_size": 16,
    "n_embd": 64, "n_ffn": 256, "vocab_size": 34, "block_size": 64, "positions": "learned", "norm": "LayerNorm",
    "activation": "GELU", "tied_head": True, "biases": "", "parameters": 154176,
    "parameters_without_embeddings": 154176 - 98 * 64, "from_config": ("n_head", "n_kv_head", "head_size"),
}  # fmt: skip
MEDIUM = {
    **SMALL, "family": "modded_medium", "program": "modded-nanogpt train_gpt_medium.py", "n_layer": 16,
    "vocab_size": 500, "parameters": 15 * 4 * 128**2 + 16 * 8 * 128**2 + 4 * 500 * 128 + 512 * 128 + 80,
    "parameters_without_embeddings": 15 * 4 * 128**2 + 16 * 8 * 128**2 + 512 * 128 + 80,
}  # fmt: skip
MEGATRON_QWEN2 = {
    **MEGATRON_LLAMA, "family": "megatron_qwen2", "program": "Megatron export with local names, Qwen2 style",
    "n_layer": 3, "n_head": 6, "n_kv_head": 3, "head_size": 8, "n_embd": 48, "n_ffn": 128, "padding": "",
    "tied_head": True, "biases": "qkv", "parameters": 88944, "parameters_without_embeddings": 88944 - 256 * 48,
}  # fmt: skip
MEGATRON_GPT2 = {
    **MEGATRON_LLAMA, "family": "megatron_gpt2", "program": "Megatron export with local names, GPT-2 style",
    "n_head": 4, "n_kv_head": 4, "head_size": 16, "n_ffn": 224, "padding": "", "positions": "learned",
    "norm": "LayerNorm", "activation": "GELU", "gated": False, "tied_head": True, "biases": "qkv proj mlp norm",
    "parameters": 112320, "parameters_without_embeddings": 112320 - 320 * 64,
}  # fmt: skip
FIXTURES = {
    "lecture_char/bundle/model.pt": LECTURE,
    "lecture_char/bundle_v2_bf16/model.pt": {**LECTURE, "key": "state_dict."},
    "lecture_char/legacy/final.pt": {**LECTURE, "key": "model_state_dict."},
    "lecture_char/legacy/latest.pt": {**LECTURE, "key": "model_state_dict."},
    "nanogpt_char_biasFalse/ckpt.pt": NANOGPT,
    "nanogpt_char_biasFalse/ckpt_orig_mod.pt": {**NANOGPT, "prefix": "_orig_mod."},
    "hf_gpt2/model.safetensors": GPT2,
    "hf_gpt2/pytorch_model.bin.ref": GPT2,
    "hf_llama_gqa_untied/model.safetensors": LLAMA,
    "hf_llama_gqa_untied/pytorch_model.bin.ref": LLAMA,
    "hf_qwen2_tied/model.safetensors": QWEN2,
    "hf_qwen2_tied/pytorch_model.bin.ref": QWEN2,
    "modded_small_16e2da07_d128h1_opt/state_step000005.pt": SMALL,
    "modded_small_16e2da07_d128h1_opt/state_ws8_scalars64.pt": SMALL,
    "modded_medium_06743860_d128h1_opt/state_step000005.pt": MEDIUM,
    "megatron_llama_gqa/exported_model.pt": MEGATRON_LLAMA,
    "megatron_llama_gqa_TEnames/exported_model.pt": MEGATRON_TE,
    "megatron_llama_gqa_TEnames_oldTE_BytesIO/exported_model.pt": MEGATRON_TE,
    "megatron_qwen2_tied_qkvbias/exported_model.pt": MEGATRON_QWEN2,
    "megatron_gpt2style_mha_learnedpos/exported_model.pt": MEGATRON_GPT2,
}


@pytest.mark.parametrize("name", FIXTURES)
def test_fixture_is_recognised_with_every_number(shared, name):
    found, key = opened(shared / "fixtures" / name)
    expected = {"prefix": "", **FIXTURES[name]}
    architecture = found.architecture
    on = " ".join(part for part, there in architecture.biases.items() if there)
    shown = {"key": key, "family": found.family, "program": found.program, "prefix": found.prefix, "biases": on}
    shown |= {field: getattr(architecture, field) for field in expected if field not in shown}
    assert shown == expected
    assert (found.unplaced, found.missing, found.conflicts) == ([], [], [])


def test_toy_model_of_the_dcp_fixture_is_unknown_and_says_what_was_looked_for(shared):
    found, _ = opened(shared / "fixtures/dcp_fsdp2_4ranks/expected_model.safetensors")
    assert (found.family, found.program, found.architecture) == ("unknown", "", None)
    assert found.reason.startswith("none of its 25 names is decisive. Looked for blocks.{i}.sa.qkv.weight (our GPT); ")
    assert "decoder.layers.{i}.self_attention.linear_qkv.weight (Megatron export with local names)" in found.reason


def test_scalars_padded_for_eight_ranks_are_said_and_not_counted(shared):
    found, _ = opened(shared / "fixtures/modded_small_16e2da07_d128h1_opt/state_ws8_scalars64.pt")
    assert found.architecture.notes == [
        "_orig_mod.scalars: 4 of 64 are padding to a multiple of the ranks, not counted"
    ]


def test_transformer_engines_extra_state_is_no_parameter(shared):
    found, _ = opened(shared / "fixtures/megatron_llama_gqa_TEnames/exported_model.pt")
    assert len(found.buffers) == 12 and all(name.endswith("._extra_state") for name in found.buffers)
    assert found.architecture.notes[0].startswith("12 buffers (0 numbers) are not counted, such as decoder.layers.0.")
