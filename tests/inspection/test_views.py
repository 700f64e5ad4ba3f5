"""The views of inspect_model.py: tensors one by one, verification, statistics, differences, folders of models."""

from __future__ import annotations

import json
import re

import pytest
import torch

import inspect_model
from core.console.commandline import DONE, FAILED, WRONG_USE
from tests.hostile.assemble import items, text, torch_zip
from tests.makers.generations import SIZES, LectureGPT, trained, write_old_bundle, write_single_file
from tests.makers.models import flip


def inspect(capsys, *argv: object) -> tuple[int, str, str]:
    code = inspect_model.main([str(word) for word in argv])
    return code, *capsys.readouterr()


@pytest.fixture
def model():
    return LectureGPT(**SIZES)


@pytest.fixture
def bundle(tmp_path, model):
    return write_old_bundle(tmp_path / "models" / "dante", model, trained(model, 2), step=2)


def test_tensors_are_listed_one_by_one_where_a_pattern_fits(bundle, capsys):
    code, out, _ = inspect(capsys, bundle, "--tensors", "*.ln1.*")
    assert code == DONE
    rows = re.findall(r"^(blocks\.\d\.ln1\.\w+) +\((\d+),\) +float32 +(\d+) bytes$", out, re.MULTILINE)
    assert sorted(rows) == [(f"blocks.{i}.ln1.{part}", "24", "96") for i in (0, 1) for part in ("bias", "weight")]
    facts = json.loads(inspect(capsys, bundle, "--tensors", "ln_f.*", "--json")[1])
    assert [tensor["name"] for tensor in facts["tensors"]] == ["ln_f.weight", "ln_f.bias"]


