"""Settings: defaults by data set and backbone, flags from dataclasses."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from helpers import run, run_error

import data
import eval as evaluation
import train
from clan import PAPER, RELEASED
from settings import both_parts, configure, parse

# Settings.


def test_train_the_data_set_and_the_backbone_bring_their_defaults():
    settings, hyper = configure({})
    assert (settings.tgt, settings.backbone, settings.init) == ("streets", "tiny", "none")
    assert hyper.batchnorm == "before" and hyper.bn_affine and not hyper.crop
    settings, hyper = configure({"src": "gta5"})
    assert (settings.tgt, settings.backbone) == ("cityscapes", "r101")
    assert (settings.init, settings.lineage) == ("imagenet", "torchvision")
    assert hyper == PAPER
    assert settings.out == Path("runs/gta5-cityscapes-r101-clan-seed0")
    settings, hyper = configure({"src": "gta5", "recipe": "released", "init": "x.pth"})
    assert settings.lineage == "caffe" and hyper == RELEASED


@pytest.mark.parametrize(
    ("src", "recipe", "expected"),
    (("synthia", "released", 10), ("synthia", "paper", 40), ("gta5", "released", 40)),
)
def test_train_lambda_local_follows_the_data_set_and_the_recipe(src, recipe, expected):
    given = {"src": src, "recipe": recipe}
    assert configure(given)[1].lambda_local == expected
    assert configure(given | {"lambda_local": 3.0})[1].lambda_local == 3


@pytest.mark.parametrize("backbone", ("tiny", "lite0", "r101", "vgg16"))
def test_train_a_flag_wins_over_every_default(backbone):
    """No setting is dead: each value given is the value used."""
    values = {
        **{"steps": 77, "batch": 3, "adv_start": 5, "lr_g": 0.5, "head_lr": 3.0, "crop": True},
        **{"bn_affine": False, "batchnorm": "running", "lambda_adv": 0.3, "lr_d": 0.1},
        **{"lambda_weight": 0.7, "jitter": 0.05, "mirror": 0.25, "d_channels": 8},
    }
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in values.items() if not isinstance(v, bool)]
    flags += ["--crop", "--no-bn-affine", "--backbone", backbone]
    given, resume = parse(flags)
    hyper = asdict(configure(given)[1])
    assert resume is None and {k: hyper[k] for k in values} == values


@pytest.mark.parametrize("backbone", ("tiny", "lite0"))
def test_train_small_networks_have_narrow_d_that_learn_faster(backbone):
    def of(method: str, name: str = backbone):
        return configure({"backbone": name, "method": method}, tuned=False)[1]

    assert [of(m).d_width for m in ("cycada", "fcns_wild", "cross_city")] == [64, 128, 64]
    assert [of(m, "r101").d_width for m in ("cycada", "fcns_wild", "cross_city")] == [512, 1024, 64]
    rates = [of(m).lr_d for m in ("tan", "advent", "cycada", "fcns_wild", "cross_city", "cda")]
    assert rates == [1e-4, 1e-4, 1e-3, 1e-3, 1e-3, 1e-2]
    assert of("multi").lambda_adv_aux == pytest.approx(of("multi").lambda_adv / 5)


def test_train_flags_of_several_values_become_tuples():
    flags = ["--scales", "0.5", "1", "--scale-probs", "0.5", "0.5", "--tgt-size", "64", "96"]
    given, _ = parse(flags)
    assert given["scales"] == (0.5, 1.0) and given["tgt_size"] == (64, 96)
    settings, hyper = configure(given)
    assert hyper.scale_probs == (0.5, 0.5) and settings.tgt_size == (64, 96)


def test_train_shift_reaches_the_city_alone_and_its_score(few, tmp_path):
    out = run(tmp_path / "a", "--shift", "0.5", "0")
    assert json.loads((out / "eval.json").read_text())["settings"]["shift"] == [0.5, 0.0]
    settings, _ = configure({"shift": (0.5, 0.0)})
    source, target, val = train.open_all(settings)
    plain = train.open_all(configure({})[0])
    for ours, others, equal in zip((source, target, val), plain, (True, False, False), strict=True):
        assert np.array_equal(data.image_at(ours, 0), data.image_at(others, 0)) == equal
    before = json.loads((out / "eval.json").read_text())["miou"]
    evaluation.main([str(out), "--device", "cpu"])
    assert json.loads((out / "eval.json").read_text())["miou"] == before
    sentence = run_error("--tgt", "folder", "--tgt-dir", str(tmp_path), "--shift", "0.1", "0.1")
    assert "--shift" in sentence


def test_train_the_help_names_all_methods_that_have_a_number_in_the_words_of_the_chosen_one(capsys):
    with pytest.raises(SystemExit):
        parse(["--method", "fcns_wild", "--help"])
    shown = capsys.readouterr().out
    assert "\n--method st, cbst:\n" in shown
    _, _, of_d = shown.partition("\n--method cycada, fcns_wild, cross_city:\n")
    of_d = " ".join(of_d.partition("\n--method")[0].split())
    assert "--d-width N channels of D's two hidden layers (third party: 1024) [128]" in of_d
    assert "--slack" not in of_d and "\n--method fcns_wild:\n" in shown


def test_train_the_help_of_both_parts_shows_the_steps_of_both_and_the_stages_numbers(capsys):
    with pytest.raises(SystemExit):
        parse(["--selftrain-start", "1600", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    first, last = both_parts({"selftrain_start": 1600})
    of_stage = configure(last)[1]
    assert f"iterations [{1600 + of_stage.steps}]" in shown
    assert f"it is the student [{of_stage.teacher_momentum}]" in shown
    assert f"initial rate [{configure(first)[1].lr_g}]" in shown
