"""Particulars of opening Megatron's checkpoints for a conversion: their tensors, config and layout."""

from __future__ import annotations

from ...containers.container import Container
from ...containers.pickles.inert import as_text
from ...containers.spec import TensorSpec
from ...containers.tensors.views import View
from ...errors import CheckpointError, CheckpointMismatch
from ...families.identify import Identity
from ...families.megatron_iteration import extra_states
from ...families.megatron_tables import TRANSFORMER_ENGINE, unstacked
from ...families.rules import Table, apply
from ..plan import Source

CLASSIC = "Megatron iteration (classic)"
MIXED = "megatron_mixed"


def refuse_classic(container: Container) -> None:
    """Refuse classic rank files, with the reason.

    Raises: CheckpointError.
    """
    if container.kind.startswith(CLASSIC):
        reasons = [note for note in container.notes if "mp_rank" in note or note.startswith("cannot be converted")]
        raise CheckpointError(f"{container.path}: {' '.join(reasons)}")


def conflicts_said(identity: Identity, bare: Identity) -> list[str]:
    """The conflicts of a Megatron model that its config alone causes: the tensors win, and these are reported.

    `bare` is the model without its config. [] when the tensors contradict each other, or do not determine what the
    config contradicts.
    """
    if not identity.family.startswith("megatron_") or bare.conflicts:
        return []
    known = identity.architecture
    if known is None or known.n_head is None or known.n_kv_head is None:
        return []
    return [f"the tensors override the config: {conflict}" for conflict in identity.conflicts]


def refuse_mixed(model: Source) -> None:
    """Refuse a model that is neither Llama, nor Qwen, nor GPT-2, with the reason.

    Raises: CheckpointMismatch.
    """
    if model.family != MIXED:
        return
    localize(model)

    def has(name: str) -> bool:
        return f"decoder.layers.0.{name}" in model.tensors

    fc1, gated = model.tensors.get("decoder.layers.0.mlp.linear_fc1.weight"), False
    if fc1 is not None and "n_ffn" in model.sizes:
        gated = fc1.shape[0] == 2 * model.sizes["n_ffn"]
    if has("input_layernorm.bias"):
        why = "its norms have biases (LayerNorm) and its feed-forward part is gated: GPT-2's is not, Llama's norms not"
        if has("self_attention.q_layernorm.weight"):
            why = "it has a norm on q and k, as Qwen3, and norms with biases, as GPT-2"
    elif not gated:
        why = "its norms have no biases, as Llama's, and its feed-forward part has no gate, as GPT-2's"
    else:
        why = "linear_proj has a bias and linear_qkv none: Llama has both or neither, Qwen2 the other one"
    raise model.refuse(f"{model.program}: {why}. --to safetensors and --to pt keep the tensors.")


def drop_extra_states(model: Source, key: str) -> None:
    """List Transformer Engine's extra state as dropped: None or bytes for a layer, any value for a shard of layers."""
    for name, value in extra_states(model.container.content, key).items():
        held = value[0] if isinstance(value, list) and len(value) == 1 else value  # a shard's is in a list
        kind = "a tensor" if isinstance(held, TensorSpec) else as_text(held, 30).split("(")[0]
        model.dropped[f"{key}{name}"] = f"what Transformer Engine keeps for FP8, here {kind}"


def localize(model: Source) -> None:
    """Rename tensors to the names of the local layers, one tensor for each layer.

    Sources are renamed and split likewise: after writing they are compared layer by layer, in the memory of one.
    """
    is_stacked = "decoder.layers.self_attention.linear_qkv.weight" in model.tensors
    for table in (unstacked(model.sizes["n_layer"]) if is_stacked else (), TRANSFORMER_ENGINE):
        made = _renamed(model, table, model.tensors)
        rules = {name: rule for name, rule in model.rules.items() if name in made[0]}
        model.tensors, model.rules = made[0], rules | made[1]
        model.sources = _renamed(model, table, model.sources)[0]


def _renamed(model: Source, table: Table, tensors: dict[str, View]) -> tuple[dict[str, View], dict[str, str]]:
    try:
        made = apply(table, tensors, model.sizes)
    except CheckpointMismatch as error:
        raise model.refuse(f"{error}.") from error
    return {name: tensors[name] for name in made.unused} | made.tensors, made.rules
