"""Data sets as they are on disk, turned into training batches and evaluation pairs (Section 4.1).

    source = open_dataset("gta5", "source", "train", Path("data/GTA5"))
    target = open_dataset("cityscapes", "target", "train", Path("data/Cityscapes"))
    batch = batch_at(step, source, target, PAPER, seed=0)     # a pure function of (seed, step)

    python data.py gta5 --data data        # read every file and report all that is wrong with them

Images are uint8 RGB, labels uint8 train ids with 255 = unlabelled. Shapes: B images, H W pixels.
A wrong file gives a ValueError of one sentence that names the file and the remedy.
"""

import argparse
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from rich.console import Console
from rich.progress import track
from rich.table import Table

import streets
from clan import Batch, Hyper
from classes import CLASSES, IGNORE, SYNTHIA_ABSENT, TO_TRAIN_IDS, UNKNOWN
from folders import files_of, find, read_classes
from methods import uses_target
from selftrain import fourier_style

PHOTOGRAPH_MODES = ("RGB", "RGBA", "L", "LA", "1", "P", "PA", "CMYK", "YCbCr")
# Photographs of a folder.
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
# Images that are not read. One of these in a folder is an error: its owner counts on it.
UNREAD: tuple[str, ...] = (".heic", ".heif", ".hif", ".avif", ".jxl", ".jp2", ".j2k", ".jpx")
UNREAD += (".jfif", ".jpe", ".gif", ".tga", ".ppm", ".pgm", ".psd")
UNREAD += (".raw", ".dng", ".cr2", ".cr3", ".crw", ".nef", ".nrw", ".arw", ".sr2", ".srf", ".raf")
UNREAD += (".orf", ".rw2", ".pef", ".srw", ".3fr", ".iiq", ".x3f")
ORIENTATION = 274  # the EXIF tag; from 5 on height and width are exchanged


Size = tuple[int, int]  # H W
# Label files: all must exist | all or none | none, or a missing one is an error when read | none
Labels = Literal["required", "optional", "unchecked", "none"]


@dataclass(frozen=True)
class DataSet:
    """One split of one data set: where its images and labels are. Nothing has been read."""

    name: str
    classes: tuple[str, ...]  # names by train id
    labelled: tuple[str, ...]  # the classes that its labels can contain
    size: Size  # its images are resized to this
    crop: Size  # size of a training crop, for recipes that crop
    items: tuple  # (image path, label path | None), or arguments of streets.render
    root: Path | None = None  # of a folder with its own classes.json

    def __len__(self) -> int:
        return len(self.items)

    @property
    def has_labels(self) -> bool:
        """Whether its items have labels: all of them, or none."""
        return self.name == "streets" or self.items[0][1] is not None


# Reading files.


def decode(path: Path) -> Image.Image:
    """The decoded image. Raises ValueError for any damage; Pillow has several exceptions."""
    try:
        image = Image.open(path)
        if image.mode == "RGB" and "RGB;16B" in str(image.tile):
            # Pillow would keep the high byte of 16-bit RGB; SYNTHIA's class is in the low one.
            image.tile = [tile._replace(args="RGB;16L") for tile in image.tile]
            image.info["bits"] = 16
        for bits, factor in ((2, 85), (4, 17)):
            if image.mode == "L" and f"'L;{bits}'" in str(image.tile):
                image.info["factor"] = factor  # by which Pillow will multiply grey of few bits
        several = getattr(image, "is_animated", False)
        if several and image.format != "MPO":  # a JPEG with a preview or a second view
            raise ValueError("an animation of several images")
        image.load()
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing: restore the file or the link to it") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise unreadable(path, error) from error
    return image


def unreadable(path: Path, error: Exception) -> ValueError:
    """What to raise for a file that Pillow cannot read."""
    remedy = "replace it with a PNG" if path.suffix.lower() in UNREAD else "replace this file"
    return ValueError(f"{path} cannot be read ({error}): {remedy}")


def read_header(path: Path) -> Image.Image:
    try:
        return Image.open(path)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise unreadable(path, error) from error


def upright_size(path: Path) -> Size:
    """H W of a photograph as `read_image` gives it: turned as its camera was held."""
    image = read_header(path)
    width, height = image.size
    try:
        turned = image.getexif().get(ORIENTATION, 1) >= 5
    except (OSError, SyntaxError, ValueError) as error:
        raise unreadable(path, error) from error
    return (width, height) if turned else (height, width)


