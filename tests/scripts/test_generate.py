"""generate.py as a person runs it: text on stdout, the rest on stderr, and a code that says how it ended."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import generate as script
from core.config.gpt import GPTConfig
from core.data.tokenizer import CharTokenizer
from core.errors import CheckpointError, CheckpointNotFound, InputError, Unspecified
from core.kinds.model_methods import save_checkpoint_bundle
from core.model import GPT
from core.networks.generation import until
from tests.makers.modded_checkpoints import upstream_file
from tests.makers.models import save_durably
from tests.makers.small_gpts import SmallGPT

ROOT = Path(__file__).resolve().parents[2]
LETTERS = "\n abcdefghijklmnopqrstuvwxyz"


def save_model(root: Path, name: str, seed: int = 0, step: int = 7) -> GPT:
    torch.manual_seed(seed)
    model = GPT(GPTConfig(block_size=16, vocab_size=len(LETTERS), n_embd=16, n_head=2, n_layer=1))
    model.tokenizer = CharTokenizer(list(LETTERS))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.5)
    save_checkpoint_bundle(model, root / name, step=step)
    return model.eval()


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A checkpoint root with one model, `alone`."""
    root = tmp_path_factory.mktemp("models")
    save_model(root, "alone")
    return root


@pytest.fixture
def write(models, capsys):
    """Run the script in this process; return exit code, stdout and stderr."""

    def run(*flags: str, root: Path = models) -> tuple[int, str, str]:
        try:
            code = script.main(["--checkpoint_root", str(root), *flags])
        except SystemExit as ended:
            code = ended.code
        streams = capsys.readouterr()
        return code, streams.out, streams.err

    return run


def expected_text(prompt: str, tokens: int, **settings) -> str:
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=len(LETTERS), n_embd=16, n_head=2, n_layer=1)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.5)
    model.tokenizer = CharTokenizer(list(LETTERS))
    return model.generate(prompt, tokens, **settings)


def test_text_goes_to_stdout_and_the_rest_to_stderr(write):
    code, out, err = write("--prompt", "hello", "--max_new_tokens", "30", "--seed", "5", "--temperature", "1")
    assert code == 0
    assert out == expected_text("hello", 30, seed=5) + "\n"
    assert "alone: step 7, 0.00 M parameters, cpu, seed 5" in err and "30 tokens in" in err


@pytest.mark.parametrize("flags", [["--stream"], ["--no_stream"]])
@pytest.mark.parametrize(
    "settings", [{"temperature": 0.0}, {"temperature": 0.7, "top_k": 3}, {"temperature": 1.3, "top_p": 0.6}], ids=str
)
def test_flags_reach_the_sampler(write, flags, settings):
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    code, out, _ = write("--prompt", "a", "--max_new_tokens", "25", "--seed", "2", *words, *flags)
    assert (code, out) == (0, expected_text("a", 25, seed=2, **settings) + "\n")


def test_an_empty_prompt_starts_after_a_lines_end(write):
    _, out, _ = write("--max_new_tokens", "12", "--seed", "3", "--temperature", "1")
    assert "\n" + out == expected_text("\n", 12, seed=3) + "\n"


@pytest.mark.parametrize("flag", ["--stream", "--no_stream"])
def test_samples_are_parted_by_a_line_and_differ(write, flag):
    _, out, _ = write(
        "--prompt", "a", "--max_new_tokens", "20", "--seed", "3", "--temperature", "1", "--num_samples", "3", flag
    )
    samples = out.removesuffix("\n").split("\n" + script.SEPARATOR + "\n")
    assert samples == [expected_text("a", 20, seed=3 + i) for i in range(3)]
    assert len(set(samples)) == 3


def test_json_is_one_object_per_sample(write):
    _, out, _ = write("--prompt", "ab", "--max_new_tokens", "9", "--seed", "4", "--num_samples", "2", "--json")
    first, second = map(json.loads, out.splitlines())
    assert {k: first[k] for k in ("model", "step", "seed", "prompt")} == {
        "model": "alone", "step": 7, "seed": 4, "prompt": "ab"
    }  # fmt: skip
    assert "ab" + first["text"] == expected_text("ab", 9, seed=4, temperature=0.8)
    assert second["seed"] == 5


def test_the_seed_on_stderr_gives_the_text_again(write):
    _, out, err = write("--max_new_tokens", "40")
    seed = err.split("seed ")[1].split("\n")[0]
    assert write("--max_new_tokens", "40", "--seed", seed)[1] == out


