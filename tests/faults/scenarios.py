"""What is interrupted: saves, prunes, migrations, recoveries and walk backs of real folders; and what must hold then.

Each is killed at every storage call (kill_points.py), has every call fail (failing_calls.py), and loses power at every
call (power_loss.py).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from core.bundle import probe
from core.bundle.bundle import open_bundle
from core.bundle.commit import MODEL, ModelFolder
from core.bundle.folder import COMMITTED
from core.bundle.storage import DISK
from core.bundle.training_state import STATE, TrainingState
from core.bundle.verify import verify
from core.conversion.migration.migrate import migrate
from core.conversion.migration.plan import find
from core.errors import CheckpointError
from core.loading.inference import load_chosen
from tests.faults.tally import Tally
from tests.makers.models import equal, flip, manager, save_durably, started, train_and_save, update, weights

probe.ENABLED = False  # its calls are no part of a save

NAME = "dante"
Act = Callable[[], None]
Found = tuple[int, dict[str, torch.Tensor]] | None
"""What a reader finds: step and weights, or None where it is told that there is nothing good."""


@dataclass(frozen=True)
class Scenario:
    """A folder, and what is done in it; `prepare` makes no change that an interruption would have to survive."""

    before: Callable[[Path], None]
    prepare: Callable[[Path], Act]
    links: bool = True
    folder_renames: bool = True

    def set_disk(self) -> None:
        """Switch off what the file system of this scenario lacks."""
        DISK.links, DISK.folder_renames = self.links, self.folder_renames


# Folders to begin with


def nothing(root: Path) -> None:
    """No folder at all."""


def three_saves(root: Path) -> None:
    """Step 3 at the top, steps 1 and 2 kept, and a file of the user's."""
    made, model, optimizer = started(root, keep=9)
    train_and_save(made, model, optimizer, 3)
    made.close()
    (root / NAME / "notes.txt").write_text("mine")


def single_file(root: Path) -> None:
    """A single-file checkpoint of step 3."""
    _singles(root, {"latest.pt": 3})


def two_single_files(root: Path) -> None:
    """Single-file checkpoints of steps 3 and 2."""
    _singles(root, {"latest.pt": 3, "final.pt": 2})


def single_file_older_than_a_bundle(root: Path) -> None:
    """A bundle of steps 3, 2 and 1, and a single file that becomes another kept step: it is of step 0."""
    _singles(root, {"latest.pt": 0})
    three_saves(root)


def _singles(root: Path, steps: dict[str, int]) -> None:
    made, model, optimizer = started(root)
    for step in range(max(steps.values()) + 1):
        content = {"model_state_dict": model.state_dict(), "optimizer_state_dict": optimizer.state_dict(), "step": step}
        content |= {"config": model.config.to_dict(), "tokenizer": model.tokenizer.state()}
        for name in (name for name, of in steps.items() if of == step):
            torch.save(content, root / NAME / name)
        update(model, optimizer)
    made.close()


def damaged_top(root: Path) -> None:
    """Three saves, one bit of the newest model.pt flipped."""
    three_saves(root)
    flip(root / NAME / "model.pt", 4000)


def reset_disk() -> None:
    """Make the disk the real one again."""
    DISK.__dict__.pop("change", None)
    DISK.links = DISK.folder_renames = True


def killed(at: Callable[..., bool], prepare: Callable[[Path], Act], **lacking: bool) -> Callable[[Path], None]:
    """Three saves, and what a process that was killed right after some call of something left."""

    def before(root: Path) -> None:
        three_saves(root)

        def work() -> None:
            Scenario(three_saves, prepare, **lacking).set_disk()
            act = prepare(root)
            DISK.change = lambda call, *args: (call(*args), at(call, *args) and os.kill(os.getpid(), signal.SIGKILL))[0]
            act()

        assert os.WIFSIGNALED(in_child(work)), "it was not killed"

    return before


