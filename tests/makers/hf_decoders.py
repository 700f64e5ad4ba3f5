"""Tiny random models of transformers, and the same models as ours: config fields and renamed weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from core.config.gpt import GPTConfig
from core.model import GPT
from tests.makers.decoder_reference import LLAMA3

SIZES = {
    "vocab_size": 61,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 80,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OURS = {"vocab_size": 61, "n_embd": 48, "n_layer": 3, "n_head": 4, "n_ffn": 80, "block_size": 64, "dropout": 0.0}
ROTARY = {"pos_encoding": "rotary", "head_bias": False, "bias": False, "mlp_bias": False}
LLAMA = {**OURS, **ROTARY, "norm_type": "rmsnorm", "norm_eps": 1e-6, "mlp_type": "swiglu"}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}

Tensors = dict[str, torch.Tensor]


def of_llama(theirs: Tensors, i: int, norms: dict[str, str]) -> Tensors:
    """Our tensors of layer i of a model with Llama's names; `norms` are ours and theirs."""
    layer = {name.removeprefix(f"model.layers.{i}."): t for name, t in theirs.items() if f"layers.{i}." in name}
    made = {f"{ours}.weight": layer[f"{name}.weight"] for ours, name in norms.items() if f"{name}.weight" in layer}
    for part in ("weight", "bias"):
        if f"self_attn.q_proj.{part}" in layer:
            made[f"sa.qkv.{part}"] = torch.cat([layer[f"self_attn.{one}_proj.{part}"] for one in "qkv"])
    made["sa.proj.weight"] = layer["self_attn.o_proj.weight"]
    for ours, name in {"gate": "gate_proj", "net.0": "up_proj", "net.2": "down_proj"}.items():
        made[f"fwd.{ours}.weight"] = layer[f"mlp.{name}.weight"]
    return {f"blocks.{i}.{name}": tensor for name, tensor in made.items()}


NORMS = {"ln1": "input_layernorm", "ln2": "post_attention_layernorm"}
QK = {"sa.q_norm": "self_attn.q_norm", "sa.k_norm": "self_attn.k_norm"}
WIDE = {"sa.q_norm_wide": "self_attn.q_norm", "sa.k_norm_wide": "self_attn.k_norm"}
OLMO2 = {**WIDE, "ln1_post": "post_attention_layernorm", "ln2_post": "post_feedforward_layernorm"}
GEMMA2 = {
    "ln1": "input_layernorm",
    "ln1_post": "post_attention_layernorm",
    "ln2": "pre_feedforward_layernorm",
    "ln2_post": "post_feedforward_layernorm",
}


def llama_like(norms: dict[str, str]) -> Callable[[Tensors, int], Tensors]:
    """Rename a state dict with Llama's names."""

    def renamed(theirs: Tensors, n_head: int) -> Tensors:
        table = theirs["model.embed_tokens.weight"]
        ends = {"token_embedding_table.weight": table, "lm_head.weight": theirs.get("lm_head.weight", table)}
        made = {**ends, "ln_f.weight": theirs["model.norm.weight"]}
        for i in range(OURS["n_layer"]):
            made |= of_llama(theirs, i, norms)
        return made

    return renamed


PLAIN_LLAMA = llama_like(NORMS)


def phi(theirs: Tensors, n_head: int) -> Tensors:
    """Rename a state dict of PhiForCausalLM."""
    names = {"ln1": "input_layernorm", "sa.proj": "self_attn.dense", "fwd.net.0": "mlp.fc1", "fwd.net.2": "mlp.fc2"}
    made = {"token_embedding_table.weight": theirs["model.embed_tokens.weight"]}
    for part in ("weight", "bias"):
        made |= {f"ln_f.{part}": theirs[f"model.final_layernorm.{part}"], f"lm_head.{part}": theirs[f"lm_head.{part}"]}
        for i in range(OURS["n_layer"]):
            start = f"model.layers.{i}"
            made |= {f"blocks.{i}.{ours}.{part}": theirs[f"{start}.{name}.{part}"] for ours, name in names.items()}
            rows = [theirs[f"{start}.self_attn.{one}_proj.{part}"] for one in "qkv"]
            made[f"blocks.{i}.sa.qkv.{part}"] = torch.cat(rows)
    return made


