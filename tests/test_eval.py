"""Scores against the official scorer, tables, pictures, predictions on photographs."""

import io
import json
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    HERE,
    SHARED,
    assert_equal,
    make_cityscapes,
    make_gta5,
    make_synthia,
    need,
    official_scores,
    run,
    seeded,
    some_labels,
    striped,
    tensors_of,
    write_png,
)
from PIL import Image
from rich.console import Console
from safetensors.torch import save_file
from torch import nn

import checkpoints
import data
import eval as evaluation
import models
import predictions
from classes import (
    CLASSES,
    LABEL_IDS,
    PALETTE,
    palette_of,
)
from weights import load_generator


def loop_confusion(pred, label, classes: int) -> torch.Tensor:
    matrix = torch.zeros(classes, classes, dtype=torch.int64)
    for p, y in zip(pred.flatten().tolist(), label.flatten().tolist(), strict=True):
        if 0 <= y < classes:
            matrix[y, p] += 1
    return matrix


@pytest.mark.parametrize("dtype", (torch.uint8, torch.int32, torch.int64), ids=str)
@pytest.mark.parametrize("classes", (2, 11, 19))
def test_eval_confusion_matrix_equals_a_loop_over_pixels(classes, dtype):
    generator = seeded(classes)
    pred = torch.randint(0, classes, (2, 13, 17), generator=generator).to(dtype)
    label = torch.randint(0, classes + 3, (2, 13, 17), generator=generator)
    label = label.where(label <= classes, 255).to(dtype)
    matrix = evaluation.confusion_matrix(pred, label, classes)
    assert matrix.dtype == torch.int64
    assert torch.equal(matrix, loop_confusion(pred, label, classes))


def test_eval_confusion_matrix_ignores_negative_and_unlabelled_and_adds_up():
    pred, label = torch.tensor([0, 1, 1]), torch.tensor([-1, 255, 1])
    matrix = evaluation.confusion_matrix(pred, label, 2)
    assert matrix.tolist() == [[0, 0], [0, 1]]
    assert evaluation.confusion_matrix(pred, label, 2, total=matrix).tolist() == [[0, 0], [0, 2]]


def test_eval_confusion_matrix_refuses_a_prediction_of_another_size():
    with pytest.raises(ValueError, match="differ in shape"):
        evaluation.confusion_matrix(torch.zeros(4, 4), torch.zeros(4, 5), 2)


def test_eval_iou_counts_each_class_and_is_nan_for_an_absent_one():
    matrix = torch.tensor([[3, 1, 0, 0], [2, 4, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]])
    score = evaluation.iou(matrix)
    assert score.dtype == torch.float64
    assert score[[0, 1, 3]].tolist() == pytest.approx([3 / 7, 4 / 7, 0])  # 3: missed altogether
    assert score[2].isnan()


def test_eval_mean_leaves_an_absent_class_out_and_counts_a_missed_one():
    matrix = torch.tensor([[3, 1, 0, 0], [2, 4, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]])
    result = evaluation.scores(matrix, ("a", "b", "c", "d"), ("a", "b", "c", "d"))
    assert result["miou"] == pytest.approx(1 / 3) and result["iou"]["c"] is None
    three = evaluation.scores(matrix, ("a", "b", "c", "d"), ("b", "c", "d"))
    assert three["miou"] == pytest.approx(2 / 7) and set(three["iou"]) == {"b", "c", "d"}
    one = evaluation.scores(matrix, ("a", "b", "c", "d"), ("b", "c"))
    assert one["only_class"] == "b" and "miou" not in one


def test_eval_of_a_perfect_prediction_is_one_and_of_a_shifted_one_is_zero():
    label = some_labels(1, 19, 40, 40)
    perfect = evaluation.iou(evaluation.confusion_matrix(label.clamp(max=18), label, 19))
    wrong = evaluation.iou(evaluation.confusion_matrix((label + 1) % 19, label, 19))
    assert torch.equal(perfect, torch.ones(19).double())
    assert torch.equal(wrong, torch.zeros(19).double())


