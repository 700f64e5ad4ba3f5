"""CheckpointManager: which step is resumed, what is saved with it, and what is kept."""

from __future__ import annotations

import contextlib
import dataclasses
import filecmp
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from core import intact, rewind, start
from core.bundle import OPTIMIZER, TOKENIZER, Bundle, Writer, history, write_bundle
from core.choice import LEGACY_FILES, seen_files
from core.commit import CONFIG, MODEL, ModelFolder, new_id
from core.config import EDITABLE, FORMAT_VERSION, GPTConfig, same_architecture
from core.containers.torch_zip_writer import file_size, write_torch_zip
from core.device import resolve_dtype
from core.errors import (
    CheckpointDamaged,
    CheckpointMismatch,
    CheckpointNotFound,
    InputError,
    SaveFailed,
)
from core.evolution import notes
from core.inference import load_chosen
from core.lineage import descent
from core.lock import hold
from core.materialize import fill, load_moments, load_optimizer
from core.model import GPT, GPTBatched, GPTFlexAttention
from core.optimizer import configure_optimizer
from core.retention import Retention, best_of
from core.speedrun import SpeedrunGPT
from core.speedrun_config import SpeedrunConfig
from core.speedrun_files import fill_speedrun
from core.state_dict import export_optimizer_state, export_state_dict, unwrap
from core.tokenizer import Tokenizer
from core.training_state import STATE, dump_json, parse_json, unseal


