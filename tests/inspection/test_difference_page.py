"""The page of --diff: what moved as a map by layer and kind, and the settings that differ."""

from __future__ import annotations

import json
import math
import re

import pytest

import inspect_model
from core.inspection.html.chart import Axis
from tests.inspection.test_page import HOSTILE, Read, luminance, safetensors


def diff_page(tmp_path, a, b):
    paths = [str(safetensors(tmp_path / f"{name}.safetensors", values)) for name, values in (("a", a), ("b", b))]
    file = tmp_path / "diff.html"
    code = inspect_model.main(["--diff", *paths, "--html", str(file), "--overwrite"])
    return code, file.read_text(encoding="utf-8")


def cells(text):
    """The map: for each kind its cells, and the colour of each."""
    heat = text[text.index('class="heat"') :]
    heat = heat[: heat.index("</table>")]
    rows = re.findall(r'<tr><th scope="row">([^<]*)</th>(.*?)</tr>', heat)
    return {
        kind: re.findall(r'<td(?: class="none")?(?: style="background:(#\w{6})")?>([^<]*)</td>', row)
        for kind, row in rows
    }


def test_the_map_has_the_root_mean_square_of_each_layer_and_kind(tmp_path, capsys):
    a = {f"h.{i}.w": [1.0, 2.0] for i in range(3)} | {"h.1.b": [0.5], "head": [1.0, 1.0]}
    b = {**a, "h.1.w": [1.5, 2.0], "h.2.w": [1.0, 2.004], "head": [math.nan, 1.0]}
    code, text = diff_page(tmp_path, a, b)
    assert code == 1 and "wrote " in capsys.readouterr().err
    found = cells(text)
    assert [said for _, said in found["h.{i}.w"]] == [
        "equal",
        f"{0.5 / math.sqrt(2):.2g}",
        f"{0.004 / math.sqrt(2):.2g}",
        "",
    ]
    assert [said for _, said in found["h.{i}.b"]] == ["", "equal", "", ""]
    assert [said for _, said in found["head"]] == ["", "", "", "NaN"]
    hot, cold = found["h.{i}.w"][1][0], found["h.{i}.w"][2][0]
    assert hot != cold and min(map(luminance, (hot, cold))) > 4.5 * (luminance("#10151f") + 0.05)
    read = Read(text)
    assert read.faults == [] and read.open == []
    assert read.has("5 compared, 3 not equal")


def test_equal_checkpoints_have_a_page_without_a_map(tmp_path):
    code, text = diff_page(tmp_path, {"a": [1.0]}, {"a": [1.0]})
    assert code == 0 and 'class="heat"' not in text and Read(text).has("equal in all that was compared")


@pytest.mark.parametrize("name", HOSTILE[:6], ids=range(6))
def test_no_name_is_markup(tmp_path, name):
    _, text = diff_page(tmp_path, {name: [1.0], "x" + name: [1.0]}, {name: [2.0], "y" + name: [1.0]})
    _, plain = diff_page(tmp_path, {"n": [1.0], "xn": [1.0]}, {"n": [2.0], "yn": [1.0]})
    assert Read(text).tags == Read(plain).tags


def test_json_has_the_root_mean_square(tmp_path, capsys):
    paths = [
        str(safetensors(tmp_path / f"{name}.safetensors", {"w": values}))
        for name, values in (("a", [0.0, 0.0, 1.0]), ("b", [3.0, 4.0, 1.0]))
    ]
    assert inspect_model.main(["--diff", *paths, "--json"]) == 1
    (pair,) = json.loads(capsys.readouterr().out)["weights"]["different"]
    assert pair["change"]["rms"] == pytest.approx(5 / math.sqrt(3))
    assert set(pair["change"]) == {"elements", "changed", "nan", "absolute", "relative", "rms"}


@pytest.mark.parametrize(
    ("values", "log"),
    [
        ([0, 1], False),
        ([3.2, 3.21], False),
        ([1, 100_000], False),
        ([-5, 1e6], False),
        ([0.01, 0.02], True),
        ([1e-8, 2.0], True),
        ([7.0], False),
        ([1e-300, 1e300], True),
    ],
)
def test_an_axis_has_a_few_round_ticks_within_its_range(values, log):
    axis = Axis.of(values, log=log)
    ticks = axis.ticks(6)
    assert 1 <= len(ticks) <= 18 and ticks == sorted(ticks)
    places = [axis.share(tick) for tick in ticks]
    assert all(0 <= place <= 1 for place in places) and len(set(places)) == len(places)