class Table(nn.Module):
    """A stand-in for G that answers each image with logits of its own, on a coarse grid."""

    def __init__(self, classes: int, answers: dict):
        super().__init__()
        self.num_classes, self.answers = classes, answers

    def forward(self, images):
        logits = torch.stack([self.answers[image.numpy().tobytes()] for image in images])
        return logits, 0.5 * logits.flip(1)  # the two heads differ


def test_eval_equals_the_official_scorer_on_real_labels(tmp_path):
    """Images in, labelIds out: the four real frames, predicted by a coarse and noisy oracle."""
    need("cityscapes")
    dataset = data.open_dataset(
        "cityscapes", "target", "train", SHARED / "cityscapes", size=(128, 256)
    )
    answers, pairs = {}, data.Pairs(dataset)
    for i, image, label in (pairs[k] for k in range(4)):
        coarse = label[::16, ::16].long()
        noise = torch.randn(19, *coarse.shape, generator=seeded(i))
        right = F.one_hot(coarse.where(coarse < 19, 0), 19).permute(2, 0, 1)
        answers[image.contiguous().numpy().tobytes()] = 4 * right + noise
    save = evaluation.save_labels(tmp_path, dataset, CLASSES)
    table = np.arange(256).astype(np.uint8)
    confusion = evaluation.evaluate(Table(19, answers), dataset, table, save=save)
    ours = evaluation.scores(confusion, CLASSES, CLASSES)

    labels = [label for _, label in dataset.items]
    predictions = [
        tmp_path / label.name.replace("gtFine_labelIds", "pred_labelIds") for label in labels
    ]
    assert all(Image.open(p).size == (2048, 1024) for p in predictions)
    official = official_scores(predictions, labels)
    assert 0.1 < ours["miou"] < 0.9
    assert ours["miou"] == pytest.approx(official["mean"], abs=1e-6)
    for name, value in ours["iou"].items():
        assert value == pytest.approx(official[name], abs=1e-6, nan_ok=True), name


def test_eval_predictions_carry_the_names_that_the_official_scorer_looks_for(tmp_path):
    scorer = pytest.importorskip("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling")
    dataset = data.open_dataset("cityscapes", "target", "val", make_cityscapes(tmp_path / "cs"))
    save = evaluation.save_labels(tmp_path / "pred", dataset, CLASSES)
    for i in range(3):
        save(i, np.full((32, 64), i, np.uint8))
    args = types.SimpleNamespace(predictionPath=str(tmp_path / "pred"), predictionWalk=None)
    for i, (_, label) in enumerate(dataset.items):
        found = Path(scorer.getPrediction(args, str(label)))
        assert (np.asarray(Image.open(found)) == LABEL_IDS[i]).all()


def test_eval_saves_no_label_ids_of_other_classes(tmp_path):
    with pytest.raises(ValueError, match="the run has other classes"):
        evaluation.save_labels(tmp_path, None, ("road", "lake"))