def read_image(path: Path) -> np.ndarray:
    """A photograph as H W 3 uint8 RGB. Raises ValueError for a file that does not hold one."""
    image = decode(path)
    if image.mode not in PHOTOGRAPH_MODES or image.info.get("bits") == 16:
        raise ValueError(f"{path} has 16 bits per colour or float pixels: convert it to 8-bit RGB")
    return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def read_label(path: Path, name: str) -> np.ndarray:
    """A label of the data set `name` as H W uint8 train ids, 255 = unlabelled.

    Raises ValueError for a damaged file, a file of another format and an id outside the map.
    """
    kind = DATASETS[name]
    if kind.to_train_ids is None:
        raise ValueError(f"the ids of {name} are in its classes.json: use label_at")
    return map_ids(kind.read_ids(path), kind.to_train_ids, path, "")


def read_indices(path: Path) -> np.ndarray:
    """The ids in a grey or palette PNG, H W uint8."""
    return check_indices(decode(path), path)


def read_synthia_ids(path: Path) -> np.ndarray:
    """The class ids in one of SYNTHIA's 16-bit RGB PNGs, H W uint8: its first channel."""
    image = decode(path)
    if image.info.get("bits") != 16:
        raise ValueError(
            f"{path} is not a 16-bit RGB PNG but a converted copy (mode {image.mode}), which "
            "would be mapped twice: use the original files of GT/LABELS"
        )
    # Pillow decodes one of the two bytes at a time, here the high one. It is 0 for every class.
    if np.asarray(Image.open(path))[..., 0].any():
        raise ValueError(f"{path} holds a class above 255: use the original of GT/LABELS")
    return np.asarray(image)[..., 0]


def check_indices(image: Image.Image, path: Path) -> np.ndarray:
    if image.mode not in ("L", "P"):
        raise ValueError(
            f"{path} has pixels of mode {image.mode}, but a label is a grey or palette PNG of "
            "class indices: use the label file itself, not its colour picture"
        )
    ids = np.asarray(image)  # a palette image gives its indices, not its colours
    return ids // image.info.get("factor", 1)


def read_mask(path: Path) -> np.ndarray:
    """The ids in a mask of a folder, H W uint8: 1 to 16 bits of grey, a palette, or grey RGB.

    Ids of a 1-bit mask are 0 and 1, as in the file.
    """
    image = decode(path)
    ids = np.asarray(image)
    if image.mode == "RGB" and image.info.get("bits") != 16 and (ids == ids[..., :1]).all():
        return ids[..., 0]
    if image.mode not in ("1", "I", "I;16"):
        return check_indices(image, path)
    if ids.min() < 0 or ids.max() > 255:
        raise ValueError(f"{path} holds the id {ids.max()}: write ids up to 255 into its labels")
    return ids.astype(np.uint8)


def map_ids(ids: np.ndarray, to_train_ids: np.ndarray, path: Path, list_file: str) -> np.ndarray:
    """The train ids of a label. list_file: where its ids are listed, for a folder."""
    label = to_train_ids[ids]
    unknown = label == UNKNOWN
    if unknown.any():
        wrong = ids[unknown][0]
        share = (ids == wrong).mean()
        remedy = f", or give it a class in {list_file} (`names` or `ids`)" if list_file else ""
        if remedy and share <= 0.01:
            remedy += ", or list it in `ignore`"
        raise ValueError(
            f"{path} holds the id {wrong} ({100 * share:.1f} % of its pixels), which its data set "
            f"does not define: check that this is the right label file{remedy}"
        )
    return label


# Finding files.