def test_a_character_without_an_id_is_shown_with_its_place(write):
    with pytest.raises(InputError, match=r"--prompt: '4' .* position 1 .*--unknown skip"):
        write("--prompt", "a4b")
    _, out, _ = write("--prompt", "a4b", "--unknown", "skip", "--max_new_tokens", "5", "--temperature", "0", "--json")
    assert "ab" + json.loads(out)["text"] == expected_text("ab", 5, temperature=0.0)


@pytest.fixture
def many(tmp_path) -> Path:
    """A root with two models, of which `first` keeps step 3, its best, beside step 9."""
    save_model(tmp_path, "second", seed=2)
    from core.checkpoint import CheckpointManager

    for step, seed in ((3, 0), (9, 1)):
        model = save_model(tmp_path / "scratch", "any", seed=seed, step=step)
        with CheckpointManager("first", tmp_path) as manager:
            save_durably(manager, model, step=step, tokenizer=model.tokenizer, metrics={"val_loss": float(step)})
    return tmp_path


def test_a_kept_step_and_the_best_can_be_asked_for(write, many):
    flags = ("--model_name", "first", "--prompt", "a", "--temperature", "0", "--max_new_tokens", "20")
    _, newest, err = write(*flags, root=many)
    assert "first: step 9" in err
    _, kept, err = write(*flags, "--step", "3", root=many)
    assert "first: step 3" in err and kept == expected_text("a", 20, temperature=0.0) + "\n" != newest
    assert write(*flags, "--step", "best", root=many)[1] == kept
    with pytest.raises(CheckpointNotFound, match="5"):
        write(*flags, "--step", "5", root=many)


def test_several_models_are_listed_with_code_2(write, many):
    with pytest.raises(Unspecified) as raised:  # of which the script makes a line and exit code 2
        write(root=many)
    assert str(raised.value) == f"{many} holds 2 models; choose one with --model_name: first, second"


@pytest.mark.parametrize(("name", "meant"), [("frist", "; did you mean first?"), ("zzz", ".")])
def test_a_misspelt_model_lists_the_models(write, many, name, meant):
    with pytest.raises(CheckpointNotFound) as raised:
        write("--model_name", name, root=many)
    assert str(raised.value) == f"{many / name}: no such folder{meant} Models in {many}: first, second."


def test_no_model_names_the_train_command(write, tmp_path):
    with pytest.raises(CheckpointNotFound, match=r"python train\.py"):
        write(root=tmp_path)


def test_the_only_model_is_named(write, models):
    assert f"model: alone (the only one in {models})" in write("--max_new_tokens", "1")[2]


def test_a_model_without_tokenizer_is_said(write, tmp_path):
    model = save_model(tmp_path, "mute")
    folder = tmp_path / "bare" / "mute"
    folder.mkdir(parents=True)
    for name in ("model.pt", "config.json"):
        (folder / name).write_bytes((tmp_path / "mute" / name).read_bytes())
    assert model.tokenizer is not None
    with pytest.raises(CheckpointError, match=r"mute: no tokenizer with it"):
        write(root=tmp_path / "bare")


WRONG = [
    (["--temperature", "-1"], "found '-1', expected 0 or a number above 0"),
    (["--temperature", "hot"], "found 'hot'"),
    (["--temperature", "nan"], "found 'nan'"),
    (["--top_k", "0"], "found '0', expected a whole number of at least 1"),
    (["--top_p", "0"], "found '0', expected a number above 0 and at most 1"),
    (["--top_p", "1.1"], "found '1.1'"),
    (["--max_new_tokens", "-3"], "found '-3', expected a whole number of at least 0"),
    (["--num_samples", "1.5"], "found '1.5'"),
    (["--seed", "-1"], "found '-1'"),
    (["--step", "last"], "found 'last', expected a step number or best"),
    (["--promt", "x"], "did you mean --prompt?"),
    (["--dtype", "fp8"], "invalid choice"),
]


