"""What a run says of its sizes and its end: a sample of what has learned, and commands that work as printed."""

from __future__ import annotations

import math
import shlex
from types import SimpleNamespace

import pytest

import generate
import inspect_model
import train
from core.console.commandline import DONE
from core.data.tokenizer import CharTokenizer, Gpt2Tokenizer
from core.errors import InputError
from core.training.report import say_preset, say_result

pytestmark = pytest.mark.usefixtures("one_thread")
PRESET = {"n_layer": 4, "n_head": 1, "n_embd": 128, "block_size": 64, "max_iters": 5}
LETTERS = CharTokenizer(list("\n abcdefgh"))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "4 layers, 1 head, 128 wide, block 64"),
        ({"n_layer": 2, "device": "cpu"}, "1 head, 128 wide, block 64"),
        ({"n_layer": 2, "n_head": 2, "n_embd": 8}, "block 64"),
        ({"n_layer": 2, "n_head": 2, "n_embd": 8, "block_size": 8}, None),
    ],
)
def test_only_sizes_that_the_preset_chose_are_said(given, said, capsys):
    say_preset(PRESET, given)
    expected = f"no GPU: a small preset ({said}); every size is a flag\n" if said else ""
    assert capsys.readouterr().err == expected


def result(tmp_path, loss, tokenizer=LETTERS, sharded=False):
    world = SimpleNamespace(is_sharded=sharded)
    folder = tmp_path / "my models" / "dante"
    manager = SimpleNamespace(checkpoint_dir=folder, model_name="dante", ranks=SimpleNamespace(world=world))
    say_result(manager, SimpleNamespace(step=20, generate=lambda *_, **__: "\nhello\n"), tokenizer, loss)


@pytest.mark.parametrize(("below", "shown"), [(1.01, True), (0.99, False), (-0.5, False)])
def test_a_sample_is_shown_from_one_nat_below_the_uniform_guess_on(tmp_path, below, shown, capsys):
    result(tmp_path, math.log(10) - below)
    out, err = capsys.readouterr()
    assert out == ("hello\n" if shown else "") and ("a sample:\n" in err) is shown
    why = "no sample: the loss is not yet 1 below that of a uniform guess; train for longer\n"
    assert (why in err) is not shown
    name = f"--model_name dante --checkpoint_root '{tmp_path / 'my models'}'"
    assert err.endswith(
        f"next:\n  python generate.py {name}\n  python inspect_model.py {name}\n"
        f"  python train.py {name} --max_iters 40\n"
    )


@pytest.mark.parametrize(("loss", "sharded"), [(None, False), (0.1, True)])
def test_no_sample_without_a_loss_or_of_shards(tmp_path, loss, sharded, capsys):
    result(tmp_path, loss, sharded=sharded)
    out, err = capsys.readouterr()
    assert out == "" and "a sample:" not in err and "python generate.py" in err


def test_without_the_ranks_of_gpt2_no_command_writes_text(tmp_path, capsys, monkeypatch):
    def missing(self, ids):
        raise InputError("gpt2: its 50,256 ranks are not here.")

    monkeypatch.setattr(Gpt2Tokenizer, "decode", missing)
    result(tmp_path, 1.0, Gpt2Tokenizer())
    out, err = capsys.readouterr()
    assert out == "" and "no sample: gpt2: its 50,256 ranks are not here.\n" in err
    assert "generate.py" not in err and "python inspect_model.py" in err


@pytest.mark.parametrize("characters", ["abc def\n", "The cat\n"])
def test_the_next_commands_work_as_printed(tmp_path, monkeypatch, capsys, characters):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.txt").write_text(characters * 200)
    sizes = "--n_layer 1 --n_head 1 --n_embd 8 --block_size 8 --batch_size 2 --eval_iters 1 --device cpu"
    flags = f"--checkpoint_root 'a b' --model_name=-odd --input_file t.txt --max_iters 4 {sizes}"
    assert train.main(shlex.split(flags)) == DONE
    printed = capsys.readouterr().err.split("next:\n")[1].splitlines()
    scripts = {"generate.py": generate, "inspect_model.py": inspect_model, "train.py": train}
    assert ("--prompt 'The '" in printed[0]) is characters.startswith("The")
    for line in printed:
        python, script, *words = shlex.split(line)
        assert python == "python" and scripts.pop(script).main(words) == DONE
    assert not scripts and "step 8" in capsys.readouterr().err