def open_dataset(
    name: str,
    role: str,
    split: str,
    folder: Path | None = None,
    size: Sequence[int] | None = None,
    *,
    labels: Labels = "required",
    shift: Sequence[float] = (0.5, 0.5),
    mixed: bool = False,
    scenes: int = 0,
    short_side: int = 512,
) -> DataSet:
    """The images of one split, found but not read.

    name: a row of DATASETS. role: "source" or "target" (streets draws its game as the source and
    its city as the target). split: train, val or, for Cityscapes, test. folder: the data set's own
    folder. size: H W to resize to instead of the data set's own. labels: "none" for a target in
    training, "optional" for its split to score on. shift: how much the city of streets differs from
    its game, in look and in layout, each in [0, 1]. mixed: as a source, streets draws each scene
    with a look between game and city. scenes: which streets; each number draws all of them anew.
    short_side: of a folder's images, if no size is given.
    """
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}: choose from {', '.join(DATASETS)}")
    kind = DATASETS[name]
    if name != "streets" and not (folder and Path(folder).is_dir()):
        raise ValueError(
            f"the folder {folder} of the data set {name} is missing: {kind.layout}{FOLDER_FLAGS}"
        )
    if kind.splits and split not in kind.splits:
        pool = "it is one pool of images, " if len(kind.splits) == 1 else ""
        choices = " or ".join(kind.splits)
        raise ValueError(f"{name} has no split {split!r}: {pool}use {choices}")
    wanted = (int(size[0]), int(size[1])) if size else kind.size
    if name == "streets":
        return open_streets(role, split, wanted or STREETS_SIZE, tuple(shift), mixed, scenes)
    if name == "folder":
        return open_folder(Path(folder or ""), split, wanted, labels, short_side)
    return kind.opener(Path(folder or ""), split, wanted, labels)


FOLDER_FLAGS = " (--src-dir or --tgt-dir; --dir of data.py)"  # flags for a data set's own folder


def pair(
    images: Iterable[Path],
    label_of: Callable[[Path], Path],
    labels: Labels,
    where: Path,
    layout: str,
    labels_in: Path,
) -> tuple:
    """Sorted (image, label) paths; the label is None if none is to be opened, or none exists.

    labels_in: the folder that holds all labels. Raises ValueError if there is no image, a label is
    missing, or belongs to two images.
    """
    images = sorted(images)
    if not images:
        raise ValueError(f"no image in {where}: {layout}")
    if labels == "none":
        return tuple((image, None) for image in images)
    pairs = tuple((image, label_of(image)) for image in images)
    image_of: dict[Path, Path] = {}
    for image, label in pairs:
        if image_of.setdefault(label, image) != image:
            raise ValueError(f"{image_of[label]} and {image} have one label, {label}: rename one")
    return complete(pairs, labels, where, layout, labels_in)


def complete(pairs: tuple, labels: Labels, where: Path, layout: str, labels_in: Path) -> tuple:
    """The pairs, without labels if these are not required and `labels_in` holds no file.

    Raises ValueError if a label is missing, unless they are unchecked. Labels of other names are
    no missing labels: then the first that was looked for is named.
    """
    missing = [label for _, label in pairs if not label.is_file()]
    none_there = labels != "required" and len(missing) == len(pairs)
    if none_there and not with_ending(files_below(labels_in), SUFFIXES):
        return tuple((image, None) for image, _ in pairs)
    if missing and labels != "unchecked":
        raise ValueError(
            f"{len(missing)} of {len(pairs)} images in {where} have no label, the first "
            f"missing label is {missing[0]}: {layout}"
        )
    return pairs


def open_gta5(folder: Path, split: str, size: Size, labels: Labels) -> DataSet:
    images = (folder / "images").glob("*.png")
    layout = DATASETS["gta5"].layout
    label_of = lambda image: folder / "labels" / image.name  # noqa: E731
    pairs = pair(images, label_of, labels, folder / "images", layout, folder / "labels")
    return DataSet("gta5", CLASSES, CLASSES, size, (512, 1024), pairs)


def open_synthia(folder: Path, split: str, size: Size, labels: Labels) -> DataSet:
    images, where = (folder / "RGB").glob("*.png"), folder / "GT" / "LABELS"
    layout = DATASETS["synthia"].layout
    pairs = pair(images, lambda p: where / p.name, labels, folder / "RGB", layout, where)
    labelled = tuple(c for c in CLASSES if c not in SYNTHIA_ABSENT)
    return DataSet("synthia", CLASSES, labelled, size, (512, 1024), pairs)


def open_cityscapes(folder: Path, split: str, size: Size, labels: Labels) -> DataSet:
    where = folder / "leftImg8bit" / split

    def label_of(image: Path) -> Path:
        stem = image.name.removesuffix("_leftImg8bit.png")
        return folder / "gtFine" / split / image.parent.name / f"{stem}_gtFine_labelIds.png"

    images = where.glob("*/*_leftImg8bit.png")
    layout, labels_in = DATASETS["cityscapes"].layout, folder / "gtFine" / split
    pairs = pair(images, label_of, labels, where, layout, labels_in)
    return DataSet("cityscapes", CLASSES, CLASSES, size, (512, 1024), pairs)


