"""Studies: statistics, shared warm-ups, tables, figures, what they refuse."""

import argparse
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    CELLS,
    assert_equal,
    interrupt_at,
    last_tensors,
    part,
    steps_logged,
    studied,
    study_error,
    write_png,
)
from PIL import Image
from torch import nn

import data
import figures
import runs
import settings
import study
import tables
import train
import trust
import tuning
from checkpoints import BEFORE, KEYS, save
from classes import CLASSES, INFREQUENT
from methods import METHODS
from runs import (
    RESULT,
    detectable,
    difference,
    interval,
    mean_and_deviation,
    mean_weight,
    spread,
    t_interval,
    t_quantile,
    warm_up,
)
from settings import configure

TASK = "streets-streets-tiny"


def test_study_statistics_by_hand():
    assert spread([1.0, None, 3.0]) == (2.0, pytest.approx(math.sqrt(2)))
    mean, deviation = spread([0.5])
    assert mean == 0.5 and math.isnan(deviation)
    assert math.isnan(spread([None])[0])
    assert mean_and_deviation([0.1, 0.3]) == "20.0 ± 14.1"
    assert mean_and_deviation([0.25]) == "25.0" and mean_and_deviation([None]) == "-"


def test_study_interval_is_the_bootstrap_of_paired_differences():
    assert interval([0.2] * 5) == (pytest.approx(0.2), pytest.approx(0.2))
    assert all(map(math.isnan, interval([0.2])))
    low, high = interval([0.0, 1.0])  # means 0, 0.5, 1 with probability 1/4, 1/2, 1/4
    assert (low, high) == (0.0, 1.0)
    values = np.random.default_rng(0).normal(1, 2, 400)
    low, high = interval(values)
    half = 1.96 * values.std() / 20
    assert (low, high) == (
        pytest.approx(values.mean() - half, abs=0.02),
        pytest.approx(values.mean() + half, abs=0.02),
    )
    a, b = (results_of(row) for row in ((0.3, 0.5), (0.2, 0.4)))
    assert difference(a, b) == "+10.0 [+10.0, +10.0]"
    assert difference(a[:1], b[:1]) == "+10.0"
    assert difference(a, b, lambda r: None) == "-"


def results_of(scores) -> list[dict]:
    return [{"miou": v, "settings": {"seed": seed}} for seed, v in enumerate(scores)]


def test_study_pairs_are_of_the_same_seeds_and_machine():
    a = results_of((0.3, 0.5, 0.2))
    for key in ("machine", "threads", "torch"):
        with pytest.raises(ValueError, match=r"seed 1 .* makes no pair"):
            difference(a, [r | {key: "2"} if i == 1 else r for i, r in enumerate(a)])
    with pytest.raises(ValueError, match="make no pairs"):
        difference(a, a[::-1])


@pytest.mark.parametrize(
    ("p", "freedom", "value"),
    (
        *((0.975, 1, 12.7062), (0.8, 1, 1.3764), (0.975, 4, 2.7764), (0.8, 4, 0.9410)),
        *((0.975, 9, 2.2622), (0.8, 9, 0.8834), (0.975, 19, 2.0930), (0.2, 19, -0.8610)),
    ),
)
def test_study_quantiles_of_student_are_those_of_the_tables(p, freedom, value):
    assert t_quantile(p, freedom) == pytest.approx(value, abs=1e-4)


def test_study_intervals_cover_and_power_holds_on_made_up_differences():
    """Of many studies with ten seeds: 95 % of the intervals hold the truth, and a difference of the
    size that `detectable` names is found in 80 %."""
    rng = np.random.default_rng(0)
    studies = rng.normal(1.0, 2.0, (400, 10))
    covered = [low < 1 < high for low, high in map(t_interval, studies)]
    assert 0.92 < np.mean(covered) < 0.98
    size = (2.2622 + 0.8834) * 2.0 / math.sqrt(10)  # at the true deviation
    found = [t_interval(row - 1 + size)[0] > 0 for row in studies]
    assert 0.75 < np.mean(found) < 0.85
    named = [detectable(row) for row in studies]
    assert np.median(named) == pytest.approx(size, rel=0.1)
    assert all(map(math.isnan, (*t_interval([1.0]), detectable([1.0]))))


def test_study_auc_counts_pairs():
    rng = np.random.default_rng(1)
    for _ in range(20):
        scores, wrong = rng.integers(0, 5, 30) / 4, rng.random(30) < 0.4
        pairs = [(a > b) + (a == b) / 2 for a in scores[wrong] for b in scores[~wrong]]
        assert trust.auc(scores, wrong) == pytest.approx(np.mean(pairs))
    assert math.isnan(trust.auc(scores, np.zeros(30, bool)))
    assert trust.correlation(scores, 2 * scores + 1) == pytest.approx(1)
    assert math.isnan(trust.correlation(scores, np.ones(30)))


class Colours(nn.Module):
    """A stand-in for G whose features are the image's colours, at half its size."""

    num_classes = 3

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def features(self, images):
        return F.avg_pool2d(images.float(), 2)


