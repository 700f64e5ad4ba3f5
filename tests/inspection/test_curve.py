"""The curve of a training run, from logs that are whole, damaged or hostile."""

from __future__ import annotations

import json
import math

from core.inspection.html.curve import BUCKETS, Series, read_curve


def test_lines_that_are_damaged_or_out_of_order_are_left_out_and_said(tmp_path):
    log = tmp_path / "metrics.jsonl"
    good = [json.dumps({"step": s, "loss": 1.0 * s, "learning_rate": 0.1}) for s in (1, 2, 5)]
    bad = ["{", "[]", '{"step": "x", "loss": 1}', '{"step": 3}', '{"step": 2, "loss": 9}', "\x00\x01", '{"step": -1}']
    text = "\n".join([*good[:2], *bad, good[2], '{"step": 6, "loss": NaN}', '{"step": 7, "lo'])
    log.write_bytes(text.encode() + b"\xff")
    curve = read_curve(log)
    assert list(curve.loss.x) == [1, 2, 5]
    assert list(curve.loss.y) == [1.0, 2.0, 5.0]
    assert curve.said == (
        "12 lines of metrics.jsonl; 8 damaged or out of order and left out; no train loss for 2 of the steps 1 to 5; "
        "NaN or Inf in 1 places, the first at step 6."
    )


def test_the_largest_numbers_stay_numbers(tmp_path):
    log = tmp_path / "metrics.jsonl"
    values = [1.7e308, -1.7e308, 1, 10**400, 2] * 30
    log.write_text("".join(json.dumps({"step": i, "loss": v, "val_loss": v}) + "\n" for i, v in enumerate(values)))
    curve = read_curve(log)
    assert len(curve.loss.x) == 120
    assert "30 damaged" in curve.said
    assert json.loads(json.dumps(curve.points(), allow_nan=False))["loss"]["y"][:3] == [1.7e308, -1.7e308, 1]


def test_a_line_without_end_is_read_in_bounded_pieces(tmp_path):
    log = tmp_path / "metrics.jsonl"
    log.write_bytes(b'{"step": 1, "loss": 2}\n' + b"[" * (1 << 20))
    curve = read_curve(log)
    assert list(curve.loss.y) == [2.0]
    assert "damaged" in curve.said


def test_a_log_that_is_a_folder_is_said(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    assert "a folder, expected a file" in read_curve(tmp_path / "metrics.jsonl").said


def test_a_long_curve_keeps_its_extremes():
    long = Series()
    for step in range(100_000):
        long.x.append(step)
        long.y.append(9.0 if step == 54_321 else -9.0 if step == 77_777 else math.sin(step))
    points = long.points()
    assert len(points["x"]) <= 2 * BUCKETS
    assert points["x"] == sorted(points["x"]) and (points["x"][0], points["x"][-1]) == (0, 99_999)
    assert points["y"][points["x"].index(54_321)] == 9.0
    assert points["y"][points["x"].index(77_777)] == -9.0


def test_smoothing_keeps_a_constant_and_calms_noise():
    flat, noisy = Series(), Series()
    for step in range(1000):
        flat.x.append(step)
        flat.y.append(2.0)
        noisy.x.append(step)
        noisy.y.append(2.0 + (-1) ** step)
    assert list(flat.smoothed().y) == [2.0] * 1000
    assert all(abs(y - 2.0) < 0.12 for y in noisy.smoothed().y[50:])
    assert list(Series().smoothed().y) == []
