"""The terminal is not the run: whatever becomes of stdout and stderr, training goes on to the end."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from core.console.commandline import DONE, STOPPED
from core.console.streams import Lasting
from tests.conftest import ROOT

pytestmark = pytest.mark.skipif(os.name != "posix", reason="descriptors and signals of POSIX")

SIZES = "--n_layer 1 --n_head 1 --n_embd 8 --block_size 8 --batch_size 2 --eval_iters 1 --device cpu"
TEXT = "äöü€ 日本語 hello " * 800


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("terminal")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    return folder


def command(place: Path, name: str, steps: int = 12) -> str:
    script = f"{sys.executable} {ROOT / 'train.py'} --input_file text.txt --checkpoint_root . --model_name {name}"
    return f"{script} {SIZES} --max_iters {steps} --eval_interval 4"


def shell(place: Path, line: str, **variables: str) -> int:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(["bash", "-c", line], cwd=place, env=environment, stdin=subprocess.DEVNULL).returncode


def weights(place: Path, name: str) -> str:
    assert json.loads((place / name / "training_state.json").read_text())["step"] == 12
    return hashlib.sha256((place / name / "model.pt").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def expected(place) -> str:
    assert shell(place, f"{command(place, 'whole')} >out.txt 2>err.txt") == DONE
    assert "next:" in (place / "err.txt").read_text(encoding="utf-8")
    return weights(place, "whole")


@pytest.mark.parametrize(
    ("name", "around"),
    [
        ("closed", "{} >&- 2>&- <&-"),
        pytest.param(
            "full",
            "{} >/dev/full 2>/dev/full",
            marks=pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full"),
        ),
    ],
)
def test_a_run_whose_output_cannot_be_written_trains_to_the_end(place, expected, name, around):
    assert shell(place, around.format(command(place, name))) == DONE
    assert weights(place, name) == expected


def test_a_run_whose_reader_is_gone_trains_to_the_end(place, expected):
    wait = "while [ ! -s code ]; do sleep 0.1; done"
    assert shell(place, f"({command(place, 'piped')} 2>&1; echo $? >code) | true; {wait}") == 0
    assert (place / "code").read_text() == "0\n"
    assert weights(place, "piped") == expected


def test_what_has_no_character_in_the_encoding_is_escaped(place, expected):
    assert shell(place, f"{command(place, 'latin')} >latin.txt 2>&1", PYTHONIOENCODING="latin-1") == DONE
    said = (place / "latin.txt").read_bytes().decode("latin-1")
    assert "done: step 12" in said and "Traceback" not in said
    assert weights(place, "latin") == expected


@pytest.mark.parametrize("is_ignored", [False, True])
def test_a_terminal_that_closes_ends_the_run_after_a_save_unless_nohup_was_before_it(place, is_ignored):
    steps = 30 if is_ignored else 100_000
    name = f"hup{is_ignored}"
    line = [*command(place, name, steps).split(), "--save_interval", "1"]
    run = subprocess.Popen(
        line,
        cwd=place,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN if is_ignored else signal.SIG_DFL),
    )
    with run:
        try:
            said = b""
            while b"saved step" not in said and run.poll() is None:
                said += os.read(run.stderr.fileno(), 65536)
            run.send_signal(signal.SIGHUP)
            said += run.communicate(timeout=60)[1]
        finally:
            run.kill()
    assert run.returncode == (DONE if is_ignored else STOPPED), said
    assert (b"stopped by SIGHUP after step " in said) is not is_ignored
    assert json.loads((place / name / "training_state.json").read_text())["step"] >= 1


def test_a_stream_that_fails_takes_every_text(tmp_path):
    file = (tmp_path / "out.txt").open("w", encoding="ascii")
    stream = Lasting(file)
    assert stream.write("caf\u00e9\n") == 5
    file.close()
    assert (tmp_path / "out.txt").read_text() == "caf\\xe9\n"
    assert stream.write("more") == 4 and stream.flush() is None and stream.closed
    nobody = Lasting(None)
    assert nobody.write("nobody") == 6
    nobody.close()
