"""--to litgpt: lit_model.pth, a state dict; model_config.yaml, from which litgpt builds the model; the tokenizer."""

from __future__ import annotations

from pathlib import Path

from ...containers.flat_yaml import dump_flat_yaml
from ...containers.hf_folder import BESIDE
from ..hf_tokenizer import add_tokenizer_files
from ..pairs.litgpt import CONFIG
from ..plan import Options, Plan, Ref, Source, WeightFile, target_of
from ..vocabulary import tokens_of
from .hf import TOKENIZER_FILES
from .safetensors import beside

FILE = "lit_model.pth"


def plan_litgpt(model: Source, options: Options, target: Path) -> Plan:
    """Plan the folder of a checkpoint of litgpt, which finetune, pretrain and generate of litgpt take."""
    if options.include_optimizer:
        raise model.refuse("--include_optimizer: a folder of litgpt has no optimizer state. Leave it out.")
    if "n_head" not in model.config:
        raise model.refuse(f"no {CONFIG} was found with it, and litgpt needs one. Put the model's own beside it.")
    rows = model.sizes["vocab_size"]
    tokens = tokens_of(model.tokenizer) or model.config.get("vocab_size") or rows
    model.config |= {"vocab_size": min(tokens, rows), "padded_vocab_size": rows}
    targets = [target_of(model, name, FILE, options) for name in model.tensors]
    content = {one.name: Ref(one.path) for one in targets}
    plan = Plan(model, target, "litgpt", [WeightFile(FILE, targets, content, ties=options.tied is not False)])
    plan.texts[CONFIG] = dump_flat_yaml(model.config)
    plan.copies = beside(model, BESIDE)
    if model.tokenizer is not None and not plan.copies.keys() & TOKENIZER_FILES:
        files, _ = add_tokenizer_files(model, options.bpe_file)
        plan.texts |= {name: text for name, text in files.items() if name not in plan.copies}
    return plan
