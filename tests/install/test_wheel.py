"""The wheel as a user has it: installed without an index, used from an empty folder, beside a clone, on two ranks."""

from __future__ import annotations

import json
import os
import shutil
import signal
import site
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.makers.models import TEXT
from tests.makers.runs import bits, same

pytestmark = pytest.mark.full

SOURCES = (
    *("core", "data/prepare.py", "train.py", "generate.py", "inspect_model.py", "convert_checkpoints.py"),
    *("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "SECURITY.md"),
)
TINY = (
    *(
        "--n_layer",
        "1",
        "--n_head",
        "2",
        "--n_embd",
        "16",
        "--block_size",
        "16",
        "--batch_size",
        "4",
        "--dropout",
        "0.1",
    ),
    *("--eval_interval", "50", "--eval_iters", "1", "--device", "cpu"),
)


def run(words, cwd: Path, **more) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*map(str, words)], cwd=cwd, capture_output=True, text=True, timeout=250, **more)


def done(words, cwd: Path, **more) -> str:
    """Run a command that must not fail; returns what it printed."""
    made = run(words, cwd, **more)
    assert made.returncode == 0, made.stdout + made.stderr
    return made.stdout + made.stderr


def environment(folder: Path, *paths: Path) -> Path:
    """A virtual environment that has what lies in these folders besides; returns its bin."""
    done([sys.executable, "-m", "venv", "--without-pip", folder], folder.parent)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "besides.pth").write_text("".join(f"{path}\n" for path in paths))
    return folder / "bin"


def install(bin: Path, *words: object) -> None:
    pip = [sys.executable, "-m", "pip", "--python", bin / "python", "install", "--no-index", "--no-deps"]
    done([*pip, "--no-build-isolation", *words], bin)


