"""What the decoders of transformers compute, and where their config.json says it: one table, read in both directions.

Keys and defaults as in huggingface/transformers, src/transformers/models/*/configuration_*.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from ...config import rope
from ...config.gpt import GPTConfig

Values = Mapping[str, Any]


class Unfit(ValueError):
    """A setting has a value that the other program does not compute."""


class Setting(Protocol):
    """A part of a config.json and of ours, and the conversion of both."""

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of ours that it stands for."""

    def read(self, config: Values) -> dict[str, Any]:
        """Our fields. Raises: Unfit."""

    def write(self, config: GPTConfig) -> dict[str, Any]:
        """Their keys. Raises: Unfit."""


@dataclass(eq=False, repr=False)
class Key:
    """A number that both have, under two names; `default` is that of their class."""

    field: str
    key: str
    default: Any = None
    of: str = ""  # the property of GPTConfig that fills the field in

    @property
    def fields(self) -> tuple[str, ...]:
        """The one field."""
        return (self.field,)

    def read(self, config: Values) -> dict[str, Any]:
        """Take the number, or their default."""
        return {self.field: config.get(self.key, self.default)}

    def write(self, config: GPTConfig) -> dict[str, Any]:
        """Write the number."""
        return {self.key: getattr(config, self.of or self.field)}


@dataclass(eq=False, repr=False)
class HeadSize(Key):
    """The width of a head, where their class asks for a width of the model that the heads divide."""

    def write(self, config: GPTConfig) -> dict[str, Any]:
        """Write it.

        Raises: Unfit.
        """
        if config.n_embd % config.n_head:
            raise Unfit(f"n_embd is {config.n_embd}, expected a multiple of n_head, {config.n_head}")
        return super().write(config)


@dataclass(eq=False, repr=False)
class Rope:
    """Rotary positions: `rope_parameters` since transformers 5, and single keys before, of which both are written."""

    theta: str = "rope_theta"
    percent_key: str = "partial_rotary_factor"
    percent: float = 1.0
    scales: bool = True

    @property
    def fields(self) -> tuple[str, ...]:
        """Base, scaling, and the part of a head that turns."""
        return ("rope_theta", "rope_scaling", "rotary_percent")

    def read(self, config: Values) -> dict[str, Any]:
        """Read either spelling; a scaling without its original context means that of the model."""
        said = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if not isinstance(said, Mapping):
            raise Unfit(f"rope_parameters is {said!r}, expected names and values")
        scaling = dict(said)
        theta = scaling.pop("rope_theta", config.get(self.theta, 10000.0))
        percent = scaling.pop("partial_rotary_factor", config.get(self.percent_key, self.percent))
        scaling = rope.settled(scaling) if scaling else {}
        if scaling and "original_max_position_embeddings" in rope.NEEDED.get(str(scaling.get("rope_type")), ()):
            context = config.get("original_max_position_embeddings", config.get("max_position_embeddings"))
            scaling.setdefault("original_max_position_embeddings", context)
        if fault := rope.fault(scaling or None):
            raise Unfit(fault)
        return {"rope_theta": theta, "rope_scaling": scaling or None, "rotary_percent": percent}

    def write(self, config: GPTConfig) -> dict[str, Any]:
        """Write both spellings."""
        scaling = config.rope_scaling or {}
        part = {} if config.rotary_percent == 1 == self.percent else {"partial_rotary_factor": config.rotary_percent}
        if part and self.percent == 1:
            raise Unfit(f"rotary_percent is {config.rotary_percent}, and all of each head turns there")
        return {
            self.theta: config.rope_theta,
            **({self.percent_key: config.rotary_percent} if part else {}),
            **({"rope_scaling": scaling} if scaling else {}),
            "rope_parameters": {"rope_type": "default", **scaling, "rope_theta": config.rope_theta, **part},
        }


GATES = {"silu": "swiglu", "swish": "swiglu", "gelu_pytorch_tanh": "geglu", "gelu_new": "geglu"}
PLAIN = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh"}
PLAIN |= {"relu": "relu"}


@dataclass(eq=False, repr=False)
class Activation:
    """The activation, of a gate or of a plain feed-forward: the first of `keys` that the config has."""

    keys: tuple[str, ...]
    default: str
    kinds: Values

    @property
    def fields(self) -> tuple[str, ...]:
        """One of the two fields in which ours says it."""
        return ("mlp_type", "activation")

    def read(self, config: Values) -> dict[str, Any]:
        """Translate it."""
        key, said = next(((key, config[key]) for key in self.keys if config.get(key)), (self.keys[0], self.default))
        if said not in self.kinds:
            raise Unfit(f"{key} is {said!r}; our GPT computes {', '.join(self.kinds)} there")
        return {"mlp_type" if self.kinds is GATES else "activation": self.kinds[said]}

    def write(self, config: GPTConfig) -> dict[str, Any]:
        """Translate it back."""
        ours = config.mlp_type or config.activation
        theirs = next((theirs for theirs, kind in self.kinds.items() if kind == ours), None)
        if theirs is None:
            kinds = dict.fromkeys(self.kinds.values())
            raise Unfit(f"{'mlp_type' if config.mlp_type else 'activation'} is {ours}, expected {' or '.join(kinds)}")
        return dict.fromkeys(self.keys, theirs)


