"""The controls: claims and their power, rows, negative transfer, the instrument."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import metrics, studied

import control
import data
import study
from clan import Hyper
from models import Discriminator, Generator
from runs import mean_weight
from settings import configure

TASK = "streets-streets-tiny"


def made_up(monkeypatch, score_of, deviation: float) -> list[dict]:
    """Runs score `score_of` of their flags, and a little more or less by seed. Returns all.

    All runs of one call are of one machine, and those of another call are of another.
    """
    made = []

    def result(flags) -> dict:
        made.append(flags)
        _, hyper = configure(flags)
        noise = np.random.default_rng([flags["seed"], len(str(hyper))]).normal()
        iou = {name: score_of(hyper) for name in ("road", "wall", "car")}
        found = {"miou": score_of(hyper) + deviation * noise, "iou": iou, "mean_weight": 0.5}
        found |= {"settings": {"seed": flags["seed"]}, "checkpoint": str(flags["out"])}
        found |= {"commit": "c", "seconds": 1.0}
        start = dict.fromkeys(iou, 0.5)
        curve = [{"step": 100, "iou": [*iou.values()]}]
        if hyper.method != "source":
            found["before"] = {"iou": start}
            curve = [{"step": 50, "iou": [*start.values()]}, *curve]
        return found | {"curve": curve}

    calls: Iterator[int] = itertools.count()

    def run_cells(study_, cells, checkpoints=False):
        machine = f"of call {next(calls)}"  # so runs of two calls make no pair
        return [result(flags) | {"machine": machine} for flags in cells]

    def run_groups(study_, groups, checkpoints=False):
        results = iter(run_cells(study_, [flags for cells in groups.values() for flags in cells]))
        return {name: [next(results) for _ in cells] for name, cells in groups.items()}

    monkeypatch.setattr(control, "run_cells", run_cells)
    monkeypatch.setattr(control, "run_groups", run_groups)
    return made


def rows_of(folder, name: str) -> dict[str, list[str]]:
    content = json.loads((folder / f"{name}.json").read_text())
    return {row[0]: row[1:] for row in content["rows"]}


def test_control_a_claim_is_the_difference_of_its_two_rows(monkeypatch, tmp_path):
    """A made-up world in which the place of M's weight is worth 3 points, and nothing else is."""

    def score(hyper) -> float:
        placed = hyper.method == "clan" and hyper.m_control == "none" and hyper.lambda_local > 0
        return 0.2 if hyper.method == "source" else 0.3 + 0.03 * placed

    made = made_up(monkeypatch, score, 0.0)
    control.control(study.parse(["control", "--to", str(tmp_path)])["control"])
    first = rows_of(tmp_path, f"claims-{TASK}-look-and-layout")
    points = {name.split()[0]: row[1] for name, row in first.items()}
    assert points == {"(i)": "+3.0", "(ii)": "+3.0", "(iii)": "+3.0", "(iv)": "+3.0", "(v)": "+0.0"}
    assert {row[-1] for row in first.values()} == {"10 of 10", "0 of 10"}
    anew = rows_of(tmp_path, f"claims-{TASK}-scenes-drawn-anew")
    assert [row[1] for row in anew.values()] == ["+3.0"]
    rows = rows_of(tmp_path, f"control-{TASK}-look-and-layout")
    assert rows["CLAN"][6] == "+3.0 [+3.0, +3.0]" and rows["CLAN"][0] == "10"
    more = rows_of(tmp_path, f"further-control-{TASK}-look-and-layout")
    assert more["BatchNorm alone"][0] == more["TAN"][0] == "5"
    assert more["CLAN"][6] == "+3.0 [+3.0, +3.0]", "beside runs of the same machine"
    assert rows["CLAN"][4] == "0.0" and rows["source only"][6].startswith("-10.0")
    assert rows["CLAN"][5] == rows["source only"][5] == "3.0", "all three fell from 50 %"
    further = rows_of(tmp_path, f"further-{TASK}-look-and-layout")
    assert [row[1] for row in further.values()] == ["+3.0", "+3.0", "+3.0", "+0.0", "+0.0", "+3.0"]
    assert {row[-1] for row in further.values()} == {"5 of 5", "0 of 5"}
    alone = rows_of(tmp_path, f"control-{TASK}-look-alone")
    assert list(alone) == ["source only", "TAN", "CLAN", *control.PLACES]
    transfer = rows_of(tmp_path, f"transfer-{TASK}")
    assert transfer["CLAN"] == ["50.0 ± 0.0", "33.0 ± 0.0", "+3.0 [+3.0, +3.0]", "33.0 ± 0.0"]
    below = ["50.0 ± 0.0", "20.0 ± 0.0", "-10.0 [-10.0, -10.0]", "20.0 ± 0.0"]
    assert transfer["source only"] == below
    assert list(transfer) == list(control.WATCHED)
    assert (tmp_path / f"transfer-{TASK}.png").exists()
    seeds = {flags["seed"] for flags in made if flags.get("split") != "dev"}
    assert seeds == set(range(10)), "the claims were clear, so no seed was added"
    dev = [flags for flags in made if flags.get("split") == "dev"]
    assert {flags["seed"] for flags in dev} == {10, 11, 12}
    scaled = [configure(flags)[1] for flags in made if flags.get("lambda_adv")]
    rate = configure({})[1].lambda_adv
    assert {hyper.method for hyper in scaled} == {"tan"}
    assert [hyper.lambda_adv for hyper in scaled] == [rate / 2] * 10, "made once"


