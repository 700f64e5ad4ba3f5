"""Files written in blocks: durable when they are closed, and closed when they cannot be made."""

from __future__ import annotations

import errno
import mmap
import os

import pytest

from core.bundle.output import SECTOR
from core.bundle.storage import Storage


class Watched(Storage):
    """Notes the calls, and lets one of them fail."""

    def __init__(self, failing: str = "") -> None:
        super().__init__()
        self.calls: list[str] = []
        self.opened: list[int] = []
        self.failing = failing

    def change(self, call, *args):
        self.calls.append(call.__name__)
        if call.__name__ == self.failing:
            raise OSError(errno.ENOSPC, "No space left on device")
        result = call(*args)
        if call is os.open:
            self.opened.append(result)
        return result


@pytest.mark.parametrize("size", [10, SECTOR, 3 * SECTOR - 7])
def test_a_file_of_blocks_is_synced_after_its_last_byte_and_before_it_is_closed(tmp_path, size):
    storage, memory = Watched(), mmap.mmap(-1, 3 * SECTOR)  # a map begins at a multiple of SECTOR
    memory[:size] = bytes(i % 251 for i in range(size))
    with storage.create_blocks(tmp_path / "blocks", size) as file:
        file.write(memoryview(memory), 0, size)
    assert (tmp_path / "blocks").read_bytes() == memory[:size]
    assert storage.calls[0] == "open" and storage.calls[-1] == "fsync" and storage.calls.count("fsync") == 1
    assert "pwrite" in storage.calls


def test_a_file_of_blocks_that_ends_in_an_error_is_closed_and_not_synced(tmp_path):
    storage = Watched()
    with pytest.raises(ZeroDivisionError), storage.create_blocks(tmp_path / "blocks", 10):
        raise ZeroDivisionError
    assert storage.calls == ["open"]
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(storage.opened[0])


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="this system cannot reserve room")
def test_a_file_for_which_there_is_no_room_leaves_no_descriptor_open(tmp_path, monkeypatch):
    # A tmpfs refuses unbuffered writes, and then nothing is reserved.
    storage = Watched(failing="posix_fallocate")
    monkeypatch.setattr("core.bundle.storage.BlockFile._set_unbuffered", lambda self, wanted: wanted)
    storage.unbuffered = True
    with pytest.raises(OSError, match="No space left on device"):
        storage.create_blocks(tmp_path / "blocks", 2 * SECTOR)
    assert storage.calls == ["open", "posix_fallocate"]
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(storage.opened[0])


@pytest.mark.parametrize("links", [True, False])
def test_what_is_published_replaces_a_file_only_when_that_is_wanted(tmp_path, links):
    storage, target = Watched(), tmp_path / "a"
    storage.links = links
    for text in (b"first", b"second"):
        with storage.published(target) as part:
            storage.write(part, text)
    assert target.read_bytes() == b"second" and storage.calls[-2:] == ["replace", "fsync"]
    if links:
        with pytest.raises(FileExistsError), storage.published(target, replace=False) as part:
            storage.write(part, b"third")
    with storage.published(tmp_path / "b", replace=False) as part:
        storage.write(part, b"fourth")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"second", "b": b"fourth"}


@pytest.mark.parametrize("failing", ["write", "fsync", "replace"])
def test_what_cannot_be_published_is_removed_and_the_target_stays(tmp_path, failing):
    (tmp_path / "a").write_bytes(b"before")
    storage = Watched(failing)
    with pytest.raises(OSError, match="No space left"), storage.published(tmp_path / "a") as part:
        storage.make_folder(part)
        storage.write(part / "x", b"after")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"before"}


def test_a_workplace_is_emptied_first_and_removed_last_and_a_file_in_its_place_stays(tmp_path):
    storage, folder = Storage(), tmp_path / "new/work"
    (folder / "left/over").mkdir(parents=True)
    with storage.workplace(folder, pytest.fail):
        assert list(folder.iterdir()) == []
        with pytest.raises(ZeroDivisionError), storage.workplace(folder, lambda: 1 / 0):
            pass
        storage.write(folder / "x", b"")
        storage.publish(folder, tmp_path / "made")
    assert not folder.exists() and [path.name for path in (tmp_path / "made").iterdir()] == ["x"]
    with pytest.raises(FileExistsError), storage.workplace(tmp_path / "made/x", pytest.fail):
        pass
    assert (tmp_path / "made/x").exists()