def neox(theirs: Tensors, n_head: int) -> Tensors:
    """Rename a state dict of GPTNeoXForCausalLM, whose q, k and v are interleaved head by head."""
    names = {
        "ln1": "input_layernorm",
        "ln2": "post_attention_layernorm",
        "sa.proj": "attention.dense",
        "fwd.net.0": "mlp.dense_h_to_4h",
        "fwd.net.2": "mlp.dense_4h_to_h",
    }
    made = {"token_embedding_table.weight": theirs["gpt_neox.embed_in.weight"]}
    made["lm_head.weight"] = theirs["embed_out.weight"] if "embed_out.weight" in theirs else theirs["lm_head.weight"]
    for part in ("weight", "bias"):
        made[f"ln_f.{part}"] = theirs[f"gpt_neox.final_layer_norm.{part}"]
        for i in range(OURS["n_layer"]):
            start = f"gpt_neox.layers.{i}"
            made |= {f"blocks.{i}.{ours}.{part}": theirs[f"{start}.{name}.{part}"] for ours, name in names.items()}
            rows = theirs[f"{start}.attention.query_key_value.{part}"].unflatten(0, (n_head, 3, -1))
            made[f"blocks.{i}.sa.qkv.{part}"] = rows.transpose(0, 1).flatten(0, 2)
    return made


@dataclass(frozen=True)
class Peer:
    """One family of transformers: how its model is made and what ours is then."""

    model: str  # "LlamaForCausalLM" has its config in LlamaConfig
    fields: dict[str, Any]  # of our config
    renamed: Callable[[Tensors, int], Tensors] = PLAIN_LLAMA
    config: dict[str, Any] = field(default_factory=dict)

    def sized(self, groups: int, share: int, size: int, wide: int, tied: bool) -> Peer:
        """The same family with other sizes; GPT-NeoX has no groups, and only some have a head size of their own."""
        groups, share = (groups * share, 1) if self.model.startswith("GPTNeoX") else (groups, share)
        heads = groups * share
        width = 48 if "head_dim" in self.config else heads * size
        ours = {"n_head": heads, "n_kv_head": groups, "n_embd": width, "n_ffn": wide}
        theirs = {"num_attention_heads": heads, "num_key_value_heads": groups, "hidden_size": width}
        theirs |= {"intermediate_size": wide, "tie_word_embeddings": tied and self.model != "PhiForCausalLM"}
        if "head_dim" in self.config:
            ours, theirs = ours | {"head_size": size}, theirs | {"head_dim": size}
        if "embedding_scale" in self.fields:
            ours["embedding_scale"] = width**0.5
        ours["tied_head"] = theirs["tie_word_embeddings"]
        return replace(self, fields={**self.fields, **ours}, config={**self.config, **theirs})

    def make(self, seed: int = 0) -> tuple[Any, GPT]:
        """Make both, with equal weights that are far from neutral."""
        import transformers

        torch.manual_seed(seed)
        kind = getattr(transformers, self.model.replace("ForCausalLM", "Config"))
        theirs = getattr(transformers, self.model)(kind(**{**SIZES, "attn_implementation": "eager", **self.config}))
        with torch.no_grad():
            for parameter in theirs.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        with torch.device("meta"):
            ours = GPT(GPTConfig(**self.fields))
        ours.load_state_dict(self.renamed(dict(theirs.state_dict()), ours.config.n_head), assign=True)
        ours.retie()
        return theirs.eval(), ours.eval()


