"""Tests of lightning_curvature/callbacks/history.py."""

import math

from lightning_curvature.callbacks.history import History


def test_history_is_thinned_out_evenly() -> None:
    history = History(max_points=5)
    for step in range(1, 101):
        history.append(step, {"loss": float(step)})
        assert len(history.as_dict()["step"]) <= 5
    columns = history.as_dict()
    gaps = {b - a for a, b in zip(columns["step"], columns["step"][1:], strict=False)}
    assert gaps == {32.0}
    assert columns["step"][0] == 1.0
    assert columns["loss"] == columns["step"]


def test_history_fills_gaps_with_nan() -> None:
    history = History(max_points=5)
    history.append(1, {"loss": 1.0})
    history.append(2, {"loss": 2.0, "damping": 3.0})
    columns = history.as_dict()
    assert math.isnan(columns["damping"][0])
    assert columns["damping"][1] == 3.0
