"""A trained network as one file that needs none of this code: torch.export's .pt2, or .onnx.

    python eval.py export runs/RUN --out model.pt2
    python eval.py export runs/RUN --out model.onnx      # needs onnx, onnxscript and onnxruntime
    python eval.py predict model.pt2 --images photos --out masks

The file takes uint8 RGB images, B 3 H W of any size from 33 pixels on, and gives the ensemble's
logits, B C H W. It normalises the images itself. It carries the names and colours of the classes,
the lineage of the weights and the commit of the run. Once written it is read again, and compared
with the network on several sizes. A file that does not agree is deleted.
"""

import argparse
import copy
import importlib
import importlib.util
import json
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from checkpoints import newest_checkpoint
from classes import CLASSES, palette_of
from models import Generator
from weights import load_generator

SIZES = ((64, 96), (45, 77), (128, 33), (96, 160))  # H W to compare on, odd ones too
LEAST_SIDE = 33  # of an image: with fewer pixels vgg16's last map has one cell, a case by itself
MOST = 1e-4  # largest difference, relative to the largest logit
PACKAGES = ("onnx", "onnxscript", "onnxruntime")


class Ensemble(nn.Module):
    """B 3 H W uint8 images to the ensemble's logits B C H W."""

    def __init__(self, G: Generator):
        super().__init__()
        self.G = G

    def forward(self, images: Tensor) -> Tensor:
        logits_1, logits_2 = self.G(images)
        logits = logits_1 + logits_2
        return F.interpolate(logits, images.shape[-2:], mode="bilinear", align_corners=True)


def information(metadata: dict, G: Generator) -> dict[str, str]:
    """What the file says of itself."""
    classes = list(metadata.get("classes", CLASSES))
    return {
        "classes": json.dumps(classes),
        "palette": json.dumps(palette_of(classes)[: len(classes)].tolist()),
        "backbone": G.backbone,
        "lineage": G.lineage,
        "commit": str(metadata.get("commit", "")),
        "tgt_size": json.dumps(metadata.get("tgt_size", [512, 1024])),
    }


class RoundedUp(nn.MaxPool2d):
    """Max-pooling with ceil_mode as padding and pooling without it; the same values.

    torch.export cannot prove for every size that ceil_mode's rounded-up size holds.
    """

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride, padding = (
            cast(int, n) for n in (self.kernel_size, self.stride, self.padding)
        )
        after = padding + stride - 1
        x = F.pad(x, (padding, after, padding, after), value=float("-inf"))
        return F.max_pool2d(x, kernel, stride)


def without_ceil_mode(network: Ensemble) -> Ensemble:
    """A copy."""
    network = copy.deepcopy(network)
    for name, layer in list(network.named_modules()):
        if isinstance(layer, nn.MaxPool2d) and layer.ceil_mode:
            network.set_submodule(name, RoundedUp(layer.kernel_size, layer.stride, layer.padding))
    return network


Run = Callable[[Tensor], Tensor]  # images to logits


def as_pt2(network: Ensemble, path: Path, said: dict[str, str]) -> None:
    torch.export.save(exported(network), path, extra_files={"said.json": json.dumps(said)})


def exported(network: Ensemble) -> torch.export.ExportedProgram:
    sides = {
        0: torch.export.Dim("batch"),
        2: torch.export.Dim("height", min=LEAST_SIDE, max=16384),
        3: torch.export.Dim("width", min=LEAST_SIDE, max=16384),
    }
    images = torch.zeros(2, 3, 96, 160, dtype=torch.uint8)
    network = without_ceil_mode(network)
    return torch.export.export(network, (images,), dynamic_shapes={"images": sides})


def unreadable(path: Path, error: Exception) -> str:
    first = (str(error).splitlines() or [""])[0][:120]
    return f"{path} cannot be read ({first}): export it again with eval.py export"


def read_pt2(path: Path) -> tuple[Run, dict[str, str]]:
    """(network, what it says of itself). Raises ValueError for a file of another kind."""
    extra = {"said.json": ""}
    try:
        network: Any = torch.export.load(path, extra_files=extra).module()
        said = json.loads(extra["said.json"])
    except Exception as error:  # on damaged bytes the reader raises nearly anything
        raise ValueError(unreadable(path, error)) from error

    def run(images: Tensor) -> Tensor:
        return network(images)

    return run, said


