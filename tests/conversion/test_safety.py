"""A conversion killed at any moment, refused, on a full disk, or in little memory."""

from __future__ import annotations

import json
import os
import shutil
import zlib
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import convert_checkpoints
from core.bundle.storage import DISK
from core.containers.open import open_container
from core.conversion import proof
from core.conversion import writing as engine
from core.conversion.plan import Options, Plan
from core.conversion.planning import plan_conversion
from core.errors import CheckpointDamaged, CheckpointError, CheckpointLocked, CheckpointMismatch, SaveFailed
from tests.makers.conversions import Killed, MortalDisk, converted, tensors_of
from tests.makers.doors import Shell
from tests.makers.locks import locked


@pytest.fixture
def source(tmp_path) -> Path:
    torch.save({f"w{k}": torch.full((50, 40), float(k)) for k in range(12)}, tmp_path / "src.pt")
    return tmp_path / "src.pt"


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


# Killed


@pytest.mark.parametrize(
    ("to", "target"), [("safetensors", "out.safetensors"), ("safetensors", "out"), ("pt", "out.pt")]
)
def test_a_conversion_killed_before_any_change_of_the_disk_leaves_nothing_visible(
    source, tmp_path, to, target, monkeypatch
):
    converted(source, tmp_path / "good" / target, to)
    good, disk, work = tensors_of(tmp_path / "good" / target), MortalDisk(monkeypatch), tmp_path / "work"
    limit, done = 0, False
    while not done:
        disk.live(limit)
        try:
            converted(source, work / target, to)
            done = True
        except Killed:
            pass
        disk.live()
        visible = [name for name in names(work) if not name.startswith(".")] if work.exists() else []
        assert visible in ([], [target])
        if not visible:  # else killed behind the commit
            converted(source, work / target, to)
            assert names(work) == [target]
        assert tensors_of(work / target) == good
        shutil.rmtree(work)
        limit += 3
    assert limit > 10


def test_a_failing_disk_is_one_sentence_and_leaves_nothing(source, tmp_path, monkeypatch):
    def full(call, *args):
        if call is os.write:
            raise OSError(28, "No space left on device")
        return call(*args)

    monkeypatch.setattr(DISK, "change", full)
    with pytest.raises(SaveFailed) as caught:
        converted(source, tmp_path / "out.pt", "pt")
    assert str(caught.value) == (
        f"{tmp_path}/out.pt: not written: No space left on device (96.0 KB needed). {source} is as it was."
    )
    assert names(tmp_path) == ["src.pt"]


def test_two_conversions_of_one_target_do_not_meet(source, tmp_path):
    with DISK.workplace(tmp_path / ".convert-out.pt", lambda: None):
        with pytest.raises(CheckpointLocked) as caught:
            converted(source, tmp_path / "out.pt", "pt")
        assert str(caught.value) == (
            f"{tmp_path}/out.pt: another conversion is writing it. Wait for it, or name another place."
        )
    converted(source, tmp_path / "out.pt", "pt")


# Durable


def calls_of(monkeypatch) -> list[tuple[str, str]]:
    """What changes the disk, in its order: the call, and the name it is about (of a rename the new one)."""
    made: list[tuple[str, str]] = []
    real = DISK.change

    def change(call, *args):
        if isinstance(args[0], int):
            path = Path(f"/proc/self/fd/{args[0]}").readlink()
        else:
            path = Path(args[0] if call is os.open else args[-1])
        made.append((call.__name__, path.name))
        return real(call, *args)

    monkeypatch.setattr(DISK, "change", change)
    return made


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads /proc")
def test_every_file_is_durable_before_the_rename_and_proven_before_that(source, tmp_path, monkeypatch):
    made = calls_of(monkeypatch)
    real = engine.prove
    monkeypatch.setattr(engine, "prove", lambda *args: (real(*args), made.append(("proven", ""))))
    converted(source, tmp_path / "out", "safetensors", shard_size=30_000)
    files = [name for call, name in made if call == "open"]
    assert len(files) == 5 and files[-1] == "model.safetensors.index.json"
    end = made.index(("proven", ""))
    assert [call for call, _ in made[:end]].count("fsync") == 0 and "replace" not in dict(made[:end])
    assert made[end + 1 :][:6] == [*(("fsync", name) for name in reversed(files)), ("fsync", "made")]
    assert made[end + 7] == ("replace", "out")


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads /proc")
def test_of_many_files_few_are_open_at_a_time(source, tmp_path, monkeypatch):
    made = calls_of(monkeypatch)
    monkeypatch.setattr(engine, "_MOST_OPEN", 3)
    converted(source, tmp_path / "out", "safetensors", shard_size=10_000)
    held, most = set(), 0
    for call, name in made:
        held |= {name} if call == "open" else set()
        held -= {name} if call == "fsync" else set()
        most = max(most, len(held))
    assert most == 3 and not held
    assert tensors_of(tmp_path / "out") == tensors_of(source)


