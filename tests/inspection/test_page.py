"""The page of inspect_model.py --html, read as a browser reads it, and in one where there is one."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import re
import shutil
import struct
import subprocess
import sys
import types
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.console.words import printable
from core.errors import InputError
from core.inspection.html.page import page, write_page
from core.inspection.inspect import inspect_path
from core.inspection.report import facts_of
from tests.makers.models import save_durably, started, update

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
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Read(HTMLParser):
    """The elements, scripts and visible text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.scripts, self.text, self.inside = [], [], [], [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self.inside = ""

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
        return Read(page(found, {**facts_of(found), **changes}, "/* library */"))


@pytest.fixture
def drawn(monkeypatch):
    """A library that draws nothing, in the place of plotly."""
    stub = types.ModuleType("plotly.offline")
    stub.get_plotlyjs = lambda: "/* library */"
    monkeypatch.setitem(sys.modules, "plotly", types.ModuleType("plotly"))
    monkeypatch.setitem(sys.modules, "plotly.offline", stub)


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
        assert sum(row[2] for row in read.data["tree"] if row[1] == -1) <= found.size


def test_statistics_of_the_table_are_those_of_the_tensors(tmp_path):
    read = page_of(safetensors(tmp_path / "t.safetensors", {"a": [1.0, -3.0, 0.0, math.nan], "b": [2.0, 2.0]}))
    name, shape, numel, dtype, nbytes, mean, std, low, high, rms, zeros, not_finite = read.data["table"][0]
    assert (name, shape, numel, dtype, nbytes) == ("a", "4", 4, "float32", 16)
    assert (low, high, zeros, not_finite) == (-3.0, 1.0, 0.25, 1)
    assert mean == pytest.approx(-2 / 3, rel=1e-5)
    assert std == pytest.approx(math.sqrt(((5 / 3) ** 2 + (7 / 3) ** 2 + (2 / 3) ** 2) / 2), rel=1e-5)
    assert rms == pytest.approx(math.sqrt(10 / 3), rel=1e-5)
    assert read.has("NaN or Inf among the weights")
    assert read.has("a: 1 NaN, 0 Inf of 4")


def test_tensors_of_all_layers_are_one_kind_in_the_order_of_the_layers(tmp_path):
    tensors = {f"h.{i}.w": [float(i), i + 1.0] for i in (10, 2, 0)} | {"head": [1.0]}
    kinds = page_of(safetensors(tmp_path / "t.safetensors", tensors)).data["kinds"]
    assert [kind["name"] for kind in kinds] == ["h.{i}.w", "head"]
    assert [layer[0] for layer in kinds[0]["layers"]] == [0, 2, 10]
    assert [(layer[3], layer[4], sum(layer[5])) for layer in kinds[0]["layers"]] == [(0, 1, 2), (2, 3, 2), (10, 11, 2)]


def test_sizes_add_up_in_every_module(tmp_path):
    tensors = {f"h.{i}.{part}.weight": [0.0] * 8 * (i + 1) for i in range(3) for part in ("attn", "mlp")}
    rows = page_of(safetensors(tmp_path / "t.safetensors", tensors)).data["tree"]
    assert rows[0][2] == sum(4 * len(values) for values in tensors.values())
    for i, row in enumerate(rows):
        inner = [other[2] for other in rows if other[1] == i]
        assert not inner or sum(inner) == row[2]
    assert {row[3] for row in rows} >= set(tensors)
    assert "h.1" in {row[0] for row in rows}


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
    assert read.data["curve"]["loss"] == {"x": [1, 2], "y": [3, 2]}
    assert read.data["curve"]["val_loss"] == {"x": [2], "y": [2.5]}
    assert read.data["step"] == 2
    assert read.has("3 lines of metrics.jsonl.")


def test_a_damaged_bundle_still_gets_its_page(tmp_path):
    made, model, optimizer = started(tmp_path)
    save_durably(made, model, optimizer, step=0)
    made.close()
    path = tmp_path / "dante/model.pt"
    path.write_bytes(path.read_bytes()[:1000])
    read = page_of(tmp_path / "dante")
    assert read.has("Damaged")
    assert read.data["kinds"] == []


def test_what_verification_found_is_no_longer_called_whole(small):
    found = {"damaged": ["a.weight is damaged <CRC32>"], "checked_bytes": 12}
    read = page_of(small, verification=found)
    assert read.has("a.weight is damaged <CRC32>")
    assert read.has("1 fault") and not read.has("no faults")
    assert page_of(small, verification={**found, "damaged": []}).has("12 bytes compared with checksums")


def test_progress_tells_the_bytes_of_both_readings(small):
    seen = []
    with inspect_path(small) as found:
        page(found, facts_of(found), "", seen.append)
    assert sum(seen) == 2 * 12


# Hostile names


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_a_name_never_becomes_markup(tmp_path, name):
    path = safetensors(tmp_path / "t.safetensors", {name: [1.0]}, {"note": name})
    read, plain = (
        page_of(path, notes=[name], contradictions=[name], foreign=[name], config={name: name}),
        page_of(path, notes=["n"], contradictions=["n"], foreign=["n"], config={"n": "n"}),
    )
    assert read.tags == plain.tags
    assert len(read.scripts) == 3
    assert read.scripts[1:] == plain.scripts[1:]
    assert read.data["table"][0][0] == printable(name)
    assert read.has(printable(name))
    assert not [key for key, _ in read.attributes if key.startswith("on")]


@given(st.text())
def test_no_text_ends_the_script_of_the_data(text):
    from core.inspection.html.page import _json

    written = _json({"name": text})
    assert json.loads(written) == {"name": text}
    assert not set(written) & set("<>&\u2028\u2029")


@given(st.text())
def test_no_text_is_read_as_markup(text):
    from core.inspection.html.page import _e

    assert not set(_e(text)) & set("<>\"'")
    assert html.unescape(_e(text)).isprintable()


def test_only_the_two_scripts_of_the_page_may_run_and_nothing_may_be_loaded(small):
    read = page_of(small)
    policy = next(value for key, value in read.attributes if key == "content" and "default-src" in value)
    sums = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in read.scripts[1:]]
    assert re.findall(r"'sha256-([^']+)'", policy) == sums
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert not [value for key, value in read.attributes if key in ("src", "srcset", "action")]
    assert [value for key, value in read.attributes if key == "href"] == ["https://plotly.com/javascript/"]


