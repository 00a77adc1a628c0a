"""What a network says of an image: classes, probabilities, M; masks and maps of photographs.

python eval.py predict runs/RUN --images photos --out masks
python eval.py predict runs/RUN --images photo.jpg --out masks --raw --confidence 0.9 --maps
python eval.py predict runs/RUN --images photos --out masks --window 512 1024
"""

import argparse
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from rich.progress import track

import clan
import data
from checkpoints import newest_checkpoint
from classes import CLASSES, IGNORE, palette_of
from devices import find_device, place
from export import KINDS, load_exported
from losses import discrepancy_map
from models import Generator
from weights import load_generator

# The classes of an image.


@torch.no_grad()
def predict(
    G: torch.nn.Module, images: torch.Tensor, sizes: Sequence[Sequence[int]], amp: bool = False
) -> list[torch.Tensor]:
    """Train ids (uint8 H W) of B 3 h w uint8 images, each at its full size in `sizes`.

    The logits are up-sampled before the argmax (Section 4.2).
    """
    G.eval()
    with torch.autocast(images.device.type, torch.bfloat16, enabled=amp):
        logits_1, logits_2 = G(images)
    logits = logits_1.float() + logits_2.float()  # B C h w
    return [best_class(one, size) for one, size in zip(logits, sizes, strict=True)]