def test_verification_counts_the_bytes_and_names_the_tensor_that_is_damaged(bundle, capsys):
    code, out, _ = inspect(capsys, bundle, "--verify")
    assert code == DONE and "nothing is damaged" in out
    path = bundle / "model.pt"
    flip(path, path.stat().st_size // 2)
    code, out, err = inspect(capsys, bundle, "--verify", "--json")
    assert code == FAILED
    (fault,) = json.loads(out)["verification"]["damaged"]
    assert re.search(rf"^{re.escape(str(path))}: .*blocks\.\d.* is damaged \(CRC32 \w{{8}}, recorded \w{{8}}\)", fault)
    assert f"error: {fault}\n" in err


def test_a_file_without_checksums_is_said(tmp_path, model, capsys):
    write_single_file(tmp_path / "old.pt", model, step=2, stream=True)
    code, out, _ = inspect(capsys, tmp_path / "old.pt", "--verify")
    assert code == DONE and "unrecorded: " in out and "no checksums are recorded in this format" in out


def test_statistics_are_those_of_torch_and_nan_is_loud(tmp_path, capsys):
    values = torch.randn(100, 7, dtype=torch.bfloat16)
    torch.save({"good": values, "bad": torch.tensor([1.0, float("nan"), float("-inf")])}, tmp_path / "x.pt")
    code, out, err = inspect(capsys, tmp_path / "x.pt", "--stats", "--json")
    stats = {stat["name"]: stat for stat in json.loads(out)["stats"]}
    assert code == FAILED
    assert "error: bad: 1 NaN and 1 Inf among 3 numbers" in err
    expected = values.double()
    assert stats["good"]["mean"] == pytest.approx(expected.mean().item(), rel=1e-6)
    assert stats["good"]["std"] == pytest.approx(expected.std().item(), rel=1e-6)
    assert (stats["good"]["min"], stats["good"]["max"]) == (expected.min().item(), expected.max().item())
    code, out, err = inspect(capsys, tmp_path / "x.pt", "--stats", "good")
    assert code == DONE and err == "" and re.search(r"^good +700 ", out, re.MULTILINE)


def test_a_difference_is_an_exit_code(tmp_path, model, capsys):
    bundle = write_old_bundle(tmp_path / "models" / "dante", model, step=2)
    same = write_single_file(tmp_path / "latest.pt", model, step=2)
    assert inspect(capsys, "--diff", same, bundle)[0] == DONE
    with torch.no_grad():
        model.blocks[1].ln1.weight[3] += 0.5
    other = write_single_file(tmp_path / "final.pt", model, step=2)
    code, out, _ = inspect(capsys, "--diff", other, bundle)
    assert code == FAILED and re.search(r"^ +blocks\.1\.ln1\.weight +0\.5 +\S+ +1 of 24$", out, re.MULTILINE)
    code, out, err = inspect(capsys, "--diff", tmp_path / "none.pt", bundle)
    assert (code, out) == (WRONG_USE, "") and "none.pt: nothing here" in err


def test_several_paths_are_shown_one_after_the_other(tmp_path, model, bundle, capsys):
    file = write_single_file(tmp_path / "final.pt", model, step=7)
    code, out, _ = inspect(capsys, bundle, file)
    assert code == DONE and out.count("=== FORMAT ===") == 2
    assert out.index(f"Location: {bundle}") < out.index(f"Location: {file}")
    facts = json.loads(inspect(capsys, bundle, file, "--json")[1])
    assert [entry["step"] for entry in facts] == [2, 7]


def test_upstream_files_say_what_they_are(shared, capsys):
    fixtures = shared / "fixtures"
    said = {
        "modded_small_16e2da07_d128h1_opt/state_step000005.pt": "Format: small (from train_gpt_small.py)",
        "modded_medium_06743860_d128h1_opt/state_step000005.pt": "Format: medium (from train_gpt_medium.py)",
        "nanogpt_char_biasFalse/ckpt.pt": "Program: nanoGPT",
        "megatron_llama_gqa/exported_model.pt": "Program: Megatron export with local names, Llama style",
        "hf_gpt2_sharded": "Program: Hugging Face GPT-2",
        "dcp_fsdp2_4ranks/0000002": "step folder, ema (DCP), model (DCP), optimizer (4 ranks)",
    }
    for path, line in said.items():
        code, out, _ = inspect(capsys, fixtures / path)
        assert code == DONE and f"\n{line}\n" in out, path
        assert inspect(capsys, fixtures / path, "--verify", "--stats")[0] == DONE, path


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--diff", "a", "b", "c"], "'a' is neither the number of a step nor newest"),
        (["a", "b", "--step", "3"], "--step is for one checkpoint"),
        (["a", "b", "--html", "x"], "--html is for one checkpoint"),
        (["--tensors", "."], "--tensors .: is a path, and would be taken as a pattern; put it first"),
        (["--moment"], "did you mean --moments?"),
    ],
    ids=str,
)
def test_flags_that_do_not_go_together_are_wrong_use(argv, said, capsys):
    with pytest.raises(SystemExit) as raised:
        inspect_model.main(argv)
    assert raised.value.code == WRONG_USE and said in capsys.readouterr().err


def test_json_of_shared_parts_is_bounded_and_says_what_it_lacks(tmp_path, capsys):
    """A list of 4,000 numbers, in a list of 30 of it, 180 levels deep: 120,000 lines of 370 characters from 9 KB."""
    rows = b"](" + b"K\x01" * 4000 + b"eq\x000](" + b"h\x00" * 30 + b"e" + b"q\x010" + b"h\x01" + b"\x85" * 180
    (tmp_path / "x.pt").write_bytes(torch_zip(items(step=b"K\x07", deep=rows, after=text("word")) + b"."))
    code, out, _ = inspect(capsys, tmp_path / "x.pt", "--json")
    facts = json.loads(out)
    assert code == DONE and len(out) < 3_000_000 and len(out.replace(" ", "")) < len(out) / 2
    assert "more, left out" in out
    assert facts["step"] == 7 and facts["tensors"] == [] and facts["format"] == "PyTorch zip file"
    (tmp_path / "y.pt").write_bytes(torch_zip(items(step=b"K\x08") + b"."))
    code, out, _ = inspect(capsys, "--diff", tmp_path / "x.pt", tmp_path / "y.pt", "--json")
    assert len(out) < 3_000_000