def test_control_an_unsettled_place_gets_ten_more_seeds(monkeypatch, tmp_path):
    made = made_up(monkeypatch, lambda hyper: 0.3, 0.05)
    control.control(study.parse(["control", "--to", str(tmp_path)])["control"])
    first = rows_of(tmp_path, f"claims-{TASK}-look-and-layout")
    counts = {name.split()[0]: row[-1].split()[-1] for name, row in first.items()}
    assert counts == {"(i)": "10", "(ii)": "10", "(iii)": "20", "(iv)": "10", "(v)": "10"}
    used = {flags["seed"] for flags in made if flags.get("split") != "dev"}
    assert used == {*control.SEEDS, *control.MORE_SEEDS} and not used & {10, 11, 12}


def test_control_lost_classes_are_those_more_than_2_points_below():
    baseline = {"iou": {"road": 0.5, "sky": 0.5, "car": 0.5, "bus": None}}
    result = {"iou": {"road": 0.47, "sky": 0.49, "car": 0.9, "bus": 0.1}}
    assert control.lost_classes(result, baseline) == 1


def test_control_of_another_target_needs_no_dev_split(monkeypatch, tmp_path):
    made = made_up(monkeypatch, lambda hyper: 0.3, 0.0)
    flags = ["--src", "gta5", "--backbone", "tiny", "--seeds", "0,1"]
    control.control(study.parse(["control", *flags, "--to", str(tmp_path)])["control"])
    assert not [f for f in made if f.get("split") == "dev"]
    assert (tmp_path / "claims-gta5-cityscapes-tiny.json").exists()


@pytest.mark.slow
def test_control_runs_every_row_and_scales_tan_by_clans_own_mean_weight(scenes, tmp_path):
    flags = ("--seeds", "0", "--shift", "0.5", "0.5")
    out = studied("control", tmp_path, *flags)
    runs = out / TASK
    clans = [line["m"] for line in metrics(runs / "clan-seed0") if "m" in line]
    _, hyper = configure({})
    weight = hyper.lambda_local * np.mean(clans) + hyper.eps
    assert mean_weight({"out": runs / "clan-seed0"}) == pytest.approx(weight)
    paths = runs.glob("tan-lambda_adv*-seed0/eval.json")
    rates = [json.loads(path.read_text())["settings"]["lambda_adv"] for path in paths]
    assert sum(x == pytest.approx(hyper.lambda_adv * weight) for x in rates) == 1
    rows = rows_of(out, f"control-{TASK}") | rows_of(out, f"further-control-{TASK}")
    assert rows["TAN"][6] == rows["CLAN"][7] == "+0.0"
    for name in (*control.PLACES, control.EVEN, "M inverted, mean 1"):
        assert rows[name][8] == "1.00"
    assert len({p.name for p in runs.iterdir()}) == len(rows) + 1  # and source only on dev
    curve = json.loads((runs / "clan-seed0" / "study.json").read_text())["curve"]
    assert [point["step"] for point in curve] == [2, 3, 4]  # from adv_start to the end
    assert len(curve[0]["iou"]) == 19 and sum(curve[0]["shares"]) == pytest.approx(1, abs=1e-3)
    assert curve[1].keys() >= {"miou", "confidence", "m", "d_source", "d_target"}
    source = json.loads((runs / "source-seed0" / "study.json").read_text())["curve"]
    assert [point["step"] for point in source] == [3, 4]


def test_control_the_instrument_sees_a_place_only_if_weights_and_d_have_one(scenes):
    """Equal weights give equal gradients. Weights that differ give others, the more so by a D with
    more cells."""
    torch.manual_seed(0)
    G = Generator("tiny", head_std=0.3)
    val = data.open_dataset("streets", "target", "val", size=(64, 128))
    cosines = {}
    for strides in ((2, 2, 2, 2, 2), (2, 2, 1, 1, 1)):
        torch.manual_seed(1)
        D = Discriminator(19, 8, strides)
        same = control.gradient_cosines(G, D, val, Hyper(lambda_local=0.0), 2)
        assert same["mean weight"] == pytest.approx(0.4, rel=1e-5) and same["spread"] < 1e-5
        equal = [v for k, v in same.items() if k.startswith("M and")]
        assert len(equal) == 4 and equal == pytest.approx([1] * 4, abs=1e-4)
        found = control.gradient_cosines(G, D, val, Hyper(detach_m=True), 2)
        assert found["spread"] > 0.1
        cosines[strides] = found["M and shuffled, logits"]
    assert cosines[2, 2, 1, 1, 1] < cosines[2, 2, 2, 2, 2] < 1


@pytest.mark.slow
def test_control_instrument_writes_a_row_for_each_grid_at_start_and_end(
    scenes, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    studied("instrument", Path("runs"), "--seeds", "0")
    rows = json.loads((Path("runs") / f"instrument-{TASK}.json").read_text())["rows"]
    assert [row[0] for row in rows] == ["1x2", "1x2", "4x8", "4x8", "8x16", "8x16"]
    assert [row[2] for row in rows] == ["start", "end"] * 3