def activated(bin: Path) -> dict[str, str]:
    """The variables of a shell in which an environment is active."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return {**plain, "PATH": f"{bin}{os.pathsep}{os.environ['PATH']}"}


def wheel(clone: Path, into: Path) -> Path:
    words = ["-m", "pip", "wheel", ".", "--no-deps", "--no-index", "--no-build-isolation", "-w", into]
    done([sys.executable, *words], clone)
    (made,) = into.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clone")
    for name in SOURCES:
        (folder / name).parent.mkdir(exist_ok=True)
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def built(clone, tmp_path_factory):
    leftover = clone / "build/lib/core/left_by_an_earlier_build.py"
    leftover.parent.mkdir(parents=True)
    leftover.touch()
    return wheel(clone, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    bin = environment(tmp_path_factory.mktemp("installed") / "venv", *map(Path, site.getsitepackages()))
    install(bin, built)
    return bin


@pytest.fixture
def command(installed, tmp_path):
    """A function that types a line into a shell in an empty folder, with the environment active."""

    def typed(line: str) -> str:
        return done(["sh", "-c", line], tmp_path, env=activated(installed))

    return typed


def contents(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as file:
        return {name: file.read(name) for name in file.namelist()}


def test_the_wheel_holds_one_package_and_one_command(built):
    held = contents(built)
    assert {name.split("/")[0] for name in held} == {"gpt_checkpoints", "gpt_checkpoints-0.2.0.dist-info"}
    modules = {str(path.relative_to(ROOT / "core")) for path in (ROOT / "core").rglob("*.py")}
    data = {"py.typed", "inspection/html/page.css", "inspection/html/page.js"}
    assert {n.removeprefix("gpt_checkpoints/") for n in held if "dist-info" not in n} == modules | data
    assert b"from core" not in b"".join(text for name, text in held.items() if name.endswith(".py"))
    said = held["gpt_checkpoints-0.2.0.dist-info/entry_points.txt"].decode()
    assert said.split() == ["[console_scripts]", "gpt-checkpoints", "=", "gpt_checkpoints.scripts:main"]


def test_its_metadata_is_that_of_pyproject(built):
    held = contents(built)
    about = message_from_bytes(held["gpt_checkpoints-0.2.0.dist-info/METADATA"])
    needs = [need for need in about.get_all("Requires-Dist") if "extra ==" not in need]
    assert [need.split(">")[0] for need in needs] == ["torch", "tiktoken", "numpy", "tqdm"]
    assert (about["Name"], about["Version"], about["Requires-Python"]) == ("gpt-checkpoints", "0.2.0", ">=3.11")
    assert (about["License-Expression"], about["Description-Content-Type"]) == ("MIT", "text/markdown")
    assert about.get_payload().startswith("# gpt-checkpoints\n")
    assert held["gpt_checkpoints-0.2.0.dist-info/licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()


def test_a_wheel_of_the_source_archive_is_the_same(built, clone, tmp_path):
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    done([sys.executable, "-c", code], clone)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        archive.extractall(tmp_path, filter="data")
    assert contents(wheel(tmp_path / "gpt_checkpoints-0.2.0", tmp_path / "again")) == contents(built)


def test_a_run_that_is_killed_and_what_follows_it_from_an_empty_folder(installed, command, tmp_path):
    (tmp_path / "book.txt").write_text(TEXT * 100)
    assert "next: gpt-checkpoints train --dataset_dir tokens\n" in command(
        "gpt-checkpoints prepare book.txt --output_dir tokens"
    )
    line = f"train --dataset_dir tokens --model_name dante --save_interval 5 {' '.join(TINY)} --max_iters"
    words = [installed / "gpt-checkpoints", *line.split(), "100000"]
    run = subprocess.Popen(words, cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=activated(installed))
    assert any("saved step 20 " in said for said in run.stderr)
    run.send_signal(signal.SIGKILL)
    run.communicate()
    reached = json.loads((tmp_path / "checkpoints/dante/training_state.json").read_text())["step"]
    said = command(f"gpt-checkpoints {line} {reached + 20}")
    assert f"resuming at step {reached}," in said and "resume is exact" in said

    following = [one.strip() for one in said.partition("next:\n")[2].splitlines() if one.strip()]
    assert [one.split()[:2] for one in following] == [
        ["gpt-checkpoints", word] for word in ("generate", "inspect", "train")
    ]
    text, facts, more = map(command, following)
    assert "tokens in" in text and f"Last recorded training step: {reached + 20}\n" in facts
    assert f"saved step {2 * (reached + 20)} to checkpoints/dante" in more
    page = command("gpt-checkpoints inspect --model_name dante --html dante.html") and tmp_path / "dante.html"
    assert "<pre>gpt-checkpoints train --model_name dante --max_iters " in page.read_text()
    assert "bit for bit" in command("gpt-checkpoints convert checkpoints/dante a.safetensors --to safetensors")
    assert "bit for bit" in command("gpt-checkpoints convert checkpoints/dante hf --to hf")
    assert "by `gpt-checkpoints convert --to hf`" in (tmp_path / "hf/README.md").read_text()

    # The clone's own run, never killed, has the same bits; and each reads what the other wrote.
    end = ["--max_iters", str(2 * (reached + 20))]
    done([sys.executable, ROOT / "train.py", *line.split()[1:-1], "--checkpoint_root", "of_clone", *end], tmp_path)
    assert same(bits(tmp_path / "checkpoints/dante"), bits(tmp_path / "of_clone/dante"))
    sample = "--temperature 0 --quiet --checkpoint_root"
    written = [
        done([*start, *f"{sample} {root}".split()], tmp_path, env=activated(installed))
        for root in ("checkpoints", "of_clone")
        for start in ([sys.executable, ROOT / "generate.py"], [installed / "gpt-checkpoints", "generate"])
    ]
    assert len(set(written)) == 1 and len(written[0]) > 100


LOOP = """
import {package}.checkpoint, {package}.data, torch
torch.manual_seed(0)
x = torch.randn(64, 4)
loader = {package}.data.resumable(
    torch.utils.data.TensorDataset(x), batch_size=4, seed=1, num_workers=1, multiprocessing_context="spawn"
)
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.AdamW(model.parameters())
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5)
also = {{"scheduler": scheduler, "rng": "all"}}
if __name__ == "__main__":
    with {package}.checkpoint.CheckpointManager("loop") as manager:
        start = manager.load(model, optimizer, also=also)
        for step, (batch,) in loader.steps(start, start + 8):
            model(batch + torch.randn(4)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        manager.save(model, optimizer, step=start + 8, also=also)
    print(start, model.weight.tolist(), scheduler.last_epoch)
"""


def test_a_loop_goes_on_under_the_other_name_with_workers_that_are_spawned(installed, tmp_path):
    said = {}
    for first, second in (("core", "gpt_checkpoints"), ("gpt_checkpoints", "core")):
        folder = tmp_path / first
        folder.mkdir()
        for number, package in enumerate((first, second)):
            (folder / "loop.py").write_text(LOOP.format(package=package))
            env = activated(installed) | ({"PYTHONPATH": str(ROOT)} if package == "core" else {})
            said[first, number] = done([installed / "python", "loop.py"], folder, env=env).splitlines()[0]
    assert said["core", 0] == said["gpt_checkpoints", 0] and said["core", 0].startswith("0 ")
    assert said["core", 1] == said["gpt_checkpoints", 1] and said["core", 1].startswith("8 ")


def test_looking_needs_no_torch(built, command, tmp_path):
    (tmp_path / "book.txt").write_text(TEXT * 100)
    command(f"gpt-checkpoints train --input_file book.txt --model_name dante --max_iters 2 {' '.join(TINY)}")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "torch.py").write_text("raise ImportError('torch is not for looking')\n")
    bin = environment(tmp_path / "venv", broken, *map(Path, site.getsitepackages()))
    install(bin, built)
    for words in ("", "--json", "--history", "--verify", "--html page.html"):
        done([bin / "gpt-checkpoints", "inspect", "--model_name", "dante", *words.split()], tmp_path)
    assert "torch is not for looking" in run([bin / "python", "-m", "gpt_checkpoints.model"], tmp_path).stderr


def test_two_ranks_start_it_as_a_module_and_print_the_command(installed, tmp_path):
    (tmp_path / "book.txt").write_text(TEXT * 100)
    module = [installed / "python", "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m"]
    words = [*module, "gpt_checkpoints.scripts.train", "--input_file", "book.txt", "--model_name", "two", *TINY]
    said = done([*words, "--max_iters", "4"], tmp_path, env=activated(installed))
    assert "\n  gpt-checkpoints train --model_name two --max_iters 8\n" in said


def test_a_clone_beside_the_wheel_is_itself_and_both_in_one_process_are_refused(installed, clone):
    assert "\n  python train.py " in done([installed / "python", "train.py", "--help"], clone)
    both = run([installed / "python", "-c", "import core, gpt_checkpoints.checkpoint"], clone)
    said = both.stderr.splitlines()[-1]
    assert both.returncode == 1 and said.startswith(f"ImportError: core ({clone}/core) and gpt_checkpoints (")
    assert "are one package under two names" in said


def test_an_editable_install_runs_the_clone_as_it_is_now(clone, tmp_path):
    bin = environment(tmp_path / "venv", *map(Path, site.getsitepackages()))
    install(bin, "--editable", clone)
    said = done([bin / "gpt-checkpoints", "train", "--help"], tmp_path, env=activated(bin))
    assert "\n  gpt-checkpoints train --model_name dante " in said
    script = clone / "inspect_model.py"
    before = script.read_text()
    try:
        script.write_text(before.replace("def main(argv", "print('edited')\n\n\ndef main(argv"))
        assert done([bin / "gpt-checkpoints", "inspect", "--version"], tmp_path).startswith("edited\n")
    finally:
        script.write_text(before)
    for name in ("core", "train"):
        assert "ModuleNotFoundError" in run([bin / "python", "-c", f"import {name}"], tmp_path).stderr