def as_onnx(network: Ensemble, path: Path, said: dict[str, str]) -> None:
    onnx: Any = importlib.import_module("onnx")
    # Else it warns of a package that nothing here needs.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    names: Any = {"input_names": ["images"], "output_names": ["logits"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch about itself
        program = torch.onnx.export(exported(network), **names, verbose=False)
    if program is None:
        raise ValueError("torch wrote no ONNX: export to .pt2")
    model = program.model_proto
    for key, value in said.items():
        model.metadata_props.add(key=key, value=value)
    onnx.checker.check_model(model)
    onnx.save(model, path)


def read_onnx(path: Path) -> tuple[Run, dict[str, str]]:
    need("onnxruntime")
    onnxruntime: Any = importlib.import_module("onnxruntime")
    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors have no class in common
        raise ValueError(unreadable(path, error)) from error
    said = session.get_modelmeta().custom_metadata_map

    def run(images: Tensor) -> Tensor:
        (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        return torch.from_numpy(logits)

    return run, said


KINDS: dict[str, tuple[Callable, Callable]] = {
    ".pt2": (as_pt2, read_pt2),
    ".onnx": (as_onnx, read_onnx),
}


@torch.no_grad()
def largest_difference(network: Ensemble, run: Run) -> float:
    """Between the network and what was written, over the largest logit; over all of SIZES."""
    found = [0.0]
    for i, size in enumerate(SIZES):
        rng = np.random.default_rng(i)
        images = torch.from_numpy(rng.integers(0, 256, (1 + i % 2, 3, *size), np.uint8))
        wanted, logits = network(images), run(images)
        finite = logits.isfinite().all() and wanted.isfinite().all()
        if logits.shape != wanted.shape or not finite:
            return float("inf")
        found.append(((logits - wanted).abs().max() / wanted.abs().max()).item())
    return max(found)


def need(*packages: str) -> None:
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise ValueError(f".onnx needs {package}: pip install {' '.join(packages)}")


def export_main(args: argparse.Namespace) -> None:
    """Writes the file, reads it again, and compares."""
    console = Console()
    kind = args.out.suffix.lower()
    if kind not in KINDS:
        raise ValueError(f"--out {args.out} must end in {' or '.join(KINDS)}")
    if kind == ".onnx":
        need(*PACKAGES)
    if args.device not in ("auto", "cpu"):
        raise ValueError(f"a run is exported on the CPU: drop --device {args.device}")
    path = newest_checkpoint(args.run)
    G, metadata = load_generator(
        path, backbone=args.backbone, lineage=args.lineage, say=console.print
    )
    network = Ensemble(G).eval().requires_grad_(False)
    write, read = KINDS[kind]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    temporary = args.out.with_name(f"{args.out.stem}.partly{kind}")
    try:
        with console.status("exporting"):
            write(network, temporary, information(metadata, G))
            run, said = read(temporary)
            difference = largest_difference(network, run)
        if not difference <= MOST:
            raise ValueError(
                f"{args.out} was not written: its logits differ from the network's by "
                f"{difference:.1g} of the largest; use the run itself, or another kind of file"
            )
        temporary.replace(args.out)
    finally:
        temporary.unlink(missing_ok=True)
    console.print(
        f"wrote {args.out}: {said['backbone']}, {len(json.loads(said['classes']))} classes, "
        f"{args.out.stat().st_size / 1e6:.0f} MB; largest difference {difference:.1g} of the "
        f"largest logit, on {len(SIZES)} sizes",
        soft_wrap=True,
    )


# To predict with an exported file.


class Loaded(nn.Module):
    """An exported file in the place of G. It has no two heads, so both give half of the logits."""

    def __init__(self, run: Run, num_classes: int):
        super().__init__()
        self.run, self.num_classes = run, num_classes
        self.place = nn.Parameter(torch.zeros(1), requires_grad=False)  # where images are to go

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        height, width = images.shape[-2:]
        if min(height, width) < LEAST_SIDE:
            raise ValueError(
                f"an exported file takes images from {LEAST_SIDE} pixels a side on, not "
                f"{height}x{width}: give a larger --short-side or --window"
            )
        half = self.run(images) / 2
        return half, half


def load_exported(path: Path) -> tuple[Loaded, dict]:
    """(network, metadata as a checkpoint has it) of a .pt2 or .onnx file."""
    run, said = KINDS[path.suffix.lower()][1](path)
    if not {"classes", "tgt_size"} <= said.keys():
        raise ValueError(f"{path} was not written by eval.py export: name a file that was")
    metadata = {key: json.loads(said[key]) for key in ("classes", "tgt_size")}
    return Loaded(run, len(metadata["classes"])), metadata