class Ramp(nn.Module):
    """Two classes: class 1 wins right of `where` (in units of the width) in the heads' sum only."""

    num_classes = 2

    def __init__(self, where: float):
        super().__init__()
        self.where = where

    def forward(self, images):
        b, _, h, w = images.shape
        x = torch.linspace(0, 1, w // 8).expand(b, 1, h // 8, w // 8)
        zero = torch.zeros_like(x)
        return torch.cat([zero, x], 1), torch.cat([zero + self.where, zero], 1)


@pytest.mark.parametrize("where", (0.3137, 0.4999, 0.8713))
def test_eval_predict_upsamples_the_sum_of_the_logits_with_aligned_corners(where):
    """A linear ramp stays exactly linear, so the border is found to the pixel."""
    images = torch.zeros(2, 3, 32, 64, dtype=torch.uint8)
    one, two = predictions.predict(Ramp(where), images, [(100, 201), (57, 333)])
    for pred, size in ((one, (100, 201)), (two, (57, 333))):
        assert pred.shape == size and pred.dtype == torch.uint8
        expected = torch.linspace(0, 1, size[1]) > where
        assert torch.equal(pred.bool(), expected.expand(size))


def test_eval_scores_at_the_labels_own_size(tmp_path):
    """The image is seen at 32x64, the label counted with all its pixels."""
    dataset = data.open_dataset(
        "cityscapes", "target", "val", make_cityscapes(tmp_path, size=(96, 192)), size=(32, 64)
    )
    table = np.full(256, 255, np.uint8)
    table[:19] = np.arange(19) % 2
    confusion = evaluation.evaluate(Ramp(0.5), dataset, table)
    expected = sum(
        loop_confusion(
            (torch.linspace(0, 1, 192) > 0.5).expand(96, 192).int(),
            torch.from_numpy(table[data.label_at(dataset, i)]),
            2,
        )
        for i in range(3)
    )
    assert torch.equal(confusion, expected) and confusion.sum() == 3 * 96 * 192


def test_eval_leaves_the_network_in_evaluation_mode_and_unchanged():
    G = models.Generator("tiny")
    before = tensors_of(G)
    G.train()
    predictions.predict(G, torch.zeros(1, 3, 32, 64, dtype=torch.uint8), [(32, 64)])
    assert not G.training
    assert_equal(tensors_of(G), before)


def test_eval_report_names_what_was_left_out(tmp_path):
    source = data.open_dataset("synthia", "source", "train", make_synthia(tmp_path / "s"))
    target = data.open_dataset("cityscapes", "target", "val", make_cityscapes(tmp_path / "c"))
    matrix = torch.eye(19, dtype=torch.int64)
    for name in ("wall", "fence", "pole"):  # in the 16, not in the 13
        matrix[CLASSES.index(name), CLASSES.index(name)] = 0
        matrix[CLASSES.index(name), 0] = 1
    result = evaluation.report(matrix, source, target)
    assert len(result["iou"]) == 16 and result["images"] == 3
    assert set(result["left_out"]) == {"terrain", "truck", "train"}
    assert result["miou"] == pytest.approx((12 + 1 / 4) / 16)
    assert result["miou_13"] == pytest.approx((12 + 1 / 4) / 13)
    gta5 = data.open_dataset("gta5", "source", "train", make_gta5(tmp_path / "g"))
    assert "miou_13" not in evaluation.report(matrix, gta5, target)


@pytest.mark.parametrize(
    ("src", "backbone", "method", "miou", "road"),
    (
        ("gta5", "r101", "clan", 43.2, 87.0),
        ("gta5", "vgg16", "clan", 36.6, 88.0),
        ("gta5", "r101", "source", 36.6, 75.8),
        ("synthia", "r101", "clan", 47.8, 81.3),
    ),
)
def test_eval_the_papers_row_stands_beside_ours(src, backbone, method, miou, road):
    row = evaluation.paper_row(src, "cityscapes", backbone, method)
    mean = row["miou_13" if src == "synthia" else "miou"]  # Table 2 is over 13 classes
    assert (mean, row["iou"]["road"]) == pytest.approx((miou / 100, road / 100))
    assert set(row["iou"]) <= set(CLASSES)
    assert len(row["iou"]) == (13 if src == "synthia" else 19)


@pytest.mark.parametrize(
    ("src", "method", "mean", "base"),
    (
        ("gta5", "mcd", 28.8, 24.9),
        ("gta5", "fcns_wild", 27.1, 17.9),
        ("synthia", "cbst", 40.7, 26.2),  # printed as 36.1
        ("synthia", "cross_city", 35.7, 20.5),  # a network that has no row
        ("synthia", "source", 20.2, 20.2),
    ),
)
def test_eval_the_papers_row_is_compared_with_its_own_source_only(src, method, mean, base):
    row = evaluation.paper_row(src, "cityscapes", "vgg16", method)
    found = row["miou_13" if src == "synthia" else "miou"], row["base"]
    assert found == pytest.approx((mean / 100, base / 100), abs=5e-4)
    assert (abs(found[0] - row["printed"]) > 0.001) == (method == "cbst")


def test_eval_other_tasks_have_no_row_in_the_paper():
    assert evaluation.paper_row("streets", "streets", "tiny", "clan") is None
    assert evaluation.paper_row("gta5", "cityscapes", "lite0", "clan") is None
    assert evaluation.paper_row("gta5", "folder", "r101", "clan") is None


def test_eval_the_papers_tables_are_those_of_the_paper():
    ours = json.loads((HERE / "docs" / "paper_tables.json").read_text())
    theirs = need("..", "paper_tables.json")
    assert ours == json.loads(theirs.read_text())


def test_eval_the_table_shows_a_dash_where_a_score_is_missing():
    ours = {"miou": 0.5, "iou": {"road": 0.91234, "car": None}}
    paper = {"miou": 0.4, "iou": {"road": 0.8}}
    console = Console(width=80, file=io.StringIO())
    console.print(evaluation.score_table("t", {"ours": ours, "paper": paper, "before": None}))
    lines = console.file.getvalue().splitlines()
    cells = {row.split("│")[1].strip(): row.split("│")[2:-1] for row in lines if "│" in row}
    assert [c.strip() for c in cells["road"]] == ["91.2", "80.0"]
    assert [c.strip() for c in cells["car"]] == ["-", "-"]
    assert [c.strip() for c in cells["mIoU"]] == ["50.0", "40.0"]


def test_eval_takes_the_newest_checkpoint_of_a_run(tmp_path):
    with pytest.raises(ValueError, match="holds no checkpoint: name a run folder"):
        checkpoints.newest_checkpoint(tmp_path)
    for step in (900, 1000, 20):
        (tmp_path / f"step_{step:07d}.safetensors").touch()
    (tmp_path / "before_adaptation.safetensors").touch()
    assert checkpoints.newest_checkpoint(tmp_path).name == "step_0001000.safetensors"
    older = tmp_path / "step_0000020.safetensors"
    assert checkpoints.newest_checkpoint(older) == older


def test_eval_a_damaged_checkpoint_is_named(tmp_path):
    path = tmp_path / "step_0000001.safetensors"
    path.write_bytes(b"\x10\0\0\0\0\0\0\0{")
    with pytest.raises(ValueError, match=r"step_0000001.safetensors is no readable checkpoint"):
        checkpoints.read_metadata(path)
    with pytest.raises(SystemExit, match=r"^error: .*no readable checkpoint"):
        evaluation.main([str(tmp_path)])


def test_eval_without_a_run_or_data_sets_ends_with_one_sentence(tmp_path):
    with pytest.raises(SystemExit, match=r"error: .* holds no checkpoint"):
        evaluation.main([str(tmp_path)])
    path = tmp_path / "bare.safetensors"
    save_file(tensors_of(models.Generator("tiny")), path)
    with pytest.raises(SystemExit, match=r"error: .* give --src and --tgt"):
        evaluation.main([str(path), "--backbone", "tiny"])


def test_eval_of_foreign_weights_needs_no_run(tmp_path, capsys):
    """A bare state dict, scored on Cityscapes: eval.json, eval.png and labelIds beside it."""
    path = tmp_path / "bare.safetensors"
    save_file(tensors_of(models.Generator("tiny")), path)
    make_cityscapes(tmp_path / "Cityscapes", size=(64, 128))
    flags = ["--backbone", "tiny", "--src", "synthia", "--tgt", "cityscapes"]
    flags += ["--data", str(tmp_path), "--tgt-size", "32", "64"]
    evaluation.main([str(path), *flags, "--save-predictions", str(tmp_path / "pred")])
    result = json.loads((tmp_path / "eval.json").read_text())
    assert len(result["iou"]) == 16 and "miou_13" in result and result["checkpoint"] == str(path)
    assert result["images"] == 3 and 0 <= result["miou"] <= 1
    assert Image.open(tmp_path / "eval.png").size[0] > 200
    saved = sorted((tmp_path / "pred").iterdir())
    assert [p.name for p in saved] == [f"ulm_{i:06d}_000019_pred_labelIds.png" for i in range(3)]
    assert set(np.unique(np.asarray(Image.open(saved[0])))) <= set(LABEL_IDS.tolist())
    assert "not scored, in one data set only: terrain, truck, train" in capsys.readouterr().out


def test_eval_predicts_on_photographs_of_odd_sizes(tmp_path):
    """A mask and an overlay for each, of its own size, in its own subfolder."""
    run = tmp_path / "run.safetensors"
    save_file(tensors_of(models.Generator("tiny")), run)
    sizes = {"a.png": (37, 53), "trip/b.jpg": (201, 99), "trip/c.jpeg": (33, 400)}
    for name, size in sizes.items():
        write_png(tmp_path / "photos" / name, striped(size, range(19))[0])
    (tmp_path / "photos" / "notes.txt").write_text("no photograph")
    flags = ["--backbone", "tiny", "--images", str(tmp_path / "photos"), "--short-side", "48"]
    evaluation.main(["predict", str(run), *flags, "--out", str(tmp_path / "out")])
    written = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.png")}
    stems = [str(Path(name).with_suffix("")) for name in sizes]
    assert written == {f"{stem}_{kind}.png" for stem in stems for kind in ("mask", "overlay")}
    for stem, (height, width) in zip(stems, sizes.values(), strict=True):
        mask = Image.open(tmp_path / "out" / f"{stem}_mask.png")
        assert mask.mode == "P" and mask.size == (width, height)
        assert Image.open(tmp_path / "out" / f"{stem}_overlay.png").size == (width, height)
        assert np.asarray(mask).max() < 19
        assert mask.getpalette()[:57] == PALETTE.flatten().tolist()


def predicted(tmp_path, name: str, *flags: str) -> Path:
    """The folder that `eval.py predict` writes to, of tiny with random weights."""
    run = tmp_path / "run.safetensors"
    if not run.exists():
        torch.manual_seed(0)
        save_file(tensors_of(models.Generator("tiny", head_std=0.5)), run)
    out = tmp_path / name
    photos = tmp_path / "photos"
    if not photos.exists():
        write_png(photos / "a.png", striped((64, 96), range(19))[0])
        write_png(photos / "b.png", striped((150, 200), range(19), seed=1)[0])
    images = [] if "--images" in flags else ["--images", str(photos)]
    flags = (*images, *flags, "--backbone", "tiny", "--out", str(out), "--device", "cpu")
    evaluation.main(["predict", str(run), *flags])
    return out


def read(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_eval_predict_writes_pseudo_labels_and_maps(tmp_path, capsys):
    plain = predicted(tmp_path, "plain", "--short-side", "64")
    raw = predicted(tmp_path, "raw", "--short-side", "64", "--raw", "--maps")
    sure = predicted(
        tmp_path, "sure", "--short-side", "64", "--raw", "--maps", "--confidence", ".3"
    )
    shown = capsys.readouterr().out
    names = {"a_trainIds.png", "a_confidence.png", "a_m.png"}
    assert {p.name for p in raw.iterdir()} == names | {n.replace("a_", "b_") for n in names}
    for name, size in (("a", (64, 96)), ("b", (150, 200))):
        mask = read(raw / f"{name}_trainIds.png")
        assert Image.open(raw / f"{name}_trainIds.png").mode == "L" and mask.shape == size
        assert (mask == read(plain / f"{name}_mask.png")).mean() > 0.999
        confidence = read(raw / f"{name}_confidence.png") / 255
        kept = read(sure / f"{name}_trainIds.png")
        assert (kept[confidence < 0.295] == 255).all() and (kept[confidence > 0.305] != 255).all()
        assert (kept[kept != 255] == mask[kept != 255]).all() and confidence.min() >= 1 / 19 - 0.01
        assert read(raw / f"{name}_m.png").max() > 0
    assert "% of the pixels are below the confidence" in shown


def test_eval_predict_takes_one_photograph(tmp_path):
    predicted(tmp_path, "all", "--short-side", "64")
    one = tmp_path / "photos" / "b.png"
    out = predicted(tmp_path, "one", "--short-side", "64", "--images", str(one))
    assert {p.name for p in out.iterdir()} == {"b_mask.png", "b_overlay.png"}
    assert (read(out / "b_mask.png") == read(tmp_path / "all" / "b_mask.png")).all()


def test_eval_windows_cover_an_image_with_overlap():
    for length, window in ((100, 100), (50, 64), (101, 100), (200, 64), (1024, 100)):
        starts = predictions.window_starts(length, window)
        covered = np.zeros(length, int)
        for start in starts:
            covered[start : start + window] += 1
        assert covered.min() >= 1 and starts[0] == 0
        assert starts[-1] == max(0, length - window)
        steps = np.diff(starts)
        assert len(steps) == 0 or steps.max() <= window * 2 / 3 + 1


def test_eval_a_window_that_holds_the_image_gives_the_whole(tmp_path):
    """And smaller ones give the mean of what each of them says."""
    torch.manual_seed(0)
    G = models.Generator("tiny", head_std=0.5)
    image = torch.from_numpy(striped((64, 160), range(19))[0]).permute(2, 0, 1)
    whole = predictions.ensemble_and_m(G, image, (64, 160))
    for one, other in zip(whole, predictions.by_windows(G, image, (64, 160)), strict=True):
        assert torch.equal(one, other)
    starts = predictions.window_starts(160, 64)
    assert len(starts) == 4
    parts = [predictions.ensemble_and_m(G, image[..., x : x + 64], (64, 64)) for x in starts]
    p, m = predictions.by_windows(G, image, (64, 64))
    assert torch.equal(p[..., :32], parts[0][0][..., :32])  # only the first window is there
    both = (parts[0][0][..., 40] + parts[1][0][..., 40 - starts[1]]) / 2
    assert torch.allclose(p[..., 40], both) and torch.allclose(p.sum(dim=0), torch.ones(64, 160))
    assert m.shape == (64, 160)
    photo = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
    fits = predictions.look_at(G, photo, (64, 160), (64, 160), maps=True)
    assert (fits.classes == whole[0].argmax(dim=0).numpy()).all()
    by_parts = predictions.look_at(G, photo, (64, 160), (64, 64), maps=False)
    assert (by_parts.classes == p.argmax(dim=0).numpy()).all() and by_parts.m is not None


@pytest.mark.parametrize("size", ((64, 128), (300, 90), (37, 401)))
def test_predict_in_strips_finds_what_the_whole_image_finds(size, monkeypatch):
    monkeypatch.setattr(predictions, "STRIP", 50)
    torch.manual_seed(0)
    G = models.Generator("tiny", head_std=0.3)
    image = torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8, generator=seeded())
    p, m = predictions.ensemble_and_m(G, image, size)
    classes, confidence, m_in_strips = predictions.confidence_and_m(G, image, size)
    assert (classes != p.argmax(dim=0)).float().mean() < 0.001
    torch.testing.assert_close(confidence, p.amax(dim=0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(m_in_strips, m, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    (
        ("--confidence 1.5", "--confidence 1.5 must lie in"),
        ("--raw --out", "lies in --images"),
        ("--window 8 64", "--window 8 64: give at least 32 32"),
        ("--short-side 8", "--short-side 8 is too small"),
    ),
)
def test_eval_predict_refuses_flags_that_make_no_sense(tmp_path, flags, sentence):
    with pytest.raises(SystemExit, match=sentence):
        name = "photos/masks" if "--out" in flags else "out"
        predicted(tmp_path, name, *flags.replace("--out", "").split())


@pytest.mark.parametrize("labels", ("none", "dummy"))
def test_eval_writes_the_test_servers_files_without_a_score(tmp_path, capsys, labels):
    """Cityscapes' test split comes without labels, or with dummies that hold no class."""
    path = tmp_path / "bare.safetensors"
    save_file(tensors_of(models.Generator("tiny")), path)
    root = make_cityscapes(tmp_path / "Cityscapes", splits=("test",), size=(64, 128))
    truths = sorted((root / "gtFine").rglob("*_labelIds.png"))
    for truth in truths:
        write_png(truth, np.full((64, 128), 3, np.uint8))  # out of roi
    scorer = pytest.importorskip("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling")
    flags = ["--backbone", "tiny", "--src", "gta5", "--tgt", "cityscapes", "--split", "test"]
    flags += ["--data", str(tmp_path), "--tgt-size", "32", "64", "--device", "cpu"]
    names = [truth.name for truth in truths]
    if labels == "none":
        for truth in truths:
            truth.unlink()
    evaluation.main([str(path), *flags, "--save-predictions", str(tmp_path / "pred")])
    shown = " ".join(capsys.readouterr().out.split())
    assert "no score: cityscapes test has no labelled pixel; 3 predictions in" in shown
    scorer.args.predictionPath, scorer.args.predictionWalk = str(tmp_path / "pred"), None
    for name in names:
        found = scorer.getPrediction(scorer.args, str(root / "gtFine" / "test" / "ulm" / name))
        assert Path(found).name == name.replace("_gtFine_labelIds", "_leftImg8bit").replace(
            "_leftImg8bit.png", "_pred_labelIds.png"
        )
        assert read(Path(found)).shape == (64, 128)
        assert set(np.unique(read(Path(found)))) <= set(LABEL_IDS.tolist())
    assert not (tmp_path / "eval.json").exists()
    with pytest.raises(SystemExit, match="to score with" if labels == "none" else "labelled pixel"):
        evaluation.main([str(path), *flags])


def test_eval_predict_without_photographs_ends_with_one_sentence(tmp_path):
    run = tmp_path / "run.safetensors"
    save_file(tensors_of(models.Generator("tiny")), run)
    arguments = ["predict", str(run), "--backbone", "tiny", "--images", str(tmp_path / "none")]
    with pytest.raises(SystemExit, match="error: no png, jpg or jpeg in"):
        evaluation.main([*arguments, "--out", str(tmp_path)])


def test_eval_predict_names_images_that_it_does_not_read(tmp_path):
    """In a folder before the first mask is made. Named by itself, it is a file to replace."""
    run, photos = tmp_path / "run.safetensors", tmp_path / "photos"
    save_file(tensors_of(models.Generator("tiny")), run)
    write_png(photos / "a.png", striped((40, 56), range(19))[0])
    (photos / "b.heic").write_bytes(b"\0\0\0\x18ftypheic")
    arguments = ["predict", str(run), "--backbone", "tiny", "--out", str(tmp_path / "masks")]
    with pytest.raises(SystemExit, match=r"error: 1 of 2 images .*/b\.heic: convert them to JPEG"):
        evaluation.main([*arguments, "--images", str(photos)])
    assert not (tmp_path / "masks").exists()
    with pytest.raises(SystemExit, match=r"b\.heic cannot be read .*: replace it with a PNG$"):
        evaluation.main([*arguments, "--images", str(photos / "b.heic")])


@pytest.mark.parametrize(
    ("command", "flags", "remedy"),
    (
        ("evaluate", "", "Give a smaller --tgt-size."),
        ("predict", "", "Give a smaller --short-side."),
        ("predict", "--short-side 900", "Give a smaller --short-side or a --window."),
        ("predict", "--window 64 64", "Give a --short-side or a smaller --window."),
        ("predict", "--window 64 64 --short-side 900", "Give a smaller --short-side or a smaller"),
        ("export", "", "No flag lowers it: use a machine with more memory."),
    ),
)
def test_eval_out_of_memory_names_flags_of_the_command(command, flags, remedy, monkeypatch):
    words = {"predict": "predict run --images a --out b", "export": "export run --out a.onnx"}
    argv = [*words.get(command, "run").split(), *flags.split()]

    def shown(error: Exception, gpu: bool) -> str:
        def full(args):
            raise error

        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        monkeypatch.setattr(evaluation, f"{command}_main", full)
        with pytest.raises(SystemExit) as caught:
            evaluation.main(argv)
        return caught.value.code

    assert shown(MemoryError(), gpu=False).startswith(f"error: no memory. {remedy}")
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
    on_gpu = shown(full, gpu=True)
    assert on_gpu.startswith("error: CUDA out of memory. Tried to allocate 2 GiB. ")
    assert on_gpu.endswith(" or --device cpu.") == (command != "export")
    killed = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
    if command == "evaluate":
        assert shown(killed, gpu=False).endswith("Killed. Give fewer --workers.")


def test_eval_colours_are_those_of_cityscapes_by_name():
    palette = palette_of(("car", "lake", "road"))
    assert tuple(palette[0]) == (0, 0, 142) and tuple(palette[2]) == (128, 64, 128)
    assert palette[1].min() >= 40 and not palette[3:].any()


def test_eval_shards_add_up_to_the_whole_matrix(few, finished, monkeypatch):
    """Each of three processes sees its own images, and what they add is the matrix of all."""
    G, _ = load_generator(finished / "step_0000008.safetensors", say=lambda _: None)
    target = data.open_dataset("streets", "target", "val", size=(32, 64))
    table = np.arange(256, dtype=np.uint8)
    whole = evaluation.evaluate(G, target, table)
    seen, shards = [], []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x: shards.append(x.clone()))
    for rank in range(3):
        monkeypatch.setattr(evaluation, "ranks", lambda rank=rank: (rank, 3))
        evaluation.evaluate(G, target, table, save=lambda i, _: seen.append(i))
    assert sorted(seen) == list(range(len(target))) and torch.equal(sum(shards), whole)


def test_eval_unlabelled_says_of_a_split_what_needs_no_label():
    """By hand: M of two one-hot heads that disagree is 1, and shares are of the ensemble."""

    class Two(torch.nn.Module):
        """Both heads see road. On the right half head 2 is sure of sky, and the ensemble too."""

        num_classes = 2

        def __init__(self):
            super().__init__()
            self.unused = torch.nn.Parameter(torch.zeros(1))

        def forward(self, images):
            logits_1 = torch.tensor([50.0, 0.0]).view(1, 2, 1, 1).expand(1, 2, 4, 8).clone()
            logits_2 = logits_1.clone()
            logits_2[:, :, :, 4:] = torch.tensor([0.0, 90.0]).view(1, 2, 1, 1)
            return logits_1, logits_2

    val = data.open_dataset("streets", "target", "val", size=(32, 64))
    found = evaluation.unlabelled(Two(), val, ("road", "sky"))
    assert found["confidence"] == pytest.approx(1, abs=0.02)
    assert found["m"] == pytest.approx(0.5, abs=0.05) and list(found["shares"]) == ["road", "sky"]
    assert found["shares"]["sky"] == pytest.approx(0.5, abs=0.05)


def test_eval_scores_the_streets_that_the_run_was_scored_on(few, tmp_path):
    out = run(tmp_path / "run", "--scenes", "3", "--shift", "0.1", "0.9")
    score = json.loads((out / "eval.json").read_text())["iou"]
    evaluation.main([str(out), "--device", "cpu"])
    assert json.loads((out / "eval.json").read_text())["iou"] == score