def in_child(work: Act) -> int:
    """Run something in a forked child, and return how it ended."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    return os.waitpid(pid, 0)[1]


def renamed_to(name: str) -> Callable[..., bool]:
    """The call that gives a file or folder this name."""
    return lambda call, *args: call is os.replace and args[1].name == name


# What is done


def saving(step_again: bool = False, optimizer: bool = True, **settings: Any) -> Callable[[Path], Act]:
    """Resume, train one step, and save it; or save another state of the same step."""

    def prepare(root: Path) -> Act:
        made, model, moments = started(root, **settings)
        if step_again:
            with torch.no_grad():
                model.ln_f.weight += 1
        else:
            update(model, moments)

        def act() -> None:
            save_durably(made, model, moments if optimizer else None, step=model.step)
            made.close()

        return act

    return prepare


def saving_and_pruning_two(root: Path) -> Act:
    """Save a step, where none of the older ones is to stay but the newest."""
    made, model, optimizer = started(root)
    made.resumed = TrainingState()
    update(model, optimizer)

    def act() -> None:
        save_durably(made, model, optimizer, step=model.step)
        made.close()

    return act


def measuring(root: Path) -> Act:
    """Add a loss to the step that was saved last."""
    made, model, _ = started(root)

    def act() -> None:
        made.add_metrics(model.step, {"val_loss": 1.5})
        made.close()

    return act


def migrating(root: Path) -> Act:
    """Bring the single files of a folder over, as convert_checkpoints.py does."""
    folder = root / NAME

    def act() -> None:
        for paths in find([folder]).folders.values():
            for outcome in migrate(folder, paths):
                if outcome.error:
                    raise CheckpointError(outcome.error)

    return act


def recovering(root: Path) -> Act:
    """What every writer does first."""

    def act() -> None:
        with manager(root):
            pass

    return act


def resuming(root: Path) -> Act:
    """Open the newest intact step to train on: walks back from a damaged one."""

    def act() -> None:
        bundle = manager(root).newest_intact()
        assert bundle is not None
        bundle.close()

    return act


def going_back(root: Path) -> Act:
    """What `train.py --resume_from 1` does to the folder."""

    def act() -> None:
        with manager(root) as made:
            made.go_back(1)

    return act


def saving_beside_training(root: Path) -> Act:
    """Save a step, and train on while it is written."""
    made, model, optimizer = started(root)
    update(model, optimizer)

    def act() -> None:
        step = model.step
        made.save(model, optimizer, step=step)
        for _ in range(3):
            update(model, optimizer)
        made.close()
        model.step = step

    return act


SCENARIOS: dict[str, Scenario] = {
    "first save": Scenario(nothing, saving()),
    "first save beside a single file": Scenario(single_file, saving()),
    "next save": Scenario(three_saves, saving()),
    "next save without hard links": Scenario(three_saves, saving(), links=False),
    "save beside training": Scenario(three_saves, saving_beside_training),
    "save that prunes two": Scenario(three_saves, saving_and_pruning_two),
    "save that prunes two without renames of folders": Scenario(
        three_saves, saving_and_pruning_two, folder_renames=False
    ),
    "save that removes optimizer states": Scenario(three_saves, saving(keep=9, keep_optimizer=0)),
    "save that removes optimizer states without renames of folders": Scenario(
        three_saves, saving(keep=9, keep_optimizer=0), folder_renames=False
    ),
    "save without optimizer": Scenario(three_saves, saving(optimizer=False)),
    "another state of the same step": Scenario(three_saves, saving(step_again=True)),
    "migration of a file": Scenario(single_file, migrating),
    "measure after a save": Scenario(three_saves, measuring),
    "migration of two files": Scenario(two_single_files, migrating),
    "migration to a kept step": Scenario(single_file_older_than_a_bundle, migrating),
    "recovery of a commit": Scenario(killed(renamed_to(COMMITTED), saving()), recovering),
    "recovery of a commit without links": Scenario(
        killed(renamed_to(COMMITTED), saving(), links=False), recovering, links=False
    ),
    "recovery of a commit without renames of folders": Scenario(
        killed(renamed_to(COMMITTED), saving(), folder_renames=False), recovering, folder_renames=False
    ),
    "recovery of half a roll forward": Scenario(killed(renamed_to("model.pt"), saving()), recovering),
    "recovery of a half-written step": Scenario(killed(lambda call, *_: call is os.write, saving()), recovering),
    "recovery of a prune": Scenario(killed(lambda call, *_: call is os.unlink, saving_and_pruning_two), recovering),
    "back to an older step": Scenario(three_saves, going_back),
    "back to an older step without hard links": Scenario(three_saves, going_back, links=False),
    "back to an older step without renames of folders": Scenario(three_saves, going_back, folder_renames=False),
    "walk back": Scenario(damaged_top, resuming),
    "walk back without hard links": Scenario(damaged_top, resuming, links=False),
}


# What must hold


def loaded(root: Path) -> Found:
    """What a program that only reads finds."""
    try:
        model = load_chosen(root / NAME, say=lambda line: None)
    except CheckpointError:
        return None
    return model.step, weights(model)


def same(a: Found, b: Found) -> bool:
    """Whether two readers found the same step with the same bits."""
    return a is b is None or (a is not None and b is not None and a[0] == b[0] and equal(a[1], b[1]))


def contents(root: Path) -> dict[str, str]:
    """The content of every file a user would miss, as a digest, and one name of it."""
    return {
        hashlib.sha256(path.read_bytes()).hexdigest(): str(path.relative_to(root))
        for path in (root / NAME).rglob("*")
        if path.suffix in (".pt", ".txt") and path.is_file() and not re.search(r"/\.(stage|trash)-", str(path))
    }


def whole_steps(root: Path) -> dict[str, str]:
    """Every kept step and every one put aside that is whole, as a digest of its tensors; and its folder's name."""
    found = {}
    for folder in (root / NAME).glob("[sa]*_*"):
        try:
            with open_bundle(folder) as bundle:
                verify(bundle)
                files = [folder / name for name in bundle.files if name.endswith(".pt")]
        except CheckpointError:
            continue
        found[hashlib.sha256(b"".join(path.read_bytes() for path in sorted(files))).hexdigest()] = folder.name
    return found


