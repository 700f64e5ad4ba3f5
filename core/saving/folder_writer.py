"""The folder of one model as this process writes it: who may write, and the save that is under way."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Self

from ..bundle.commit import ModelFolder
from ..bundle.lock import hold
from ..bundle.probe import probe
from ..bundle.writing import explained, writing
from ..logs.hand_over import Logs
from ..networks.wrappers import Optimizers, optimizers_by_name, says_when_it_steps
from .background import BackgroundSaver
from .block_memory import Memory
from .ranks import Ranks
from .step import StepSave


class FolderWriter:
    """Holds the lock of a model's folder, and writes one step at a time in the background."""

    def __init__(
        self,
        checkpoint_dir: Path,
        ranks: Ranks,
        say: Callable[[str], None],
        stage_memory: int | None = None,
        log_to: str | Iterable[str | Callable[..., object]] = (),
    ) -> None:
        self.checkpoint_dir = checkpoint_dir
        """The folder of the model: `base_dir/model_name`, wherever the process goes later."""
        self.ranks = ranks
        """How the processes that train this model share its folder."""
        self.say = say
        """Called with each line that reports what was found, saved or removed."""
        self.logs = Logs(checkpoint_dir if ranks.world.is_first else None, log_to, say)
        """The log of the run, `metrics.jsonl`, and who gets it."""
        self._folder = ModelFolder(checkpoint_dir)
        self._held = contextlib.ExitStack()
        self._saver = BackgroundSaver(stage_memory)
        weakref.finalize(self, self._saver.last_words)

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def acquire(self) -> None:
        """Become the only process that writes this model, until `close`, and finish an interrupted save.

        Other managers and threads of this process may save: one write after the other.

        Raises: CheckpointLocked when another process writes here, SaveFailed where no checkpoint can be written.
        """
        self._held.enter_context(self.holding())
        self.logs.committed()

    def close(self) -> None:
        """Wait for the save that is being written, and let other processes write.

        Raises: SaveFailed when that save failed.
        """
        try:
            self.wait_written()
        finally:
            try:
                self.logs.settle(ends=True)
            finally:
                self._held.close()

    @contextlib.contextmanager
    def holding(self) -> Iterator[None]:
        """Keep other processes from writing while the block runs, and finish an interrupted save.

        Other managers and threads of this process may save: one write after the other.

        Raises: CheckpointLocked when another process writes here.
        """
        with contextlib.ExitStack() as held:
            if self.ranks.world.is_first:
                with self.writing():
                    held.enter_context(hold(self.checkpoint_dir, self.say))
                    self._probe()
            yield

    def _probe(self) -> None:
        """Find out, the first time, what the file system lacks, and say so; the caller is the only writer."""
        if line := probe(self._folder):
            self.say(line)

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Be the only writer while the block runs, in this process too; an interrupted save is finished first."""
        if self.ranks.world.is_first:
            self._saver.join()
        with writing(self._folder, self.say) if self.ranks.world.is_first else contextlib.nullcontext():
            yield

    def wait(self) -> None:
        """Wait until the last save is durable, and for at most ten seconds for loggers.

        Raises: SaveFailed when it, or an earlier save that was not asked about, could not be committed.
        """
        self.wait_written()
        self.logs.settle()

    def wait_written(self) -> None:
        """Wait until the last save is durable, as `wait`, and not for loggers."""
        self._saver.join()
        self.raise_failed()

    @property
    def durable_at(self) -> float | None:
        """When the last save that succeeded was durable, by time.monotonic; None where none was written here."""
        return self._saver.durable_at

    def raise_failed(self) -> None:
        """Raise the SaveFailed of a save that ended since the last call; at the edge of a step it costs nothing.

        The last committed step is intact, and training may continue.
        """
        self._saver.raise_failure()

    def _write(self, save: StepSave, optimizer: Optimizers | None) -> None:
        """Begin to write a step; the step of its optimizers waits until its copy is done."""
        held = save.lock(self.say)
        optimizers = [*(optimizers_by_name(optimizer) or {}).values()]
        waiting = [one for one in optimizers if says_when_it_steps(one)]

        def write(memory: Memory) -> None:
            with held, explained(self.checkpoint_dir):
                save.write(memory, self.say)
                self.logs.committed(save.step)

        try:
            if self.ranks.world.size == 1:  # in a run of several, `acquire` has done it
                self._probe()
            self._saver.begin(f"save of step {save.step}", write, save.snapshot, waiting)
        except BaseException:
            if not self._saver.busy:
                held.close()
            raise
        if not optimizers or len(waiting) < len(optimizers):
            save.snapshot.wait_copied()
