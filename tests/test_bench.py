"""The benchmark: what it counts, measures and prints."""

import json
from dataclasses import replace

import pytest
from PIL import Image

import bench
import measure
from settings import configure

# The benchmark.


def test_bench_counts_the_operations_of_a_step_of_the_paper():
    """4,036 and 2,310 GFLOP for G, 6.7 TFLOP in all, and what float32 keeps for the backward."""
    _, hyper = configure({"backbone": "r101", "src": "gta5"})
    case = measure.Case("r101", (720, 1280, 512, 1024), 1)
    flops = measure.count_flops(case, hyper, 1)
    assert flops["G, source"] / 1e9 == pytest.approx(4036, abs=1)
    assert flops["G, target"] / 1e9 == pytest.approx(2310, abs=1)
    assert flops["step"] / 1e12 == pytest.approx(6.65, abs=0.05)
    assert 10e9 < measure.saved_bytes(case, hyper, 1)[0] < 12e9
    case = measure.Case("tiny", (64, 128, 64, 128), 4)
    _, hyper = configure({})
    assert measure.count_flops(case, hyper, 0)["G, target"] == 0
    layer = 9 * 3 * 24 * 32 * 64  # the first convolution, counted by hand: forward and two backward
    only = measure.count_flops(replace(case, batch=1), hyper, 0)["G, source"]
    assert only > 2 * 2 * layer


@pytest.mark.parametrize(
    ("argv", "keys"),
    (
        pytest.param(
            ["step", "--repeats", "2"],
            {"plain_s", "ours_s", "ratio", "peak_bytes"},
            marks=pytest.mark.slow,
        ),
        (["eval", "--repeats", "1", "--count", "3"], {"plain_s", "ours_s", "ratio"}),
        (["loader", "--repeats", "1", "--count", "1", "--workers", "0"], {"gta5", "synthia"}),
    ),
)
def test_bench_ends_with_one_line_of_json(monkeypatch, capsys, argv, keys):
    for module in (bench, measure):
        monkeypatch.setattr(module, "FILES", dict.fromkeys(measure.FILES, (64, 96)))
    monkeypatch.setattr(bench, "peak_bytes", lambda *arguments: 1)
    bench.main([*argv, "--json"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert keys <= result.keys()
    if "ratio" in keys:
        assert result["ratio"] == pytest.approx(result["plain_s"] / result["ours_s"])


@pytest.mark.slow
def test_bench_growth_measures_and_draws(monkeypatch, tmp_path, capsys):
    bench.main(
        ["growth", "--repeats", "1", "--sizes", "32", "64", "32", "64", "--to", str(tmp_path)]
    )
    shown = capsys.readouterr().out
    assert "pixels: at the largest sizes time grows as the power" in shown
    assert Image.open(tmp_path / "growth.png").size[0] > 500
