"""The benchmark: what it counts, measures and prints."""

import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from helpers import HERE
from PIL import Image

import bench
import gpu
import measure
import tables
from methods import METHODS
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
def test_bench_gpu_runs_every_part_dry(tmp_path):
    """Each part has rows, a section in gpu.md, and no note of a failure."""
    command = [sys.executable, str(HERE / "bench.py"), "gpu", "--dry", "--to", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500)
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert done.returncode == 0, done.stdout + done.stderr
    assert result["parts"].keys() == gpu.PARTS.keys()
    text = (tmp_path / "gpu.md").read_text()
    for name, part in result["parts"].items():
        title = gpu.PARTS[name][0].__doc__.splitlines()[0]
        assert part["rows"] and "note" not in part and f"### {title}" in text, name
    rows = {name: part["rows"] for name, part in result["parts"].items()}
    assert rows["precision"][0]["E"] == 0, "the CPU against itself"
    assert "agrees" in [row.get("result") for row in rows["compiled"]]
    assert all(row["same bits"] for row in rows["repeated"] if "same bits" in row)
    assert rows["torchrun"][0]["mIoU"] == rows["torchrun"][0]["mIoU without torchrun"]


def made_up_parts(tmp_path) -> dict:
    """gpu.json of a dry run whose parts are made up."""
    script = f"""
import subprocess, sys, time
sys.path.insert(0, {str(HERE)!r})
import gpu
def good(scale):
    "Good."
    yield {{"what": "a", "value": 1.5}}
    yield {{"what": "b", "other": True}}
def fails(scale):
    "Fails."
    yield {{"what": "before", "value": 1}}
    raise RuntimeError("it broke")
def hangs(scale):
    "Hangs."
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    child = subprocess.Popen([sys.executable, "-c", stubborn], start_new_session=True)
    yield {{"what": "known", "value": child.pid}}
    time.sleep(600)
gpu.PARTS = {{"fails": (fails, 60), "hangs": (hangs, 10), "good": (good, 200)}}
gpu.BENCH = __file__
import bench
bench.PARTS = gpu.PARTS
bench.main(sys.argv[1:])
"""
    path = tmp_path / "parts.py"
    path.write_text(script)
    command = [sys.executable, str(path), "gpu", "--dry", "--minutes", "1", "--to", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    return json.loads((tmp_path / "gpu.json").read_text()) | {"shown": done.stderr}


@pytest.mark.slow
def test_bench_gpu_a_part_that_fails_or_hangs_ends_alone_and_keeps_its_rows(tmp_path):
    result = made_up_parts(tmp_path)
    parts = result["parts"]
    assert [row["what"] for row in parts["fails"]["rows"]] == ["before"]
    assert "it broke" in parts["fails"]["errors"]
    assert [row["what"] for row in parts["hangs"]["rows"]] == ["known"]
    assert parts["hangs"]["note"].startswith("stopped after ")
    assert not gpu.runs(parts["hangs"]["rows"][0]["value"]), "its child has ended too"
    assert len(parts["good"]["rows"]) == 2 and "note" not in parts["good"]
    text = (tmp_path / "gpu.md").read_text()
    assert "| a | 1.5 |  |" in text and "| b |  | yes |" in text and "failed; gpu.json" in text
    assert "these parts failed: fails;" in result["shown"]


def test_bench_batches_are_pinned_as_the_loader_gives_them(monkeypatch):
    """What only CUDA does, with a `pin_memory` that does nothing."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    batch = measure.noise(measure.Case())
    assert measure.pinned(batch) == batch
    assert measure.pinned(batch._replace(target=None)).target is None


@pytest.mark.parametrize(
    ("error", "expected"),
    (
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("GET was unable to find an engine to execute this computation"), True),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ),
)
def test_bench_knows_when_a_case_does_not_fit(monkeypatch, error, expected):
    def full(*arguments):
        raise error

    monkeypatch.setattr(gpu, "Subject", full)
    scale = gpu.TOY
    if expected:
        assert gpu.largest_batch(scale.ours, scale) == 1
        assert gpu.timed("it", scale.ours, scale, 1.0) == {"what": "it", "note": "does not fit"}
    else:
        with pytest.raises(RuntimeError, match="shapes"):
            gpu.timed("it", scale.ours, scale, 1.0)


def test_bench_gpu_without_a_gpu_is_one_sentence(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as caught:
        bench.main(["gpu"])
    assert "cuda is not available" in str(caught.value.code)


@pytest.mark.slow
def test_bench_growth_measures_and_draws(monkeypatch, tmp_path, capsys):
    def grows(case, hyper, step):
        return case.batch * case.classes * math.prod(case.sizes)

    monkeypatch.setattr(bench, "peak_bytes", grows)
    bench.main(
        ["growth", "--repeats", "1", "--sizes", "32", "64", "32", "64", "--to", str(tmp_path)]
    )
    shown = capsys.readouterr().out
    assert "pixels: at the largest sizes time grows as the power" in shown
    assert Image.open(tmp_path / "growth.png").size[0] > 500


@pytest.mark.slow
def test_bench_every_method_is_measured_over_source_only(tmp_path):
    flags = ["--method", "all", "--repeats", "1", "--batch", "2", "--to", str(tmp_path)]
    bench.main(["step", *flags, "--sizes", "32", "64", "32", "64"])
    found = json.loads((tmp_path / tables.STEPS.format("tiny")).read_text())
    assert found["methods"].keys() == METHODS.keys() and found["commit"]
    of_source = found["methods"]["source"]
    assert (of_source["step_ratio"], of_source["peak_ratio"]) == (1.0, 1.0)
    assert found["methods"]["selftrain"]["numbers"]["class_mix"], "a second stage's numbers"
    assert all(row["step_ratio"] > 0 and row["peak_ratio"] > 0 for row in found["methods"].values())


def test_bench_one_method_alone_writes_no_file(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "peak_bytes", lambda case, hyper, step: 2.0)
    flags = ["--method", "minent", "--repeats", "1", "--batch", "1", "--to", str(tmp_path)]
    bench.main(["step", *flags, "--sizes", "32", "64", "32", "64", "--json"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["step_ratio"] > 0 and found["peak_ratio"] == 1 and not list(tmp_path.iterdir())
