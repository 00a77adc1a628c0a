"""The studies of the second stage: whole, on tiny runs, and their numbers."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import studied

import second
import study
from runs import all_fields, same_run
from settings import configure

TASK = "streets-streets-tiny"


def table(folder, name: str) -> dict[str, list[str]]:
    content = json.loads((folder / f"{name}-{TASK}.json").read_text())
    return {row[0]: row[1:] for row in content["rows"]}


def test_second_a_stage_goes_on_with_a_run_and_is_recorded_without_its_folder(tmp_path):
    s = study.parse(["second", "--runs", str(tmp_path), "--seeds", "3,4"])["second"]
    first = s.cells(method="tan", lambda_adv=0.5)
    stages = second.stage_after(s, first, trust="m")
    assert [cell["init"] for cell in stages] == [str(cell["out"]) for cell in first]
    names = [cell["out"].name for cell in stages]
    assert names == [f"selftrain-inittan-lambda_adv0.5-trustm-seed{i}" for i in (3, 4)]
    settings, hyper = configure(stages[0])
    assert (hyper.adv_start, hyper.steps, hyper.trust) == (0, 500, "m")
    kept = same_run(json.loads(json.dumps(vars(settings) | vars(hyper), default=str)))
    assert kept["init"] == "tan-lambda_adv0.5", "neither seed nor folder"


def test_second_each_row_has_a_folder_of_its_own(tmp_path):
    """Also those that switch off what is on by default after a run."""
    s = study.parse(["second", "--runs", str(tmp_path), "--tau", "0.1"])["second"]
    firsts = {name: s.cells(**change) for name, change in second.MAIN.items()}
    scores = {f"TAN, {second.BY[w]}": [{"miou": 0.5}] for w in ("confidence", "m")}
    groups = firsts | second.controls(s, firsts, scores, "confidence")
    groups |= {f"{k}, stage": second.stage_after(s, v) for k, v in firsts.items()}
    folders = [flags["out"] for group in groups.values() for flags in group]
    assert len({*folders}) == len(folders) == 5 * (3 + 5 + 3)
    changed = {k: configure(v[0])[1].class_mix for k, v in groups.items() if "mix" in k}
    assert changed == dict.fromkeys(changed, False) and len(changed) == 2


def test_second_a_flag_of_the_trust_holds_for_the_weights_that_read_it(tmp_path):
    s = study.parse(["second", "--runs", str(tmp_path), "--trusted", "0.3"])["second"]
    first = s.cells(method="tan")

    def of_each(s, name: str) -> dict:
        cells = {trust: second.stage_after(s, first, trust=trust)[0] for trust in second.BY}
        return {trust: getattr(configure(flags)[1], name) for trust, flags in cells.items()}

    tau = study.parse(["second", "--runs", str(tmp_path), "--tau", "0.5"])["second"]
    read = dict.fromkeys(second.BY, 0.01) | {"both": 0.5, "m": 0.5}
    assert of_each(tau, "tau") == read
    assert of_each(s, "trusted") == dict.fromkeys(second.BY, 0.3) | {"m": 0.5, "constant": 0.5}
    s = study.parse(["second", "--runs", str(tmp_path), "--trust", "m", "--tau", "0.5"])["second"]
    assert of_each(s, "tau") == read
    assert second.numbers_of_stage(s, first[0]).trust == "m"
    (cell, *_) = second.stage_weighed_by(s, first, "m")
    assert configure(cell)[1].tau == 0.5, "--tau holds, and nothing is fitted"


def test_second_rows_on_photographs(tmp_path, monkeypatch):
    """M and a constant weight go on from the best of three starts; BatchNorm alone is a fourth."""
    flags = ["--tgt", "folder", "--tgt-dir", "x", "--backbone", "lite0", "--tau", "0.1"]
    s = study.parse(["second", "--runs", str(tmp_path), "--seeds", "0", *flags])["second"]
    scores = {"source only, by confidence": 0.4}
    found = {}

    def with_starts(study_, firsts, groups):
        found.update(groups)
        return {name: [{"miou": scores.get(name, 0.3)}] for name in groups}

    monkeypatch.setattr(second, "with_starts", with_starts)
    monkeypatch.setattr(second, "write_second", lambda *args: found.update(start=args[1]))
    second.second(s)
    rows = ("source only", "TAN", "CLAN", "BatchNorm alone")
    stages = [f"{name}, by confidence" for name in rows]
    more = ["source only, by M", "source only, constant", "source only, FDA", "TAN, FDA"]
    assert found.pop("start") == "source only"
    assert {*found} == {*rows, *stages, *more}
    adapted = configure(found["BatchNorm alone, by confidence"][0])[0].init
    assert "batchnormbatch" in adapted and "lambda_adv0.0" in adapted


def test_second_batchnorm_alone_is_compared_with_its_stage_alone(tmp_path, monkeypatch):
    """It may come from another machine than the other rows of a seed."""

    def result(miou: float, machine: str, **more) -> dict:
        return {"miou": miou, "machine": machine, "settings": {"seed": 0}} | more

    s = study.parse(["second", "--runs", str(tmp_path), "--seeds", "0"])["second"]
    student = {"student": {"miou": 0.1}}
    results = {
        "TAN": [result(0.3, "A")],
        "TAN, by confidence": [result(0.4, "A", **student)],
        "TAN, constant": [result(0.35, "A", **student)],
        "BatchNorm alone": [result(0.3, "B")],
        "BatchNorm alone, by confidence": [result(0.32, "B", **student)],
    }
    tables: list[list] = []
    monkeypatch.setattr(second, "write", lambda *args: tables.append(args[3]))
    second.write_second(s, "TAN", "by confidence", results)
    shown = {row[0]: row[2:4] for row in tables[0]}
    assert shown["TAN, constant"] == ["+5.0", "-5.0"]
    assert shown["BatchNorm alone, by confidence"] == ["+2.0", ""]


@pytest.mark.parametrize("flags", ((), ("--tau", "1e-5"), ("--trust", "m", "--tau", "1e-5")))
def test_second_the_cost_of_a_step_is_known_whatever_weighs_the_labels(flags):
    results = Path(second.__file__).parent / "results"
    s = study.parse(["second", "--results", str(results), *flags])["second"]
    assert second.cost_of_a_step(s).startswith("A step takes 0.")


def test_second_the_tau_of_m_is_fitted_to_each_start(tmp_path, monkeypatch):
    monkeypatch.setattr(second, "run_cells", lambda *_, **__: None)
    monkeypatch.setattr(second, "start_tau", lambda study, first: {"tan": 0.2, "clan": 0.4}[
        first["method"]])  # fmt: skip
    s = study.parse(["second", "--runs", str(tmp_path)])["second"]
    taus = [
        configure(second.stage_weighed_by(s, s.cells(method=m), "both")[0])[1].tau
        for m in ("tan", "clan")
    ]
    assert taus == [0.2, 0.4]


def test_second_tau_gives_the_wanted_mean_weight():
    m = np.random.default_rng(0).gamma(0.3, 0.02, 10_000)
    for mean in (0.2, 0.5, 0.9):
        assert np.exp(-m / second.tau_for(m, mean)).mean() == pytest.approx(mean, abs=1e-6)


def test_second_a_collapsed_m_shows_in_its_spread_with_the_tau_of_the_start():
    m, doubt = np.random.default_rng(0).uniform(size=(2, 1000))
    wrong = doubt > 0.7
    tau = second.tau_for(m, 0.5)
    start, end = (second.numbers_of_m(k * m, doubt, wrong, tau) for k in (1.0, 1e-3))
    assert start["spread"] > second.USELESS > end["spread"]
    assert start["AUC of 1 - confidence"] == 1.0 and start["AUC of M"] == end["AUC of M"]


def test_second_reliability_is_the_accuracy_by_tenths_whatever_the_order_of_the_images():
    values = np.repeat([0.0, 0.1, 0.2], [200, 300, 500])
    wrong = np.concatenate([np.arange(200) >= 150, np.arange(300) % 2 == 0, np.ones(500, bool)])
    x, y = second.reliability(values, wrong)
    assert x[0] == 0.05 and y == pytest.approx([0.75] * 2 + [0.5] * 3 + [0.0] * 5)
    order = np.random.default_rng(0).permutation(1000)
    assert second.reliability(values[order], wrong[order])[1] == pytest.approx(y)


def test_second_coverage_is_by_class_of_the_truth(monkeypatch):
    p = torch.zeros(2, 2, 4)
    p[0, :, :2], p[1, :, 2:] = 0.9, 0.8  # the left half is class 0, the right half class 1
    p[0, 1, 0] = p[1, 1, 3] = 0.6  # one pixel of each is less sure
    label = torch.tensor([[0, 0, 0, 0], [0, 1, 1, 255]])
    image = torch.zeros(3, 2, 4, dtype=torch.uint8)
    monkeypatch.setattr(second, "ensemble_and_m", lambda *_: (p, torch.zeros(2, 4)))
    monkeypatch.setattr(second.evaluation, "spread_images", lambda *_: [(0, image, label)])
    _, hyper = configure({"method": "selftrain", "threshold": 0.7, "trusted": 0.75})
    G, ids = SimpleNamespace(num_classes=2), np.arange(256)
    shares = second.coverage(G, ("road", "sky"), None, ids, hyper, 1)
    wanted = {"road": 4 / 5, "sky": 1.0}
    assert shares == pytest.approx(wanted), "the unlabelled pixel is not counted"

    p = torch.cat([p[:1], torch.zeros(1, 2, 4), p[1:]])  # the target does not have the second
    ids = np.full(256, 255)
    ids[[0, 1]] = 0, 2
    G = SimpleNamespace(num_classes=3)
    assert second.coverage(G, ("road", "wall", "sky"), None, ids, hyper, 1) == pytest.approx(wanted)


def test_second_a_stage_is_named_by_its_start_also_where_no_folder_is(tmp_path):
    s = study.parse(["second", "--runs", str(tmp_path)])["second"]
    stages = [second.stage_after(s, s.cells(method="tan", lambda_adv=x))[0] for x in (0.05, 0.5)]
    inits = [same_run(all_fields(flags), s.starts)["init"] for flags in stages]
    assert inits[0].startswith("tan-") and inits[1].startswith("tan-lambda_adv0.5-")
    again = second.stage_after(s, s.cells(method="tan", lambda_adv=0.5)[:1])
    assert same_run(all_fields(again[0]), s.starts)["init"] == inits[1]
    half = second.stage_after(s, s.cells(method="tan"), "before_adaptation.safetensors")[0]
    assert same_run(all_fields(half), s.starts)["init"].startswith("before_adaptation.safetensors-")


def test_second_a_change_that_diverges_has_a_row_and_does_not_stop_the_trials(
    tmp_path, monkeypatch, capsys
):
    def result_of(name: str, seed: int) -> dict:
        if name == "rate x 2.5" and seed == 11:
            return {"miou": 0.0, "diverged": "step 8: grad is not finite"}
        curve = [{"step": 0, "miou": 0.2}, {"step": 100, "miou": 0.35}]
        rest = {"student": {"miou": 0.3}, "settings": {"seed": seed}, "curve": curve}
        return {"miou": 0.4} | rest

    def found(study, groups, checkpoints=False):
        assert study.unpaired, "else a run that diverges ends the study"
        return {k: [result_of(k, cell["seed"]) for cell in group] for k, group in groups.items()}

    monkeypatch.setattr(second, "run_groups", found)
    monkeypatch.setattr(second, "labels_over_time", lambda _, flags, moments: dict.fromkeys(
        moments, (0.7 + (flags["seed"] - 10) / 5, 0.5)))  # fmt: skip
    monkeypatch.setattr(second, "write", lambda study, name, header, rows, *_: tables.update(
        {row[0]: row[1:] for row in rows if len(row) <= len(header)}))  # fmt: skip
    tables: dict[str, list[str]] = {}
    second.trials(study.parse(["trials", "--runs", str(tmp_path)])["trials"])
    assert tables.keys() == second.CHANGES.keys()
    assert tables["rate x 2.5"][1] == "diverged" and tables["class mix"][1].startswith("40.0")
    assert tables["class mix"][0].startswith("35.0"), "at step 100"
    assert tables["class mix"][-3:] == ["80.0 of 50"] * 3, "of both seeds"
    assert "rate x 2.5, 1 of 2 runs: step 8: grad is not finite" in capsys.readouterr().out


def test_second_accuracy_of_labels_by_pixel_and_by_the_class_that_they_name(monkeypatch):
    """Three roads right, one of two signs wrong, and a third class that no label names."""
    labels, ids = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([0, 0, 0, 1, 2])
    found = [(labels, torch.ones(5), ids), (labels[3:], torch.tensor([0.0, 0.0]), ids[3:])]
    monkeypatch.setattr(second, "trusted_labels", lambda *_: iter(found))
    G = SimpleNamespace(num_classes=4)
    accuracies = second.label_accuracies(G, None, None, None, 2)
    assert accuracies == pytest.approx((4 / 5, (1 + 1 / 2) / 2))


@pytest.mark.slow
def test_second_all_of_its_studies_end_with_their_tables_and_figures(scenes, tmp_path, monkeypatch):
    few = {k: second.CHANGES[k] for k in ("momentum .999", "every label counts", "class mix")}
    monkeypatch.setattr(second, "CHANGES", few)
    studied("trials", tmp_path, "--seeds", "10")
    rows = table(tmp_path, "trials")
    assert list(rows) == list(few) and rows["every label counts"][4].endswith("of 100")
    studied("decline", tmp_path / "often", "--seeds", "10")
    rows = json.loads((tmp_path / "often" / f"decline-{TASK}.json").read_text())["rows"]
    assert [row[1] for row in rows] == ["0", "2"] * 2, (
        "with labels and without, a stage of two steps"
    )
    assert all(row[4] == row[5] for row in rows[::2]), "the teacher begins as the student"
    studied("signs", tmp_path / "val", "--seeds", "0")
    rows = json.loads((tmp_path / "val" / f"signs-{TASK}.json").read_text())["rows"]
    assert [row[:2] for row in rows if row[0] == "TAN"] == [
        ["TAN", "0"],
        ["TAN", "1"],
        ["TAN", "2"],
    ]
    studied("second", tmp_path / "val", "--seeds", "0,1")
    rows = table(tmp_path / "val", "second")
    assert len(rows) == 3 + 3 + (len(second.BY) - 1) + 6 + 4
    assert [name for name in rows if name.endswith("shuffled")], "of the better weight"
    assert rows["TAN"][1] == "" and rows["TAN, FDA"][1] and rows["TAN, by M"][1]
    means = {name: float(row[0].split()[0]) for name, row in rows.items()}
    gain = float(rows["TAN, FDA, by confidence"][1].split()[0])
    assert gain == pytest.approx(means["TAN, FDA, by confidence"] - means["TAN, FDA"], abs=0.11)
    assert rows["CLAN, by confidence"][3] and not rows["CLAN"][3].strip("-")
    assert rows["TAN, by M"][2] and not rows["TAN, by confidence"][2], "one from the other"
    lines = (tmp_path / "val" / "results" / f"{TASK}.jsonl").read_text().splitlines()
    lines = [json.loads(x) for x in lines]
    free = [x for x in lines if x["settings"].get("source_free")]
    assert free and all({"st", "kept", "m"} <= line["result"]["terms"].keys() for line in free)
    whole = [x for x in lines if x["settings"]["init"].startswith("before_adaptation")]
    assert len(whole) == 2, "from the warm-up, with all steps"

    shutil.rmtree(tmp_path / "val" / TASK)  # the records are enough
    monkeypatch.setattr("runs.run_cell", lambda *_: pytest.fail("a run is made again"))
    tau = next(x["settings"]["tau"] for x in lines if x["settings"].get("trust") == "m")
    studied("second", tmp_path / "val", "--seeds", "0,1", "--tau", f"{tau}")
    assert table(tmp_path / "val", "second") == rows
    monkeypatch.undo()
    monkeypatch.setattr(second, "CHANGES", few)
    studied("fourier", tmp_path, "--seeds", "10")
    assert list(table(tmp_path, "fourier")) == ["0", *(f"{beta:g}" for beta in second.BETAS)]
    assert (tmp_path / f"fourier-{TASK}.png").exists()
    studied("reliable", tmp_path / "val", "--seeds", "0")
    assert (tmp_path / "val" / f"reliable-{TASK}.png").exists()
    tenths = json.loads((tmp_path / "val" / f"reliable-{TASK}.json").read_text())["rows"]
    assert len(tenths) == 4 and all(len(row) == 11 for row in tenths)
    covered = json.loads((tmp_path / "val" / f"coverage-{TASK}.json").read_text())["rows"]
    assert len(covered) == 19 and covered[0][0] == "road"
    of_m = json.loads((tmp_path / "val" / f"m-{TASK}.json").read_text())["rows"]
    assert [row[0] for row in of_m] == ["before", "after"] and of_m[0][5] == of_m[1][5], "one tau"
