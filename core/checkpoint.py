"""CheckpointManager: which step is resumed, what is saved with a step, and which steps are kept."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .bundle import intact, rewind
from .bundle.bundle import Bundle, newest_tokenizer
from .bundle.choice import LEGACY_FILES, holds_bundle
from .bundle.commit import MODEL
from .bundle.folder import top_state
from .bundle.foreign import refuse_foreign
from .bundle.names import file_in, model_folder
from .bundle.retention import best_step
from .bundle.rules import StepRules
from .bundle.training_state import RESUMES
from .bundle.writing import explained
from .config.gpt import GPTConfig
from .console.anchored import anchored
from .console.words import size_text
from .containers.json_files import dump_json, with_infinities
from .data.tokenizer import Tokenizer
from .errors import CheckpointDamaged, CheckpointError, InputError
from .inspection.notebook import steps_html
from .kinds import gpt_kind
from .kinds.gpt import given_fields
from .kinds.kind import ModelKind, Request, new_model
from .loading.also import also_restored
from .loading.inference import load_chosen
from .loading.known_sums import KnownSums
from .loading.live import fill_live
from .loading.tensors import load_averages, read_through
from .model import GPT, GPTBatched, GPTFlexAttention
from .networks.device import resolve_dtype
from .networks.frozen import Frozen
from .networks.wrappers import Modules, Optimizers, as_module
from .saving.also import captured
from .saving.consolidate import consolidate
from .saving.folder_writer import FolderWriter
from .saving.ranks import Ranks
from .saving.step import StepContent, add_metrics, refuse_unwritable, whole_step


class CheckpointManager(FolderWriter, StepRules):
    """The checkpoints of one model: a folder whose top is always the newest committed step, whole.

    `stage_memory` limits the bytes that hold a step on its way to disk; None is half of what is free when the first
    step is saved, and 48 MB are always allowed. `log_to` names who gets what `log` is given: csv, tensorboard, wandb,
    module:function, or a function itself. The attributes describe all other arguments.
    """

    def __init__(
        self,
        model_name: str,
        base_dir: str | Path = "checkpoints",
        *,
        keep: int = 1,
        keep_every: int | None = None,
        keep_best: int = 1,
        best_by: str = "val_loss",
        keep_steps: Iterable[int] | str = (),
        keep_optimizer: int | None = None,
        keep_within: int = 0,
        say: Callable[[str], None] = intact.say_on_stderr,
        save_policy: str = "wait",
        stage_memory: int | None = None,
        verify: bool = True,
        allow_fresh: bool = False,
        ranks: Ranks | None = None,
        log_to: str | Iterable[str | Callable[..., object]] = (),
    ) -> None:
        if save_policy not in ("wait", "skip") or (stage_memory is not None and stage_memory < 0):
            raise InputError(
                f"save_policy is {save_policy!r} and stage_memory {stage_memory}: expected wait or skip, and bytes."
            )
        FolderWriter.__init__(self, model_folder(base_dir, model_name), ranks or Ranks(), say, stage_memory, log_to)
        StepRules.__init__(self, keep, keep_every, keep_best, best_by, keep_steps, keep_optimizer, keep_within)
        self.model_name = model_name
        """Name of the model, and of its folder."""
        self.facts: dict[str, Any] = {}
        self.known_sums = KnownSums()
        """Entries of the training state of every later save, by name; `record` adds to them."""
        self.averages: dict[str, torch.Tensor] | None = None
        """The average of the weights at the resumed step, by their names; None where it has none."""
        self.save_policy = save_policy
        """When a save is due while another is being written: "wait" for it, or "skip" this one."""
        self.verify = verify
        """Whether checksums are compared on resume; if not, only what cannot be opened counts as damaged."""
        self.allow_fresh = allow_fresh
        """Whether, when no step is intact, everything in the folder is set aside and training starts from scratch."""
        self._frozen = Frozen()

    @classmethod
    def of_folder(cls, checkpoint_dir: str | Path, **settings: Any) -> CheckpointManager:
        """Manage the checkpoints of `model_name` below `base_dir`."""
        folder = anchored(checkpoint_dir)
        if folder.name in ("", ".."):
            folder = folder.resolve()
        return cls(folder.name, folder.parent, **settings)

    def get_path(self, filename: str = MODEL) -> Path:
        """Name a file in the model's folder.

        Raises: InputError when the name leads out of the folder.
        """
        return file_in(self.checkpoint_dir, filename)

    def exists(self) -> bool:
        """Whether the folder holds a checkpoint of any format."""
        return self.exists_new_format() or any(self.exists_legacy_format(name) for name in LEGACY_FILES)

    def exists_new_format(self) -> bool:
        """Whether the folder holds a committed bundle, at the top or kept."""
        return holds_bundle(self._folder)

    def exists_legacy_format(self, filename: str = "latest.pt") -> bool:
        """Whether the folder holds a single-file checkpoint of this name."""
        return self.get_path(filename).is_file()

    def newest_intact(self, origin: Path | None = None, *, to_train: bool = False) -> Bundle | None:
        """Open the newest step whose every file is intact, of a bundle or a single file; None where there is nothing.

        A damaged newest step is renamed aside and replaced by the newest intact one; both are reported. Where there are
        steps and none is intact, `allow_fresh` sets all of them aside and returns None. Every rank calls it. With
        `to_train`, what `start` needs stays in memory as it is checked, unless the machine has an accelerator.

        Raises: NoneIntact when there are steps and none is intact; Unspecified when another program's checkpoint is
            here, unless `allow_fresh` or it is the `origin` of a new run. Nothing is changed then.
        """
        reopen = functools.partial(self._reopen, to_train and not torch.accelerator.is_available())
        bundle = self.ranks.newest_intact(self._folder, reopen, self.verify)
        if bundle is None:
            refuse_foreign(self.checkpoint_dir, origin, self.allow_fresh, self.say)
        return bundle

    def _reopen(self, to_train: bool, check: bool, damage: str | None) -> Bundle | None:
        """Open the newest intact step, as the only writer where others are set aside.

        `damage` is the known damage of the newest one.
        """
        self._saver.join()
        found: BaseException | None = CheckpointDamaged(damage) if damage else None
        if not damage:
            try:
                with explained(self.checkpoint_dir):
                    return intact.open_unrepaired(self._folder, self.say, read_through, check=check, to_train=to_train)
            except intact.NeedsRepair as needed:
                found = needed.__cause__
        if isinstance(found, CheckpointError) and not self._folder.storage.may_change(self.checkpoint_dir):
            return intact.look_back(self._folder, found, self.say, read_through)
        with self.writing(), explained(self.checkpoint_dir):
            if damage and not self.allow_fresh:
                return intact.walk_back(self._folder, CheckpointDamaged(damage), self.say, read_through)
            open_to_train = rewind.open_or_clear if self.allow_fresh else intact.open_newest_intact
            return open_to_train(self._folder, self.say, read_through, check=check)

    def prune(
        self, keep: int | None = None, keep_every: int | None = None, *, dry_run: bool = False, **rules: Any
    ) -> int:
        """Remove and report what was set aside, and return the bytes freed; with a rule given, kept steps as well.

        Those are removed that the rules of the run, with the ones given (by the names of the manager's attributes), do
        not keep, and so are optimizer states. A `dry_run` reports what would be removed, and changes nothing.
        """
        if not self.ranks.world.is_first:
            return 0
        with self.writing(), explained(self.checkpoint_dir):
            return rewind.prune(self._folder, self.say, dry_run, keep=keep, keep_every=keep_every, **rules)

    def go_back(self, step: int) -> None:
        """Make a kept step the newest one again: training continues from it, and later steps are set aside.

        Raises: CheckpointNotFound when the step is not kept, CheckpointDamaged; nothing is changed then.
        """
        if self.ranks.world.is_first:
            with self.writing(), explained(self.checkpoint_dir):
                rewind.go_back(self._folder, step, self.say, read_through, check=self.verify)

    def consolidate(self) -> None:
        """Make plain files of the newest step, where it is in shards; after the last save."""
        if not self.ranks.world.is_first:
            return
        with self.writing(), explained(self.checkpoint_dir):
            made = consolidate(self._folder)
        if made is not None:
            with made:
                self.say(f"step {made.step} is in plain files now ({size_text(sum(made.sizes.values()))})")

    def initialize_for_training(
        self,
        config: GPTConfig | Mapping[str, Any],
        tokenization: str | Tokenizer,
        input_text: str | None,
        learning_rate: float,
        init_from_model: str | None = None,
        *,
        preset: Mapping[str, Any] | None = None,
        weight_decay: float | None = None,
        seed: int = 1337,
        bundle: Bundle | None = None,
    ) -> tuple[GPT, torch.optim.AdamW, int]:
        """Resume this model, or start it from another model's weights, or fresh; return model, optimizer and step.

        A field given in `config` (of a GPTConfig: one that differs from the default) wins over config.json of the
        checkpoint, which wins over `preset`. The head of a new model is the token table, without a bias, unless one of
        them has `tied_head` False or `head_bias` True (in a mapping: those are GPTConfig's defaults). Everything else,
        and what it raises, is as in `start`.
        """
        request = Request(
            given_fields(config),
            tokenization,
            learning_rate,
            weight_decay,
            preset=preset or {},
            text=input_text,
            seed=seed,
            init_from_model=init_from_model,
        )
        return self.start(gpt_kind(self.ranks.world), request, bundle)

    def start(self, kind: ModelKind, request: Request, bundle: Bundle | None = None) -> tuple[Any, Any, int]:
        """Resume this model, or start it; return it where it trains, with its optimizer and step. Every rank calls it.

        The manager holds the writer's lock from here on. A `bundle` is one that `newest_intact` has opened, so that
        nothing is verified twice; it is closed.

        Raises: CheckpointMismatch when the architecture or the tokenizer contradicts the checkpoint; both are shown.
        """
        self.acquire()
        bundle = bundle or self.newest_intact(request.origin.path if request.origin else None, to_train=True)
        if bundle is not None:
            with bundle:
                bundle.refuse_partial()
                model = kind.load(bundle, request, self.say)
                optimizer = kind.optimizer(model, request, bundle, self.say)
                self.went_on_from(bundle, model)
            self.known_sums.until_step_of(optimizer)
            refuse_unwritable(self.checkpoint_dir, model)
            return model, optimizer, model.step
        model = new_model(kind, request, self.checkpoint_dir, self.say, check=self.verify)
        refuse_unwritable(self.checkpoint_dir, model)
        return model, kind.optimizer(model, request, request.origin, self.say), 0

    def went_on_from(self, bundle: Bundle, model: nn.Module) -> None:
        """Remember the step that training continues from, and map its averaged weights, sharded like the model."""
        self.resumed = bundle.state
        self.known_sums = KnownSums(filter(None, (part.source.filled for part in bundle.torch_parts.values())))
        for part in bundle.torch_parts.values():
            part.source.filled = None  # it stays for as long as tensors lie in it
        self.logs.goes_on_from(bundle.step)
        if bundle.state.step is not None:
            self.record(resumes=[*(bundle.state.resumes or []), bundle.state.step][-RESUMES:])
        self.averages = load_averages(bundle, model)

    def record(self, **facts: Any) -> None:
        """Add facts to the training state of every later save, by name.

        Raises: InputError naming the entry that JSON cannot hold.
        """
        dump_json(facts)
        self.facts = {**self.facts, **facts}

    def log(self, step: int, **values: Any) -> None:
        """Log values of a step, such as its loss: numbers and texts, by name.

        They are in `metrics.jsonl` before a step that is not lower is committed, and loggers (`log_to`) get them after
        that commit. A run that continues from an earlier step drops what was logged after it. Logging costs memory
        only; where a logger fails, training continues. Ranks other than the first log nothing.

        Raises: InputError for anything else than a number or a text.
        """
        self.logs.add(whole_step(step), values)

    def save(
        self,
        model: Modules,
        optimizer: Optimizers | None = None,
        *,
        step: int,
        tokenizer: Tokenizer | Mapping[str, Any] | None = None,
        metrics: Mapping[str, float] | None = None,
        extra: Mapping[str, Any] | None = None,
        ema: Mapping[str, torch.Tensor] | None = None,
        also: Mapping[str, Any] | None = None,
        trainable_only: bool = False,
        before_commit: Callable[[], None] | None = None,
    ) -> bool:
        """Begin to commit a step of any module; after `wait` it is durable and older steps are pruned.

        A program that ends waits for it. Where no thread can be started, as in an atexit handler, it is durable on
        return, and its own error is raised.

        Training may continue at once: the next step of the optimizer waits until weights and state are copied.
        Anything else that may change, like buffers, is copied here; without an optimizer that is everything. `ema`
        are averages that change only after the optimizer's step. Returns False when another save is being written
        and the policy is to skip.

        Compiled and wrapped modules are saved under their plain names, tied weights once, views without the rest
        of their storage. Dicts and lists of modules, and of optimizers, are saved by name. A parameter of an optimizer
        outside the module is refused. Saving the same state at the same step again changes nothing. The metric of
        `best_by` in `metrics` decides which step is the best; `extra` is kept in the training state for the caller.
        `ema` is an average of the weights under the same names. `also` are other objects by name, whose states are
        copied here: anything with state_dict and load_state_dict, random generators, dicts and lists of tensors and
        arrays, and "all" for the generators of Python, NumPy and torch on every rank. `trainable_only` leaves out the
        parameters that require no gradient, and records their digests: `load` fills a module that has them.
        `before_commit` is called when the files are written, in the writer's thread.

        Raises: SaveFailed when the save before this one could not be committed (the last committed step is intact),
        CheckpointLocked, InputError.
        """
        step = whole_step(step)
        self.logs.begin_if_due()
        states = None if also is None else captured(also, self.ranks.world)
        if not self.ranks.may_begin(self._saver, self.save_policy == "skip", step, self.say):
            return False
        content = StepContent(
            model,
            optimizer,
            step,
            tokenizer=tokenizer,
            metrics=metrics,
            extra=extra,
            ema=ema,
            also=states,
            facts=self.facts,
            retention=self.rules,
            frozen=self._frozen if trainable_only else None,
            before_commit=lambda: self._before_commit(step, before_commit),
        )
        if (save := self.ranks.step_save(self._folder, content)) is not None:
            self._write(save, optimizer)
        return True

    def _before_commit(self, step: int, also: Callable[[], None] | None) -> None:
        if also is not None:
            also()
        self.logs.flush(step)

    def add_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record metrics of the newest step after it was saved; durable when this returns.

        Raises: SaveFailed when it could not be recorded (the step is intact), InputError when another is the newest.
        """
        if self.ranks.world.is_first:
            self.wait_written()
            self.logs.flush(step)
            with self.writing(), explained(self.checkpoint_dir):
                add_metrics(self._folder, step, metrics)
            self.logs.committed(step)

    def tokenizer_state(self, or_of: str | None = None) -> dict[str, Any] | None:
        """The tokenizer.json of the newest step, or one beside a config.json without weights; None without one.

        Where there is none, that of another model below the same root, if one is specified.
        """
        other = model_folder(self.checkpoint_dir.parent, or_of) if or_of else None
        return newest_tokenizer(self.checkpoint_dir) or (newest_tokenizer(other) if other else None)

    def saved_step(self) -> int | None:
        """The newest committed step; None where nothing is saved."""
        return top_state(self._folder).step

    def seed_in_use(self) -> int | None:
        """The seed of the run that saved the newest step; None where none is recorded. Every rank calls it."""
        top = top_state(self._folder)
        return self.ranks.world.from_first((top.training or {}).get("seed", top.seed))

    def _repr_html_(self) -> str:
        return steps_html(self.checkpoint_dir)

    @property
    def extra(self) -> dict[str, Any]:
        """The `extra` of the step that was loaded; empty where it has none."""
        return with_infinities(self.resumed.extra or {})

    def load(
        self,
        model: Modules,
        optimizer: Optimizers | None = None,
        *,
        also: Mapping[str, Any] | None = None,
        strict: bool = True,
    ) -> int:
        """Fill live modules, and their optimizers, from the newest intact step, and return that step; 0 for none.

        Everything of an optimizer comes back: its state of any shape, and every value of its groups, the learning rate
        among them, by the names of parameters, in any order and any groups. What has no counterpart is reported:
        parameters that were not trained before start from zero, those that are frozen now are dropped, and a value that
        the groups of the file do not agree on stays as it is. `strict=False` is for a module that was changed, like one
        with a new head: tensors that only one side has are left alone and reported. Dicts and lists are loaded as they
        were saved. `also` are the objects that were saved with the step, by the same names: each is restored in place.
        A step of `trainable_only` fills a module that has the frozen tensors beside which it was saved.

        Raises: CheckpointMismatch when names or shapes do not fit, or when an optimizer or object is of another class;
        nothing is changed then.
        """
        module = as_module(model)
        if (bundle := self.newest_intact()) is None:
            self.logs.goes_on_from(0)
            return 0
        with bundle:
            with also_restored(bundle, also, self.ranks.world, self.say, strict):
                fill_live(bundle, module, optimizer, self.say, strict, self._frozen)
            self.went_on_from(bundle, module)
            return bundle.step

    @staticmethod
    def load_for_inference(
        model_name: str,
        base_dir: str | Path = "checkpoints",
        legacy_filename: str | None = None,
        load_dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        step: int | str | None = None,
        bpe_file: Path | None = None,
        verify: bool = True,
        ema: bool = False,
    ) -> GPT | GPTBatched | GPTFlexAttention:
        """Load a model for inference: the newest step, a kept step, or the best one (`step="best"`).

        It is of the class that config.json names. `legacy_filename` names a single-file checkpoint in the
        folder, which wins over everything else in it. Checksums of what is read are compared, unless `verify` is off.
        With `ema` the average of the weights is used in their place.

        Raises: CheckpointNotFound, CheckpointDamaged (naming the newest intact step), CheckpointMismatch.
        """
        folder = model_folder(base_dir, model_name)
        number = best_step(folder) if step == "best" else int(step) if step is not None else None
        single = file_in(folder, legacy_filename).name if legacy_filename is not None else None
        dtype = resolve_dtype(load_dtype)
        return load_chosen(folder, number, single, device=device, dtype=dtype, bpe_file=bpe_file, check=verify, ema=ema)
