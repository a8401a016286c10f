"""What reports share: tables, figures in JSON, times; and the pictures and reports that no run of a miniature draws."""

import json
import statistics
import sys
from argparse import Namespace

import pytest
import torch

from scripts.common.measuring import machine, spread_of, timed, yardsticks
from scripts.common.reports import rounded, table, write_beside
from scripts.studies import compare_curves, conversion


def test_table():
    assert table(["a", "b"], [["x", "1"]]) == "| a | b |\n| --- | ---: |\n| x | 1 |"
    assert table(["a", "b"], [], 0).splitlines()[1] == "| ---: | ---: |"


def test_figures_beside_a_report(tmp_path):
    """Six digits of every number; what is no number in JSON is a word; keys are words."""
    write_beside(tmp_path / "reports" / "a.md", {"x": [1 / 3, {2: float("inf")}], "n": 2**40, "s": (1.5, None, "t", True)})
    found = json.loads((tmp_path / "reports" / "a.json").read_text())
    assert found == {"x": [0.333333, {"2": "inf"}], "n": 2**40, "s": [1.5, None, "t", True]}
    assert rounded(float("nan")) == "nan"


def test_times():
    wall, cpu = timed("cpu", sum, range(10**6))
    assert 0 < cpu < 10 and 0 < wall < 10
    found = spread_of([(1.0, 2.0), (2.0, 2.0), (4.0, 6.0), (9.0, 6.0)])
    quarters = statistics.quantiles([1.0, 2.0, 4.0, 9.0], method="inclusive")
    assert found == {"median": 3.0, "spread": pytest.approx((quarters[2] - quarters[0]) / 2), "cpu": 1.0}
    assert spread_of([(1.0, 5.0), (2.0, 7.0)], "processor")["median"] == 6.0
    assert machine()["cores"] > 0 and machine()["torch"] == torch.__version__
    multiply, copy, flops, moved = yardsticks("cpu", torch.float32)
    assert multiply().shape == (1024, 1024) and flops == 2 * 1024**3
    assert copy().numel() * 2 == moved


def test_curves_of_several_runs(tmp_path, monkeypatch, capsys):
    for name, bits in (("a", 2.5), ("b", 2.25)):
        (tmp_path / name).mkdir()
        figures = {"curve": [{"step": step, "bits": bits + 1 / step} for step in (1, 2, 3)], "parameters": 1234}
        (tmp_path / name / "figures.json").write_text(json.dumps(figures | {"bits_per_byte": {"this model": bits, "gzip -9": 1.8}}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["compare_curves", "--output", "both.png", "multipole=a", "full attention=b"])
    if pytest.importorskip("matplotlib"):
        compare_curves.main()
    assert "full attention: 2.250 bits per byte, 1,234 parameters" in capsys.readouterr().out
    assert (tmp_path / "both.png").stat().st_size > 1000
    monkeypatch.setattr(sys, "argv", ["compare_curves", "--output", "both.png", "multipole=nothing"])
    with pytest.raises(SystemExit, match="must be NAME=FOLDER"):
        compare_curves.main()


def test_the_report_on_conversion(tmp_path):
    pytest.importorskip("matplotlib")
    bits = {"1024": 2.0, "4096": 2.5}
    arms = {name: {"bits_per_byte": bits, "curve": [3.0, 2.5, 2.0]} for name in conversion.ARMS}
    grid = [{"block_size": m, "rank": p, "bits": 2.2, "errors": [0.5 / p, 0.25]} for m in conversion.BLOCK_SIZES for p in (1, 2)]
    conversion.plot(arms, grid, tmp_path / "images" / "a.png")
    means = {"exact": 2.0, "grid": grid, "chosen": {"multipole, untrained": bits, "near field only, untrained": bits}}
    text = conversion.report(Namespace(steps=2, further_steps=3), {"bits_per_byte": bits}, arms, means, "images/a.png")
    assert "| multipole, all weights, 3 steps more | 2.000 | 2.500 |" in text
    assert "| 64 | 2 | 2.200 | +10.0 % | 0.25 | 0.25 |" in text and (tmp_path / "images" / "a.png").stat().st_size > 1000