STREETS_SIZE = (64, 128)
# Scenes of streets by domain and split: (first index, count). Splits share no scene. Settings are
# chosen on dev, and results are of val.
STREETS = {
    ("game", "train"): (0, 1500),
    ("game", "dev"): (200_000, 250),
    ("game", "val"): (100_000, 250),
    ("city", "train"): (0, 1000),
    ("city", "dev"): (200_000, 250),
    ("city", "val"): (100_000, 250),
}


def open_streets(
    role: str, split: str, size: Size, shift: tuple, mixed: bool = False, scenes: int = 0
) -> DataSet:
    domain = {"source": "game", "target": "city"}[role]
    first, count = STREETS[domain, split]
    if mixed and role == "source":
        domain = "mixed"
    items = tuple((index, domain, *shift, scenes) for index in range(first, first + count))
    return DataSet("streets", CLASSES, CLASSES, size, size, items)


def folder_of_images(folder: Path, split: str, labels: Labels) -> Path:
    """images/SPLIT, or for photographs alone images/ or the folder itself."""
    where = folder / "images" / split
    parts = [folder / "images" / name for name in ("train", "val", "test")]
    parts += [folder / "labels", folder / "classes.json"]
    if labels in ("required", "optional") or any(part.exists() for part in parts):
        return where
    return folder / "images" if (folder / "images").is_dir() else folder


def photographs_below(folder: Path) -> list[Path]:
    """The photographs of a folder and its folders, as `files_below` finds them.

    Raises ValueError for images of other endings. One that has been converted, so that the new file
    of the same name lies beside it, is passed over.
    """
    files = files_below(folder)
    found = with_ending(files, SUFFIXES)
    names = {path.with_suffix("") for path in found}
    unread = [path for path in with_ending(files, UNREAD) if path.with_suffix("") not in names]
    if unread:
        raise ValueError(
            f"{len(unread)} of {len(found) + len(unread)} images in {folder} have an ending that "
            f"is not read here, the first is {unread[0]}: convert them to JPEG, or move them away"
        )
    return found


def with_ending(files: Iterable[Path], endings: tuple[str, ...]) -> list[Path]:
    return [path for path in files if path.suffix.lower() in endings]


def files_below(folder: Path) -> list[Path]:
    """The files of a folder and its folders, sorted, but for names that begin with a dot.

    Links to folders are followed, to each folder once.
    """
    found: list[Path] = []
    seen: set[str] = set()
    for place, inner, names in os.walk(folder, followlinks=True):
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        if (real := os.path.realpath(place)) in seen:
            inner.clear()
            continue
        seen.add(real)
        found += [Path(place, name) for name in names if not name.startswith(".")]
    return sorted(found)


def open_folder(
    folder: Path, split: str, size: Size | None, labels: Labels, short_side: int
) -> DataSet:
    list_file, layout = folder / "classes.json", DATASETS["folder"].layout
    classes = read_classes(list_file) if list_file.exists() else None
    if classes and classes.images:
        if split not in classes.images:
            raise ValueError(f"{list_file} has no images of {split}: add a pattern for them")
        found = files_of(folder, classes, split, with_labels=labels != "none")
        if not found:
            raise ValueError(
                f"no image below {folder} fits {classes.images[split]}: change `images` of "
                f"{list_file}"
            )
        bare = labels == "none" or found[0][1] is None
        if bare and labels == "required":
            raise ValueError(f"{list_file} has no labels of {split}: add a pattern for them")
        asked: Labels = "unchecked" if labels == "unchecked" else "required"  # by the pattern
        pairs = tuple(found)
        if not bare:
            change = f"change `labels` of {list_file}, or drop it"
            pairs = complete(pairs, asked, folder, change, folder)
    else:
        where = folder_of_images(folder, split, labels)
        images = photographs_below(where)

        def label_of(image: Path) -> Path:
            return (folder / "labels" / split / image.relative_to(where)).with_suffix(".png")

        pairs = pair(images, label_of, labels, where, layout, folder / "labels" / split)
    names = read_classes(list_file).names if pairs[0][1] is not None else ()
    if size is None:  # of the commonest size of a hundred images
        height, width = commonest_size([image for image, _ in pairs])
        scale = short_side / min(height, width)
        size = (8 * round(height * scale / 8), 8 * round(width * scale / 8))
    return DataSet("folder", names, names, size, size, pairs, folder)