@dataclass(eq=False, repr=False)
class Windows:
    """Sliding windows: the same for all layers, or as `layer_types` has it."""

    default: int | None
    switch: str = ""  # the key without which there are none
    first: int | None = None  # without layer_types, layers from max_window_layers on; its default
    alternate: bool = False  # without layer_types, every other layer from the first on
    fields = ("sliding_window",)

    def read(self, config: Values) -> dict[str, Any]:
        """Read the window of each layer; None where there is none at all."""
        window = config.get("sliding_window", self.default)
        if self.switch and config.get(self.switch) is not True:
            window = None
        count, kinds = config.get("num_hidden_layers"), config.get("layer_types")
        if window is None or not isinstance(count, int) or not (self.switch or self.alternate):
            return {"sliding_window": window}
        if kinds is None:
            first = config.get("max_window_layers", self.first)
            has = [i % 2 == 0 if self.alternate else i >= first for i in range(count)]
        elif isinstance(kinds, list) and set(kinds) <= {"sliding_attention", "full_attention"}:
            has = [kind == "sliding_attention" for kind in kinds]
        else:
            raise Unfit(f"layer_types is {kinds!r}, expected sliding_attention or full_attention for each layer")
        return {"sliding_window": window if all(has) else [window if one else None for one in has]}

    def write(self, config: GPTConfig) -> dict[str, Any]:
        """Write the window and the layers that have it."""
        sizes = {window for window in config.windows if window is not None}
        if len(sizes) > 1:
            raise Unfit(f"sliding_window has {len(sizes)} different windows, and there is one for all layers there")
        if not (self.switch or self.alternate):
            if sizes and None in config.windows:
                raise Unfit("sliding_window is of some layers, and of all there")
            return {"sliding_window": next(iter(sizes), None)}
        kinds = ["full_attention" if window is None else "sliding_attention" for window in config.windows]
        made = {"sliding_window": next(iter(sizes), self.default), "layer_types": kinds}
        return made | ({self.switch: bool(sizes), "max_window_layers": 0} if self.switch else {})


@dataclass(eq=False, repr=False)
class Query:
    """The factor of the scores, as the number whose inverse root it is; absent where it is that of the head size."""

    key: str
    default: float
    fields = ("attention_scale",)

    def read(self, config: Values) -> dict[str, Any]:
        """Make the factor."""
        number = config.get(self.key, self.default)
        if not isinstance(number, (int, float)) or not number > 0:
            raise Unfit(f"{self.key} is {number!r}, expected a number above 0")
        return {"attention_scale": "head_size" if number == config.get("head_dim") else number**-0.5}

    def write(self, config: GPTConfig) -> dict[str, Any]:
        """Make the number, which is whole in every config."""
        number = config.score_scale**-2
        return {self.key: round(number) if math.isclose(number, round(number), rel_tol=1e-9) else number}


@dataclass(eq=False, repr=False)
class EmbeddingRoot:
    """Embeddings times the root of the width, for which there is no key."""

    fields = ("embedding_scale",)

    def read(self, config: Values) -> dict[str, Any]:
        """Compute it."""
        return {"embedding_scale": config["hidden_size"] ** 0.5}

    def write(self, config: GPTConfig) -> dict[str, Any]:
        """Write nothing.

        Raises: Unfit for any other factor.
        """
        root = config.n_embd**0.5
        if not math.isclose(config.embedding_scale, root, rel_tol=1e-6):
            raise Unfit(f"embedding_scale is {config.embedding_scale}, expected the root of n_embd, {root:g}")
        return {}


@dataclass(eq=False, repr=False)
class Biases:
    """Biases, which tensors show: the key that says so for each of our fields; with one key for two, both or none."""

    keys: Values
    fields = ("bias", "proj_bias", "qkv_bias", "mlp_bias")

    def read(self, config: Values) -> dict[str, Any]:
        """Read nothing: the tensors say it."""
        return {}

    def write(self, config: GPTConfig) -> dict[str, Any]:
        """Write each key."""
        made: dict[str, Any] = {}
        have = {"bias": config.bias, "proj_bias": config.has_proj_bias, "mlp_bias": config.mlp_bias}
        for field, there in have.items():
            key = self.keys[field]
            wanted = made.setdefault(key, there) if isinstance(key, str) else key
            if there is not wanted:
                raise Unfit(f"{field} is {str(there).lower()}, expected {str(wanted).lower()}")
        return made


@dataclass(eq=False, repr=False)
class Decoder:
    """One family of transformers: its class, what all of its models compute, and its settings."""

    model: str
    always: Values
    settings: tuple[Setting, ...]
    tied: bool = False  # by default

    @property
    def free(self) -> set[str]:
        """Our fields that its config decides."""
        return {"n_layer", "n_head", "n_embd", "vocab_size", "tied_head", "head_bias"} | {
            field for setting in self.settings for field in setting.fields
        }