PEERS = {
    "llama2": Peer(
        "LlamaForCausalLM", {**LLAMA, "rope_theta": 5000.0}, config={"rope_parameters": {**ROPE, "rope_theta": 5000.0}}
    ),
    "llama2_grouped": Peer("LlamaForCausalLM", {**LLAMA, "n_kv_head": 2}, config={"num_key_value_heads": 2}),
    "llama_linear": Peer(
        "LlamaForCausalLM",
        {**LLAMA, "rope_scaling": {"type": "linear", "factor": 2.0}},
        config={"rope_parameters": {**ROPE, "rope_type": "linear", "factor": 2.0}},
    ),
    "llama_yarn": Peer(
        "LlamaForCausalLM", {**LLAMA, "rope_scaling": YARN}, config={"rope_parameters": {**ROPE, **YARN}}
    ),
    "llama3": Peer(
        "LlamaForCausalLM",
        {**LLAMA, "n_kv_head": 2, "rope_scaling": LLAMA3, "rope_theta": 500000.0},
        config={"num_key_value_heads": 2, "rope_parameters": {**LLAMA3, "rope_theta": 500000.0}},
    ),
    "smollm2": Peer(
        "LlamaForCausalLM",
        {**LLAMA, "n_kv_head": 1, "tied_head": True},
        config={"num_key_value_heads": 1, "tie_word_embeddings": True},
    ),
    "mistral": Peer(
        "MistralForCausalLM",
        {**LLAMA, "n_kv_head": 2, "sliding_window": 5},
        config={"num_key_value_heads": 2, "sliding_window": 5},
    ),
    "qwen2": Peer("Qwen2ForCausalLM", {**LLAMA, "qkv_bias": True, "n_kv_head": 2}, config={"num_key_value_heads": 2}),
    "qwen3": Peer(
        "Qwen3ForCausalLM",
        {**LLAMA, "n_kv_head": 2, "head_size": 16, "qk_norm": "head"},
        llama_like({**NORMS, **QK}),
        {"num_key_value_heads": 2, "head_dim": 16},
    ),
    "phi2": Peer(
        "PhiForCausalLM",
        {
            **OURS,
            "pos_encoding": "rotary",
            "rotary_percent": 0.5,
            "bias": True,
            "activation": "gelu_tanh",
            "parallel_residual": True,
            "shared_attention_norm": True,
        },
        phi,
        {"rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}},
    ),
    "neox": Peer(
        "GPTNeoXForCausalLM",
        {
            **OURS,
            "pos_encoding": "rotary",
            "rotary_percent": 0.5,
            "bias": True,
            "head_bias": False,
            "parallel_residual": True,
        },
        neox,
        {"rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}},
    ),
    "neox_serial": Peer(
        "GPTNeoXForCausalLM",
        {**OURS, "pos_encoding": "rotary", "rotary_percent": 0.5, "bias": True, "head_bias": False},
        neox,
        {"rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}, "use_parallel_residual": False},
    ),
    "olmo2": Peer(
        "Olmo2ForCausalLM",
        {**LLAMA, "n_kv_head": 2, "norm_placement": "after_sublayer", "qk_norm": "width", "norm_eps": 1e-5},
        llama_like(OLMO2),
        {"num_key_value_heads": 2},
    ),
    "gemma": Peer(
        "GemmaForCausalLM",
        {
            **LLAMA,
            "norm_type": "rmsnorm_1p",
            "mlp_type": "geglu",
            "n_kv_head": 1,
            "head_size": 16,
            "embedding_scale": 48**0.5,
            "tied_head": True,
            "norm_eps": 1e-2,  # which would hardly show behind large embeddings
        },
        config={"num_key_value_heads": 1, "head_dim": 16, "hidden_act": "gelu_pytorch_tanh", "rms_norm_eps": 1e-2},
    ),
    "gemma2": Peer(
        "Gemma2ForCausalLM",
        {
            **LLAMA,
            "norm_type": "rmsnorm_1p",
            "mlp_type": "geglu",
            "n_kv_head": 2,
            "head_size": 16,
            "embedding_scale": 48**0.5,
            "tied_head": True,
            "norm_eps": 1e-2,
            "norm_placement": "both",
            "attention_scale": 24**-0.5,
            "attention_cap": 5.0,
            "logit_cap": 3.0,
            "sliding_window": [5, None, 5],
        },
        llama_like(GEMMA2),
        {
            "num_key_value_heads": 2,
            "head_dim": 16,
            "query_pre_attn_scalar": 24,
            "rms_norm_eps": 1e-2,
            "sliding_window": 5,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 3.0,
        },
    ),
}