def broken_steps(root: Path) -> list[str]:
    """What is wrong with the kept steps, each of which is whole at every moment, with its optimizer or without."""
    found = []
    for folder in ModelFolder(root / NAME).kept_steps().values():
        try:
            with open_bundle(folder) as bundle:
                verify(bundle)
        except CheckpointError as error:
            found.append(str(error))
    return found


DRAWN_ANEW = {"commit_id", "parent", "run", "saved_at", "went_back", "branch", "integrity"}


def listing(root: Path) -> dict[str, Any]:
    """What a folder holds, but for what is drawn anew in every run, and for what was put aside."""
    found: dict[str, Any] = {}
    for path in sorted((root / NAME).rglob("*")):
        name = str(path.relative_to(root))
        if "/aside_" in name or path.name.startswith(".lock"):
            continue
        if path.name == STATE:
            state = json.loads(path.read_text())
            found[name] = {k: v for k, v in state.items() if k not in DRAWN_ANEW}
        else:
            found[name] = path.read_bytes() if path.is_file() else None
    return found


@dataclass
class Expected:
    """What a scenario leads to when nothing interrupts it, and what has to outlive it."""

    scenario: Scenario
    old: Found
    new: Found
    before: dict[str, Any]
    end: dict[str, Any]
    contents: dict[str, str]
    steps: dict[str, str]

    @classmethod
    def of(cls, scenario: Scenario, base: Path, whole: Path) -> Expected:
        """Compare a folder before with the same one after it; what is gone then is gone by the user's will."""
        left, steps = contents(whole), whole_steps(whole)
        return cls(
            scenario,
            loaded(base),
            loaded(whole),
            listing(base),
            listing(whole),
            {digest: name for digest, name in contents(base).items() if digest in left},
            {digest: name for digest, name in whole_steps(base).items() if digest in steps},
        )

    def check_interrupted(self, root: Path, tally: Tally, where: str) -> Found:
        """Check what an interruption left for those who only read; return what they find."""
        found = loaded(root)
        tally.check(same(found, self.old) or same(found, self.new), f"{where}: a reader finds neither old nor new")
        there = contents(root)
        gone = [name for digest, name in self.contents.items() if digest not in there]
        tally.check(not gone, f"{where}: the content of {gone} is nowhere")
        tally.check(not (broken := broken_steps(root)), f"{where}: {broken}")
        return found

    def check_finished(self, root: Path, found: Found, tally: Tally, where: str, again: Act | None = None) -> None:
        """Let the next run do its work, or the same one once more; check that it ends as if nothing had happened."""
        is_done = same(found, self.new) and not same(self.old, self.new)
        self.scenario.set_disk()
        try:
            (again or (recovering if is_done else self.scenario.prepare)(root))()
            recovering(root)()  # a load alone changes nothing where the newest step is whole, rolled forward or not
        except (CheckpointError, OSError) as error:
            tally.losses.append(f"{where}: the next run says {error!r}")
            return
        tally.check(same(loaded(root), self.new), f"{where}: the next run leads to another step")
        plain = torch.load(root / NAME / MODEL, weights_only=True)
        tally.check(self.new and equal(plain, self.new[1]), f"{where}: plain torch.load finds other weights")
        there, end = whole_steps(root), listing(root)
        lost = [name for digest, name in self.steps.items() if digest not in there]
        tally.check(not lost, f"{where}: {lost} is whole nowhere after the next run")
        # A prune that did not come about is left to the next save: what was there before may still be there.
        # So is the removal of an optimizer state, before which the training state of its step is replaced.
        differs = [n for n in end.keys() | self.end.keys() if end.get(n) != self.end.get(n, self.before.get(n))]
        states = re.compile(rf"{NAME}/step_\d+/{re.escape(STATE)}")
        differs = [n for n in differs if not (states.fullmatch(n) and end.get(n) == self.before.get(n, ...))]
        tally.check(not differs, f"{where}: after the next run {sorted(differs)} differ from a run never interrupted")