_ROTARY = {"pos_encoding": "rotary", "norm_bias": False, "norm_type": "rmsnorm"}
_SIZES = (Key("n_ffn", "intermediate_size", of="ffn_width"), Key("n_kv_head", "num_key_value_heads", of="kv_heads"))
_HEAD = Key("head_size", "head_dim", of="head_width")
_EVEN = HeadSize("head_size", "head_dim", of="head_width")
_SILU = Activation(("hidden_act",), "silu", GATES)
_EPS = Key("norm_eps", "rms_norm_eps", 1e-6)
_ATTENTION = Biases({"bias": "attention_bias", "proj_bias": "attention_bias", "mlp_bias": False})


def _llama(
    context: int, *more: Setting, head: Setting = _HEAD, eps: Setting = _EPS, activation: Setting = _SILU
) -> tuple[Setting, ...]:
    return (*_SIZES, head, Rope(), eps, activation, Key("block_size", "max_position_embeddings", context), *more)


_GEMMA = {**_ROTARY, "norm_type": "rmsnorm_1p"}
_TANH = Activation(("hidden_activation", "hidden_act"), "gelu_pytorch_tanh", GATES)
_LAYERNORM_EPS = Key("norm_eps", "layer_norm_eps", 1e-5)
_CONTEXT = Key("block_size", "max_position_embeddings", 2048)
_LAYERNORM = {"pos_encoding": "rotary", "norm_bias": True}

DECODERS: dict[str, Decoder] = {
    "hf_llama": Decoder(
        "LlamaForCausalLM",
        _ROTARY,
        _llama(
            2048, Biases({"bias": "attention_bias", "proj_bias": "attention_bias", "mlp_bias": "mlp_bias"}), head=_EVEN
        ),
    ),
    "hf_mistral": Decoder(
        "MistralForCausalLM",
        _ROTARY,
        _llama(131072, Windows(4096), Biases(dict.fromkeys(("bias", "proj_bias", "mlp_bias"), False))),
    ),
    "hf_qwen2": Decoder(
        "Qwen2ForCausalLM",
        _ROTARY,
        _llama(
            32768,
            Windows(4096, "use_sliding_window", first=28),
            Biases({"bias": True, "proj_bias": False, "mlp_bias": False}),
        ),
    ),
    "hf_qwen3": Decoder(
        "Qwen3ForCausalLM",
        {**_ROTARY, "qk_norm": "head"},
        _llama(32768, Windows(4096, "use_sliding_window", first=28), _ATTENTION),
    ),
    "hf_olmo2": Decoder(
        "Olmo2ForCausalLM",
        {**_ROTARY, "qk_norm": "width", "norm_placement": "after_sublayer"},
        _llama(2048, _ATTENTION, eps=Key("norm_eps", "rms_norm_eps", 1e-5)),
    ),
    "hf_gemma": Decoder(
        "GemmaForCausalLM", _GEMMA, _llama(8192, EmbeddingRoot(), _ATTENTION, activation=_TANH), tied=True
    ),
    "hf_gemma2": Decoder(
        "Gemma2ForCausalLM",
        {**_GEMMA, "norm_placement": "both"},
        _llama(
            8192,
            EmbeddingRoot(),
            Query("query_pre_attn_scalar", 256),
            Windows(4096, alternate=True),
            Key("attention_cap", "attn_logit_softcapping", 50.0),
            Key("logit_cap", "final_logit_softcapping", 30.0),
            _ATTENTION,
            head=_EVEN,
            activation=_TANH,
        ),
        tied=True,
    ),
    "hf_phi": Decoder(
        "PhiForCausalLM",
        {**_LAYERNORM, "parallel_residual": True, "shared_attention_norm": True},
        (
            *_SIZES,
            Rope(percent=0.5),
            _LAYERNORM_EPS,
            Activation(("hidden_act",), "gelu_new", PLAIN),
            _CONTEXT,
            Biases(dict.fromkeys(("bias", "proj_bias", "mlp_bias"), True)),
        ),
    ),
    "hf_gpt_neox": Decoder(
        "GPTNeoXForCausalLM",
        _LAYERNORM,
        (
            _SIZES[0],
            Rope("rotary_emb_base", "rotary_pct", 0.25),
            _LAYERNORM_EPS,
            Activation(("hidden_act",), "gelu", PLAIN),
            _CONTEXT,
            Key("parallel_residual", "use_parallel_residual", True),
            Biases({"bias": "attention_bias", "proj_bias": "attention_bias", "mlp_bias": True}),
        ),
    ),
}
"""Every decoder of transformers that our GPT computes, by family; of those that fit a model the first is written."""

ONLY: dict[str, tuple[Any, ...]] = {
    "qk_layernorm": (False, None),
    "use_bidirectional_attention": (False, None),
    "quantization_config": (None,),
}
"""Keys of which our GPT computes only these values. Keys that are in no table here are not read by transformers."""