def test_ten_thousand_tensors_stay_small_and_quick(tmp_path):
    names = [f"layers.{i // 50}.mlp.experts.{i % 50}.weight" for i in range(10_000)]
    path = safetensors(tmp_path / "t.safetensors", {name: [float(i), 1.0] for i, name in enumerate(names)})
    read = page_of(path)
    assert len(read.data["table"]) == 10_000
    assert len(read.scripts[0]) < 5_000_000


# The file


def test_a_page_is_not_replaced_without_being_told(drawn, small, tmp_path):
    file = tmp_path / "page.html"
    put(small, file)
    first = file.read_bytes()
    with pytest.raises(InputError, match=r"page\.html: already exists\..*--overwrite"):
        put(small, file)
    assert file.read_bytes() == first
    put(safetensors(tmp_path / "other.safetensors", {"c": [1.0]}), file, overwrite=True)
    assert b"other.safetensors" in file.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other.safetensors", "page.html", "small.safetensors"]


def test_what_is_no_page_is_never_replaced(drawn, small, tmp_path):
    before = small.read_bytes()
    for overwrite in (False, True):
        with pytest.raises(InputError, match=r"small\.safetensors: exists and is not a page of this program"):
            put(small, small, overwrite=overwrite)
        with pytest.raises(InputError, match="is not a page of this program"):
            put(small, tmp_path, overwrite=overwrite)
    assert small.read_bytes() == before


def test_a_folder_that_is_missing_is_named_before_anything_is_read(drawn, small, tmp_path):
    seen = []
    with pytest.raises(InputError, match=r"there is no folder .*nowhere"):
        put(small, tmp_path / "nowhere/page.html", progress=seen.append)
    with pytest.raises(InputError, match="File name too long"):
        put(small, tmp_path / ("x" * 300), progress=seen.append)
    assert seen == []


def test_a_full_disk_leaves_the_old_page_and_no_other_file(drawn, small, tmp_path, monkeypatch):
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


def test_without_plotly_one_sentence_says_how_to_get_it(small, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(InputError, match=r"plotly, which is not installed\. Run `pip install plotly`"):
        put(small, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


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
    drawn_plots = re.findall(r'<div id="(\w+)" class="plot js-plotly-plot"', done.stdout)
    assert sorted(drawn_plots) == ["histograms", "norms", "tree"]
    assert not [value for key, value in read.attributes if "javascript:" in (value or "")]