def commonest_size(images: Sequence[Path], most: int = 100) -> Size:
    """H W that most of the images have, by the headers of `most` of them, evenly spread.

    A file without a header is passed over here, since reading it later names it. Raises ValueError
    if all are such.
    """
    sizes: Counter[Size] = Counter()
    for i in np.linspace(0, len(images) - 1, min(most, len(images))).round().astype(int):
        try:
            sizes[upright_size(images[i])] += 1
        except ValueError as error:
            fault = error
    if not sizes:
        raise fault
    return sizes.most_common(1)[0][0]


class Kind(NamedTuple):
    """A row of DATASETS: what is known of a data set before a file is read."""

    opener: Callable[..., DataSet]  # (folder, split, size, labels), but not of streets and folder
    layout: str  # where its files belong, for messages
    folder: str | None  # its place under --data
    splits: tuple[str, ...]  # (): any name of a folder in images/
    size: Size | None  # its images are resized to this; None: it follows from the first image
    # Train id by id on disk. None: classes.json has the ids, or the labels are drawn.
    to_train_ids: np.ndarray | None = None
    read_ids: Callable[[Path], np.ndarray] = read_indices
    tolerance: float = 0.0  # largest relative difference in size of image and label
    images: str = ""  # the folder of its splits, if each has its own


FOLDER_LAYOUT = (
    "name a folder of photographs; for training on labels or a score it needs images/SPLIT, "
    "labels/SPLIT and classes.json"
)
DATASETS = {
    "gta5": Kind(
        open_gta5,
        "put images/ and labels/ into GTA5/ under --data, or name their own folder",
        "GTA5",
        ("train",),
        (720, 1280),
        TO_TRAIN_IDS["gta5"],
        tolerance=0.02,
    ),
    "synthia": Kind(
        open_synthia,
        "put RGB/ and GT/LABELS/ into SYNTHIA/RAND_CITYSCAPES/ under --data, or name their own "
        "folder",
        "SYNTHIA/RAND_CITYSCAPES",
        ("train",),
        (760, 1280),
        TO_TRAIN_IDS["synthia"],
        read_synthia_ids,
    ),
    "cityscapes": Kind(
        open_cityscapes,
        "put leftImg8bit/ and gtFine/ into Cityscapes/ under --data, or name their own folder",
        "Cityscapes",
        ("train", "val", "test"),
        (512, 1024),
        TO_TRAIN_IDS["cityscapes"],
        images="leftImg8bit",
    ),
    "folder": Kind(
        *(open_folder, FOLDER_LAYOUT, None, (), None),
        images="images",
    ),
    "streets": Kind(open_streets, "it is drawn", None, ("train", "dev", "val"), STREETS_SIZE),
}


def has_split(name: str, folder: Path | None, split: str) -> bool:
    """Whether a data set has this split. Its folder is looked for, and no file is opened."""
    kind = DATASETS[name]
    if kind.splits and split not in kind.splits:
        return False
    if name == "folder" and folder and (Path(folder) / "classes.json").exists():
        classes = read_classes(Path(folder) / "classes.json")
        if classes.images:
            return bool(find(Path(folder), classes.images.get(split, "")))
    if not (kind.images and folder):
        return True
    return bool(photographs_below(Path(folder) / kind.images / split))


def splits_of(name: str, folder: Path | None) -> list[str]:
    """The splits that a data set has on disk; train for a folder of photographs alone."""
    known = DATASETS[name].splits or ("train", "val", "test")
    if name == "folder" and folder and (folder / "classes.json").exists():
        known = tuple(read_classes(folder / "classes.json").images) or known
    return [split for split in known if has_split(name, folder, split)] or ["train"]


def default_folder(name: str, data: Path) -> Path | None:
    """Where a data set lies under the folder of data sets; None if it has no place there."""
    inside = DATASETS[name].folder
    return data / inside if inside else None


# Reading samples.


@lru_cache(maxsize=4096)  # keeps every scene of the default run, some 90 MB
def draw_small_street(item: tuple, size) -> tuple[np.ndarray, np.ndarray]:
    index, domain, shift, layout, scenes = item
    return streets.render(index, domain, seed=scenes, size=size, shift=shift, layout=layout)