@pytest.mark.parametrize("without", ["writeback", "advice", "positioned reads", "reserved room"])
def test_the_same_bytes_where_a_system_lacks_something(shared, tmp_path, monkeypatch, without):
    def refuse(*args):
        raise OSError(22, "Invalid argument")

    folder = shared / "fixtures/hf_gpt2"
    converted(folder, tmp_path / "first", "bundle")
    monkeypatch.setattr(engine, "_AT_ONCE", 4096)
    monkeypatch.setattr("core.containers.tensors.reading._LARGE", 0)
    asked = []
    if without == "writeback":
        monkeypatch.setattr(engine, "WRITEBACK", False)
        monkeypatch.setattr(os, "posix_fadvise", lambda *args: asked.append(args))
    elif without == "advice":
        monkeypatch.setattr(os, "posix_fadvise", lambda *args: (asked.append(args), refuse()))
    elif without == "reserved room":
        monkeypatch.setattr(engine.DISK, "preallocation", True)  # put back what the refusal turns off
        monkeypatch.setattr(os, "posix_fallocate", lambda *args: (asked.append(args), refuse()))
    else:
        monkeypatch.setattr("core.containers.checksum.POSITIONED_READS", False)
        monkeypatch.delattr(os, "preadv")
    converted(folder, tmp_path / "second", "bundle")
    assert tensors_of(tmp_path / "second") == tensors_of(tmp_path / "first")
    assert len(asked) == {"advice": len(asked) or 1, "reserved room": 1}.get(without, 0)


@pytest.mark.skipif(not hasattr(os, "SEEK_DATA"), reason="this system does not tell data from room")
def test_room_is_not_reserved_by_writing_into_every_block(tmp_path, monkeypatch):
    asked = []

    def emulated(fd, start, size):
        asked.append(size)
        os.pwrite(fd, bytes(size), start)

    monkeypatch.setattr(os, "posix_fallocate", emulated)
    with (
        engine.writing_back() as begin,
        engine.OutputFiles(tmp_path, begin) as made,
        made.file("a", least=3 * engine._AT_ONCE) as output,
    ):
        output.write(b"first")
    assert asked == [engine._PROBED]
    assert (tmp_path / "a").read_bytes().startswith(b"first\0")


def test_room_is_reserved_and_a_full_disk_shows_before_the_first_byte(source, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "_AT_ONCE", 4096)
    reserved = []
    monkeypatch.setattr(os, "posix_fallocate", lambda fd, start, size: reserved.append(size))
    converted(source, tmp_path / "whole.pt", "pt")
    size = reserved[-1]
    assert reserved in ([size], [engine._PROBED, size])
    whole = (tmp_path / "whole.pt").stat().st_size
    assert whole * 0.5 < size <= whole

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    monkeypatch.setattr(os, "write", full)
    with pytest.raises(SaveFailed, match="No space left on device"):
        converted(source, tmp_path / "second.pt", "pt")
    assert not (tmp_path / "second.pt").exists()


def test_the_disk_is_told_to_write_what_it_was_not_told_yet(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(engine, "_AT_ONCE", 100)
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, start, size, advice: told.append((start, size)))
    with engine.writing_back() as begin, engine.OutputFiles(tmp_path, begin) as made:
        with made.file("a") as output:
            for size in (60, 60, 30, 300, 7):
                output.write(bytes(size))
                output.flush()
        assert (tmp_path / "a").stat().st_size == 457
    assert told == [(0, 120), (120, 330)]
    assert made.recorded == {"a": {"size": 457, "crc32": f"{zlib.crc32(bytes(457)):08x}"}}


# Proof


