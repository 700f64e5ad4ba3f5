"""No control character of a checkpoint reaches a terminal: in no name, setting, error, or text that it writes."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.config.gpt import GPTConfig
from core.console.streams import Guarded, unguarded
from core.data.tokenizer import CharTokenizer
from core.errors import CheckpointMismatch
from core.kinds.model_methods import save_checkpoint_bundle
from core.model import GPT
from tests.conftest import ROOT

pytestmark = pytest.mark.skipif(os.name != "posix", reason="names and terminals of POSIX")

BAD = "\x1b[31m\x07\x9b2J\x7f"
CONTROL = re.compile(rb"[\x00-\x08\x0b-\x1f\x7f]|\xc2[\x80-\x9f]|\xe2\x80[\xaa-\xae]")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Two models that a stranger named; their vocabulary is of control characters."""
    root = tmp_path_factory.mktemp("named")
    model = GPT(GPTConfig(block_size=8, vocab_size=4, n_embd=8, n_head=1, n_layer=1))
    model.tokenizer = CharTokenizer(["\x1b", "\x9b", "a", "\n"])
    for name in (f"m{BAD}", "plain"):
        save_checkpoint_bundle(model, root / name, step=1)
    path = root / f"m{BAD}/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), f"of{BAD}": BAD, "device": f"cuda{BAD}"}))
    shutil.copy(root / "plain/model.pt", root / f"x{BAD}.pt")
    return root


def shown(*words: object, **more) -> bytes:
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, **more)
    assert b"Traceback" not in done.stderr, done.stderr
    return done.stdout + done.stderr


COMMANDS = {
    "all models": ["inspect_model.py", "--checkpoint_root", "{0}"],
    "a model": ["inspect_model.py", "{0}/m{1}"],
    "its past": ["inspect_model.py", "{0}/m{1}", "--history"],
    "a file": ["inspect_model.py", "{0}/x{1}.pt", "--tensors"],
    "a difference": ["inspect_model.py", "--diff", "{0}/m{1}", "{0}/plain"],
    "which model": ["generate.py", "--checkpoint_root", "{0}"],
    "a device": ["generate.py", "--checkpoint_root", "{0}", "--model_name", "m{1}"],
    "a plan": ["convert_checkpoints.py", "{0}/m{1}", "{0}/new{1}", "--to", "pt", "--dry_run"],
    "a place": ["convert_checkpoints.py", "{0}/nothing{1}"],
    "a word": ["inspect_model.py", "--nothing{1}"],
}


IN_CI = ("all models", "a model")


@pytest.mark.parametrize("name", [n if n in IN_CI else pytest.param(n, marks=pytest.mark.full) for n in COMMANDS])
def test_a_name_of_a_checkpoint_does_not_change_a_terminal(name, root):
    out = shown(*(word.format(root, BAD) for word in COMMANDS[name]))
    assert b"[31m" in out and not CONTROL.search(out), out


@pytest.mark.full
def test_a_text_goes_to_a_file_as_it_is_and_to_a_terminal_escaped(root):
    pty = pytest.importorskip("pty")
    words = ["generate.py", "--checkpoint_root", root, "--model_name", "plain", "--seed", "1", "--max_new_tokens", "60"]
    written = shown(*words)
    assert b"\x1b" in written and b"\xc2\x9b" in written
    ours, theirs = pty.openpty()
    done = subprocess.Popen([sys.executable, *map(str, words)], cwd=ROOT, stdout=theirs, stderr=subprocess.DEVNULL)
    os.close(theirs)
    out = b""
    with os.fdopen(ours, "rb", buffering=0) as screen, pytest.raises(OSError, match="Input"):  # its end, on Linux
        while block := screen.read(4096):
            out += block
    assert done.wait(60) == 0
    assert rb"\u001b" in out and not CONTROL.search(out.replace(b"\r\n", b"\n"))


@given(st.text(), st.dictionaries(st.text(max_size=5), st.text()))
def test_everything_but_control_characters_is_printed_and_json_stays_the_same(text, values):
    below = io.StringIO()
    stream = Guarded(below)
    assert unguarded(stream) is below and unguarded(below) is below
    assert stream.write(text) == len(text)
    stream.writelines(["\n", json.dumps(values, ensure_ascii=False)])
    printed, _, document = below.getvalue().rpartition("\n")
    assert json.loads(document) == values
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", printed)
    assert re.sub(r"\\u([0-9a-f]{4})", lambda found: chr(int(found[1], 16)), printed) == text or "\\u" in text


def test_an_error_can_be_printed_by_any_program():
    error = CheckpointMismatch(f"runs/{BAD}/config.json: n_head is 0\nsaved")
    assert str(error) == "runs/\\x1b[31m\\x07\\x9b2J\\x7f/config.json: n_head is 0\\nsaved"
    assert error.args[0].startswith(f"runs/{BAD}")
