"""Exported files: they say what the network says, on any size, and are not left behind if not."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import striped, tensors_of, write_png
from PIL import Image
from safetensors.torch import save_file

import eval as evaluation
import export
import models
from classes import CLASSES, PALETTE
from weights import load_weights


def weights_of(backbone: str, folder: Path) -> Path:
    """A file of random weights, with statistics of BatchNorm as after some training."""
    torch.manual_seed(0)
    G = models.Generator(backbone, head_std=0.2)
    for m in G.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.running_mean.uniform_(-0.1, 0.1)
            m.running_var.uniform_(0.5, 1.5)
    path = folder / f"{backbone}.safetensors"
    save_file(tensors_of(G), path)
    return path


def exported(backbone: str, kind: str, folder: Path) -> Path:
    out = folder / "files" / f"model{kind}"
    path = weights_of(backbone, folder)
    evaluation.main(["export", str(path), "--backbone", backbone, "--out", str(out)])
    return out


SLOW = [pytest.param(x, marks=pytest.mark.slow) for x in ("lite0", "r101", "vgg16")]


@pytest.mark.parametrize("backbone", ("tiny", *SLOW))
@pytest.mark.parametrize("kind", export.KINDS)
def test_export_gives_the_ensembles_logits_on_any_size(backbone, kind, tmp_path, capsys):
    """Compared here once more, on sizes that the program does not try."""
    for package in export.PACKAGES if kind == ".onnx" else ():
        pytest.importorskip(package)
    out = exported(backbone, kind, tmp_path)
    assert f"wrote {out}: {backbone}, 19 classes" in " ".join(capsys.readouterr().out.split())
    assert [p.name for p in out.parent.iterdir()] == [out.name]
    run, said = export.KINDS[kind][1](out)
    assert json.loads(said["classes"]) == list(CLASSES) and said["lineage"]
    assert json.loads(said["palette"]) == PALETTE.tolist() and "commit" in said
    G = models.Generator(backbone, lineage=said["lineage"])
    load_weights(G, tmp_path / f"{backbone}.safetensors", say=lambda _: None)
    G.eval()
    for size in ((33, 33), (71, 103)):
        images = torch.from_numpy(striped(size, range(19))[0].copy()).permute(2, 0, 1)[None]
        with torch.no_grad():
            logits_1, logits_2 = G(images)
        wanted = torch.nn.functional.interpolate(
            logits_1 + logits_2, size, mode="bilinear", align_corners=True
        )
        found = run(images)
        assert found.shape == (1, 19, *size)
        assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max()


def test_export_a_file_that_does_not_agree_is_not_left_behind(tmp_path, monkeypatch):
    def wrong(network, path, said):
        with torch.no_grad():
            next(network.G.C1.parameters()).add_(0.01)
        export.as_pt2(network, path, said)
        with torch.no_grad():
            next(network.G.C1.parameters()).sub_(0.01)

    monkeypatch.setitem(export.KINDS, ".pt2", (wrong, export.read_pt2))
    with pytest.raises(SystemExit, match=r"was not written: its logits differ"):
        exported("tiny", ".pt2", tmp_path)
    assert not list((tmp_path / "files").iterdir())


def test_export_an_older_file_stays_if_the_new_one_does_not_agree(tmp_path, monkeypatch):
    out = exported("tiny", ".pt2", tmp_path)
    before = out.read_bytes()
    ones = (export.as_pt2, lambda path: (lambda images: torch.ones(1), {}))
    monkeypatch.setitem(export.KINDS, ".pt2", ones)
    with pytest.raises(SystemExit, match="was not written"):
        exported("tiny", ".pt2", tmp_path)
    assert out.read_bytes() == before and len(list(out.parent.iterdir())) == 1


def test_export_names_the_package_that_is_missing_and_the_endings(tmp_path, monkeypatch):
    find = export.importlib.util.find_spec
    util = export.importlib.util
    absent = "onnxscript"
    monkeypatch.setattr(util, "find_spec", lambda name: None if name == absent else find(name))
    with pytest.raises(SystemExit, match=r"\.onnx needs onnxscript: pip install onnx onnxscript"):
        exported("tiny", ".onnx", tmp_path)
    with pytest.raises(SystemExit, match=r"must end in \.pt2 or \.onnx"):
        exported("tiny", ".pth", tmp_path)


@pytest.mark.parametrize("kind", export.KINDS)
def test_export_predict_runs_the_file(kind, tmp_path):
    """The same masks as from the weights, but where two classes are as likely."""
    for package in export.PACKAGES if kind == ".onnx" else ():
        pytest.importorskip(package)
    out = exported("tiny", kind, tmp_path)
    write_png(tmp_path / "photos" / "a.png", striped((70, 90), range(19))[0])
    masks = []
    for name, path in (("file", out), ("weights", tmp_path / "tiny.safetensors")):
        flags = ["--images", str(tmp_path / "photos"), "--out", str(tmp_path / name)]
        flags += ["--backbone", "tiny", "--short-side", "70", "--device", "cpu"]
        evaluation.main(["predict", str(path), *flags])
        masks.append(np.asarray(Image.open(tmp_path / name / "a_mask.png")))
    assert (masks[0] == masks[1]).mean() > 0.999
    with pytest.raises(SystemExit, match="has no M: drop --maps"):
        evaluation.main(["predict", str(out), *flags, "--maps"])
    damaged = tmp_path / f"damaged{kind}"
    damaged.write_bytes(out.read_bytes()[:2000])
    with pytest.raises(SystemExit, match=rf"damaged{kind} cannot be read"):
        evaluation.main(["predict", str(damaged), *flags])


def test_export_a_network_that_gives_nan_agrees_with_nothing():
    class Nan(torch.nn.Module):
        def forward(self, images):
            return torch.full((len(images), 19, *images.shape[-2:]), float("nan"))

    assert export.largest_difference(Nan(), lambda images: torch.nan_to_num(Nan()(images))) > 1
    assert export.largest_difference(Nan(), Nan()) > 1


def test_export_a_foreign_file_or_a_missing_package_is_one_sentence(tmp_path, monkeypatch):
    pytest.importorskip("onnx")
    out = exported("tiny", ".onnx", tmp_path)
    flags = ["--images", str(tmp_path), "--out", str(tmp_path / "masks")]
    monkeypatch.setitem(export.KINDS, ".onnx", (export.as_onnx, lambda path: (None, {})))
    with pytest.raises(SystemExit, match=r"model.onnx was not written by eval.py export"):
        evaluation.main(["predict", str(out), *flags[:2], "--out", str(tmp_path.parent / "masks")])
    util = export.importlib.util
    monkeypatch.setattr(util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"\.onnx needs onnxruntime: pip install onnxruntime$"):
        export.read_onnx(out)