def test_the_proof_names_the_tensor_that_differs_and_removes_what_was_written(source, tmp_path, monkeypatch):
    real = engine.elements

    def flipped(gatherer, target, progress):
        for piece in real(gatherer, target, progress):
            copy = bytearray(piece)
            copy[3] ^= target.name == "w7"
            yield memoryview(copy)

    monkeypatch.setattr(engine, "elements", flipped)
    with pytest.raises(CheckpointDamaged) as caught:
        converted(source, tmp_path / "out.safetensors", "safetensors")
    assert str(caught.value) == (
        f"{tmp_path}/out.safetensors: w7 is not what {source} holds, within 8000 bytes from element 0 on. It was "
        "removed again; the disk may be failing."
    )
    assert names(tmp_path) == ["src.pt"]
    converted(source, tmp_path / "out.safetensors", "safetensors", verify=False)
    assert load_file(tmp_path / "out.safetensors")["w7"][0, 0] != 7


def test_a_tensor_that_no_file_gets_is_seen_in_the_plan_and_if_not_there_by_the_proof(source, tmp_path, monkeypatch):
    with ExitStack() as held:
        plan = plan_conversion(source, tmp_path / "out.safetensors", "safetensors", Options(), held)
        plan.files[0].targets[:] = [target for target in plan.files[0].targets if target.name != "w7"]
        with pytest.raises(CheckpointMismatch, match=r"the plan is not whole: w7 is neither used nor dropped\."):
            engine.convert(plan)
        monkeypatch.setattr(Plan, "check", lambda self: None)
        with pytest.raises(CheckpointDamaged) as caught:
            engine.convert(plan)
    assert str(caught.value) == f"{tmp_path}/out.safetensors: w7 of {source} is not in it. It was removed again."
    assert names(tmp_path) == ["src.pt"]


def test_a_wrong_rule_does_not_pass_the_proof(shared, tmp_path, monkeypatch):
    """The proof undoes the rules on what was written; here the rule back is another than the rule there."""
    from core.families.rules import Permute

    monkeypatch.setattr(Permute, "inverse", lambda self, views, sizes, count: list(views))
    with pytest.raises(CheckpointDamaged, match=r"c_attn\.weight"):
        converted(shared / "fixtures/hf_gpt2", tmp_path / "b", "bundle")
    assert names(tmp_path) == []


def test_fills_are_proven_too(shared, tmp_path, monkeypatch):
    real = engine.elements

    def spoilt(gatherer, target, progress):
        for piece in real(gatherer, target, progress):
            yield memoryview(b"\1" * len(piece)) if target.view.is_constant else piece

    monkeypatch.setattr(engine, "elements", spoilt)
    with pytest.raises(CheckpointDamaged, match=r"\.bias is not what"):
        converted(shared / "fixtures/nanogpt_char_biasFalse/ckpt.pt", tmp_path / "hf", "hf")


@pytest.mark.parametrize(("to", "large"), [("safetensors", False), ("bundle", False), ("bundle", True)])
def test_damage_of_any_record_is_found_and_a_whole_record_is_read_once_for_it(shared, tmp_path, monkeypatch, to, large):
    """Damaged bytes are copied as they are and equal their copy: only the source's own checksum knows better."""
    if large:  # as of a tensor that is compared when the others are
        monkeypatch.setattr(proof, "THREADS", 1 << 40)
        monkeypatch.setattr(proof, "Readers", lambda sums, threads, real=proof.Readers: real(sums, 2))
    summed = []
    real = proof.compare_checksum
    monkeypatch.setattr(proof, "compare_checksum", lambda *found: (summed.append(found[2]), real(*found)))
    path = Path(shutil.copy(shared / "fixtures/nanogpt_char_biasFalse/ckpt.pt", tmp_path / "ckpt.pt"))
    opened, whole = open_container(path), path.read_bytes()
    checks = [c for c in opened.checks if set(c.names) <= set(opened.tensors)]
    for check in checks:
        data = bytearray(whole)
        data[check.offset + check.size - 1] ^= 1
        path.write_bytes(data)
        if not any(name.startswith("model.") for name in check.names) and to == "safetensors":
            continue
        end = r"\)\.$" if check.names == ("best_val_loss",) else r"\).*Nothing was written"  # read as a number
        with pytest.raises(CheckpointDamaged, match=rf"is damaged \(CRC32 [0-9a-f]{{8}}, recorded [0-9a-f]{{8}}{end}"):
            converted(path, tmp_path / "out", to)
        assert names(tmp_path) == ["ckpt.pt"]
    assert len(checks) > 20 and summed == []


