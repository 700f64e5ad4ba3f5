"""The page of inspect_model.py --html, read as a browser reads it, and in one where there is one."""

from __future__ import annotations

import base64
import hashlib
import html
import itertools
import json
import math
import re
import shutil
import struct
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

import core.inspection.html.document
import inspect_model
from core.console.words import printable
from core.errors import InputError
from core.inspection.html.page import page, write_page
from core.inspection.html.sizes import part_of, sizes_of
from core.inspection.html.weights import Weights
from core.inspection.inspect import inspect_path
from core.inspection.report import facts_of
from tests.makers.models import manager, save_durably, save_steps, started, update

HOSTILE = [
    "<script>document.title='taken'</script>",
    "</script><script>document.title='taken'</script>",
    "<img src=x onerror=\"document.title='taken'\">",
    "\"'><svg onload=alert(1)>.weight",
    "<!--<script>",
    "]]>&amp;&lt;b&gt;",
    "a\x00b\x1b[31m\r\n\u2028\u202ec",
    "%{customdata[0]}<br><a href='javascript:alert(1)'>x</a>",
    "h.0." + "x" * 996,
    "__proto__.constructor",
]
VOID = {"meta", "link", "input", "br"}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Read(HTMLParser):
    """The elements, scripts and visible text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.scripts, self.text, self.inside = [], [], [], [], ""
        self.open, self.faults = [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.inside = tag
        if tag not in VOID:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        self.inside = ""
        if not self.open or self.open.pop() != tag:
            self.faults.append(f"</{tag}> closes another element")

    def handle_data(self, data):
        if self.inside == "script":
            self.scripts[-1] += data
        elif self.inside != "style":
            self.text.append(data)

    @property
    def data(self):
        return json.loads(self.scripts[0])

    def has(self, text):
        return text in " ".join(self.text)


def safetensors(path, tensors, metadata=None):
    """A file of float32 vectors by name."""
    header, data = {"__metadata__": metadata} if metadata else {}, b""
    for name, values in tensors.items():
        piece = struct.pack(f"<{len(values)}f", *values)
        header[name] = {"dtype": "F32", "shape": [len(values)], "data_offsets": [len(data), len(data) + len(piece)]}
        data += piece
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def page_of(path, **changes):
    with inspect_path(path) as found:
        return Read(page(found, {**facts_of(found), **changes}))


@pytest.fixture
def small(tmp_path):
    return safetensors(tmp_path / "small.safetensors", {"a.weight": [1.0, -3.0], "b.weight": [0.5]})


def put(path, file, **options):
    with inspect_path(path) as found:
        write_page(file, found, facts_of(found), **options)


# What it says


def test_a_nanogpt_file_shows_program_architecture_step_and_size(shared):
    path = shared / "fixtures/nanogpt_char_biasFalse/ckpt.pt"
    read = page_of(path)
    for said in ("ckpt.pt", "nanoGPT", "PyTorch zip file", "3 layers, 4 heads of 16", "no faults"):
        assert read.has(said)
    with inspect_path(path) as found:
        assert read.has(f"{found.step:,}")
        assert [row[0] for row in read.data["table"]] == list(found.container.tensors)


def test_statistics_of_the_table_are_those_of_the_tensors(tmp_path):
    read = page_of(safetensors(tmp_path / "t.safetensors", {"a": [1.0, -3.0, 0.0, math.nan], "b": [2.0, 2.0]}))
    name, shape, numel, dtype, nbytes, mean, std, low, high, rms, zeros, not_finite = read.data["table"][0]
    assert (name, shape, numel, dtype, nbytes) == ("a", "4", 4, "float32", 16)
    assert (low, high, zeros, not_finite) == (-3.0, 1.0, 0.25, 1)
    assert mean == pytest.approx(-2 / 3, rel=1e-3)
    assert std == pytest.approx(math.sqrt(((5 / 3) ** 2 + (7 / 3) ** 2 + (2 / 3) ** 2) / 2), rel=1e-3)
    assert rms == pytest.approx(math.sqrt(10 / 3), rel=1e-3)
    assert read.has("NaN or Inf among the weights")
    assert read.has("a: 1 NaN, 0 Inf of 4")


def test_tensors_of_all_layers_are_one_kind_in_the_order_of_the_layers(tmp_path):
    tensors = {f"h.{i}.w": [float(i), i + 1.0] for i in (10, 2, 0)} | {"head": [1.0]}
    with inspect_path(safetensors(tmp_path / "t.safetensors", tensors)) as found:
        kinds = Weights.of(found, lambda size: None).kinds
    assert list(kinds) == ["h.{i}.w", "head"]
    assert [layer.number for layer in kinds["h.{i}.w"]] == [0, 2, 10]
    shapes = [layer.shape for layer in kinds["h.{i}.w"]]
    assert [(shape.low, shape.high, sum(shape.counts)) for shape in shapes] == [(0, 1, 2), (2, 3, 2), (10, 11, 2)]
    assert {len(shape.counts) for shape in shapes} == {48}


def test_sizes_add_up_in_every_module_and_weights_are_apart_from_the_optimizer(tmp_path):
    made, model, optimizer = started(tmp_path)
    update(model, optimizer)
    save_durably(made, model, optimizer, step=1)
    made.close()
    with inspect_path(tmp_path / "dante") as found:
        tops = sizes_of(found)
        weights = sum(t.nbytes for name, t in found.weights.items() if name != "lm_head.weight")
    assert tops["weights"].size == weights and tops["optimizer"].size > weights

    def adds_up(module):
        return not module.inner or (
            sum(inner.size for inner in module.inner.values()) == module.size
            and all(adds_up(inner) for inner in module.inner.values())
        )

    assert all(adds_up(module) for module in tops.values())


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("transformer.h.0.attn.c_attn.weight", "attention"),
        ("decoder.layers.3.self_attention.linear_qkv.weight", "attention"),
        ("decoder.layers.3.mlp.linear_fc1.layer_norm_weight", "norms"),
        ("decoder.layers.3.mlp.linear_fc2.weight", "feed-forward"),
        ("embedding.word_embeddings.weight", "embeddings"),
        ("transformer.wte.weight", "embeddings"),
        ("output_layer.weight", "head"),
        ("lm_head.weight", "head"),
        ("blocks.0.sa.qkv.weight", "attention"),
        ("blocks.0.fwd.net.0.weight", "feed-forward"),
        ("blocks.0.ln1.weight", "norms"),
        ("transformer.ln_f.bias", "norms"),
        ("model.layers.0.input_layernorm.weight", "norms"),
        ("model.layers.0.mlp.experts.7.up_proj.weight", "feed-forward"),
        ("value_embeds.1.weight", "embeddings"),
        ("scalars", "other"),
    ],
)
def test_a_tensor_of_any_program_has_a_part_in_words(name, part):
    assert part_of(name) == part


def test_a_pickle_that_calls_is_a_red_box(small):
    read = page_of(small, foreign=['x.pt: its pickle names posix.system("rm -rf /")'], damaged=["b is damaged"])
    assert read.has('posix.system("rm -rf /")')
    assert read.attributes.count(("class", "red")) == 2
    assert ("class", "red") not in page_of(small).attributes


def test_contradictions_and_notes_are_shown(small):
    read = page_of(small, contradictions=["n_layer is 3 <here>"], notes=["a shard is missing"])
    assert read.has("n_layer is 3 <here>")
    assert read.has("a shard is missing")


def test_a_bundle_shows_its_training_curve(tmp_path):
    made, model, optimizer = started(tmp_path)
    for _ in range(2):
        update(model, optimizer)
    save_durably(made, model, optimizer, step=2)
    made.close()
    log = [{"step": s, "loss": 4.0 - s, "learning_rate": 1e-3} for s in (1, 2)] + [{"step": 2, "val_loss": 2.5}]
    (tmp_path / "dante/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    read = page_of(tmp_path / "dante")
    assert read.has("Train loss from 3 at step 1 to 2 at step 2; validation loss from 2.5 at step 2 to 2.5 at step 2")
    names = [value for key, value in read.attributes if key == "data-name"]
    assert names[:4] == ["train loss", "train loss, smoothed", "validation loss", "learning rate"]
    assert ("id", "curve") in read.attributes and read.faults == []
    assert read.has("3 lines of metrics.jsonl.")


def test_a_damaged_bundle_still_gets_its_page(tmp_path):
    made, model, optimizer = started(tmp_path)
    save_durably(made, model, optimizer, step=0)
    made.close()
    path = tmp_path / "dante/model.pt"
    path.write_bytes(path.read_bytes()[:1000])
    read = page_of(tmp_path / "dante")
    assert read.has("Damaged")
    assert "histograms" not in dict(read.attributes).values()


def test_what_verification_found_is_no_longer_called_whole(small):
    found = {"damaged": ["a.weight is damaged <CRC32>"], "checked_bytes": 12}
    read = page_of(small, verification=found)
    assert read.has("a.weight is damaged <CRC32>")
    assert read.has("1 fault") and not read.has("no faults")
    assert page_of(small, verification={**found, "damaged": []}).has("12 bytes compared with checksums")


def test_progress_tells_the_bytes_of_both_readings(small):
    seen = []
    with inspect_path(small) as found:
        page(found, facts_of(found), seen.append)
    assert sum(seen) == 2 * 12


def test_a_page_for_a_model_of_124_million_is_small_well_formed_and_thinned(tmp_path):
    made, model, optimizer = started(tmp_path)
    save_durably(made, model, optimizer, step=0)
    made.close()
    folder, random = tmp_path / "dante", Random(1)
    with (folder / "metrics.jsonl").open("w") as log:
        for step in range(1, 20_001):
            loss = 9.5 if step == 12_345 else 3 + 4 / step**0.3 + random.gauss(0, 0.05)
            log.write(json.dumps({"step": step, "loss": loss, "learning_rate": 1e-3 * step}) + "\n")
            if step % 10 == 0:
                log.write(json.dumps({"step": step, "val_loss": loss}) + "\n")
    parts = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
    names = [f"transformer.h.{i}.{part}.{kind}" for i in range(12) for part in parts for kind in ("weight", "bias")]
    values = {
        name: [random.gauss(0, 0.02) for _ in range(600)] for name in [*names, "wte", "wpe", "f.weight", "f.bias"]
    }
    with inspect_path(folder) as ours, inspect_path(safetensors(tmp_path / "t.safetensors", values)) as large:
        weights = Weights.of(large, lambda size: None)
        facts = {**facts_of(ours), "tensors": facts_of(large)["tensors"]}
        text = page(ours, facts, weights=weights)
    read = Read(text)
    assert len(text.encode()) < 150_000
    assert len(read.data["table"]) == 148 and all(len(row) == 12 for row in read.data["table"])
    ids = [value for key, value in read.attributes if key == "id"]
    assert sorted(ids) == sorted(set(ids)) and {"training", "sizes", "norms", "histograms", "table"} <= set(ids)
    assert read.faults == [] and read.open == []
    loss, smooth, evaluations, rate = re.findall(r'data-name="[^"]*" d="([^"]+)"', text)[:4]
    assert max(path.count("l") for path in (loss, smooth, evaluations, rate)) < 1000
    heights = list(itertools.accumulate(y for _, y in steps(loss)))
    assert min(heights) == pytest.approx(10 + 0.04 / 1.08 * 306, abs=1)  # the peak, near the top of the plot
    assert heights.index(min(heights)) == pytest.approx(12_345 / 20_000 * len(heights), abs=3)


def steps(path):
    """The numbers of a path by pairs."""
    numbers = [float(number) for number in re.findall(r"-?\d*\.?\d+", path)]
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def luminance(color):
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one, other):
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_colour_has_the_contrast_of_aa(scheme):
    style = (Path(core.inspection.html.document.__file__).parent / "page.css").read_text()
    light, dark = re.findall(r":root \{(.*?)\}", style, re.DOTALL)[:2]
    colors = dict(re.findall(r"--([\w-]+): (#\w{6})", light if scheme == "light" else dark))
    assert len(colors) == 20
    texts = ("text", "faint", "red", "amber", *(f"c{i}" for i in range(1, 9)))
    backs = {"red": "red-back", "amber": "amber-back", "faint": "back"}
    low = {name: contrast(colors[name], colors["card"]) for name in texts}
    low |= {f"{name} on {back}": contrast(colors[name], colors[back]) for name, back in backs.items()}
    assert {name: value for name, value in low.items() if value < 4.5} == {}
    assert contrast(colors["raw"], colors["card"]) >= 3  # a line


def test_a_walk_back_and_the_branch_it_left_are_marked(tmp_path):
    made, model, optimizer = started(tmp_path, keep=3)
    for step in (1, 2, 3):
        update(model, optimizer)
        save_durably(made, model, optimizer, step=step)
    made.close()
    log = [json.dumps({"step": s, "loss": 4.0 - s}) + "\n" for s in (1, 2, 3)]
    (tmp_path / "dante/metrics.jsonl").write_text("".join(log))
    read = page_of(tmp_path / "dante")
    assert not read.has("abandoned")
    with manager(tmp_path, keep=3) as made:
        made.go_back(1)
        model, optimizer, _ = made.initialize_for_training({}, "char", None, 1e-3)
        update(model, optimizer)
        save_durably(made, model, optimizer, step=2)
    read = page_of(tmp_path / "dante")
    assert read.has("step 1: went back to it, and on from there")
    assert read.has("step 3: end of a branch that was abandoned")
    assert ("data-name", "abandoned, to step 3") in read.attributes


def test_every_resume_is_marked_also_where_its_steps_are_gone_and_the_command_is_shown(tmp_path):
    made, model, optimizer = started(tmp_path, keep=0)
    for step in (1, 2, 3):
        update(model, optimizer)
        made.record(command=["train.py", "--model_name", "a<b> c"])
        save_durably(made, model, optimizer, step=step)
        made.close()
        made = manager(tmp_path, keep=0)
        model, optimizer, _ = made.initialize_for_training({}, "char", None, 1e-3)
    made.close()
    state = json.loads((tmp_path / "dante/training_state.json").read_bytes())
    assert state["resumes"] == [1, 2] and state["command"] == ["train.py", "--model_name", "a<b> c"]
    log = [json.dumps({"step": s, "loss": 4.0 - s}) + "\n" for s in (1, 2, 3)]
    (tmp_path / "dante/metrics.jsonl").write_text("".join(log))
    read = page_of(tmp_path / "dante")
    assert read.has("step 1: resumed") and read.has("step 2: resumed") and not read.has("step 3: resumed")
    assert read.has("python train.py --model_name 'a<b> c'")


def test_a_page_without_a_name_is_named_after_what_it_shows(tmp_path, monkeypatch, capsys):
    save_steps(tmp_path / "checkpoints", 2)
    monkeypatch.chdir(tmp_path)
    for words, name in (
        (["--model_name", "dante", "--html"], "dante.html"),
        (["checkpoints/dante", "--step", "1", "--html"], "dante_1.html"),
        (["checkpoints/dante", "--history", "--html"], "dante_history.html"),
        (["checkpoints", "--html"], "checkpoints.html"),
        (["--model_name", "dante", "--diff", "1", "2", "--html"], "dante_1_and_2.html"),
        (["--diff", "checkpoints/dante/step_00000001", "checkpoints/dante", "--html"], "step_00000001_and_dante.html"),
    ):
        inspect_model.main(words)
        assert f"wrote {name} (" in capsys.readouterr().err and Path(name).is_file()
    with pytest.raises(SystemExit):
        inspect_model.main(["--html", "checkpoints"])
    assert "--html checkpoints: is a folder, and would be taken as the page; put it first" in capsys.readouterr().err


def test_damage_is_said_by_a_page_without_being_asked(tmp_path, capsys):
    made, model, optimizer = started(tmp_path)
    save_durably(made, model, optimizer, step=0)
    made.close()
    path, file = tmp_path / "dante/model.pt", tmp_path / "page.html"
    assert inspect_model.main([str(tmp_path / "dante"), "--html", str(file)]) == 0
    assert f"wrote {file} (" in capsys.readouterr().err
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert inspect_model.main([str(tmp_path / "dante"), "--html", str(file), "--overwrite"]) == 1
    said = capsys.readouterr().err
    assert f"wrote {file} (" in said and "error: " in said and "model.pt" in said
    assert Read(file.read_text()).has("1 fault")


def test_a_sample_is_a_text_of_the_model_and_what_cannot_write_has_a_page_without(tmp_path, small, capsys):
    made, model, optimizer = started(tmp_path)
    save_durably(made, model, optimizer, step=3)
    made.close()
    file = tmp_path / "page.html"
    assert inspect_model.main([str(tmp_path / "dante"), "--html", str(file), "--sample"]) == 0
    text = file.read_text()
    written = html.unescape(re.search("<blockquote>(.*?)</blockquote>", text, re.DOTALL)[1])
    assert len(written) > 200 and set(written) <= {*made.tokenizer_state()["chars"], "\n"}
    assert inspect_model.main([str(small), "--html", str(file), "--sample", "--overwrite"]) == 0
    assert "no sample: " in capsys.readouterr().err and "<blockquote>" not in file.read_text()
    with pytest.raises(SystemExit):
        inspect_model.main([str(small), "--sample"])
    assert "--sample needs --html" in capsys.readouterr().err


def test_a_history_has_a_page_with_every_step_and_what_rules_would_remove(tmp_path, capsys):
    made, model, optimizer = started(tmp_path, keep=3)
    for step in (1, 2, 3):
        update(model, optimizer)
        save_durably(made, model, optimizer, step=step, metrics={"val_loss": 4.0 - step})
    made.go_back(2)
    made.close()
    file, folder = tmp_path / "page.html", tmp_path / "dante"
    assert inspect_model.main([str(folder), "--history", "--keep", "0", "--html", str(file)]) == 0
    assert f"wrote {file} (" in capsys.readouterr().err
    text = file.read_text()
    read = Read(text)
    assert read.faults == [] and read.open == [] and read.has("3 steps, 1 aside")
    rows = re.findall(r"</pre></td><td>(\d)</td><td>([\d.]+)</td>", text)
    assert rows == [("1", "3.0000"), ("2", "2.0000"), ("3", "1.0000"), ("2", "2.0000")]  # as a drawing of branches
    assert read.has("--keep 0 would remove") and read.has(str(folder / "step_00000001"))


# Hostile names


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_a_name_never_becomes_markup(tmp_path, name):
    path = safetensors(tmp_path / "t.safetensors", {name: [1.0]}, {"note": name})
    read, plain = (
        page_of(path, notes=[name], contradictions=[name], foreign=[name], config={name: name}),
        page_of(path, notes=["n"], contradictions=["n"], foreign=["n"], config={"n": "n"}),
    )
    assert read.tags == plain.tags
    assert len(read.scripts) == 2
    assert read.scripts[1:] == plain.scripts[1:]
    assert read.data["table"][0][0] == printable(name)
    assert read.has(printable(name))
    assert not [key for key, _ in read.attributes if key.startswith("on")]


@given(st.text())
def test_no_text_ends_the_script_of_the_data(text):
    from core.inspection.html.markup import json_text

    written = json_text({"name": text})
    assert json.loads(written) == {"name": text}
    assert not set(written) & set("<>&\u2028\u2029")


@given(st.text())
def test_no_text_is_read_as_markup(text):
    from core.inspection.html.markup import escaped

    assert not set(escaped(text)) & set("<>\"'")
    assert html.unescape(escaped(text)).isprintable()


def test_only_the_script_of_the_page_may_run_and_nothing_may_be_loaded(small):
    read = page_of(small)
    policy = next(value for key, value in read.attributes if key == "content" and "default-src" in value)
    sums = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in read.scripts[1:]]
    assert re.findall(r"'sha256-([^']+)'", policy) == sums
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert not [value for key, value in read.attributes if key in ("src", "srcset", "action")]
    assert [value for key, value in read.attributes if key == "href"] == ["data:,"]
    assert not [value for _, value in read.attributes if "://" in (value or "")]


def test_ten_thousand_tensors_stay_small_and_quick(tmp_path):
    names = [f"layers.{i // 50}.mlp.experts.{i % 50}.weight" for i in range(10_000)]
    path = safetensors(tmp_path / "t.safetensors", {name: [float(i), 1.0] for i, name in enumerate(names)})
    read = page_of(path)
    assert len(read.data["table"]) == 10_000
    with inspect_path(path) as found:
        assert len(page(found, facts_of(found)).encode()) < 3_000_000


# The file


def test_a_page_is_not_replaced_without_being_told(small, tmp_path):
    file = tmp_path / "page.html"
    put(small, file)
    first = file.read_bytes()
    with pytest.raises(InputError, match=r"page\.html: already exists\..*--overwrite"):
        put(small, file)
    assert file.read_bytes() == first
    put(safetensors(tmp_path / "other.safetensors", {"c": [1.0]}), file, overwrite=True)
    assert b"other.safetensors" in file.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other.safetensors", "page.html", "small.safetensors"]


def test_what_is_no_page_is_never_replaced(small, tmp_path):
    before = small.read_bytes()
    for overwrite in (False, True):
        with pytest.raises(InputError, match=r"small\.safetensors: exists and is not a page of this program"):
            put(small, small, overwrite=overwrite)
        with pytest.raises(InputError, match="is not a page of this program"):
            put(small, tmp_path, overwrite=overwrite)
    assert small.read_bytes() == before


def test_a_folder_that_is_missing_is_named_before_anything_is_read(small, tmp_path):
    seen = []
    with pytest.raises(InputError, match=r"there is no folder .*nowhere"):
        put(small, tmp_path / "nowhere/page.html", progress=seen.append)
    with pytest.raises(InputError, match="File name too long"):
        put(small, tmp_path / ("x" * 300), progress=seen.append)
    assert seen == []


def test_a_full_disk_leaves_the_old_page_and_no_other_file(small, tmp_path, monkeypatch):
    file = tmp_path / "page.html"
    put(small, file)
    before = file.read_bytes()

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(InputError, match=r"page\.html: cannot be written \(No space left on device\)"):
        put(small, file, overwrite=True)
    assert file.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["page.html", "small.safetensors"]


# In a browser


@pytest.mark.full
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_a_browser_draws_everything_and_runs_no_name(tmp_path):
    tensors = {name: [1.0, 2.0] for name in HOSTILE} | {f"h.{i}.w": [1.0, float(i)] for i in range(3)}
    path = safetensors(tmp_path / "t.safetensors", tensors)
    file = tmp_path / "page.html"
    put(path, file)
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run(
        [CHROMIUM, *flags, "--enable-logging=stderr", "--virtual-time-budget=8000", "--dump-dom", file.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "CONSOLE" not in done.stderr
    read = Read(done.stdout)
    assert "<title>t.safetensors</title>" in done.stdout
    assert read.tags.count("tr") == 1 + len(tensors)
    assert not [value for key, value in read.attributes if "javascript:" in (value or "")]
