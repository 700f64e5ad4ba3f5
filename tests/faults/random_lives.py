"""Random lives of a model's folder: saves, kills, damage, edits, going back, pruning; the promises hold after each.

FAULTS_EXAMPLES=N python -m tests.faults random_lives
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import tempfile
import traceback
import warnings
from collections import Counter
from pathlib import Path

import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from core.bundle.folder import COMMITTED
from core.bundle.storage import DISK
from core.checkpoint import CheckpointManager
from core.loading.inference import load_chosen
from tests.faults.kill_points import Killer
from tests.faults.scenarios import NAME, Found, in_child, loaded, same
from tests.faults.tally import Tally
from tests.makers.models import SMALL, flip, manager, save_durably, started, update, weights

EXAMPLES = int(os.environ.get("FAULTS_EXAMPLES", "12"))
STEPS = 14
DONE: Counter[str] = Counter()
"""What was done in all lives of this process."""


class Life(RuleBasedStateMachine):
    """One folder, and beside it what was ever committed: the weights of each step, by a digest."""

    place: Path

    def __init__(self) -> None:
        super().__init__()
        torch.set_num_threads(1)
        DISK.change = Killer()  # no fsync
        self.root = Path(tempfile.mkdtemp(dir=self.place))
        self.folder = self.root / NAME
        self.committed: dict[str, int] = {}
        self.newest: Found = None
        self.batch_size = 4
        self.salt = 0

    def teardown(self) -> None:
        del DISK.change
        shutil.rmtree(self.root)

    # What is done

    @initialize()
    def begin(self) -> None:
        """Save some steps, so that there is always something to lose and to go back to."""
        self.save(3)
        (self.folder / "notes.txt").write_text("mine")

    @rule(steps=st.integers(1, 3))
    def save(self, steps: int) -> None:
        """Resume, train, and save each step."""
        made, model, optimizer = self._resumed()
        with made:
            for _ in range(steps):
                self._train(model, optimizer)
                save_durably(made, model, optimizer, step=model.step)
                assert self.newest is None or self.newest[0] in self._kept(), "the step before is not kept"
                self._commit(model)
        DONE["saves"] += steps

    @rule(at=st.integers(0, 70), midway=st.booleans())
    def kill(self, at: int, midway: bool) -> None:
        """Resume, train a step, and be killed at some storage call of its save, or after it."""
        made, model, optimizer = self._resumed()
        made.close()
        self._train(model, optimizer)
        before, after = self.newest, (model.step, weights(model))

        def work() -> None:
            child, resumed, moments = started(self.root, NAME, {})
            self._train(resumed, moments)
            killer = DISK.change = Killer(at)
            child.save(resumed, moments, step=resumed.step)
            child.close()
            killer.calls.clear()
            os.kill(os.getpid(), signal.SIGKILL)

        self.salt -= 1  # the child trains with the salt of the step that was trained here
        status = in_child(work)
        self.salt += 1
        assert os.WIFSIGNALED(status)
        found = loaded(self.root)
        assert found is not None
        assert same(found, before) or same(found, after), "neither the old nor the new step"
        if same(found, after):
            self._commit(model)
        DONE["kills"] += 1

    @precondition(lambda self: self._kept())
    @rule(
        name=st.sampled_from(["model.pt", "optimizer.pt", "tokenizer.json", "training_state.json"]),
        place=st.floats(0, 1),
        bit=st.integers(0, 7),
    )
    def corrupt(self, name: str, place: float, bit: int) -> None:
        """Flip a bit of the newest step, where an older one is kept; resume must not use it in silence."""
        pending = self.folder / COMMITTED / name  # after a kill the newest file may not be at the top yet
        if name == "training_state.json" and pending.exists():
            # A recovery that cannot read what was committed stops and says so (docs/commit_protocol.md, not covered).
            with CheckpointManager(NAME, self.root, say=lambda line: None):
                pending = self.folder / name
        path = pending if pending.exists() else self.folder / name
        flip(path, int(place * (path.stat().st_size - 1)), bit)
        lines: list[str] = []
        with CheckpointManager(NAME, self.root, say=lines.append) as made, made.newest_intact() as bundle:
            walked = any("the newest intact one" in line for line in lines)
            assert walked or any("used as it is" in line for line in lines), "used in silence"
            step = bundle.step
        found = loaded(self.root)
        assert found is not None and found[0] == step
        if walked:
            assert self.committed.get(_digest(found)) == step, "walked back to what was never committed"
            self.newest = found
        DONE["corruptions"] += 1

    @rule(size=st.integers(1, 64))
    def edit_config(self, size: int) -> None:
        """Edit config.json by hand: the next saves must leave it alone."""
        path = self.folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "batch_size": size}))
        self.batch_size = size
        DONE["edits"] += 1

    @precondition(lambda self: self._kept())
    @rule(data=st.data())
    def go_back(self, data: st.DataObject) -> None:
        """Go back to a kept step."""
        step = data.draw(st.sampled_from(self._kept()))
        expected = weights(load_chosen(self.folder, step, say=lambda line: None))
        with manager(self.root) as made:
            if made.saved_step() != step:
                made.go_back(step)
                self.newest = (step, expected)
        DONE["goings back"] += 1

    @rule()
    def prune(self) -> None:
        """Remove what was set aside."""
        with manager(self.root) as made:
            made.prune()
        assert not list(self.folder.glob("aside_*"))
        DONE["prunes"] += 1

    # What holds after each

    @invariant()
    def newest_is_found(self) -> None:
        """A reader finds the newest committed step, with the bits that were committed."""
        if self.newest is not None:
            assert same(loaded(self.root), self.newest)

    @invariant()
    def every_folder_is_a_whole_step(self) -> None:
        """What is kept was committed, bit for bit."""
        for step in self._kept():
            model = load_chosen(self.folder, step, say=lambda line: None)
            assert self.committed.get(_digest((step, weights(model)))) == step

    @invariant()
    def what_a_person_made_stays(self) -> None:
        """Nothing of the user's is gone, and edits stay."""
        if self.newest is not None and (self.folder / "notes.txt").exists():
            assert (self.folder / "notes.txt").read_text() == "mine"
            assert json.loads((self.folder / "config.json").read_text())["batch_size"] == self.batch_size

    # Ways and means

    def _resumed(self):
        made, model, optimizer = started(self.root, NAME, {} if self.newest else SMALL)
        if self.newest is not None:
            assert same((model.step, weights(model)), self.newest), "resumed from another step"
        return made, model, optimizer

    def _train(self, model, optimizer) -> None:
        """One step that no other step of this life equals."""
        update(model, optimizer)
        self.salt += 1
        with torch.no_grad():
            model.ln_f.weight += self.salt

    def _commit(self, model) -> None:
        self.newest = (model.step, weights(model))
        self.committed[_digest(self.newest)] = model.step

    def _kept(self) -> list[int]:
        return sorted(int(path.name[5:]) for path in self.folder.glob("step_*"))


def _digest(found: Found) -> str:
    assert found is not None
    tensors = b"".join(tensor.numpy().tobytes() for _, tensor in sorted(found[1].items()))
    return hashlib.sha256(f"{found[0]}".encode() + tensors).hexdigest()


def run(folder: Path, examples: int = EXAMPLES) -> Tally:
    """Live some lives, always the same ones, up to the first that breaks a promise, which is told step by step."""
    Life.place, tally = folder, Tally()
    DONE.clear()
    how = settings(
        max_examples=examples,
        stateful_step_count=STEPS,
        deadline=None,
        derandomize=True,
        phases=[Phase.generate],
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fork beside threads: torch has some that sleep
        try:
            run_state_machine_as_test(Life, settings=how)
        except Exception as error:
            notes = "\n".join(getattr(error, "__notes__", []))
            tally.losses.append(f"{type(error).__name__}: {error}\n{notes}\n{traceback.format_exc(limit=-3)}")
    tally.counts = Counter({"lives": examples}) + DONE
    return tally