def test_a_record_of_which_rows_are_left_out_is_summed_whole(shared, tmp_path):
    path = Path(shutil.copy(shared / "fixtures/nanogpt_char_biasFalse/ckpt.pt", tmp_path / "ckpt.pt"))
    spec = open_container(path).tensors["model.transformer.wte.weight"]
    data = bytearray(path.read_bytes())
    data[spec.offset + spec.nbytes - 1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointDamaged, match=r"wte\.weight is damaged"):
        converted(path, tmp_path / "out", "hf", vocab_size=spec.shape[0] - 1)


# Refused


def test_what_is_there_is_not_overwritten_unless_asked_and_then_moved_aside(source, tmp_path):
    (tmp_path / "out.pt").write_text("mine")
    with pytest.raises(CheckpointMismatch) as caught:
        converted(source, tmp_path / "out.pt", "pt")
    assert str(caught.value) == (
        f"{tmp_path}/out.pt: is there already, and nothing is overwritten. Name another place, or add --overwrite, "
        "which moves it aside."
    )
    assert (tmp_path / "out.pt").read_text() == "mine"
    converted(source, tmp_path / "out.pt", "pt", overwrite=True)
    (aside,) = tmp_path.glob("aside_out.pt_*")
    assert aside.read_text() == "mine" and tensors_of(tmp_path / "out.pt") == tensors_of(source)


def test_a_folder_that_a_trainer_writes_in_is_not_moved_aside(shared, tmp_path):
    bundle = Path(shutil.copytree(shared / "fixtures/lecture_char/bundle", tmp_path / "dante"))
    with locked(bundle) as trainer:
        with pytest.raises(CheckpointLocked, match=rf"{bundle}: process {trainer.pid} on .* has been writing here"):
            converted(shared / "fixtures/nanogpt_char_biasFalse/ckpt.pt", bundle, "bundle", overwrite=True)
        assert names(tmp_path) == ["dante"]
    converted(shared / "fixtures/nanogpt_char_biasFalse/ckpt.pt", bundle, "bundle", overwrite=True)
    (aside,) = tmp_path.glob("aside_dante_*")
    assert (aside / "model.pt").read_bytes() == (shared / "fixtures/lecture_char/bundle/model.pt").read_bytes()