class CheckpointManager:
    """The checkpoints of one model: a folder whose top is always the newest committed step, whole.

    `keep` older steps stay beside it, and besides them the best by validation loss, every `keep_every`-th, and the
    one that was resumed from. `facts` go into the training state of every save.
    """

    def __init__(
        self,
        model_name: str,
        base_dir: str | Path = "checkpoints",
        *,
        keep: int = 1,
        keep_every: int | None = None,
        say: Callable[[str], None] = intact.say_on_stderr,
    ) -> None:
        if not model_name or model_name in (".", "..") or Path(model_name).name != model_name or "\\" in model_name:
            raise InputError(f"model name {model_name!r}: expected the name of one folder, without a path.")
        if keep < 0 or (keep_every is not None and keep_every < 1):
            raise InputError(f"keep is {keep} and keep_every {keep_every}: expected at least 0 and 1.")
        self.model_name = model_name
        self.checkpoint_dir = Path(base_dir) / model_name
        self.keep = keep
        self.keep_every = keep_every
        self.facts: dict[str, Any] = {}
        self.resumed: dict[str, Any] = {}
        self._folder = ModelFolder(self.checkpoint_dir)
        self._held = contextlib.ExitStack()
        self.say = say

    @classmethod
    def of_folder(cls, checkpoint_dir: str | Path, **settings: Any) -> CheckpointManager:
        """Manage the model whose folder this is."""
        folder = Path(checkpoint_dir)
        return cls(
            folder.name if folder.name not in ("", "..") else folder.resolve().name,
            folder.parent if folder.name not in ("", "..") else folder.resolve().parent,
            **settings,
        )

    # What is there

    def get_path(self, filename: str = MODEL) -> Path:
        """Name a file in the model's folder.

        Raises: InputError when the name leads out of the folder.
        """
        path = self.checkpoint_dir / filename
        name = Path(os.path.normpath(filename))  # a link in the folder may lead where its owner likes
        if name == Path():
            raise InputError(f"{filename!r}: expected the name of a file in {self.checkpoint_dir}.")
        if name.is_absolute() or name.parts[0] == "..":
            raise InputError(
                f"{filename!r} leads out of {self.checkpoint_dir}; a file of the model stays in its folder."
            )
        return path

    def exists(self) -> bool:
        """Whether the folder holds a checkpoint of any format."""
        return self.exists_new_format() or any(self.exists_legacy_format(name) for name in LEGACY_FILES)

    def exists_new_format(self) -> bool:
        """Whether the folder holds a committed bundle, at the top or kept."""
        names = {CONFIG, MODEL}
        top = set(self._folder.storage.names(self.checkpoint_dir))
        pending = set(self._folder.storage.names(self._folder.committed))
        return names <= top | pending or bool(self._folder.kept_steps())

    def exists_legacy_format(self, filename: str = "latest.pt") -> bool:
        """Whether the folder holds a single-file checkpoint of this name."""
        return self.get_path(filename).is_file()

    # Writing needs the lock

    def __enter__(self) -> CheckpointManager:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def acquire(self) -> None:
        """Become the only writer of this model, until `close`, and finish what an interrupted save left.

        Raises: CheckpointLocked when another process writes here.
        """
        with self.writing():
            self._held.enter_context(hold(self.checkpoint_dir))

    def close(self) -> None:
        """Let other processes write."""
        self._held.close()

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Be the only writer while the block runs; what an interrupted save left is finished first."""
        with contextlib.ExitStack() as held:
            with self._explained():
                self.checkpoint_dir.mkdir(parents=True, exist_ok=True)
                held.enter_context(hold(self.checkpoint_dir))
                self._folder.recover()
            yield

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            place = error.filename or self.checkpoint_dir
            raise SaveFailed(f"{place}: {error.strerror}. Nothing that was committed is lost.") from error

    # Resume

    def newest_intact(self, *, allow_fresh: bool = False, verify: bool = True) -> Bundle | None:
        """Open the newest step whose every file is intact, of a bundle or a single file; None where there is nothing.

        A damaged newest step is renamed aside, the newest intact one takes its place, and both are said. Where there
        are steps and none is intact, `allow_fresh` moves all of it aside and gives None. Without `verify`, only what
        cannot be opened counts as damaged.

        Raises: NoneIntact when there are steps and none is intact; nothing is changed then.
        """
        with self.writing(), self._explained():
            open_to_train = rewind.open_or_clear if allow_fresh else intact.open_newest_intact
            return open_to_train(self._folder, self.say, check=verify)

    def prune(self, keep: int | None = None, keep_every: int | None = None) -> int:
        """Remove what was set aside, name it, and return the bytes freed; with a number given, kept steps as well.

        Then those go that the rules of the run, with these numbers, do not keep.
        """
        with self.writing(), self._explained():
            newest, kept = self._top_state(), history(self.checkpoint_dir)
            asked = keep is not None or keep_every is not None
            going = Retention.of(newest).given(keep, keep_every).going(newest, kept) if asked else []
            return rewind.prune(self._folder, going, self.say)

    def go_back(self, step: int, *, verify: bool = True) -> None:
        """Make a kept step the newest one again: training goes on from it, and what came after it is kept aside.

        Raises: CheckpointNotFound when the step is not kept, CheckpointDamaged; nothing is changed then.
        """
        with self.writing(), self._explained():
            rewind.go_back(self._folder, step, self.say, check=verify)

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

        A field given in `config` (of a GPTConfig: one that is not the default) wins over config.json of the
        checkpoint, which wins over `preset`. The manager holds the writer's lock from here on. A `bundle` is what
        `newest_intact` has opened before, so that nothing is verified twice; it is closed.

        Raises: CheckpointMismatch when the architecture or the tokenizer contradicts the checkpoint; both are shown.
        """
        self.acquire()
        given = start.given_fields(config)
        bundle = bundle or self.newest_intact()
        if bundle is not None:
            with bundle:
                start.refuse_stray_config(bundle)
                for line in notes(str(bundle.path(CONFIG)), bundle.config, bundle.state):
                    self.say(line)
                model = start.resume(bundle, given, tokenization)
                state = load_optimizer(bundle)
                self._say_without_moments(bundle, state)
                where = bundle.path(OPTIMIZER)

                def say(line: str) -> None:
                    self.say(f"{where}: {line}")

                try:
                    optimizer = configure_optimizer(model, learning_rate, weight_decay, state, say)
                except CheckpointMismatch as error:
                    raise CheckpointMismatch(f"{where}: {error}") from error
            self.resumed = bundle.state
            return model, optimizer, model.step
        tokenizer = start.find_tokenizer(tokenization, input_text)
        alone = start.config_alone(self.checkpoint_dir, given, tokenizer, self.say)
        if init_from_model:
            other = CheckpointManager(init_from_model, self.checkpoint_dir.parent)
            with intact.open_chosen(other.checkpoint_dir, self.say) as bundle:
                model = start.from_weights(bundle, {**alone, **given}, tokenizer)
                self.say(f"starting from the weights of {init_from_model}, step {bundle.step}")
        else:
            model = start.fresh({**(preset or {}), **alone, **given}, tokenizer, seed)
        return model, configure_optimizer(model, learning_rate, weight_decay), 0

    def _say_without_moments(self, bundle: Bundle, state: dict[str, Any] | None) -> None:
        if state is None and bundle.step:
            place = bundle.path(bundle.single) if bundle.single else bundle.folder
            self.say(f"{place}: no optimizer state; its moments start from zero at step {bundle.step}")

    # Save

    def save(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Mapping[str, Any] | None = None,
        *,
        step: int,
        tokenizer: Tokenizer | Mapping[str, Any] | None = None,
        metrics: Mapping[str, float] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        """Commit a step of any module; when this returns it is durable, and the older steps are pruned.

        Compiled and wrapped modules are saved under their plain names, tied weights once, views without the rest
        of their storage. The same state at the same step again changes nothing. `metrics` with a `val_loss` decide
        which step is the best; `extra` is kept in the training state for the caller.

        Raises: SaveFailed when it could not be committed; the last committed step is intact.
        """
        module = unwrap(model)
        weights = export_state_dict(module)
        moments = (
            export_optimizer_state(optimizer, module) if isinstance(optimizer, torch.optim.Optimizer) else optimizer
        )
        with self.writing(), self._explained():
            files = self._files(module, weights, moments, tokenizer or getattr(module, "tokenizer", None))
            state = self._state(step, OPTIMIZER in files, metrics, extra)
            started = time.perf_counter()
            if not self._stage_and_commit(state, files, [weights, moments]):
                self.say(f"step {step} is already saved in {self.checkpoint_dir}")
                return
            size = sum(entry.stat().st_size for entry in os.scandir(self._folder.committed))
            self._folder.roll_forward()
            self._prune(state)
        self.say(
            f"saved step {step} to {self.checkpoint_dir} ({size / 1e6:.1f} MB, {time.perf_counter() - started:.2f} s)"
        )

    def _files(
        self, module: nn.Module, weights: Any, moments: Any, tokenizer: Tokenizer | Mapping[str, Any] | None
    ) -> dict[str, Writer | dict]:
        files: dict[str, Writer | dict] = {MODEL: lambda output: write_torch_zip(output, weights)}
        if moments is not None:
            files[OPTIMIZER] = lambda output: write_torch_zip(output, moments)
        files[CONFIG] = self._config_to_save(module)
        if tokenizer is not None:
            files[TOKENIZER] = dict(tokenizer) if isinstance(tokenizer, Mapping) else tokenizer.state()
        return files

    def _config_to_save(self, module: nn.Module) -> dict[str, Any]:
        """The architecture of the module, with what a person edited in the config.json at the top."""
        config = getattr(module, "config", None)
        if isinstance(config, GPTConfig):
            values = config.to_dict()
        elif isinstance(config, SpeedrunConfig):
            values = config.to_dict(type(module).__qualname__)
        else:
            values = {"model_class": type(module).__qualname__, "format_version": FORMAT_VERSION}
        with contextlib.suppress(FileNotFoundError, CheckpointDamaged):
            top = parse_json(self._folder.read(CONFIG), CONFIG)
            if same_architecture(top, values):
                values.update({name: top[name] for name in EDITABLE if name in top})
        return values

    def _state(
        self, step: int, has_optimizer: bool, metrics: Mapping[str, float] | None, extra: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        top, kept = self._top_state(), history(self.checkpoint_dir)
        best = best_of(top, kept)
        loss = (metrics or {}).get("val_loss")
        if loss is not None and (best is None or loss < best["val_loss"]):
            best = {"step": step, "val_loss": loss}
        state = {
            "step": step,
            "optimizer_file": OPTIMIZER if has_optimizer else None,
            "format_version": FORMAT_VERSION,
            "commit_id": new_id(),
            "parent": self._folder.newest_id(),
            **descent(top, (step.state for step in kept)),
            "saved_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "best": best,
            "retention": dataclasses.asdict(self._retention()),
            **self.facts,
        }
        if seen := seen_files(self.checkpoint_dir, top.get("legacy", [])):
            state["legacy"] = seen
        if clash := state.keys() & (metrics or {}).keys():
            raise InputError(f"metrics: {', '.join(sorted(clash))} is what the training state calls something else.")
        state |= dict(metrics or {}) | ({"extra": dict(extra)} if extra else {})
        try:
            dump_json(state)
        except (TypeError, ValueError) as error:
            raise InputError(f"metrics or extra of step {step}: {error}. They are written as JSON.") from error
        return state

    def tokenizer_state(self) -> dict[str, Any] | None:
        """The tokenizer.json of the newest step, or one that waits beside a config.json alone; None without one."""
        try:
            return parse_json(self._folder.read(TOKENIZER), str(self.checkpoint_dir / TOKENIZER))
        except FileNotFoundError:
            return None

    def saved_step(self) -> int | None:
        """The newest committed step; None where nothing is saved."""
        return self._top_state().get("step")

    def _top_state(self) -> dict[str, Any]:
        try:
            return unseal(self._folder.read(STATE), str(self.checkpoint_dir / STATE))
        except (FileNotFoundError, CheckpointDamaged):
            return {}

    def _stage_and_commit(self, state: dict[str, Any], files: dict[str, Writer | dict], content: list[Any]) -> bool:
        stage = None
        try:
            stage = self._folder.stage()
            write_bundle(self._folder, stage, state, files)
            if self._is_newest(stage):
                self._folder.discard(stage)
                return False
            self._folder.commit(stage)
        except OSError as error:
            if stage is not None:
                # A disk that fails may refuse this as well; the next writer removes what is left.
                with contextlib.suppress(OSError):
                    self._folder.discard(stage)
            raise self._save_failed(
                state["step"], error, sum(file_size(c) for c in content if c is not None)
            ) from error
        return True

    def _is_newest(self, stage: Path) -> bool:
        """Whether a staged step holds what the top holds already, byte for byte."""
        top, staged = self._top_state(), unseal(self._folder.storage.read(stage / STATE), STATE)
        if any(top.get(key) != staged.get(key) for key in ("step", "optimizer_file")) or "integrity" not in top:
            return False
        files = {key: value for key, value in staged["integrity"]["files"].items() if key != CONFIG}
        return files == {key: value for key, value in top["integrity"]["files"].items() if key != CONFIG} and all(
            filecmp.cmp(stage / name, self.checkpoint_dir / name, shallow=False) for name in files
        )

    def _save_failed(self, step: int, error: OSError, needed: int) -> SaveFailed:
        top = self._top_state()
        stays = f"Step {top['step']} is intact." if "step" in top else "Nothing was saved before."
        sizes = ""
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(self.checkpoint_dir).free
            sizes = f" ({needed / 1e6:.1f} MB needed, {free / 1e6:.1f} MB free)"
        return SaveFailed(f"{self.checkpoint_dir}: save of step {step} failed: {error.strerror}{sizes}. {stays}")

    def _prune(self, state: dict[str, Any]) -> None:
        kept = history(self.checkpoint_dir)
        self._folder.prune([step.step for step in self._retention().going(state, kept)])

    def _retention(self) -> Retention:
        return Retention(self.keep, self.keep_every, self.resumed.get("step"))

    # Load

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None, *, strict: bool = True) -> int:
        """Fill a live module, and its optimizer, from the newest intact step, and return that step; 0 for none.

        Moments follow the names of their parameters, whatever the order or the groups. Those of parameters that were
        not trained before start from zero, those of frozen ones are dropped; both are said. `strict=False` is for a
        module that was changed, like one with a new head: tensors that only one side has are left alone, and said.

        Raises: CheckpointMismatch when names or shapes do not fit; the module is unchanged then.
        """
        bundle = self.newest_intact()
        if bundle is None:
            return 0
        with bundle:
            module = unwrap(model)
            if isinstance(module, SpeedrunGPT):
                fill_speedrun(bundle, module)
            else:
                for line in fill(bundle, module, strict):
                    self.say(f"{bundle.path(MODEL)}: {line}")
            if optimizer is not None:
                self._say_without_moments(bundle, load_moments(bundle, module, optimizer, self.say, strict))
            self.resumed = bundle.state
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
    ) -> GPT | GPTBatched | GPTFlexAttention:
        """Load a model to write text with: the newest step, a kept step, or the best one (`step="best"`).

        It is of the class that config.json names. `legacy_filename` takes a single-file checkpoint in the folder,
        whatever else is there. The checksums of what is read are compared, unless `verify` is off.

        Raises: CheckpointNotFound, CheckpointDamaged (naming the newest intact step), CheckpointMismatch.
        """
        manager = CheckpointManager(model_name, base_dir)
        number = manager._best_step() if step == "best" else int(step) if step is not None else None
        single = manager.get_path(legacy_filename).name if legacy_filename is not None else None
        return load_chosen(
            manager.checkpoint_dir,
            number,
            single,
            device=device,
            dtype=resolve_dtype(load_dtype),
            bpe_file=bpe_file,
            check=verify,
        )

    def _best_step(self) -> int:
        best = best_of(self._top_state(), history(self.checkpoint_dir))
        if not best:
            raise CheckpointNotFound(f"{self.checkpoint_dir}: no step has a validation loss, so none is the best.")
        return int(best["step"])