def draw_street(item: tuple, size) -> tuple[np.ndarray, np.ndarray]:
    if size[0] * size[1] > 256 * 256:  # a cache would take gigabytes
        return draw_small_street.__wrapped__(item, size)
    return draw_small_street(item, size)


def image_name(dataset: DataSet, i: int) -> str:
    """What to call image i in messages and file names."""
    first, second = dataset.items[i][:2]
    return f"{second}_{first:06d}" if dataset.name == "streets" else str(first)


def image_at(dataset: DataSet, i: int) -> np.ndarray:
    """Image i at its own size, H W 3 uint8 RGB."""
    if dataset.name == "streets":
        return draw_street(dataset.items[i], dataset.size)[0]
    return read_image(dataset.items[i][0])


def label_at(dataset: DataSet, i: int) -> np.ndarray:
    """Label i at its own size, H W uint8 train ids of `dataset.classes`, 255 = unlabelled."""
    if dataset.name == "streets":
        return draw_street(dataset.items[i], dataset.size)[1]
    path = dataset.items[i][1]
    if dataset.name != "folder":
        return read_label(path, dataset.name)
    list_file = Path(dataset.root or "") / "classes.json"
    return map_ids(read_mask(path), read_classes(list_file).to_train_ids, path, str(list_file))


def check_pair(dataset: DataSet, i: int, image: np.ndarray, label: np.ndarray) -> None:
    """Raises ValueError if the sizes of image and label do not fit each other.

    A few published pairs of GTA5 differ by some pixels. These pass: both are resized to one grid.
    """
    a, b = np.array(image.shape[:2]), np.array(label.shape)
    allowed = DATASETS[dataset.name].tolerance
    if (np.abs(a / b - 1) > allowed).any():
        raise ValueError(
            f"{dataset.items[i][1]} is {b[1]}x{b[0]} but its image is {a[1]}x{a[0]}: "
            "restore the label that belongs to the image"
        )


def resize(pixels: np.ndarray, size, box=None) -> np.ndarray:
    """Resizes H W 3 images (bicubic, antialiased) or H W labels (nearest); box: y0 x0 y1 x1."""
    if pixels.shape[:2] == tuple(size) and box is None:
        return pixels
    how = Image.Resampling.BICUBIC if pixels.ndim == 3 else Image.Resampling.NEAREST
    box = box and (box[1], box[0], box[3], box[2])
    return np.asarray(Image.fromarray(pixels).resize((size[1], size[0]), how, box=box))


# Batches. A sample depends on (seed, step) alone: workers, order and resuming do not matter.


@lru_cache(maxsize=8)
def epoch_order(length: int, seed: int, domain: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, domain, epoch]).permutation(length)


