"""From a path to a plan: open the source, convert the model to a family that the format holds, lay out the files."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from ..console.words import listed, on_one_side
from ..containers import safetensors_writer
from ..containers.tensors.views import concatenate, filled, slice_axis
from ..errors import CheckpointMismatch
from ..families.fused import FUSED
from ..families.identify import UNKNOWN, identify
from ..families.match import in_order
from .aside import entries_left_out
from .average import averaged
from .match_original import plan_matched
from .opening import FAMILY, open_model
from .pairs import PAIRS, Way, ways
from .pairs.decoders import GPT2, hf_family, refuse_unknown
from .pairs.gpt import complete
from .pairs.litgpt import FAMILIES as LITGPT
from .pairs.litgpt import litgpt_family
from .pairs.megatron_settings import FLAGS
from .plan import TORCH_ENDINGS, Options, Plan, Source
from .sharded import take_parts
from .targets import FORMATS, HF, Format, formats_of
from .vocabulary import add_tokenizer, tokens_of

BY_NAME = {one.name: one for one in FORMATS}


def plan_conversion(source: Path, target: Path, to: str, options: Options, held: ExitStack) -> Plan:
    """Plan a conversion from headers; opened files stay open until `held` is closed.

    Raises: CheckpointError for what cannot be read, or cannot be converted, with the reason.
    """
    plan = _planned(source, target, to, options, held)
    if not plan.targets:
        raise plan.model.refuse("it has no tensors, so there is nothing to convert.")
    _refuse_target(plan)
    _refuse_names(plan)
    plan.check()
    if options.more.get("match_original") is None:
        plan.aside = entries_left_out(plan)
    return plan


def plan_in_memory(source: Path, options: Options, held: ExitStack) -> Plan:
    """Plan the bundle that a checkpoint would become, for who opens it in memory instead; as `plan_conversion`."""
    plan = _planned(source, Path(), "bundle", options, held)
    plan.check()
    return plan


def _planned(source: Path, target: Path, to: str, options: Options, held: ExitStack) -> Plan:
    kind = BY_NAME[to]
    if options.more.get("match_original") is not None:
        return plan_matched(source, target, to, options, held)
    models = []
    for path in (source, *options.average_with):
        models.append(open_model(path, held, options, needs_family=bool(kind.families)))
        take_parts(models[-1], path, options)
    model = averaged(models, held) if options.average_with else models[0]
    if kind.families:
        add_tokenizer(model, options)
    elif options.meta is not None:
        raise model.refuse(f"--meta is the vocabulary of a model, and --to {to} has no place for one. Leave it out.")
    _refuse_flags(model, kind, options)
    if options.vocab_size is not None:
        _set_rows(model, options.vocab_size)
    if kind.families:
        _carry(model, kind, options)
    _set_tied(model, options)
    plan = kind.plan(model, options, target)
    if kind.families:
        _check_family(plan)
    return plan


def _refuse_target(plan: Plan) -> None:
    """Refuse a target whose name or type does not fit the plan; a device is not even moved aside."""
    target, safetensors = plan.target, (".safetensors",)
    wrong = (*safetensors, *TORCH_ENDINGS) if plan.is_folder else safetensors if plan.format == "pt" else ()
    if target.suffix in wrong:
        what = "a folder" if plan.is_folder else "a torch file"
        raise CheckpointMismatch(
            f"{target}: ends in {target.suffix}, and --to {plan.format} writes {what}. Name it otherwise."
        )
    if target.exists() and not (target.is_file() or target.is_dir()):
        raise CheckpointMismatch(f"{target}: is a device or a pipe, which is left where it is. Name another place.")


def _refuse_names(plan: Plan) -> None:
    """Refuse names and dtypes that safetensors does not support, by making all headers before anything is written."""
    for file in plan.files:
        if not file.is_torch:
            try:
                safetensors_writer.header([(t.path, t.dtype, t.view.shape, t.nbytes) for t in file.targets], {})
            except CheckpointMismatch as error:
                raise plan.model.refuse(str(error)) from error


def _refuse_flags(model: Source, kind: Format, options: Options) -> None:
    """Refuse flags that would have no effect."""
    if options.shard_size is not None and kind.name not in ("hf", "safetensors"):
        raise model.refuse(f"--shard_size cuts safetensors, and --to {kind.name} writes none. Leave it out.")
    if options.bpe_file is not None and (kind.name != "hf" or (model.tokenizer or {}).get("token_kind") != "gpt2"):
        raise model.refuse("--bpe_file: only a tokenizer.json of --to hf is made of GPT-2's ranks. Leave it out.")
    if options.include_optimizer and kind.name == "hf":
        raise model.refuse("--include_optimizer: a folder of transformers has no optimizer state. Leave it out.")
    if options.tied and model.family not in FAMILY:
        raise model.refuse("--tied needs to know which tensor is the head, and the program is not known. Leave it out.")
    # another program's config has the settings that a Megatron file lacks
    if options.choices and not kind.families:
        raise model.refuse(
            f"--{next(iter(options.choices))}: --to {kind.name} takes tensors as they are. Leave it out."
        )
    asked = [f"--{name}" for name in FLAGS if name in options.more]
    if asked and not (model.family.startswith("megatron_") and kind.families):
        raise model.refuse(
            f"{', '.join(asked)}: for settings that a Megatron file lacks, but this is {model.program} "
            f"with --to {kind.name}. Leave it out."
        )


def _carry(model: Source, kind: Format, options: Options) -> None:
    """Convert a model to the nearest family of a format, pair by pair."""
    way = _way(model, kind)
    if model.family == "hf_gpt2" and not way and "model_type" not in model.config:  # made from the choices
        (there_and_back,) = (pair for pair in PAIRS if (pair.theirs, pair.ours) == ("hf_gpt2", FUSED))
        there_and_back.carry(model, options, back=False)
        there_and_back.carry(model, options, back=True)
        return
    if model.family == FUSED and not way and not model.config.keys() >= {"n_head", "activation"}:
        model.config = complete(model, options)
    changes = bool(way)
    while way:
        pair, back = way[0]
        pair.carry(model, options, back)
        way = _way(model, kind)
    if changes:
        model.tensors = {name: model.tensors[name] for name in in_order(model.tensors, FAMILY[model.family])}


def _way(model: Source, kind: Format) -> Way:
    """The shortest way to a family of a format; our GPT leaves for the one of transformers and of litgpt that it is."""
    theirs = hf_family(model.config) if model.family == FUSED and "n_head" in model.config else None
    other = {*HF, *LITGPT} - {theirs, litgpt_family(model.config)} if theirs is not None else set()
    found = ways(model.family, lambda pair, back: back and pair.theirs in other)
    there = [found[family] for family in kind.families if family in found]
    if not there:
        others = [name for name in formats_of(ways(model.family_of_source)) if name != kind.name]
        raise model.refuse(f"{model.program} cannot become {kind.name}. It can become {', '.join(others)}.")
    way = min(there, key=len)
    if way and theirs == GPT2 == way[0][0].theirs and model.config.get("pos_encoding", "learned") != "learned":
        raise refuse_unknown(model)
    return way


def _set_rows(model: Source, rows: int) -> None:
    """Crop or pad the vocabulary to `rows` rows.

    Raises: CheckpointMismatch for fewer rows than tokens, if their number is known.
    """
    family = FAMILY.get(model.family)
    if family is None:
        raise model.refuse(
            "--vocab_size needs to know which tensor is the token table, and the program is not known. Leave it out."
        )
    said = model.config.get("vocab_size") if family.pads else None
    tokens = tokens_of(model.tokenizer) or (said if isinstance(said, int) else 0)
    if rows < tokens:
        raise model.refuse(
            f"--vocab_size {rows} would cut off tokens: the vocabulary has {tokens}. Only padding is cropped."
        )
    heads = (family.head, family.head.replace(".weight", ".bias"))
    for name in (family.embedding, *heads, *family.tables):
        view = model.tensors.get(name)
        if view is None or view.shape[0] == rows:
            continue
        if view.shape[0] > rows:
            made, rule = slice_axis(view, 0, 0, rows), f"crop {view.shape[0]} rows to {rows}"
        else:
            more = filled(view.dtype, (rows - view.shape[0], *view.shape[1:]))
            made, rule = concatenate([view, more]), f"pad {view.shape[0]} rows with zeros to {rows}"
        model.replace(name, made, rule)
    words = [word for word in ("vocab_size", "head_rows") if word in model.sizes]
    model.sizes = {**model.sizes, **dict.fromkeys(words, rows)}
    model.config |= {word: rows for word in ("vocab_size", "head_rows") if word in model.config}
    if model.moments is not None:
        model.notes.append(f"its optimizer state is left out: --vocab_size {rows} changes the parameters it belongs to")
    model.moments = None


def _set_tied(model: Source, options: Options) -> None:
    """Tie the head to the token table, or make it a tensor of its own, if an option asks for that."""
    family = FAMILY.get(model.family)
    if options.tied is None or family is None:
        return
    head, table = family.head, family.embedding
    if options.tied and head in model.tensors:
        if not model.is_tied(head, table):
            raise model.refuse(f"{head} has other values than {table}: --tied would change the model. Leave it out.")
        model.tie(head, table)
    if not options.tied and head not in model.tensors:
        model.replace(head, model.tensors[table], f"copy of {table}")
    for field in ("tied_head", "tie_word_embeddings"):
        if field in model.config:
            model.config[field] = options.tied


def _check_family(plan: Plan) -> None:
    """Match the plan with the table of the target's family: names, shapes and config have to fit."""
    model = plan.model
    shapes = {target.name: target.view.shape for target in plan.targets if target.is_weight}
    found = identify(shapes, model.config)
    faults = on_one_side(found.missing, found.unplaced)
    if found.family == UNKNOWN:
        faults.append(found.reason)
    elif found.family not in (model.family, FAMILY[model.family].name):
        faults.append(f"it would be taken for {found.program}")
    faults += found.conflicts
    if faults:
        raise CheckpointMismatch(f"{model.path}: the result would not be a valid {model.family}: {listed(faults, 5)}.")