@pytest.mark.parametrize(("flags", "message"), WRONG, ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_wrong_flags_end_with_code_2_and_name_the_value(write, flags, message):
    code, out, err = write(*flags)
    assert (code, out) == (2, "") and message in err


def test_zero_tokens_print_the_prompt(write):
    assert write("--prompt", "abc", "--max_new_tokens", "0")[:2] == (0, "abc\n")


# A checkpoint as it lies there


def nanogpt(path: Path, **config) -> SmallGPT:
    """Write a file of nanoGPT with LETTERS in a meta.pkl beside it."""
    small = SmallGPT(vocab_size=len(LETTERS), block_size=16)
    torch.save({"model": small.nanogpt(), "model_args": small.sizes, "iter_num": 7}, path)
    (path.parent / "meta.pkl").write_bytes(pickle.dumps({"itos": dict(enumerate(LETTERS))}))
    return small


@pytest.mark.parametrize("flag", [[], ["--checkpoint"]])
def test_a_file_of_nanogpt_writes_what_its_logits_say(write, tmp_path, flag):
    small, ids = nanogpt(tmp_path / "ckpt.pt"), [LETTERS.index("a")]
    for _ in range(9):
        ids.append(int(small.logits(torch.tensor([ids]))[0, -1].argmax()))
    words = ["--prompt", "a", "--max_new_tokens", "9", "--temperature", "0"]
    code, out, err = write(*flag, str(tmp_path / "ckpt.pt"), *words)
    assert (code, out) == (0, "".join(LETTERS[i] for i in ids) + "\n")
    assert err.startswith("Format: nanoGPT\nnote: its vocabulary is taken from ") and "ckpt.pt: step 7, " in err
    (tmp_path / "meta.pkl").rename(tmp_path / "letters")
    with pytest.raises(InputError, match=r"ckpt\.pt: no tokenizer in it or beside it\. Give --tokenization"):
        write(*flag, str(tmp_path / "ckpt.pt"), *words)
    assert write(*flag, str(tmp_path / "ckpt.pt"), *words, "--meta", str(tmp_path / "letters"))[1] == out


def test_a_folder_of_ours_anywhere_has_its_steps(write, many):
    words = ("--prompt", "a", "--temperature", "0", "--max_new_tokens", "20")
    newest = write("--model_name", "first", *words, root=many)[1]
    for path, more in ((many / "first", []), (many / "first", ["--step", "newest"])):
        assert write(str(path), *more, *words, root=many / "nowhere")[1] == newest
    kept = expected_text("a", 20, temperature=0.0) + "\n"
    assert write(str(many / "first"), "--step", "best", *words)[1] == kept
    assert write(str(many / "first" / "step_00000003"), *words)[1] == kept


def test_what_a_file_does_not_show_is_asked_for_and_flags_answer(write, tmp_path):
    small = SmallGPT(vocab_size=len(LETTERS))
    torch.save(small.lecture(), tmp_path / "lecture.pt")
    words = [str(tmp_path / "lecture.pt"), "--max_new_tokens", "3", "--tokenization", str(tmp_path / "tokenizer.json")]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"token_kind": "char", "chars": list(LETTERS)}))
    with pytest.raises(CheckpointError, match=r"lecture\.pt: nothing in the file shows its .*--norm_placement before"):
        write(*words)
    flags = ["--attention_scale", "head_size", "--norm_placement", "before", "--activation", "relu"]
    assert write(*words, *flags, "--norm_eps", "1e-5")[0] == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["{}/ckpt.pt", "--checkpoint", "a.pt"], "PATH and --checkpoint both name a checkpoint: "),
        (["{}/ckpt.pt", "--model_name", "a"], "leave out --model_name and --legacy_checkpoint"),
        (["{}/ckpt.pt", "--ema"], "--ema: only a folder of ours has it"),
        (["{}/ckpt.pt", "--step", "best"], "--step best: only a folder of ours has it"),
        (["--activation", "relu"], "--activation: for a checkpoint of another program"),
        (["{}/ckpt.pt", "more"], "unexpected word 'more'"),
    ],
)
def test_words_that_contradict_each_other_are_wrong_use(write, tmp_path, words, said):
    nanogpt(tmp_path / "ckpt.pt")
    code, out, err = write(*(word.format(tmp_path) for word in words))
    assert (code, out) == (2, "") and said in err


def test_a_file_has_no_steps_and_a_file_of_modded_nanogpt_no_choices(write, tmp_path):
    nanogpt(tmp_path / "ckpt.pt")
    with pytest.raises(CheckpointNotFound, match=r"ckpt\.pt: not a folder, so there are no steps"):
        write(str(tmp_path / "ckpt.pt"), "--step", "3")
    path = upstream_file(tmp_path / "state.pt")
    with pytest.raises(CheckpointError, match=r"state\.pt: --norm_eps has no effect on a model of modded-nanogpt"):
        write(str(path), "--norm_eps", "1e-6")


# As a process


def process(*flags: str, **settings) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **settings.pop("env", {})}
    return subprocess.run(
        [sys.executable, str(ROOT / "generate.py"), *flags], capture_output=True, text=True, env=environment, **settings
    )


def test_process_writes_text_and_exits_0(models):
    done = process("--checkpoint_root", str(models), "--prompt", "a", "--max_new_tokens", "8", "--temperature", "0")
    assert (done.returncode, done.stdout) == (0, expected_text("a", 8, temperature=0.0) + "\n")
    assert "Traceback" not in done.stderr


