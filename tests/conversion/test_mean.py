"""convert_checkpoints.py --average: the mean of several checkpoints, of any program, to any format."""

from __future__ import annotations

import json
import math
import re
import tempfile
import tracemalloc
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import convert_checkpoints
from core.checkpoint import CheckpointManager
from core.console.commandline import DONE, FAILED, WRONG_USE
from core.containers.tensors.averaged import span
from core.containers.tensors.reading import Gatherer
from core.conversion.opening import open_model
from core.conversion.plan import Options
from core.errors import CheckpointError
from tests.makers.models import SMALL, flip, save_steps, state_of


def average(capsys, *words) -> tuple[int, str, str]:
    try:
        code = convert_checkpoints.main([str(word) for word in (*words, "--average")])
    except SystemExit as stopped:
        code = int(stopped.code or 0)
    said = capsys.readouterr()
    return code, said.out, said.err


def mean(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack([tensor.double() for tensor in tensors]).mean(0).to(tensors[0].dtype)


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are equal to the last place."""
    above, below = (
        torch.nextafter(b.float(), torch.tensor(math.inf)),
        torch.nextafter(b.float(), torch.tensor(-math.inf)),
    )
    return a.dtype == b.dtype and bool(((a.float() >= below) & (a.float() <= above)).all())


DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.mark.parametrize("kind", DTYPES)
@settings(max_examples=5, deadline=None)
@given(
    st.integers(2, 5),
    st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=3),
    st.integers(0, 9),
    st.sampled_from([".safetensors", ".pt"]),
)
def test_a_mean_is_that_of_torch_and_equal_files_give_the_same_bits(kind, count, shapes, seed, ending):
    dtype = DTYPES[kind]
    with tempfile.TemporaryDirectory() as made:
        root, draw = Path(made), torch.Generator().manual_seed(seed)
        files = []
        for number in range(count):
            tensors = {f"t{i}": torch.randn(shape, generator=draw).to(dtype) for i, shape in enumerate(shapes)}
            tensors["ids"] = torch.arange(3)
            files.append(tensors)
            save(tensors, root / f"{number}{ending}")
        sources = [root / f"{number}{ending}" for number in range(count)]
        words = ["--to", "safetensors", "--average"]
        assert convert_checkpoints.main([*map(str, sources), "--output_path", f"{root}/m.safetensors", *words]) == DONE
        found = load_file(root / "m.safetensors")
        for name in files[0]:
            expected = [tensors[name] for tensors in files]
            assert torch.equal(found[name], expected[0]) if name == "ids" else close(found[name], mean(expected))
        same = [sources[0], root / f"again{ending}", *[sources[0]] * (count - 2)]
        save(files[0], same[1])
        assert convert_checkpoints.main([*map(str, same), "--output_path", f"{root}/s.safetensors", *words]) == DONE
        assert {n: bits(t) for n, t in load_file(root / "s.safetensors").items()} == {
            n: bits(t) for n, t in files[0].items()
        }


def save(tensors, path: Path) -> None:
    if path.suffix == ".pt":
        torch.save({name: turned(tensor) for name, tensor in tensors.items()}, path)
    else:
        save_file(tensors, path)


def turned(tensor: torch.Tensor) -> torch.Tensor:
    """The same tensor, its last axis outermost in memory."""
    return tensor.movedim(-1, 0).contiguous().movedim(0, -1) if tensor.ndim > 1 else tensor


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_bits_that_all_sources_share_stay_whatever_they_are(tmp_path, capsys):
    odd = torch.tensor([0x7FC00001, -0x400001, 0x7F800000, -0x80000000, 0x00000001, 0x7F800001], dtype=torch.int32)
    same = odd.view(torch.float32)
    for number in range(3):
        save_file({"w": torch.cat([same, torch.tensor([float(number), math.inf])])}, tmp_path / f"{number}.safetensors")
    sources = [tmp_path / f"{number}.safetensors" for number in range(3)]
    assert average(capsys, *sources, "--output_path", tmp_path / "mean.safetensors")[0] == DONE
    found = load_file(tmp_path / "mean.safetensors")["w"]
    assert bits(found[:6]) == bits(same) and found[6:].tolist() == [1.0, math.inf]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=0, max_size=4), st.data())
def test_a_span_has_the_elements_in_their_order(shape, data):
    numbers = torch.arange(math.prod(shape), dtype=torch.int32).reshape(shape)
    start = data.draw(st.integers(0, numbers.numel() - 1))
    stop = data.draw(st.integers(start + 1, numbers.numel()))
    with tempfile.TemporaryDirectory() as made, ExitStack() as held:
        torch.save({"w": turned(numbers)}, Path(made) / "w.pt")
        view = open_model(Path(made) / "w.pt", held, Options(), needs_family=False).tensors["w"]
        with Gatherer() as gatherer:
            found = b"".join(p.tobytes() for part in span(view, start, stop) for p in gatherer.pieces(part))
    assert np.frombuffer(found, "<i4").tolist() == list(range(start, stop))


@pytest.fixture
def steps(tmp_path):
    """Steps 1 to 3 of a small model, the first two kept."""
    save_steps(tmp_path, 3, keep=9, val_loss=lambda step: 4.0 - step)
    folder = tmp_path / "dante"
    return [folder / "step_00000001", folder / "step_00000002", folder]


def weights(paths) -> list[dict[str, torch.Tensor]]:
    return [torch.load(path / "model.pt", weights_only=True) for path in paths]


@pytest.mark.parametrize("to", ["bundle", "nanogpt", "hf", "safetensors", "pt", "dcp"])
def test_kept_steps_of_a_model_are_averaged_to_every_format(to, tmp_path, capsys):
    save_steps(tmp_path, 3, config={**SMALL, "tied_head": True, "head_bias": False}, keep=9)
    steps = [tmp_path / "dante/step_00000001", tmp_path / "dante/step_00000002"]
    target = tmp_path / ("mean.pt" if to == "pt" else "mean")
    code, out, err = average(capsys, *steps, "--output_path", target, "--to", to)
    assert (code, err) == (DONE, "")
    assert f"the average of 2 checkpoints: {steps[0]}, {steps[1]}" in out
    assert "their optimizer states are left out" in out and "bit for bit" in out
    if to in ("safetensors", "pt", "dcp"):
        assert convert_checkpoints.main([str(target), str(tmp_path / "back.pt"), "--to", "pt"]) == DONE
        found = torch.load(tmp_path / "back.pt", weights_only=True)
    else:
        assert convert_checkpoints.main([str(target), str(tmp_path / "back"), "--to", "bundle"]) == DONE
        found = torch.load(tmp_path / "back/model.pt", weights_only=True)
    if to == "safetensors":
        assert ": our GPT, 25 tensors, 1 left out" in out  # the head, which is the table
    if to == "hf":
        assert "Converted from the mean of `step_00000001`, `step_00000002` (" in (target / "README.md").read_text()
    sources = weights(steps)
    more = found.keys() - sources[0].keys()  # biases of zero, in GPT-2
    assert sources[0].keys() - found.keys() <= {"lm_head.weight"} and not any(found[name].any() for name in more)
    assert all(close(found[name], mean([s[name] for s in sources])) for name in found.keys() - more)


def test_a_bundle_records_its_sources_and_nothing_that_is_of_one_step(steps, tmp_path, capsys):
    code, out, _ = average(capsys, *steps, "--output_path", tmp_path / "mean", "--to", "bundle", "--dry_run")
    assert code == DONE and not (tmp_path / "mean").exists() and "mean of 3" in out
    assert "step 3 is the last of theirs (1, 2, 3)" in out
    assert average(capsys, *steps, "--output_path", tmp_path / "mean", "--to", "bundle")[0] == DONE
    state = state_of(tmp_path / "mean")
    assert state["extra"]["averaged"] == [str(path) for path in steps]
    assert state["step"] == 3 and state["optimizer_file"] is None
    assert not {"val_loss", "best", "certificate", "run", "retention"} & {n for n, v in state.items() if v is not None}
    model = CheckpointManager.load_for_inference("mean", tmp_path)
    expected = {name: mean([one[name] for one in weights(steps)]) for name in model.state_dict()}
    assert all(close(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert isinstance(model.generate("In", max_new_tokens=3), str)


def altered(root: Path, name: str, change) -> Path:
    tensors = {"w": torch.ones(2, 3), "n": torch.tensor([1, 2])}
    change(tensors)
    save_file(tensors, root / name)
    return root / name


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda t: t.update(w=torch.ones(3, 2)),
            r"does not fit the first: w is \(3, 2\), expected \(2, 3\)",
        ),
        (lambda t: t.pop("w"), "missing: w"),
        (lambda t: t.update(v=torch.ones(1)), "without a place: v"),
        (lambda t: t.update(w=torch.ones(2, 3).half()), "w is float32 and float16, expected one dtype"),
        (lambda t: t.update(n=torch.tensor([1, 3])), r"n \(int64\) has other values. Only float64, float32, float16"),
    ],
)
def test_files_that_do_not_agree_are_refused_by_name(change, said, tmp_path, capsys):
    files = [altered(tmp_path, "a.safetensors", lambda t: None), altered(tmp_path, "b.safetensors", change)]
    code, _, err = run_script(capsys, *files, "--output_path", tmp_path / "mean.safetensors")
    assert code == FAILED and err.startswith(f"error: {files[0]} and {files[1]}: ")
    assert re.search(said, err) and not (tmp_path / "mean.safetensors").exists()


def run_script(capsys, *words) -> tuple[int, str, str]:
    """As `average`, with the errors that the script prints."""
    try:
        return average(capsys, *words)
    except CheckpointError as error:
        return FAILED, "", f"error: {error}"


def test_models_with_other_settings_or_vocabularies_are_refused(steps, tmp_path, capsys):
    other = steps[1] / "config.json"
    values = json.loads(other.read_text())
    other.write_text(json.dumps({**values, "dropout": 0.0}))
    assert run_script(capsys, *steps[:2], "--output_path", tmp_path / "a", "--to", "bundle")[0] == DONE
    other.write_text(json.dumps({**values, "n_head": 4}))
    code, _, err = run_script(capsys, *steps[:2], "--output_path", tmp_path / "b", "--to", "bundle")
    assert code == FAILED and str(steps[1]) in err
    other.write_text(json.dumps(values))
    tokenizer = steps[1] / "tokenizer.json"
    chars = json.loads(tokenizer.read_text())
    tokenizer.write_text(json.dumps({**chars, "chars": chars["chars"][::-1], "fingerprint": None}))
    code, _, err = run_script(capsys, *steps[:2], "--output_path", tmp_path / "b", "--to", "bundle")
    assert code == FAILED and ("tokenizers differ" in err or "tokenizer.json" in err)


@pytest.mark.parametrize("number", [0, 1])
def test_a_damaged_source_is_found_by_its_checksum_and_nothing_is_written(number, steps, tmp_path, capsys):
    flip(steps[number] / "model.pt", 5000)
    code, _, err = run_script(capsys, *steps[:2], "--output_path", tmp_path / "mean", "--to", "bundle")
    assert code == FAILED and str(steps[number]) in err and "damaged" in err
    assert not (tmp_path / "mean").exists()


def test_memory_is_that_of_pieces(tmp_path, capsys):
    sources = [tmp_path / f"{number}.safetensors" for number in range(3)]
    for number, path in enumerate(sources):
        save_file({"w": torch.full((4096, 2048), float(number))}, path)  # 32 MB each
    tracemalloc.start()
    try:
        assert average(capsys, *sources, "--output_path", tmp_path / "mean.safetensors")[0] == DONE
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 24e6 and torch.equal(load_file(tmp_path / "mean.safetensors")["w"], torch.ones(4096, 2048))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["a", "b"], "--average takes two or more checkpoints as PATHs, and --output_path DST"),
        (["a", "--output_path", "c"], "--average takes two or more checkpoints as PATHs, and --output_path DST"),
        (["a", "b", "--output_path", "c", "--include_optimizer"], "leave out --include_optimizer"),
        (["a", "b", "--output_path", "c", "--match_original", "d"], "leave out --match_original"),
    ],
)
def test_wrong_use_is_said_in_one_line(words, said, capsys):
    code, _, err = average(capsys, *words)
    assert code == WRONG_USE and said in err
