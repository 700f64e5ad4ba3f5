"""Every script says its version, which stands in one place, without loading torch."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib

import pytest

from core import __version__
from tests.conftest import ROOT

SCRIPTS = ("train.py", "generate.py", "inspect_model.py", "convert_checkpoints.py", "data/prepare.py")


@pytest.mark.parametrize("script", SCRIPTS)
def test_each_script_says_the_version_whatever_else_is_asked(script, tmp_path):
    for words in (["--version"], ["--model_name", "absent", "--version"], ["--version", "--unknown"]):
        command = [sys.executable, "-X", "importtime", ROOT / script, *words]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (0, f"gpt-checkpoints {__version__}\n"), done.stderr
        loaded = set(re.findall(r"\| +(\S+)$", done.stderr, re.MULTILINE))
        assert "argparse" in loaded and "torch" not in loaded
    assert not list(tmp_path.iterdir())


def test_a_file_of_settings_asks_for_no_version(tmp_path):
    (tmp_path / "flags.json").write_text(json.dumps({"version": True}))
    command = [sys.executable, ROOT / "train.py", "--config_file", tmp_path / "flags.json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "") and "unknown flag --version" in done.stderr


def test_the_package_has_the_same_version():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert settings["tool"]["setuptools"]["dynamic"] == {"version": {"attr": "core.__version__"}}
    assert re.fullmatch(r"\d+\.\d+\.\d+", __version__)