def best_class(logits: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """The arg-max over classes of C h w logits up-sampled to size H W, as uint8 H W.

    It works class by class. So it holds two planes of that size instead of C, and takes a third of
    the time.
    """

    def plane(c: int) -> torch.Tensor:  # H W
        one = logits[None, c : c + 1]  # 1 1 h w
        return F.interpolate(one, tuple(size), mode="bilinear", align_corners=True)[0, 0]

    best = plane(0)
    pred = torch.zeros_like(best, dtype=torch.uint8)
    for c in range(1, len(logits)):
        up = plane(c)
        pred.masked_fill_(up > best, c)
        torch.maximum(best, up, out=best)
    return pred


# Probabilities and M.


@torch.no_grad()
def ensemble_and_m(
    G: Generator, image: torch.Tensor, size: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(p, M) of one image 3 H W on the CPU: the ensemble C h' w', the discrepancy h' w'."""
    G.eval()
    images = image[None].to(next(G.parameters()).device)
    logits_1, logits_2 = (clan.upsample(x, size) for x in G(images))
    m = discrepancy_map(logits_1.softmax(dim=1), logits_2.softmax(dim=1))
    return (logits_1 + logits_2).softmax(dim=1)[0].cpu(), m[0, 0].cpu()


def window_starts(length: int, window: int) -> list[int]:
    """Where windows that cover a length begin: evenly spread, a third of overlap or more."""
    if length <= window:
        return [0]
    count = 1 + -(-(length - window) * 3 // (window * 2))
    return np.linspace(0, length - window, count).round().astype(int).tolist()


def by_windows(
    G: Generator, image: torch.Tensor, window: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(p, M) of one image 3 H W: C H W and H W, the means over windows that cover it.

    An image that fits into one window gives what `ensemble_and_m` gives.
    """
    (height, width), (h, w) = image.shape[-2:], window
    p = torch.zeros(G.num_classes, height, width)
    m, times = torch.zeros(2, height, width)
    for y in window_starts(height, h):
        for x in window_starts(width, w):
            box = slice(y, y + h), slice(x, x + w)
            part = image[:, *box]
            p_of_part, m_of_part = ensemble_and_m(G, part, part.shape[-2:])
            p[:, *box] += p_of_part
            m[box] += m_of_part
            times[box] += 1
    return p.div_(times), m.div_(times)


STRIP = 128  # rows of a photograph that are worked on at a time


def strips(x: torch.Tensor, size: Sequence[int]) -> Iterator[tuple[slice, torch.Tensor]]:
    """(rows, B C n W): B C h w up-sampled to `size` H W, a strip of n rows after the other.

    All C planes of a large photograph would take gigabytes.
    """
    (h, w), (H, W) = x.shape[-2:], size
    columns = clan.hat_weights(w, W, x.dtype, x.device).T
    weights = clan.hat_weights(h, H, x.dtype, x.device)
    for y in range(0, H, STRIP):
        rows = slice(y, min(y + STRIP, H))
        yield rows, weights[rows] @ x @ columns


@torch.no_grad()
def confidence_and_m(
    G: Generator, image: torch.Tensor, size: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(classes, confidence, M) of one image 3 h w at `size` H W, as `ensemble_and_m` has them."""
    G.eval()
    both = torch.cat(G(image[None].to(next(G.parameters()).device))).float()  # 2 C h w
    classes, confidence, m = (
        torch.zeros(*size, dtype=t) for t in (torch.uint8, *[torch.float] * 2)
    )
    for rows, logits in strips(both, size):
        p = logits.sum(dim=0).softmax(dim=0)  # C n W
        confidence[rows], classes[rows] = (x.cpu() for x in p.max(dim=0))
        p1, p2 = logits.softmax(dim=1).split(1)
        m[rows] = discrepancy_map(p1, p2)[0, 0].cpu()
    return classes, confidence, m


class Found(NamedTuple):
    """What a network says of a photograph, at the photograph's own size."""

    classes: np.ndarray  # H W uint8 train ids
    confidence: np.ndarray | None  # H W in [0, 1], the ensemble's largest probability
    m: np.ndarray | None  # H W in [0, 1]


def look_at(
    G: Generator, image: np.ndarray, size: Sequence[int], window: Sequence[int] | None, maps: bool
) -> Found:
    """Classes of a photograph H W 3, which the network sees at `size`; with `maps` all of Found."""
    own_size = image.shape[:2]
    seen = torch.from_numpy(np.array(data.resize(image, size))).permute(2, 0, 1)
    several = window and (size[0] > window[0] or size[1] > window[1])
    if not (several or maps):
        device = next(G.parameters()).device
        found = predict(G, seen[None].to(device), [own_size])[0]
        return Found(found.cpu().numpy(), None, None)
    if not several:
        return Found(*(x.numpy() for x in confidence_and_m(G, seen, own_size)))
    p, m = by_windows(G, seen, window or size)
    classes, confidence = (np.zeros(own_size, t) for t in (np.uint8, np.float32))
    for rows, part in strips(p[None], own_size):
        confidence[rows], classes[rows] = (x.numpy() for x in part[0].max(dim=0))
    return Found(classes, confidence, clan.upsample(m[None, None], own_size)[0, 0].numpy())


# Files.


def overlay(image: np.ndarray, pred: np.ndarray, classes) -> np.ndarray:
    """The photograph with its classes' colours laid over it, H W 3 uint8."""
    return (0.5 * image + 0.5 * palette_of(classes)[pred]).astype(np.uint8)


def write_masks(
    stem: Path, image: np.ndarray, found: Found, classes: Sequence[str], raw: bool, maps: bool
) -> None:
    """STEM_mask.png and STEM_overlay.png, or with `raw` STEM_trainIds.png; with `maps` two more."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    if raw:
        Image.fromarray(found.classes).save(f"{stem}_trainIds.png")
    else:
        mask = Image.fromarray(found.classes)
        mask.putpalette(palette_of(classes).flatten().tolist())
        mask.save(f"{stem}_mask.png")
        Image.fromarray(overlay(image, found.classes, classes)).save(f"{stem}_overlay.png")
    for name, values in (("confidence", found.confidence), ("m", found.m)):
        if maps and values is not None:
            grey = (255 * values + 0.5).astype(np.uint8)
            Image.fromarray(grey).save(f"{stem}_{name}.png")


def photographs_in(path: Path) -> list[Path]:
    """A photograph, or those of a folder. Raises ValueError if there is none, or two of a name."""
    if path.is_file():
        return [path]
    paths = data.photographs_below(path)
    if not paths:
        raise ValueError(f"no png, jpg or jpeg in {path}: name a photograph or a folder of some")
    twice = [name for name, n in Counter(p.with_suffix("") for p in paths).items() if n > 1]
    if twice:
        raise ValueError(f"{twice[0]} exists with two endings but would get one mask: rename one")
    return paths


def input_size(image: np.ndarray, short_side: int | None) -> tuple[int, int]:
    """H W that the network sees: the image's own, or one with that short side."""
    scale = short_side / min(image.shape[:2]) if short_side else 1.0
    height, width = (max(32, round(s * scale)) for s in image.shape[:2])
    return height, width


def add_flags(command: argparse.ArgumentParser) -> None:
    command.add_argument("--images", type=Path, required=True, help="a photograph, or a folder")
    command.add_argument("--out", type=Path, required=True, help="where masks and overlays go")
    command.add_argument("--short-side", type=int, help="of the input [the run's; --window: own]")
    command.add_argument("--window", type=int, nargs=2, help="H W: slide over larger images")
    command.add_argument("--confidence", type=float, default=0.0, help="255 below it [0]")
    command.add_argument("--raw", action="store_true", help="grey PNGs of train ids, no overlays")
    command.add_argument("--maps", action="store_true", help="PNGs of confidence and M, 255 is 1")


def check_flags(args: argparse.Namespace) -> None:
    if args.short_side is not None and args.short_side < 32:
        raise ValueError(f"--short-side {args.short_side} is too small: give at least 32")
    if args.window is not None and min(args.window) < 32:
        raise ValueError(f"--window {args.window[0]} {args.window[1]}: give at least 32 32")
    if not 0 <= args.confidence <= 1:
        raise ValueError(f"--confidence {args.confidence} must lie in [0, 1]: give such as 0.9")
    out = args.out.resolve()
    if args.images.is_dir() and args.images.resolve() in (out, *out.parents):
        raise ValueError(f"--out {args.out} lies in --images, whose masks would count as images")


def predict_main(args: argparse.Namespace) -> None:
    """Masks of photographs that need no labels."""
    console = Console()
    check_flags(args)
    G: Any
    if args.run.suffix.lower() in KINDS:
        if args.maps:
            raise ValueError(f"{args.run} has no second head, so it has no M: drop --maps")
        if args.device not in ("auto", "cpu"):
            raise ValueError(f"an exported file runs on the CPU here: drop --device {args.device}")
        if args.lineage:
            raise ValueError(f"{args.run} holds its lineage: drop --lineage {args.lineage}")
        G, metadata = load_exported(args.run)
    else:
        how = {"backbone": args.backbone, "lineage": args.lineage, "say": console.print}
        G, metadata = load_generator(newest_checkpoint(args.run), **how)
        G = place(G, find_device(args.device))
    classes = metadata.get("classes", CLASSES)
    paths = photographs_in(args.images)
    root = args.images.parent if args.images.is_file() else args.images
    short_side = args.short_side or (None if args.window else min(metadata.get("tgt_size", (512,))))
    maps = args.maps or args.confidence > 0
    left_out = pixels = 0
    faults = []
    for file in track(paths, "predicting", console=console):
        try:
            image = data.read_image(file)
        except ValueError as error:
            faults.append(str(error))
            continue
        found = look_at(G, image, input_size(image, short_side), args.window, maps)
        if found.confidence is not None:
            found.classes[found.confidence < args.confidence] = IGNORE
        left_out += int((found.classes == IGNORE).sum())
        pixels += found.classes.size
        stem = args.out / file.relative_to(root).with_suffix("")
        write_masks(stem, image, found, classes, args.raw, args.maps)
    if args.confidence > 0 and pixels:
        console.print(f"{100 * left_out / pixels:.1f} % of the pixels are below the confidence")
    what = "grey masks" if args.raw else "masks and overlays"
    console.print(f"{len(paths) - len(faults)} {what} in {args.out}", soft_wrap=True)
    if faults:
        listed = "\n".join(faults)
        raise ValueError(f"{len(faults)} of {len(paths)} photographs were left out:\n{listed}")