def test_a_target_needs_a_name(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for target in (".", "x/..", "/"):
        with pytest.raises(CheckpointMismatch, match="names no file or folder of its own"):
            converted(source, Path(target), "safetensors", overwrite=True)
    assert names(tmp_path) == ["src.pt"]


def test_source_and_target_may_not_contain_each_other(shared, tmp_path):
    folder = Path(shutil.copytree(shared / "fixtures/hf_gpt2", tmp_path / "hf"))
    (tmp_path / "link").symlink_to(folder)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    for target, words in (
        (folder, "is the source itself"),
        (tmp_path / "link", "is the source itself"),
        (folder / "b", "lies in the source"),
        (tmp_path / "link/deep/b", "lies in the source"),
        (tmp_path, "lies around the source"),
    ):
        with pytest.raises(CheckpointMismatch, match=words):
            converted(folder, target, "bundle", overwrite=True)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before and names(tmp_path) == ["hf", "link"]


def test_a_pickle_that_names_code_is_refused_and_nothing_runs(tmp_path):
    torch.save({"w": torch.zeros(2), "x": Shell(tmp_path / "ran")}, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match=r"its pickle names posix\.system"):
        converted(tmp_path / "evil.pt", tmp_path / "out.safetensors", "safetensors")
    assert names(tmp_path) == ["evil.pt"]


def test_tensors_that_are_missing_or_have_no_place_are_named(shared, tmp_path):
    tensors = load_file(shared / "fixtures/hf_gpt2/model.safetensors")
    folder = tmp_path / "hf"
    folder.mkdir()
    shutil.copy(shared / "fixtures/hf_gpt2/config.json", folder)
    save_file({**tensors, "extra.weight": torch.zeros(2)}, folder / "model.safetensors")
    with pytest.raises(CheckpointMismatch, match=r"Hugging Face GPT-2, but without a place: extra\.weight\. --to saf"):
        converted(folder, tmp_path / "b", "bundle")
    save_file({name: t for name, t in tensors.items() if "h.1.ln_1.bias" not in name}, folder / "model.safetensors")
    with pytest.raises(CheckpointMismatch, match=r"but missing: transformer\.h\.1\.ln_1\.bias\."):
        converted(folder, tmp_path / "b", "bundle")
    torch.save({"a": torch.zeros(2)}, tmp_path / "a.pt")
    with pytest.raises(CheckpointMismatch, match=r"none of its 1 names is decisive"):
        converted(tmp_path / "a.pt", tmp_path / "b", "bundle")
    with pytest.raises(CheckpointMismatch, match=r"--vocab_size needs to know which tensor is the token table"):
        converted(tmp_path / "a.pt", tmp_path / "b.pt", "pt", vocab_size=5)


# The script


def test_dry_run_prints_every_tensor_and_writes_nothing(shared, tmp_path, capsys):
    words = [str(shared / "fixtures/hf_gpt2"), str(tmp_path / "b"), "--to", "bundle", "--dry_run"]
    assert convert_checkpoints.main(words) == 0
    shown = capsys.readouterr().out
    assert shown.splitlines()[0].split() == ["source", "rule", "target", "shape", "dtype", "bytes"]
    row = next(line for line in shown.splitlines() if "h.0.attn.c_attn.weight" in line)
    assert row.split() == [
        *("transformer.h.0.attn.c_attn.weight", "transpose", "blocks.0.sa.qkv.weight"),
        *("(144,", "48)", "float32", "27648"),
    ]
    assert convert_checkpoints.main([*words, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert len(facts["tensors"]) == 41 and facts["bytes"] == sum(t["bytes"] for t in facts["tensors"])
    assert names(tmp_path) == []


def test_the_script_converts_says_so_and_lists_the_matrix(source, tmp_path, capsys):
    assert convert_checkpoints.main([str(source), str(tmp_path / "x.safetensors"), "--to", "safetensors"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[1] == f"{tmp_path}/x.safetensors: safetensors, 12 tensors, float32, 96.0 KB"
    assert out[-1] == "read back and compared with the source, bit for bit"
    assert convert_checkpoints.main(["--list"]) == 0
    shown = capsys.readouterr().out
    assert "nanogpt" in shown and "--to hf" in shown
    assert convert_checkpoints.main(["--list", "--json"]) == 0
    assert "bundle" in json.loads(capsys.readouterr().out)["hf_gpt2"]
    for words in (["a", "--to", "pt"], ["a", "b", "c", "--to", "pt"], ["a", "b", "--to", "pt", "--model_name", "d"]):
        with pytest.raises(SystemExit) as wrong:
            convert_checkpoints.main(words)
        assert wrong.value.code == 2
    for word in ("5XB", "0GB", "-1"):
        with pytest.raises(SystemExit):
            convert_checkpoints.main(["a", "b", "--to", "hf", f"--shard_size={word}"])
    capsys.readouterr()


TWICE = {"n_head": "num_attention_heads", "n_layer": "num_hidden_layers"}
"""The other spelling of a field in a config.json for transformers."""


@pytest.mark.parametrize("to", ["bundle", "hf"])
@pytest.mark.parametrize(("field", "value", "said"), [
    ("n_head", 2, "heads is 2 in it (from config.json), and was heads 4 (from model_args)"),
    ("n_layer", 2, " is 2"),
])  # fmt: skip
def test_a_result_that_its_readers_would_take_for_another_model_never_appears(shared, tmp_path, to, field, value, said):
    """The bytes of the tensors are right, and compared; what is written beside them says otherwise."""
    source = shared / "fixtures/nanogpt_char_biasFalse/ckpt.pt"
    with ExitStack() as held:
        plan = plan_conversion(source, tmp_path / "out", to, Options(), held)
        config = json.loads(plan.texts["config.json"])
        others = {TWICE[field]: value} if to == "hf" else {}
        plan.texts["config.json"] = json.dumps({**config, field: value, **others}).encode()
        with pytest.raises(CheckpointMismatch) as caught:
            engine.convert(plan)
    assert str(caught.value).startswith(f"{tmp_path}/out: the result would not be read as the model it was made from: ")
    assert said in str(caught.value) and str(caught.value).endswith("Nothing was published.")
    assert names(tmp_path) == []
