"""The three tables: a new row of each is all that a data set, a backbone or a method needs.

Each row added here trains four steps through train.main, is killed, resumes to the same weights,
is scored, and appears in --help and in `study.py table`.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from helpers import (
    assert_equal,
    before_step,
    last_tensors,
    metrics,
    power_cut,
    run_error,
    steps_logged,
    striped,
    write_png,
)
from torch import nn

import clan
import data
import study
import tables
import train
from clan import Hyper
from classes import CLASSES, LABEL_IDS, TO_TRAIN_IDS
from data import DataSet, Kind
from methods import ADVERSARIAL, CLAN_ONLY, METHODS, Method
from models import BACKBONES, Backbone, dilated
from settings import configure

SIZES = "--src-size 32 64 --tgt-size 32 64 --steps 4 --adv-start 2 --batch 2 --device cpu"
FLAGS = f"{SIZES} --log-every 1 --save-every 1 --keep 9".split()


# A data set of three images.


def open_trio(folder: Path, split: str, size, labels) -> DataSet:
    images = (folder / "frames").glob("*.png")
    label_of = lambda image: folder / "ids" / image.name  # noqa: E731
    pairs = data.pair(images, label_of, labels, folder, DATA_ROW.layout, folder / "ids")
    return DataSet("trio", CLASSES, CLASSES, size, size, pairs)


DATA_ROW = Kind(
    open_trio,
    "put frames/ and ids/ into Trio/ under --data",
    "Trio",
    ("train", "val"),
    (32, 64),
    TO_TRAIN_IDS["cityscapes"],
)


# A backbone of two layers.


class TwoLayers(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.BatchNorm2d(8)
        )


BACKBONE_ROW = Backbone(lambda caffe: TwoLayers(), dilated(8, (1, 2)), ("scratch",))


# A method with a loss and a number of its own, no D, a second step of G, and a tensor of state.


@dataclass(frozen=True)
class EvenHyper(Hyper):
    lambda_even: float = 0.5  # weight of the made-up loss


def even_loss(G, batch, wanted: torch.Tensor) -> torch.Tensor:
    logits_1, logits_2 = G(batch.target)
    shares = (logits_1 + logits_2).softmax(dim=1).mean(dim=(0, 2, 3))  # C
    return (shares - wanted).square().sum()


def even_first(G, D, batch, phase, hyper, state):
    assert D is None
    loss, terms, _ = clan.g_step(G, D, batch, phase, replace(hyper, method="source"))
    if batch.target is not None:
        even = even_loss(G, batch, state["wanted"])
        loss, terms["even"] = loss + hyper.lambda_even * even, even.detach()
    return loss, terms, None


def even_second(G, batch, phase, hyper, state):
    loss = even_loss(G, batch, state["wanted"])
    return hyper.lambda_even * loss, {"even_again": loss.detach()}


def even_state(G, hyper):
    return {"wanted": torch.full((G.num_classes,), 1 / G.num_classes)}


def even_next(state, G, terms, hyper):
    return {"wanted": 0.9 * state["wanted"] + 0.1 * terms["seg"]}


METHOD_ROW = Method(
    "Even",
    CLAN_ONLY | ADVERSARIAL,
    EvenHyper,
    has_d=False,
    g_step=even_first,
    later_steps=lambda hyper: (even_second,),
    first_state=even_state,
    next_state=even_next,
)


@pytest.fixture
def rows(monkeypatch, tmp_path, few):
    """The three rows in their tables, and the flags that ask for each."""
    monkeypatch.setitem(data.DATASETS, "trio", DATA_ROW)
    monkeypatch.setitem(BACKBONES, "two", BACKBONE_ROW)
    monkeypatch.setitem(METHODS, "even", METHOD_ROW)
    for i in range(3):
        image, train_ids = striped((32, 64), range(19), seed=i)
        ids = LABEL_IDS[train_ids]
        write_png(tmp_path / "data" / "Trio" / "frames" / f"{i}.png", image)
        write_png(tmp_path / "data" / "Trio" / "ids" / f"{i}.png", ids)
    return {
        "trio": ["--src", "trio", "--tgt", "trio", "--data", str(tmp_path / "data"),
                 "--backbone", "tiny"],
        "two": ["--backbone", "two"],
        "even": ["--method", "even", "--lambda-even", "0.7"],
    }  # fmt: skip


@pytest.mark.parametrize("row", ("trio", "two", "even"))
def test_methods_a_new_row_trains_is_killed_resumes_and_is_scored(rows, tmp_path, monkeypatch, row):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train.main([*FLAGS, *rows[row], "--out", str(whole)])
    with monkeypatch.context() as patch:
        before_step(patch, 3, power_cut)
        with pytest.raises(RuntimeError, match="power"):
            train.main([*FLAGS, *rows[row], "--out", str(parts)])
    train.main(["--resume", str(parts)])
    assert_equal(last_tensors(parts), last_tensors(whole))
    assert metrics(parts) == metrics(whole)
    score = json.loads((parts / "eval.json").read_text())
    assert 0 <= score["miou"] <= 1 and score == json.loads(
        (whole / "eval.json").read_text().replace(str(whole), str(parts))
    )


@pytest.mark.parametrize("row", ("trio", "two", "even"))
def test_methods_a_new_row_is_in_the_help_and_in_the_table_of_a_study(rows, tmp_path, capsys, row):
    for program in (train.main, study.main):
        with pytest.raises(SystemExit) as caught:
            program(["--help"])
        assert caught.value.code == 0
        shown = capsys.readouterr().out
        assert row in shown and ("--lambda-even" in shown)
    methods = ["--methods", "source,tan,even"] if row == "even" else ["--methods", "source,tan"]
    flags = [] if row == "even" else rows[row]
    folder = ["--runs", str(tmp_path / "runs"), "--to", str(tmp_path / "runs"), "--seeds", "0"]
    sizes = SIZES.split()
    study.main(["table", *methods, *sizes, *flags, *folder, "--log-every", "1"])
    (table,) = (tmp_path / "runs").glob("table-*.json")
    header = json.loads(table.read_text())["header"]
    bound = [tables.BOUND] * (row != "trio")  # streets alone have one
    assert header == ["class", "source only", "TAN", *["Even"] * (row == "even"), *bound]


def test_methods_state_steps_and_numbers_do_what_the_row_says(rows, tmp_path):
    train.main([*FLAGS, *rows["even"], "--out", str(tmp_path / "a")])
    tensors = last_tensors(tmp_path / "a")
    assert not any(name.startswith(("D.", "opt_d.")) for name in tensors)
    lines = steps_logged(tmp_path / "a")
    wanted = torch.full((19,), 1 / 19)
    for line in lines:
        wanted = 0.9 * wanted + 0.1 * line["seg"]
        assert ("even" in line) == ("even_again" in line) == (line["step"] > 2)
    torch.testing.assert_close(tensors["state.wanted"], wanted, rtol=1e-4, atol=1e-5)
    assert lines[-1]["even_again"] != lines[-1]["even"]  # the second step sees the first's weights
    train.main([*FLAGS, "--method", "even", "--lambda-even", "0", "--out", str(tmp_path / "b")])
    other = last_tensors(tmp_path / "b")
    assert not torch.equal(other["G.E.0.weight"], tensors["G.E.0.weight"])


def test_methods_a_number_of_one_method_is_refused_for_the_others(rows):
    for method in ("source", "tan", "clan"):
        error = run_error("--method", method, "--lambda-even", "1")
        assert f"--method {method} does not use --lambda-even" in error
    error = run_error("--method", "even", "--lr-d", "1", "--eps", "1")
    assert "--method even does not use --lr-d, --eps" in error


def test_methods_a_checkpoint_with_another_state_is_refused(rows, tmp_path, monkeypatch):
    train.main([*FLAGS, *rows["even"], "--out", str(tmp_path / "a")])
    other = replace(METHOD_ROW, first_state=lambda G, hyper: {"wanted": torch.zeros(3)})
    monkeypatch.setitem(METHODS, "even", other)
    assert "the method's state is" in run_error("--resume", str(tmp_path / "a"))


def test_methods_a_method_of_unknown_name_is_refused_by_configure():
    with pytest.raises(ValueError, match=r"unknown method 'dann': choose one of source, tan, clan"):
        configure({"method": "dann"})