def painted(folder: Path, colours: dict[int, tuple], size=(8, 8)) -> data.DataSet:
    """A folder data set of two equal images, a quadrant each class, the fourth unlabelled."""
    label = np.full(size, 3, np.uint8)
    image = np.zeros((*size, 3), np.uint8)
    for i, colour in colours.items():
        where = (slice(4 * (i // 2), 4 * (i // 2) + 4), slice(4 * (i % 2), 4 * (i % 2) + 4))
        label[where], image[where] = i, colour
    for name in ("a", "b"):
        write_png(folder / "images" / "val" / f"{name}.png", image)
        write_png(folder / "labels" / "val" / f"{name}.png", label)
    names = {"names": ["road", "sky", "car"], "ignore": [3]}
    (folder / "classes.json").write_text(json.dumps(names))
    return data.open_dataset("folder", "target", "val", folder, size)


def test_study_cluster_distance_is_the_distance_of_the_mean_features(tmp_path):
    source = painted(tmp_path / "s", {0: (0, 0, 0), 1: (30, 40, 0), 2: (9, 9, 9)})
    target = painted(tmp_path / "t", {0: (3, 4, 0), 1: (30, 40, 0)})
    table = np.full(256, 255, np.uint8)
    table[:3] = (0, 1, 2)
    distance = figures.cluster_distance(Colours(), source, target, table, 2)
    assert distance[:2].tolist() == [5.0, 0.0] and math.isnan(distance[2])


def test_study_relative_distance_is_in_units_of_the_spread_within_a_class(tmp_path):
    """Centres 30 apart. Features lie 5 from the source's centre and 1 from the target's."""
    table = np.full(256, 255, np.uint8)
    table[0] = 0
    sides = []
    for name, first, second in (("s", (0, 0, 0), (6, 8, 0)), ("t", (32, 4, 0), (34, 4, 0))):
        sides.append(painted(tmp_path / name, {0: first}))
        other = painted(tmp_path / "other", {0: second})
        shutil.copy(other.items[0][0], sides[-1].items[1][0])
    for scale in (1, 7):  # larger features change nothing
        G = Colours()
        G.features = lambda images, k=scale: k * F.avg_pool2d(images.float(), 2)
        distance = figures.relative_distance(G, *sides, table, 2)
        assert distance[0].item() == pytest.approx(30 / 3) and math.isnan(distance[1])


def test_study_features_take_the_label_nearest_to_the_cell(tmp_path):
    val = painted(tmp_path, {0: (10, 0, 0), 1: (20, 0, 0), 2: (30, 0, 0)})
    (i, x, ids), _ = figures.labelled_features(Colours(), val, np.arange(256, dtype=np.uint8), 2)
    assert i == 0 and x.shape == (12, 3) and (x[:, 0] == 10 * (ids + 1)).all()
    assert ids.bincount().tolist() == [4, 4, 4]


def test_study_table_runs_a_cell_once_and_goes_on_with_an_interrupted_one(
    scenes, tmp_path, capsys, monkeypatch
):
    flags = ("--seeds", "0,1", "--methods", "tan,clan")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2)
        with pytest.raises(SystemExit) as caught:
            studied("table", tmp_path, *flags)
    assert caught.value.code == 130 and "go on" in capsys.readouterr().err
    out = studied("table", tmp_path, *flags)
    runs = out / "streets-streets-tiny"
    stamps = {p: p.stat().st_mtime_ns for p in runs.rglob("*.safetensors")}
    shown = capsys.readouterr().out
    assert shown.count("mIoU") >= 4 and "[4/4]" in shown
    studied("table", tmp_path, *flags)
    assert stamps == {p: p.stat().st_mtime_ns for p in runs.rglob("*.safetensors")}
    assert "[" not in capsys.readouterr().out.split("table-")[0], "a finished run was run again"

    content = json.loads((out / "table-streets-streets-tiny.json").read_text())
    assert content["header"] == ["class", "TAN", "CLAN", "CLAN - TAN"]
    rows = {row[0]: row[1:] for row in content["rows"]}
    assert set(rows) == {c + " *" * (c in INFREQUENT) for c in CLASSES} | {"mIoU"}
    scores = {
        m: [json.loads((runs / f"{m}-seed{s}" / "eval.json").read_text())["miou"] for s in (0, 1)]
        for m in ("tan", "clan")
    }
    assert rows["mIoU"][:2] == [
        mean_and_deviation(scores["tan"]),
        mean_and_deviation(scores["clan"]),
    ]
    kept = {m: [run["miou"] for run in content["runs"][m]] for m in ("tan", "clan")}
    assert kept == scores and [run["seed"] for run in content["runs"]["tan"]] == [0, 1]
    assert "seeds 0, 1" in content["notes"][-1] and (out / "table-streets-streets-tiny.md").exists()


@pytest.mark.slow
def test_study_a_shared_warm_up_changes_no_bit(scenes, tmp_path):
    """Source only, from TAN's checkpoint at adv_start, and CLAN's variants from CLAN's."""
    out = studied("table", tmp_path / "all", "--seeds", "3") / "streets-streets-tiny"
    studied("params", tmp_path / "all", "--seeds", "3")
    for name, flags in {
        "source": ["--method", "source"],
        "tan": ["--method", "tan"],
        "clan": [],
        "clan-eps1.6": ["--eps", "1.6"],
    }.items():
        alone = tmp_path / name
        own = list(CELLS)
        if name == "source":  # train.py refuses D's width there, and D's weights differ by it
            own = own[: own.index("--d-channels")] + own[own.index("--d-channels") + 2 :]
        train.main([*own, *flags, "--seed", "3", "--out", str(alone)])
        here = out / f"{name}-seed3"
        parts = ("G.", "opt_g.") if name == "source" else ("",)
        for prefix in parts:
            assert_equal(*(part(last_tensors(x), prefix) for x in (here, alone)))
        steps = (steps_logged(folder)[-2:] for folder in (here, alone))
        assert next(steps) == next(steps)
        kept = json.loads((here / "eval.json").read_text())
        again = json.loads((alone / "eval.json").read_text())
        assert (kept["miou"], kept["iou"]) == (again["miou"], again["iou"])
        log = (here / "log.txt").read_text()
        assert ("step 1/4" in log) == (name in ("tan", "clan")), "a warm-up was not shared"
    assert "adv_start" not in warm_up({"method": "clan", "adv_start": 0, "out": tmp_path})


@pytest.mark.parametrize(
    ("change", "shares"),
    (
        ({"lambda_local": 10.0}, True),
        ({"lambda_adv": 0.5}, True),
        ({"m_mean1": True}, True),
        ({"lambda_weight": 0.5}, False),
        ({"lr_g": 0.5}, False),
        ({"seed": 5}, False),
        ({"d_channels": 8}, False),
        ({"shift": (0.5, 0.0)}, True),
        ({"batchnorm": "batch"}, True),
        ({"batchnorm": "running"}, False),
        ({"head_std": 0.5}, False),
        ({"method": "tan"}, False),
    ),
)
def test_study_a_warm_up_is_shared_only_by_runs_that_agree_until_then(change, shares):
    assert (warm_up({}) == warm_up(change)) == shares


def test_study_source_and_tan_share_a_warm_up_whatever_clan_would_read():
    a = warm_up({"method": "tan", "lambda_adv": 1.0})
    assert a == warm_up({"method": "source"})


def test_study_refuses_a_folder_of_another_configuration(scenes, tmp_path):
    studied("table", tmp_path, "--seeds", "0", "--methods", "tan")
    sentence = study_error("table", tmp_path, "--seeds", "0", "--methods", "tan", "--lr-g", "0.5")
    assert "--lr-g 0.02, now 0.5" in sentence and "--runs" in sentence
    studied("table", tmp_path, "--seeds", "0", "--methods", "tan", "--eps", "0.5")  # not TAN's


@pytest.mark.parametrize(
    ("flags", "sentence"),
    (
        (["--class", "zebra"], "zebra"),
        (["--quick", "--backbone", "r101"], "--quick is for tiny on streets"),
        (["--eps", "-1"], "eps must not be negative"),
    ),
)
def test_study_refuses_what_it_cannot_use(scenes, tmp_path, flags, sentence):
    assert sentence in study_error("ccd", tmp_path, "--seeds", "0", "--methods", "clan", *flags)
    sentence = study_error("weightmap", tmp_path, "--methods", "tan")
    assert "weightmap does not use --methods" in sentence


@pytest.mark.parametrize("flags", ("--jobs 0", "--images x", "--seeds 1,1", "--methods tan,dann"))
def test_study_refuses_flags_that_make_no_sense(tmp_path, capsys, flags):
    with pytest.raises(SystemExit) as caught:
        study.main(["ccd", *flags.split(), "--runs", str(tmp_path)])
    assert caught.value.code == 2 and "error:" in capsys.readouterr().err


def test_study_does_not_take_flags_that_it_sets_itself(tmp_path, capsys):
    for flag in ("--seed", "--out", "--method"):
        with pytest.raises(SystemExit) as caught:
            studied("table", tmp_path, flag, "1")
        assert caught.value.code == 2 and "unrecognized" in capsys.readouterr().err


def test_study_mean_weight_counts_eq_2_as_1(tmp_path):
    """The map is logged from the first adversarial step on, but Eq. 2 is in force until later."""
    given = {"out": tmp_path, "steps": 10, "adv_start": 0, "adaptive_start": 0.5}
    given |= {"lambda_local": 40.0}
    lines = [{"step": step, "m": 0.1} for step in range(1, 11)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    assert mean_weight(given) == pytest.approx((5 * 1 + 5 * 4.4) / 10)


def test_study_names_a_run_by_what_it_changes():
    s = study.parse(["table"])["table"]
    rate = configure({})[1].lambda_adv
    assert s.cell(0, method="tan")["out"].name == "tan-seed0"
    assert s.cell(0, method="tan", lambda_adv=rate)["out"].name == "tan-seed0"
    assert s.cell(0, method="tan", lambda_adv=0.5)["out"].name == "tan-lambda_adv0.5-seed0"
    assert s.cell(0, seg_heads="ensemble")["out"].name == "clan-seg_headsensemble-seed0"
    assert "keep" in s.cell(0, method="tan") and "keep" not in s.cell(0, eps=0.1)


def test_study_a_result_forged_by_an_evaluation_is_not_taken_for_a_finished_run(scenes, tmp_path):
    """eval.py may score a run that was cut off; the study still runs it to its end."""
    given = ("table", tmp_path, "--seeds", "0", "--methods", "source")
    runs = studied(*given) / "streets-streets-tiny" / "source-seed0"
    (runs / RESULT).unlink()
    shutil.rmtree(tmp_path / "results")
    (runs / "eval.json").write_text('{"miou": 1.0}')
    studied(*given)
    assert json.loads((runs / RESULT).read_text())["miou"] < 1.0


@pytest.mark.parametrize(
    ("what", "files"),
    (
        ("ccd", ("ccd-curve", "ccd-classes")),
        ("params", ("params",)),
        ("tsne", ("tsne",)),
        ("figure5", ("figure5",)),
        ("weightmap", ("weightmap",)),
        ("disagreement", ("disagreement",)),
        ("calibration", ("calibration",)),
    ),
)
def test_study_draws_every_figure(scenes, tmp_path, what, files):
    studied(what, tmp_path, "--seeds", "0")
    for name in files:
        path = tmp_path / f"{name}-streets-streets-tiny.png"
        with Image.open(path) as image:
            assert min(image.size) > 200 and len(image.convert("RGB").getcolors(10**6)) > 20
        assert path.stat().st_size < 300_000


def test_study_asked_to_stop_saves_its_runs_and_starts_no_other(tmp_path):
    command = [sys.executable, "study.py", "table", "--methods", "source", "--seeds", "0,1,2"]
    command += [*CELLS, "--steps", "100000", "--jobs", "2", "--runs", str(tmp_path)]
    here = Path(study.__file__).parent
    child = subprocess.Popen(command, cwd=here, stderr=subprocess.PIPE, text=True)
    runs = tmp_path / "streets-streets-tiny"

    def under_way() -> list[Path]:
        return [p.parent for p in runs.glob("*/metrics.jsonl") if p.stat().st_size > 0]

    try:
        deadline = time.monotonic() + 60
        while len(under_way()) < 2 and child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        child.send_signal(signal.SIGTERM)
        _, errors = child.communicate(timeout=60)
    finally:
        child.kill()
    assert child.returncode == 130 and "run the same command to go on" in errors
    names = {p.name for p in runs.iterdir()}
    assert names == {"source-seed0", "source-lookscity-seed0"}, "another run was started"
    assert all(list((runs / name).glob("step_*.safetensors")) for name in names)


@pytest.mark.slow
def test_study_photographs_compare_each_part_with_source_only(scenes, tmp_path):
    studied("photographs", tmp_path, "--seeds", "0,1", "--steps", "2", "--adv-start", "1")
    rows = json.loads((tmp_path / f"photographs-{TASK}.json").read_text())["rows"]
    assert [row[0] for row in rows] == list(study.PHOTOGRAPHS)
    assert rows[0][3:] == ["+0.0 [+0.0, +0.0]", "0 of 2"] and all(len(row) == 5 for row in rows)


def test_study_table_of_streets_has_a_bound_that_is_no_method(monkeypatch, tmp_path):
    scores = {"source": 0.2, "tan": 0.3, "clan": 0.36, "bound": 0.6}
    made = {}

    def run_groups(study_, groups):
        for name, cells in groups.items():
            bound = cells[0].get("looks") == "city"
            score = scores["bound" if bound else name]
            result = {"miou": score, "iou": {"road": score}, "commit": "c", "machine": "m"}
            result |= {"seconds": 1.0, "checkpoint": "x"}
            made[name] = [result | {"settings": {"seed": f["seed"]}} for f in cells]
        return made

    monkeypatch.setattr(tables, "run_groups", run_groups)
    tables.table_1_and_2(study.parse(["table", "--to", str(tmp_path)])["table"])
    content = json.loads((tmp_path / f"table-{TASK}.json").read_text())
    rows = {row[0]: row[1:] for row in content["rows"]}
    assert content["header"][-1] == tables.BOUND and len(rows["mIoU"]) == 5
    assert rows["gap closed"] == ["0 %", "25 %", "40 %", "", "100 %"]
    assert rows["mIoU"][-1] == rows["road"][-1] == "60.0 ± 0.0"
    photographs = study.parse(["table", "--tgt", "folder", "--backbone", "lite0"])["table"]
    assert tables.bound_groups(photographs) == {}, "only streets have labels for a bound"


def test_study_table_of_all_systems_has_gains_costs_and_the_papers_numbers(monkeypatch, tmp_path):
    """A made-up world in which CBST gains ten points and loses one class."""

    def result(method: str, flags: dict) -> dict:
        points = {"source": 0.0, "cbst": 0.1, "tan": 0.05, "clan": 0.05}[method]
        score = 0.3 + points + flags["seed"] / 100
        iou = {"road": score, "pole": score, "wall": 0.1 if method == "cbst" else score}
        found = {"miou": score, "iou": iou, "commit": "c", "machine": "m", "seconds": 1.0}
        return found | {"checkpoint": str(flags["out"]), "settings": runs.all_fields(flags)}

    def run_groups(study_, groups):
        known = {name: name for name in ("source", "tan", "clan", "cbst")}
        return {k: [result(known.get(k, "source"), f) for f in v] for k, v in groups.items()}

    monkeypatch.setattr(settings, "TUNED", {})
    monkeypatch.setattr(tables, "run_groups", run_groups)
    numbers = {m: tables.as_recorded(tables.numbers_of_step({}, m)) for m in ("cbst", "tan")}
    measured = {"step_ratio": 2.5, "peak_ratio": 1.25, "numbers": numbers["cbst"]}
    stale = measured | {"numbers": numbers["tan"] | {"lr_d": 9.0}}
    costs = {"methods": {"cbst": measured, "tan": stale}}
    (tmp_path / tables.STEPS.format("tiny")).write_text(json.dumps(costs))
    flags = ["table", "--to", str(tmp_path), "--results", str(tmp_path)]
    study.main([*flags, "--methods", "source,tan,clan"])
    assert not (tmp_path / f"systems-{TASK}.json").exists(), "the usual table has no need of it"
    study.main([*flags, "--methods", "source,tan,clan,cbst"])
    content = json.loads((tmp_path / f"systems-{TASK}.json").read_text())
    rows = {row[0]: dict(zip(content["header"], row, strict=True)) for row in content["rows"]}
    assert rows["CBST"]["gain over source only"] == "+10.0 [+10.0, +10.0]"
    assert rows["CBST"]["classes lost"] == "1.0" and rows["TAN"]["classes lost"] == "0.0"
    assert (rows["CBST"]["time a step"], rows["CBST"]["memory"]) == ("2.50", "1.25")
    assert rows["TAN"]["memory"] == "not measured", "with these numbers"
    assert rows["CBST"]["paper, SYNTHIA"] == "40.7 * (26.2)", "36.1 is printed"
    assert rows["TAN"]["paper, GTA5"] == "35.0 (17.9)"
    assert (
        rows["CBST"]["numbers"] == "portion 0.2, lambda_st 1" and not rows["source only"]["numbers"]
    )
    assert "with their first numbers: TAN, CLAN, CBST." in content["notes"][0]
    assert Image.open(tmp_path / f"systems-{TASK}.png").size[0] > 300
    monkeypatch.setattr(
        tables, "BY_EIGHT_TRIALS", {("tiny", "tan"): {"lr_d": 3e-4}, ("tiny", "clan"): {}}
    )
    study.main([*flags, "--methods", "source,tan,clan,cbst"])
    content = json.loads((tmp_path / f"systems-{TASK}.json").read_text())
    rows = {row[0]: dict(zip(content["header"], row, strict=True)) for row in content["rows"]}
    assert "with their first numbers: CBST." in content["notes"][0]
    assert rows["TAN, by eight trials"]["gain over source only"] == "+0.0 [+0.0, +0.0]"
    assert "CLAN, by eight trials" in rows, "also where they chose the default"
    assert rows["TAN, by eight trials"]["paper, GTA5"] == "35.0 (17.9)" and "TAN" in rows
    header = json.loads((tmp_path / f"table-{TASK}.json").read_text())["header"]
    assert not [name for name in header if "trials" in name], "of the other table alone"


def test_study_the_papers_rows_stand_with_the_source_only_of_each_system():
    found = {m: (tables.of_paper("gta5", m), tables.of_paper("synthia", m)) for m in METHODS}
    assert found["mcd"] == ("28.8 (24.9)", "") and found["cda"] == ("28.9 (22.3)", "")
    assert found["cross_city"] == ("", "35.7 (20.5)") and found["source"] == ("17.9", "20.2")
    assert found["st"] == found["multi"] == found["advent"] == found["clan_late"] == ("", "")


def test_study_a_flag_of_one_method_holds_for_its_runs_alone(tmp_path):
    line = ["table", "--methods", "source,st,cbst", "--portion", "0.3", "--runs", str(tmp_path)]
    s = study.parse(line)["table"]
    portions = {m: configure(s.cell(0, method=m))[1] for m in s.methods}
    assert portions["st"].portion == portions["cbst"].portion == 0.3
    assert "portion" not in s.cell(0, method="source")
    assert s.task == "streets-streets-tiny" and s.shared[1].method == "clan"
    assert s.cell(0, method="st")["out"].name == "st-seed0"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (["table", "--portion", "0.3"], "no run that reads --portion, of cbst, st"),
        (["table", "--tau", "0.3"], "no run that reads --tau, of selftrain"),
        (["tune", "--methods", "tan,clan", "--gate", "0.3"], "--gate, of cycada"),
        (["second", "--fourier", "0.1"], "second sets --fourier itself"),
    ],
)
def test_study_a_flag_that_no_run_reads_is_refused(line, words):
    with pytest.raises(ValueError, match=words):
        study.parse(line)
    assert study.parse(["second", "--trusted", "0.3"])["second"].flags["trusted"] == 0.3


@pytest.mark.parametrize("what", ["sweep", "tune", "trials", "decline", "fourier"])
def test_study_settings_are_not_chosen_on_the_labels_that_results_are_of(what, tmp_path):
    line = [what, "--tgt", "folder", "--tgt-dir", str(tmp_path), "--runs", str(tmp_path)]
    with pytest.raises(SystemExit, match="folder has no dev split, and its val is for results"):
        study.main(line)


def test_study_a_second_stage_is_no_method_to_compare():
    with pytest.raises(argparse.ArgumentTypeError, match="choose from source,tan,clan,"):
        study.methods_of("source,selftrain")


def test_study_a_flag_that_a_tuned_method_refuses_is_named(tmp_path):
    with pytest.raises(SystemExit, match="source, clan_late: not tuned; name others"):
        study.main(["tune", "--methods", "source,clan_late", "--runs", str(tmp_path)])
    line = ["tune", "--methods", "mcd", "--mcd-steps", "0", "--runs", str(tmp_path)]
    with pytest.raises(SystemExit, match="mcd_steps must be at least 1"):
        study.main(line)
    with pytest.raises(ValueError, match="a grid needs four values"):
        tuning.two_beyond({0.5}, 0.5)


def test_study_damaged_costs_are_named(tmp_path):
    s = replace(study.parse(["table"])["table"], results=tmp_path)
    assert tables.step_costs(s) == {}
    (tmp_path / "step-tiny.json").write_text('{"machine": "x"}')
    with pytest.raises(
        ValueError, match=r"step-tiny\.json is damaged: make it again with bench\.py"
    ):
        tables.step_costs(s)


def test_study_quick_of_everything_leaves_no_part_out(tmp_path):
    names = [name for name in study.COMMANDS if name not in study.NOT_IN_ALL]
    done = study.parse(["all", "--quick", "--runs", str(tmp_path)])
    assert list(done) == names and {"table", "control", "disagreement", "ccd"} <= done.keys()
    for name, s in done.items():
        one = name in ("params", "disagreement", "calibration", "control")
        assert s.seeds == ((0,) if one else (0, 1))
        assert s.flags["steps"] < 400 and s.images == 100
    assert study.parse(["second"])["second"].images == 50
    usual = study.parse(["all", "--runs", str(tmp_path)])
    assert usual["table"].seeds == (0, 1, 2, 3, 4) and usual["control"].seeds == tuple(range(10))
    assert study.parse(["sweep"])["sweep"].seeds == study.TUNING_SEEDS


@pytest.mark.slow
def test_study_everything_ends_with_all_tables_and_figures(scenes, tmp_path):
    """`all --quick` on images of 32x64 and runs of a few steps."""
    study.main(["all", "--quick", *CELLS, "--images", "6", "--runs", str(tmp_path)])
    made = {path.name.removesuffix(path.suffix) for path in tmp_path.glob(f"*{TASK}*.*")}
    wanted = "table params ccd ccd-classes tsne figure5 weightmap disagreement disagreement-classes"
    wanted += " transfer calibration"
    assert {f"{name}-{TASK}" for name in wanted.split()} <= made, made
    regimes = ("look-and-layout", "look-alone")
    assert {f"control-{TASK}-{regime}" for regime in regimes} <= made, made
    assert {f"claims-{TASK}-{regime}" for regime in (*regimes, "scenes-drawn-anew")} <= made, made


def test_study_disagreement_has_no_shift_of_streets_on_photographs():
    s = study.parse(["disagreement", "--tgt", "folder", "--backbone", "lite0"])["disagreement"]
    for change in trust.head_settings(s).values():
        s.cells(**change)
    assert trust.head_settings(study.parse(["disagreement"])["disagreement"])["shift of look alone"]


def test_study_the_curve_starts_where_a_shared_warm_up_was_trained(scenes, tmp_path):
    flags = ("--seeds", "0", "--steps", "6", "--adv-start", "3", "--methods", "source,tan")
    s = study.parse(["table", *CELLS, "--runs", str(tmp_path), *flags])["table"]
    cells, _ = figures.first_seed(s)
    steps = figures.over_training(cells)
    assert list(steps["source"]) == list(steps["tan"]) == [1, 2, 3, 4, 5, 6]
    assert steps["source"][2] == steps["tan"][2] and steps["source"][4] != steps["tan"][4]


def test_study_two_folders_of_photographs_do_not_share_runs(tmp_path):
    def task(folder):
        flags = {"tgt": "folder", "tgt_dir": tmp_path / folder, "backbone": "lite0"}
        return replace(study.parse(["table"])["table"], flags=flags).task

    assert task("camvid") == "streets-camvid-lite0" and task("mine") == "streets-mine-lite0"


@pytest.mark.slow
def test_study_runs_in_parallel_as_one_after_the_other(tmp_path, monkeypatch):
    """Two processes, of one thread each as the tests, give the bits of one."""
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    flags = ("--seeds", "0,1", "--methods", "source", "--steps", "2", "--adv-start", "0")
    a = studied("table", tmp_path / "a", *flags)
    b = studied("table", tmp_path / "b", *flags, "--jobs", "2")
    for seed in (0, 1):
        runs = (x / "streets-streets-tiny" / f"source-seed{seed}" for x in (a, b))
        assert_equal(*map(last_tensors, runs))


def test_study_dusk_splits_camvid_by_its_own_names(scenes, tmp_path, monkeypatch):
    shown = {}
    monkeypatch.setattr(
        study, "photographs", lambda s, rows: shown.update(flags=s.flags, task=s.task, rows=rows)
    )
    camvid = tmp_path / "camvid"
    names = [f"0006R0_{i}" for i in range(3)] + [f"0016E5_{i}" for i in range(2)]
    names += [f"0001TP_{i}" for i in range(5)]
    for name in names:
        write_png(camvid / "images" / "train" / f"{name}.png", np.zeros((8, 8, 3), np.uint8))
        write_png(camvid / "labels" / "train" / f"{name}.png", np.zeros((8, 8), np.uint8))
    (camvid / "classes.json").write_text('{"names": ["road"], "ignore": [11]}')
    for _ in range(2):  # a second time finds its links
        studied("dusk", tmp_path / "runs", "--tgt-dir", str(camvid))
    assert shown["task"] == "day-dusk-lite0" and len(shown["rows"]) == 4
    day, dusk = shown["flags"]["src_dir"], shown["flags"]["tgt_dir"]

    def stems(folder):
        return sorted(p.stem for p in folder.iterdir())

    assert stems(day / "images" / "train") == sorted(names[:5])
    assert stems(dusk / "images" / "train") == names[5::2]
    assert stems(dusk / "images" / "val") == stems(dusk / "labels" / "val") == names[6::2]
    assert "--tgt-dir" in study_error("dusk", tmp_path / "runs")
    shutil.rmtree(camvid / "images" / "train")
    (camvid / "images" / "train").mkdir()
    assert "0001TP" in study_error("dusk", tmp_path / "runs", "--tgt-dir", str(camvid))


# Calibration.


def test_study_calibration_error_by_hand():
    """80 right of 100 at confidence 0.9, and 30 of 100 at 0.3: (100 * 0.1 + 100 * 0) / 200."""
    confidence = np.repeat([0.9, 0.3], 100)
    right = np.concatenate([np.arange(100) < 80, np.arange(100) < 30])
    assert trust.calibration_error(confidence, right) == pytest.approx(0.05)
    rng = np.random.default_rng(0)
    confidence = rng.random(200_000)
    right = rng.random(200_000) < confidence
    assert trust.calibration_error(confidence, right) < 0.01, "calibrated by construction"
    assert trust.calibration_error(np.ones(10), np.ones(10, bool)) == 0


# Labels of self-training.


@pytest.mark.slow
def test_study_as_many_labels_are_found_as_the_last_round_was_to_give(scenes, tmp_path):
    """The share is kept to a bin of confidence, which holds many pixels of an untrained network."""
    flags = ["--seeds", "0,1", "--rounds", "1", "--portion", "0.4", "--images", "1000"]
    studied("labels", tmp_path, *flags)
    rows = json.loads((tmp_path / f"labels-{TASK}.json").read_text())["rows"]
    assert [row[0] for row in rows] == ["ST", "CBST", "CDA"]
    for name, share, right, network, never, _ in rows:
        assert (58 <= float(share.split()[0]) < 64) if name == "CDA" else True, "60 % of the cells"
        assert (40 <= float(share.split()[0]) < 55) if name != "CDA" else True
        assert 0 < float(right.split()[0]) <= 100 and 0 <= float(never) < 19
        assert (right == network) == (name == "ST"), "ST trusts the network's own answer"
    source, target = json.loads((tmp_path / f"sizes-{TASK}.json").read_text())["rows"]
    assert 10 <= float(source[2]) < 25, "a tenth of many, more of a few"
    assert 0 < float(source[3]) < float(target[3]) < 100


# Figures that need no label.


def test_study_entropy_is_that_of_the_shares():
    assert trust.entropy({"road": 0.5, "sky": 0.5}) == pytest.approx(math.log(2))
    assert trust.entropy([1.0, 0.0]) == 0.0 == trust.entropy([0.0, 1.0])


def test_study_a_figure_that_ranks_as_miou_does_loses_nothing():
    group = [{"miou": m, "x": x} for m, x in ((0.3, 1.0), (0.4, 2.0), (0.5, 9.0))]
    assert trust.ranked([group, group], lambda r: r["x"]) == (pytest.approx(1), 0)
    rank, loss = trust.ranked([group], lambda r: -r["x"])
    assert (rank, loss) == (pytest.approx(-1), pytest.approx(20))
    assert trust.ranked([group, group[:2]], lambda r: r["x"])[0] == pytest.approx(1)
    for nothing in ([group[:2]], [[]]):
        assert math.isnan(trust.ranked(nothing, lambda r: r["x"])[0])
    assert math.isnan(trust.ranked([group], lambda r: 1.0)[1])
    assert math.isnan(trust.ranked([group * 3], lambda r: 1 - 0.0041)[0]), "its mean is rounded"


def recorded_line(seed: int, lambda_adv: float, miou: float, split: str = "val") -> dict:
    """A made-up run in which the confidence is the mIoU, and M tells the opposite."""
    point = {"miou": miou, "confidence": miou, "m": miou, "shares": [0.5, 0.5], "d_target": 0.5}
    curve = [point | {"miou": x, "confidence": x} for x in (miou, miou - 0.1, miou - 0.05)]
    curve[-1]["m"] = 0.9
    result = point | {"curve": curve, "seconds": 1.0}
    settings = {"split": split, "lambda_adv": lambda_adv, "method": "clan"}
    return {"seed": seed, "settings": settings, "commit": "c", "machine": "m", "result": result}


def test_study_ranking_reads_the_recorded_runs_and_trains_nothing(tmp_path):
    flags = ["--to", str(tmp_path), "--results", str(tmp_path), "--runs", str(tmp_path / "none")]
    assert "fewer than three scored runs" in study_error("ranking", tmp_path, *flags[2:4])
    lines = [recorded_line(s, x, 0.3 + s / 10 + x / 20) for s in range(3) for x in (0.0, 1.0, 2.0)]
    lines.append(recorded_line(0, 0.0, 0.9))  # the first run once more, by another machine
    lines.append(recorded_line(0, 9.0, 0.0, "dev"))
    lines.append(recorded_line(0, 9.0, 0.9))
    lines[-1]["settings"]["looks"] = "city"  # the bound
    lines.append(recorded_line(1, 9.0, 0.9))
    lines[-1]["settings"]["shift"] = [0.5, 0.0]  # another target
    lines[0]["result"]["curve"] = lines[0]["result"]["curve"][:1] * 2  # too few to choose from
    path = tmp_path / f"{TASK}.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    study.main(["ranking", *flags])
    content = json.loads((tmp_path / f"ranking-{TASK}.json").read_text())
    rows = {row[0]: row[1:] for row in content["rows"]}
    assert rows["confidence"] == ["1.00, loses 0.0"] * 5
    assert rows["agreement of the heads, 1 - M"][0] == "-1.00, loses 30.0"
    assert rows["the last checkpoint"][-1] == "loses 5.0"
    assert "9 recorded runs" in content["notes"][0] and not (tmp_path / "none").exists()


# Recorded runs.


def test_study_goes_on_from_recorded_runs_where_the_folders_are_gone(scenes, tmp_path):
    """The table is the same, and no run is made; only a study of checkpoints makes it again."""
    results = ["--results", str(tmp_path / "results")]
    flags = ["--seeds", "0", "--methods", "source,clan", *results]
    first, second = tmp_path / "first", tmp_path / "second"
    studied("table", first, *flags)
    lines = (tmp_path / "results" / "streets-streets-tiny.jsonl").read_text().splitlines()
    found = {line["settings"]["method"]: line for line in map(json.loads, lines)}
    assert set(found) == {"source", "clan"} and len(lines) == 3, "one is the bound"
    assert "/" not in json.dumps([line["settings"] for line in found.values()]), "no path"
    kept = found["clan"]["result"]
    assert {"miou", "iou", "mean_weight", "d_loss", "d_source", "confidence", "m"} <= kept.keys()
    assert sum(kept["shares"].values()) == pytest.approx(1) and 0 < kept["confidence"] <= 1
    studied("table", second, *flags)
    name = "table-streets-streets-tiny.json"
    one, other = (json.loads((folder / name).read_text()) for folder in (first, second))
    assert one["rows"] == other["rows"] and one["runs"] == other["runs"]
    assert not (second / "streets-streets-tiny").exists()
    studied("figure5", second, *flags)
    assert (second / "streets-streets-tiny" / "clan-seed0").exists()


def test_study_recorded_runs_of_a_seed_come_from_one_machine(tmp_path):
    """The first that has recorded them all, else this one. Trials may come from any."""
    flags = ["--jobs", "2", "--seeds", "0", "--results", str(tmp_path)]
    asked = study.parse(["table", *flags])["table"]
    here, threads, version = runs.made_here(asked, asked.cell(0))
    cells = [asked.cell(0, method=method) for method in ("tan", "clan")]

    def answers(
        *lines: tuple[int, str, float], of: runs.Study = asked, done: float | None = None
    ) -> list[float | None]:
        """Scores of the two cells, where `lines` are recorded: cell, machine, score.

        done: the score of the first cell in a run folder of this machine.
        """
        (tmp_path / f"{TASK}.jsonl").unlink(missing_ok=True)
        for i, name, score in lines:
            result = {"miou": score, "before": {}, "threads": threads, "torch": version}
            result |= {"commit": "c", "machine": name, "settings": runs.all_fields(cells[i])}
            runs.record(asked, cells[i], result)
        of_folder = {"miou": done, "machine": here, "threads": threads, "torch": version}
        folders = {cells[0]["out"]: of_folder} if done else {}
        found = runs.known_results(of, runs.recorded_lines(asked), folders, cells)
        return [found.get(cell["out"], {}).get("miou") for cell in cells]

    assert answers((0, "a", 0.1), (1, "a", 0.2), (0, here, 0.3), (1, here, 0.4)) == [0.1, 0.2]
    assert answers((0, "a", 0.1), (0, "b", 0.2), (1, "b", 0.3)) == [0.2, 0.3]
    assert answers((0, "a", 0.1), (0, here, 0.2), (1, "b", 0.3)) == [0.2, None]
    assert answers((0, "a", 0.1)) == [None, None]
    assert answers((0, "a", 0.1), (1, "a", 0.2), done=0.3) == [0.1, 0.2]
    assert answers((1, "a", 0.2), done=0.3) == [0.3, None]
    assert answers((1, here, 0.2), (1, "a", 0.1), done=0.3) == [0.3, 0.2]
    trials = replace(asked, unpaired=True)
    assert answers((0, "a", 0.1), (1, "b", 0.2), (1, here, 0.3), of=trials) == [0.1, 0.3]


def test_study_a_finished_run_is_not_passed_off_as_made_with_other_threads(scenes, tmp_path):
    """It would be scored again, and recorded as of this machine and these threads."""
    found = study.parse(["tune", *CELLS, "--runs", str(tmp_path)])["tune"]
    cells = [found.cell(10, method=method) for method in ("tan", "source")]
    runs.run_cells(found, cells[:1])
    file = cells[0]["out"] / runs.RESULT
    file.write_text(json.dumps(json.loads(file.read_text()) | {"threads": 99}))
    shutil.rmtree(found.results)
    with pytest.raises(ValueError, match=r"tan-seed10 was made by .*, 99, .*: delete it, or"):
        runs.run_cells(found, cells)
    assert len(runs.run_cells(replace(found, unpaired=True), cells)) == 2, "trials need no pairs"


def test_study_names_of_trials_last_when_their_choice_becomes_the_default(monkeypatch, tmp_path):
    monkeypatch.setattr(settings, "TUNED", {})
    found = study.parse(["tune", "--runs", str(tmp_path)])["tune"]
    first = [found.cell(10, method="mcd", lambda_dis=x)["out"].name for x in (1.0, 3.0)]
    assert first == ["mcd-seed10", "mcd-lambda_dis3.0-seed10"]
    monkeypatch.setitem(settings.TUNED, ("tiny", "mcd"), {"lambda_dis": 3.0})
    again = [found.cell(10, method="mcd", lambda_dis=x)["out"].name for x in (1.0, 3.0)]
    assert again == ["mcd-lambda_dis1.0-seed10", "mcd-lambda_dis3.0-seed10"], "no name for two"


def test_study_a_run_made_with_settings_that_changed_meanwhile_is_not_recorded(tmp_path):
    asked = study.parse(["table", "--results", str(tmp_path)])["table"]
    cell = asked.cell(0, method="tan")
    result = {"commit": "c", "machine": "a", "settings": runs.all_fields(cell) | {"lr_d": 9.0}}
    with pytest.raises(ValueError, match="was made with settings that have changed since"):
        runs.record(asked, cell, result)
    assert not list(tmp_path.iterdir())


def test_study_a_recorded_run_with_other_settings_does_not_count(scenes, tmp_path):
    results = ["--results", str(tmp_path / "results")]
    flags = ["--seeds", "0", "--methods", "tan", *results]
    studied("table", tmp_path / "first", *flags)
    studied("table", tmp_path / "second", *flags, "--lambda-adv", "0.5")
    lines = (tmp_path / "results" / "streets-streets-tiny.jsonl").read_text().splitlines()
    tuned = configure({"method": "tan"})[1].lambda_adv
    assert [json.loads(x)["settings"]["lambda_adv"] for x in lines] == [tuned, 0.5]
    studied("table", tmp_path / "third", *flags, "--eps", "0.1")  # TAN reads no eps
    assert not (tmp_path / "third" / "streets-streets-tiny").exists()


# The instrument: could the place of the weight matter?


# How settings are chosen.


def fake_runs(monkeypatch, score_of) -> list[tuple]:
    """Trials score what `score_of` says of (method, lambda_adv, lr_d, length); returns them all."""
    made = []

    def run_groups(study_, groups, checkpoints=False):
        found = {}
        for key, cells in groups.items():
            _, hyper = configure(cells[0])
            trial = (hyper.method, hyper.lambda_adv, hyper.lr_d, hyper.steps - hyper.adv_start)
            if trial not in made:  # a finished run is not made again
                made.append(trial)
            found[key] = [{"miou": score_of(*trial)} for _ in cells]
        return found

    monkeypatch.setattr(tuning, "run_groups", run_groups)
    return made


def searched(monkeypatch, score_of) -> tuple[dict, list[tuple]]:
    made = fake_runs(monkeypatch, score_of)
    trials = tuning.Trials(study.parse(["sweep"])["sweep"], {})
    best = {method: tuning.first_values(trials.study) for method in ("tan", "clan")}
    for name, steps in tuning.AXES:
        best = tuning.descend(trials, best, name, steps)
    return best, made


def test_study_a_sweep_follows_edges_and_gives_each_method_the_same_values(monkeypatch):
    """The best of TAN lies far above the first grid, that of CLAN far below."""
    peak = {"tan": 0.2, "clan": 0.00625}

    def score_of(method, lambda_adv, lr_d, length):
        far = abs(math.log(lambda_adv / peak[method])) + abs(math.log(lr_d / 3e-5)) / 4
        return 1 / (1 + far + abs(length - 750) / 5000)

    best, made = searched(monkeypatch, score_of)
    assert best["tan"]["lambda_adv"] == 0.2 and best["clan"]["lambda_adv"] == 0.00625
    assert all(values["lr_d"] == pytest.approx(3.33e-5) for values in best.values())
    assert all(values["length"] == 750 for values in best.values())
    tried = {m: {trial[1] for trial in made if trial[0] == m} for m in peak}
    assert min(tried["tan"]) < 0.005 < 0.16 < max(tried["clan"])
    assert {trial[3] for trial in made} == {250, 500, 750, 1000}, "750 was an edge"
    counts = [sum(trial[0] == m for trial in made) for m in peak]
    assert abs(counts[0] - counts[1]) <= 2 and sum(counts) * 3 <= tuning.MOST_RUNS


def test_study_a_sweep_without_an_end_is_stopped(monkeypatch):
    with pytest.raises(ValueError, match="more than 120: stop it"):
        searched(monkeypatch, lambda method, lambda_adv, lr_d, length: lambda_adv)


@pytest.mark.slow
def test_study_sweep_chooses_on_dev(scenes, tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "AXES", (("length", (2, 4)),))
    monkeypatch.setattr(tuning, "LONGEST", 4)
    monkeypatch.setattr(tuning, "MOST_RUNS", 40)
    studied("sweep", tmp_path, "--seeds", "10")
    content = json.loads((tmp_path / "sweep-streets-streets-tiny.json").read_text())
    assert content["header"][:3] == ["method", "numbers", "mIoU on dev"]
    assert {row[1].split()[0] for row in content["rows"]} == {"lambda_adv"}
    chosen = [row for row in content["rows"] if row[-1] == "chosen"]
    assert sorted(row[0] for row in chosen) == ["CLAN", "TAN"]
    assert "seg_heads by source only" in content["notes"][0] and "mean M is" in content["notes"][0]
    lines = (tmp_path / "results" / "streets-streets-tiny.jsonl").read_text().splitlines()
    assert {json.loads(line)["settings"]["split"] for line in lines} == {"dev"}


def test_study_a_trial_that_diverges_counts_as_0_and_is_recorded(monkeypatch, scenes, tmp_path):
    """Other runs are not trials: there the error ends the study, when the rest is made."""
    found = study.parse(["tune", *CELLS, "--runs", str(tmp_path)])["tune"]
    (start,) = runs.run_cells(replace(found, seeds=(10,)), [found.cell(10, method="tan")])
    train_on = runs.train.train

    def diverges(settings, hyper, resume, console):
        assert resume is not None, "it begins with the donor's warm-up"
        if hyper.lambda_adv == 0.1:
            raise FloatingPointError("step 4: adv is nan")
        return train_on(settings, hyper, resume, console)

    monkeypatch.setattr(runs.train, "train", diverges)
    monkeypatch.setattr(runs, "commit", lambda: "later than the warm-up")
    cells = [found.cell(10, method="tan", lambda_adv=rate) for rate in (0.1, 0.02)]
    with pytest.raises(FloatingPointError, match="1 of 2 runs diverged, first: step 4: adv is nan"):
        runs.run_cells(found, cells)
    assert runs.finished(cells[1]), "the other one is made all the same"
    trials = replace(found, unpaired=True)
    for recorded in (False, True):  # the second takes both from what is recorded
        if recorded:
            with pytest.raises(FloatingPointError):
                runs.run_cells(found, cells)
            shutil.rmtree(tmp_path / found.task)
        diverged, other = runs.run_cells(trials, cells)
        assert diverged["miou"] == 0 and diverged["diverged"] == "step 4: adv is nan"
        assert diverged["commit"] == "later than the warm-up"
        assert other["miou"] > 0 and "diverged" not in other
        assert {"seg", "adv", "grad"} <= start["terms"].keys() & other["terms"].keys()
    assert runs.run_cells(found, cells[1:]) == [other], "a recorded result"


def test_study_a_trial_that_diverges_after_its_own_warm_up_counts_as_0(scenes, tmp_path):
    """Its folder holds an older checkpoint than that of adv_start, too."""
    found = study.parse(["tune", *CELLS, "--runs", str(tmp_path)])["tune"]
    steps = {"steps": 6, "adv_start": 3, "save_every": 2}
    cell = found.cell(10, method="tan", lambda_adv=1e38, **steps)
    (result,) = runs.run_cells(replace(found, unpaired=True), [cell])
    assert result["miou"] == 0 and "not finite" in result["diverged"]


def test_study_any_method_that_adapts_gives_its_warm_up_to_the_others(tmp_path):
    found = study.parse(["tune", *CELLS, "--runs", str(tmp_path)])["tune"]
    of_mcd = [found.cell(10, method="mcd", lambda_dis=x) for x in (0.3, 3.0)]
    of_clan, of_source = found.cell(10, method="clan"), found.cell(10, method="source")
    cells = [*of_mcd, of_clan, of_source]
    donors = runs.choose_donors(found, cells, cells)
    assert {donors[flags["out"]] for flags in of_mcd} == {of_mcd[0]["out"]}
    assert donors[of_clan["out"]] == of_clan["out"], "its warm-up has Eq. 4"
    assert of_source["out"] not in donors, "it cannot go on with the networks of MCD"
    of_tan = found.cell(10, method="tan", lambda_adv=0.5)
    donors = runs.choose_donors(found, cells, [*cells, of_tan])
    assert donors[of_mcd[0]["out"]] == of_mcd[0]["out"], "TAN's is neither there nor missing"
    of_tan["out"].mkdir(parents=True)
    metadata = dict.fromkeys(KEYS, 0) | {"settings": runs.all_fields(of_tan)}
    save(of_tan["out"] / BEFORE, {"G.x": torch.zeros(1)}, metadata)
    donors = runs.choose_donors(found, cells, [*cells, of_tan])
    assert {donors[x["out"]] for x in (*of_mcd, of_source)} == {of_tan["out"]}
    metadata["settings"]["lr_g"] = 9.0
    save(of_tan["out"] / BEFORE, {"G.x": torch.zeros(1)}, metadata)
    donors = runs.choose_donors(found, cells, [*cells, of_tan])
    assert donors[of_mcd[0]["out"]] == of_mcd[0]["out"], "that folder holds another run"


def tuned(monkeypatch, tmp_path, methods: str, score_of, *flags) -> tuple[dict, dict]:
    """(chosen numbers, all trials) by label, where trials score what `score_of` says of Hyper."""
    made = {}

    def run_groups(study_, groups, checkpoints=False):
        for key, cells in groups.items():
            assert [flags["seed"] for flags in cells] == [10, 11]
            assert all(configure(flags)[0].split == "dev" for flags in cells)
            made[key] = score_of(configure(cells[0])[1])
        return {key: [{"miou": made[key]}] * 2 for key in groups}

    found = {}

    def write(study_, name, header, rows, note, groups):
        assert name == "tune-streets-streets-tiny"
        found.update({row[0]: row[1] for row in rows if row[-1] == "chosen"})

    monkeypatch.setattr(tuning, "run_groups", run_groups)
    monkeypatch.setattr(tuning, "write", write)
    study.main(["tune", "--methods", methods, "--runs", str(tmp_path), *flags])
    return found, made


def test_study_tune_tries_two_numbers_of_each_method_and_follows_an_edge_once(
    monkeypatch, tmp_path
):
    def score_of(hyper) -> float:
        far = math.log(hyper.lambda_adv / 1e-6) + abs(math.log(hyper.lr_d / 1e-4))
        if hyper.method == "mcd":
            far = abs(math.log(hyper.lambda_dis / 3.0)) + hyper.mcd_steps
        if hyper.method == "cbst":
            far = abs(hyper.portion - 0.7) + abs(math.log(hyper.lambda_st / 0.3))
        if hyper.method == "minent":
            far = abs(math.log(hyper.lambda_ent / 0.02))
        return 1 / (1 + far)

    methods = ("tan", "mcd", "cbst", "minent")
    chosen, made = tuned(monkeypatch, tmp_path, ",".join(methods), score_of)
    assert chosen == {
        "TAN": "lambda_adv 0.00313, lr_d 0.0001",
        "MCD": "lambda_dis 3, mcd_steps 1",
        "CBST": "lambda_st 0.3, portion 0.7",
        "MinEnt": "lambda_ent 0.0139",
    }
    trials = {m: [dict(key[1:]) for key in made if key[0] == m] for m in methods}
    rates = {0.0125, 0.025, 0.05, 0.1} | {0.00313, 0.00625}  # the best was an edge
    assert {t["lambda_adv"] for t in trials["tan"]} == rates
    assert len(trials["mcd"]) == 7, "no count below 1"
    shares = {0.2, 0.35, 0.5, 0.7, 0.98}
    assert {t["portion"] for t in trials["cbst"]} == shares, "none above 1"
    assert len(trials["minent"]) == 8 and len(trials["cbst"]) == 8


def test_study_tune_of_one_number_leaves_the_other(monkeypatch, tmp_path):
    score_of = lambda hyper: -abs(math.log(hyper.lambda_adv / 0.03))  # noqa: E731
    chosen, made = tuned(monkeypatch, tmp_path, "tan,clan", score_of, "--numbers", "1")
    both = "lambda_adv 0.025, lr_d 0.0001"
    assert chosen == {"TAN": both, "CLAN": both} and len(made) == 8


def test_study_tune_asks_for_the_same_trials_after_its_choice_is_the_default(monkeypatch, tmp_path):
    score_of = lambda hyper: -abs(math.log(hyper.lambda_dis / 3)) - hyper.mcd_steps  # noqa: E731
    chosen, made = tuned(monkeypatch, tmp_path, "mcd", score_of)
    assert chosen == {"MCD": "lambda_dis 3, mcd_steps 1"}
    monkeypatch.setitem(settings.TUNED, ("tiny", "mcd"), {"lambda_dis": 3.0, "mcd_steps": 1})
    assert configure({"method": "mcd"})[1].mcd_steps == 1
    assert tuned(monkeypatch, tmp_path, "mcd", score_of) == (chosen, made)


def test_study_what_tune_chose_stands_over_what_a_small_network_has(monkeypatch):
    monkeypatch.setitem(settings.TUNED, ("tiny", "cycada"), {"lambda_adv": 0.2})
    found = configure({"method": "cycada"})[1]
    assert (found.lambda_adv, found.d_width, found.lr_d) == (0.2, 64, 1e-3)


def test_study_lite0_has_tinys_numbers_and_an_adversary_in_proportion(monkeypatch):
    monkeypatch.setitem(
        settings.TUNED, ("tiny", "cross_city"), {"lambda_class": 0.02, "lr_d": 3e-3}
    )
    found = configure({"method": "cross_city", "backbone": "lite0"})[1]
    assert (found.lambda_class, found.lr_d, found.lambda_adv) == (pytest.approx(0.002), 3e-3, 0.005)
    monkeypatch.setitem(settings.TUNED, ("lite0", "cross_city"), {"lambda_class": 0.5})
    assert configure({"method": "cross_city", "backbone": "lite0"})[1].lambda_class == 0.5
    assert configure({"method": "cross_city", "backbone": "r101"})[1].lr_d != 3e-3


def test_study_each_method_names_two_numbers_of_its_own_with_four_values_each():
    for name, method in METHODS.items():
        untuned = ("source", "clan_late", "selftrain")  # with another's numbers, or by trials
        assert bool(method.tuned) == (name not in untuned)
        if not method.tuned:
            continue
        (first, values), (second, others) = method.tuned
        used = configure({"method": name})[1]
        assert hasattr(used, first) and hasattr(used, second)
        assert not {first, second} & method.unused
        assert len(values) == 4 and len(others) in (0, 4) and list(values) == sorted(values)
    for (_, name), chosen in settings.TUNED.items():
        assert chosen.keys() == {number for number, _ in METHODS[name].tuned}
        assert (first == second) == (not others)


def test_study_only_the_usual_run_folder_is_recorded_in_the_repository():
    for flags, folder in (
        ([], Path("results")),
        (["--runs", "elsewhere"], Path("elsewhere/results")),
        (["--quick"], Path("runs/study-quick/results")),
        (["--runs", "elsewhere", "--results", "here"], Path("here")),
    ):
        assert study.parse(["table", *flags])["table"].results == folder