def sample_index(n: int, length: int, seed: int, domain: int) -> int:
    """The image of the n-th sample of a domain. Each epoch has all images, in a new order."""
    return int(epoch_order(length, seed, domain, n // length)[n % length])


def augment(pixels, size, scale, box, mirror):
    """Crop `box` (in units of `size`), resize to scale times its size, mirror."""
    y0, x0, y1, x1 = box
    ratio_y, ratio_x = pixels.shape[0] / size[0], pixels.shape[1] / size[1]
    box_here = (y0 * ratio_y, x0 * ratio_x, y1 * ratio_y, x1 * ratio_x)
    to = (round((y1 - y0) * scale), round((x1 - x0) * scale))
    whole = box == (0, 0, *size)
    pixels = resize(pixels, to, None if whole else box_here)
    return pixels[:, ::-1] if mirror else pixels


def jitter_colours(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Draws a gain and an offset for each colour, of up to `strength` of the range."""
    if not strength:
        return image
    gain, offset = rng.uniform(-strength, strength, (2, 3))
    return np.clip(image * (1 + gain) + 255 * offset, 0, 255).astype(np.uint8)


def in_style(image: np.ndarray, style: DataSet, n: int, seed: int, beta: float) -> np.ndarray:
    """The n-th sample of the source, H W 3 uint8, in the style of one of the target's images."""
    other = image_at(style, sample_index(n, len(style), seed, 2))
    pair = (image, resize(other, image.shape[:2]))
    source, target = (torch.from_numpy(x.astype(np.float32)).permute(2, 0, 1) for x in pair)
    found = fourier_style(source, target, beta).round().clamp(0, 255)
    return found.permute(1, 2, 0).byte().numpy()


def domain_batch(
    step, dataset, domain, hyper: Hyper, seed, rank, world, labels: bool, style: DataSet | None
):
    """Images (and labels) of one domain for one step. One scale, so that they can be stacked."""
    rng = np.random.default_rng([seed, domain, step, rank])
    scale = rng.choice(hyper.scales, p=hyper.scale_probs)
    crop = np.minimum(dataset.crop, dataset.size).tolist() if hyper.crop else list(dataset.size)
    images, targets = [], []
    for slot in range(hyper.batch):
        n = (step * world + rank) * hyper.batch + slot
        i = sample_index(n, len(dataset), seed, domain)
        y, x = (int(rng.integers(0, s - c + 1)) for s, c in zip(dataset.size, crop, strict=True))
        box, mirror = (y, x, y + crop[0], x + crop[1]), rng.random() < hyper.mirror
        image = image_at(dataset, i)
        images.append(augment(image, dataset.size, scale, box, mirror))
        if labels:
            label = label_at(dataset, i)
            check_pair(dataset, i, image, label)
            targets.append(augment(label, dataset.size, 1.0, box, mirror))
            if style:
                images[-1] = in_style(images[-1], style, n, seed, hyper.fourier)
            images[-1] = jitter_colours(images[-1], hyper.jitter, rng)
    stacked = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)  # B 3 H' W', channels last
    return stacked, torch.from_numpy(np.stack(targets)) if labels else None, tuple(crop)


def batch_at(
    step: int,
    source: DataSet,
    target: DataSet | None,
    hyper: Hyper,
    *,
    seed=0,
    rank=0,
    world=1,
    style: DataSet | None = None,
) -> Batch:
    """The batch of one step: uint8 images of both, uint8 labels of the source alone.

    target None: a step on the source alone. style: whose style the source gets (hyper.fourier).
    rank and world: number of this process, and of how many. Their samples are disjoint.
    """
    place = (seed, rank, world)
    images, labels, _ = domain_batch(step, source, 0, hyper, *place, labels=True, style=style)
    if target is None:
        return Batch(images, labels, None, None)
    found = domain_batch(step, target, 1, hyper, *place, labels=False, style=None)
    t_images, _, t_size = found
    return Batch(images, labels, t_images, t_size)


def or_error(function, *args, **options):
    """The result, or the ValueError as a value. Raised in a worker it would print a traceback."""
    try:
        return function(*args, **options)
    except ValueError as error:
        return error


def ignore_signals(worker: int) -> None:
    """Workers ignore Ctrl-C and SIGTERM: the loop receives them, saves, and ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def checked(samples):
    """What a DataLoader of Steps or Pairs yields. Raises a ValueError that stands for a sample."""
    for sample in samples:
        for part in sample if isinstance(sample, list) else (sample,):
            if isinstance(part, ValueError):
                raise part
        yield sample


class Steps(torch.utils.data.Dataset):
    """The batches of a run by step, for a DataLoader with batch_size=None."""

    def __init__(self, source, target, hyper: Hyper, *, seed: int, rank: int = 0, world: int = 1):
        self.source, self.target, self.hyper = source, target, hyper
        self.place = {"seed": seed, "rank": rank, "world": world}

    def __len__(self) -> int:
        return self.hyper.steps

    def __getitem__(self, step: int) -> Batch | ValueError:
        target = self.target if uses_target(step, self.hyper) else None
        style = self.target if self.hyper.fourier else None
        how = self.place | {"style": style}
        return or_error(batch_at, step, self.source, target, self.hyper, **how)


class Pairs(torch.utils.data.Dataset):
    """A split for evaluation: (index, image 3 H W resized, label H' W' at its own size).

    The label of an unlabelled split is 255 everywhere, at the image's own size.
    """

    def __init__(self, dataset: DataSet):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int):
        return or_error(pair_at, self.dataset, i)


class LabelsOf(torch.utils.data.Dataset):
    """The labels of a data set: (i) -> H W uint8 train ids."""

    def __init__(self, dataset: DataSet):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int):
        return or_error(label_at, self.dataset, i)


def pair_at(dataset: DataSet, i: int):
    image = image_at(dataset, i)
    if dataset.has_labels:
        label = label_at(dataset, i)
        check_pair(dataset, i, image, label)
    else:
        label = np.full(image.shape[:2], IGNORE, np.uint8)
    resized = np.array(resize(image, dataset.size))  # a copy that torch may write to
    return i, torch.from_numpy(resized).permute(2, 0, 1), torch.from_numpy(label.copy())


# The classes of two data sets are matched by name.


def shared_classes(source: DataSet, target: DataSet) -> tuple[np.ndarray, tuple, tuple]:
    """How the target's labels are mapped to the classes of the source, which the network has.

    Returns (to_source_ids, scored, left_out): the source's train id for each of the target's, 256
    uint8 (255 if the source lacks the class); the names that both have, in the source's order; and
    the names that only one of the two has.
    """
    scored = tuple(c for c in source.classes if c in source.labelled and c in target.labelled)
    if not scored:
        raise ValueError(
            f"{source.name} and {target.name} share no class name: name the classes of "
            f"classes.json as Cityscapes does ({', '.join(CLASSES)})"
        )
    to_source_ids = np.full(256, IGNORE, np.uint8)
    for i, name in enumerate(target.classes):
        if name in scored:
            to_source_ids[i] = source.classes.index(name)
    every = dict.fromkeys((*source.labelled, *target.labelled))
    return to_source_ids, scored, tuple(c for c in every if c not in scored)


# Checking a data set.


def check(dataset: DataSet, console: Console) -> list[str]:
    """Read every file, print its faults and the class frequencies, and return the faults.

    Of a data set without labels the images alone.
    """
    wrong, notes = [], []
    pixels, seen = np.zeros(256, np.int64), np.zeros(256, np.int64)
    for i in track(range(len(dataset)), f"reading {dataset.name}", console=console):
        try:
            image = image_at(dataset, i)
            label = label_at(dataset, i) if dataset.has_labels else np.zeros(image.shape[:2], int)
            check_pair(dataset, i, image, label)
        except ValueError as error:
            wrong.append(str(error))
            continue
        if image.shape[:2] != label.shape:
            notes.append(f"{image_name(dataset, i)} and its label differ in size by some pixels")
        squeezed = (image.shape[1] / image.shape[0]) / (dataset.size[1] / dataset.size[0])
        if not 0.75 < squeezed < 1.34 and dataset.name == "folder":
            notes.append(f"{image_name(dataset, i)} has another shape and is squeezed")
        if image.min() == image.max():
            notes.append(f"{image_name(dataset, i)} is blank")
        counts = np.bincount(label.ravel(), minlength=256)
        pixels, seen = pixels + counts, seen + (counts > 0)
    table = Table("class", "% of pixels", "% of images", title=f"{dataset.name}: {len(dataset)}")
    for i, name in (*enumerate(dataset.classes), (IGNORE, "unlabelled")):
        shares = 100 * pixels[i] / max(pixels.sum(), 1), 100 * seen[i] / len(dataset)
        table.add_row(name, *(f"{share:.2f}" for share in shares))
    if dataset.has_labels:
        console.print(table)
    for sentence in (*(f"note: {n}" for n in notes), *wrong):
        console.print(sentence, markup=False, highlight=False, soft_wrap=True)
    what = "pairs" if dataset.has_labels else "images"
    console.print(f"{len(wrong)} of {len(dataset)} {what} are wrong, {len(notes)} notes")
    return wrong


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description="Check every file of a data set.")
    parser.add_argument("dataset", choices=DATASETS)
    parser.add_argument("--data", type=Path, default=Path("data"), help="the folder of data sets")
    parser.add_argument("--dir", type=Path, help="the data set's own folder, instead of --data")
    parser.add_argument("--split", help="[all that there are]")
    parser.add_argument("--role", choices=("source", "target"), default="source", help="of streets")
    args = parser.parse_args(argv)
    try:
        folder = args.dir or default_folder(args.dataset, args.data)
        console, wrong = Console(), False
        for split in [args.split] if args.split else splits_of(args.dataset, folder):
            dataset = open_dataset(args.dataset, args.role, split, folder, labels="unchecked")
            console.print(f"{args.dataset} {split}")
            if not dataset.has_labels:
                console.print("no labels: the images alone are read, which is enough for a target")
            wrong |= bool(check(dataset, console))
            wrong |= not dataset.has_labels and args.dataset in ("gta5", "synthia")  # sources
        return int(wrong)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped: nothing was written")


if __name__ == "__main__":
    sys.exit(main())