def test_process_says_one_line_for_a_missing_model(tmp_path):
    done = process("--checkpoint_root", str(tmp_path), "--model_name", "nobody")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: ") and "nobody" in done.stderr and "Traceback" not in done.stderr


def test_help_and_wrong_flags_do_not_wait_for_torch():
    program = (
        "import atexit, sys, generate\n"
        "atexit.register(lambda: print('torch' in sys.modules))\n"
        "generate.main(sys.argv[1:])"
    )
    for flag, code in (("--help", 0), ("--prom", 2)):
        done = subprocess.run([sys.executable, "-c", program, flag], cwd=ROOT, capture_output=True, text=True)
        assert (done.returncode, done.stdout.split("\n")[-2]) == (code, "False"), done.stderr


def test_a_terminal_that_lacks_characters_gets_replacements(models, tmp_path):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=2, n_embd=8, n_head=1, n_layer=1))
    model.tokenizer = CharTokenizer(["\u00e9", "\u4e2d"])
    save_checkpoint_bundle(model, tmp_path / "foreign", step=0)
    done = process("--checkpoint_root", str(tmp_path), "--max_new_tokens", "6", env={"PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stdout) == (0, "??????\n")


def test_a_reader_that_leaves_early_is_no_error(models):
    command = (
        f'"{sys.executable}" "{ROOT / "generate.py"}" --checkpoint_root "{models}" --max_new_tokens 3000 | head -c 5'
    )
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0 and len(done.stdout) == 5
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr


@pytest.mark.parametrize(
    ("pieces", "stops", "expected"),
    [
        (["ab", "cd"], [], ["ab", "cd", ""]),
        (["ab", "cd", "ef"], ["cd"], ["ab", ""]),
        (["ab", "c", "d", "ef"], ["cd"], ["ab", "", ""]),  # the c is held back until it is known
        (["ab", "c", "x", "ef"], ["cd"], ["ab", "", "cx", "ef", ""]),
        (["aab", "aabaac"], ["aabaac"], ["", "aab"]),  # it begins again within its own beginning
        (["one. two! "], ["!", "."], ["one"]),  # the first in the text, not in the list
        (["ab", "c"], ["cd"], ["ab", "", "c"]),  # the end: what was held back is written
    ],
)
def test_a_text_ends_before_the_first_stop(pieces, stops, expected):
    assert list(until(iter(pieces), stops)) == expected


@pytest.mark.parametrize("mode", [[], ["--no_stream"], ["--json"]])
def test_stop_cuts_the_text_of_the_same_seed_and_draws_no_more(write, mode):
    same = ("--prompt", "a b", "--seed", "3", "--max_new_tokens", "60")
    whole = json.loads(write(*same, "--json")[1])["text"]
    stop = whole[20:22]
    code, out, err = write(*same, *mode, "--stop", stop, "--stop", "never in it")
    cut = whole[: whole.index(stop)]
    assert code == 0 and out == (out if mode == ["--json"] else f"a b{cut}\n")
    assert mode != ["--json"] or json.loads(out)["text"] == cut
    assert f"\n{whole.index(stop) + 2} tokens in " in err


def test_out_writes_a_file_per_text(write, tmp_path):
    same = ("--seed", "3", "--max_new_tokens", "9", "--num_samples", "2", "--prompt", "a b")
    expected = write(*same)[1].split(script.SEPARATOR + "\n")
    code, out, err = write(*same, "--out", str(tmp_path / "deep/texts"))
    assert (code, out) == (0, "") and err.endswith(f"2 texts in {tmp_path / 'deep/texts'}\n")
    assert {p.name: p.read_text() for p in (tmp_path / "deep/texts").iterdir()} == {
        "0001.txt": expected[0],
        "0002.txt": expected[1],
    }
    write(*same, "--json", "--out", str(tmp_path / "objects"))
    made = [json.loads((tmp_path / f"objects/000{n}.json").read_text()) for n in (1, 2)]
    assert [one["prompt"] + one["text"] + "\n" for one in made] == expected and [one["seed"] for one in made] == [3, 4]


def test_out_refuses_what_is_there_before_a_model_is_opened(write, tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/mine.txt").write_text("mine")
    for place, what in (("texts", "is not empty"), ("texts/mine.txt", "is a file")):
        with pytest.raises(InputError) as raised:
            write("--model_name", "nobody", "--out", str(tmp_path / place))
        expected = f"{tmp_path / place}: {what}, expected a new or empty folder for --out. Nothing was written."
        assert str(raised.value) == expected
    assert [p.name for p in (tmp_path / "texts").iterdir()] == ["mine.txt"]
    code, _, err = write("--stop", "")
    assert code == 2 and "argument --stop: found no text, expected one that ends what is written" in err
