"""Evaluation: confusion matrix, IoU, the table beside the paper's, pictures (Tables 1 and 2).

    confusion = confusion_matrix(pred, label, 19)          # int64, 19 x 19
    miou = iou(confusion).nanmean()

    python eval.py runs/streets-streets-tiny-clan-seed0    # a run folder or a checkpoint
    python eval.py GTA5_100000.pth --src gta5 --tgt cityscapes --data data --save-predictions out
    python eval.py predict RUN --images photos/ --out masks/

Shapes: B images, C classes, H W pixels. The last checkpoint of a run is its result.
"""

import argparse
import json
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

# Imports may swallow Ctrl-C or abort on it. Until they are done it ends the program at once.
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import data
from checkpoints import newest_checkpoint, read_metadata
from classes import CLASSES, IGNORE, LABEL_IDS, SYNTHIA_13, SYNTHIA_ABSENT, palette_of
from devices import (
    count_workers,
    does_not_fit,
    find_device,
    join_processes,
    leave_processes,
    place,
    ranks,
    share_buffers,
    uses_bfloat16,
)
from export import KINDS, export_main
from folders import read_classes
from methods import METHODS
from models import Generator
from predictions import add_flags, ensemble_and_m, predict, predict_main
from runlog import progress_bar, tracked
from settings import one_of, short_side
from weights import load_generator


def confusion_matrix(
    pred: torch.Tensor, label: torch.Tensor, num_classes: int, *, total: torch.Tensor | None = None
) -> torch.Tensor:
    """How many pixels of class i (row) were predicted as class j (column).

    pred, label: integers of equal shape on one device; pred in 0 to num_classes - 1; a label
    outside that range (255) is unlabelled and not counted. total: a matrix to add to.
    Returns int64, num_classes x num_classes. Raises ValueError if the shapes differ.
    """
    if pred.shape != label.shape:
        raise ValueError(f"pred {tuple(pred.shape)} and label {tuple(label.shape)} differ in shape")
    label = label.int()  # enough for the bins, and half the memory
    counted = (label >= 0) & (label < num_classes)
    # Unlabelled pixels go to an extra bin, so that no tensor's size depends on the data.
    bins = torch.where(counted, label * num_classes + pred, num_classes**2)
    counts = torch.bincount(bins.flatten(), minlength=num_classes**2 + 1)[:-1]
    counts = counts.view(num_classes, num_classes)
    return counts if total is None else total + counts


def iou(confusion: torch.Tensor) -> torch.Tensor:
    """Intersection over union by class, float64 C in [0, 1]; NaN for a class that never occurs."""
    hit = confusion.diagonal().double()
    union = confusion.sum(0) + confusion.sum(1) - confusion.diagonal()
    return hit / union  # 0 / 0 is NaN


# Running a network over a split.


def spread_images(dataset: data.DataSet, count: int) -> Iterator[tuple]:
    """(index, image 3 H W, label H' W') of at most `count` images, evenly spread over a split."""
    picks = np.linspace(0, len(dataset) - 1, min(count, len(dataset))).round().astype(int)
    pairs = data.Pairs(dataset)
    yield from data.checked(pairs[int(i)] for i in picks)


MEASURED = 100  # images at most, where no label is read


def unlabelled(
    G: Generator, dataset: data.DataSet, classes: Sequence[str], bar: Progress | None = None
) -> dict:
    """What can be said without a label, over at most MEASURED images, evenly spread over a split.

    {"confidence", "m", "shares"}: the mean of the ensemble's largest probability, the mean of M,
    and the share of the pixels that is predicted as each of G's classes. Leaves G in evaluation
    mode.
    """
    confidence, m, counts = [], [], np.zeros(G.num_classes)
    total = min(MEASURED, len(dataset))
    for _, image, _ in tracked(spread_images(dataset, MEASURED), bar, "measuring", total):
        p, m_of_image = ensemble_and_m(G, image, image.shape[-2:])
        best, ids = p.max(dim=0)
        confidence.append(best.mean().item())
        m.append(m_of_image.mean().item())
        counts += np.bincount(ids.flatten().numpy(), minlength=G.num_classes)
    shares = dict(zip(classes, (counts / counts.sum()).tolist(), strict=True))
    return {"confidence": float(np.mean(confidence)), "m": float(np.mean(m)), "shares": shares}


def evaluate(
    G,
    dataset: data.DataSet,
    to_source_ids: np.ndarray,
    *,
    device: torch.device | str = "cpu",
    amp: bool = False,
    workers: int = 0,
    save: Callable[[int, np.ndarray], None] | None = None,
    bar: Progress | None = None,
) -> torch.Tensor:
    """The confusion matrix (C x C, on the CPU) of G over a split.

    to_source_ids: 256 uint8, from the split's train ids to G's classes (data.shared_classes).
    save: called with (index, prediction H W uint8) for each image. Leaves G in evaluation mode.
    Several processes share the images, and each returns the matrix of all.
    """
    rank, world = ranks()
    to_source = torch.from_numpy(to_source_ids).to(device)
    confusion = torch.zeros(G.num_classes, G.num_classes, dtype=torch.int64, device=device)
    part = torch.utils.data.Subset(data.Pairs(dataset), range(rank, len(dataset), world))
    loader = batches(part, dataset.size, workers)
    for pairs in tracked(data.checked(loader), bar, "scoring", len(dataset) // world):
        indices, images, labels = zip(*pairs, strict=True)
        sizes = [label.shape for label in labels]
        found = predict(G, torch.stack(images).to(device), sizes, amp)
        for i, pred, label in zip(indices, found, labels, strict=True):
            label = to_source[label.to(device).int()]
            confusion = confusion_matrix(pred, label, G.num_classes, total=confusion)
            if save:
                save(i, pred.cpu().numpy())
    if world > 1:
        torch.distributed.all_reduce(confusion)
    return confusion.cpu()


def batches(items: torch.utils.data.Dataset, size: data.Size, workers: int) -> Any:
    """A loader of lists of items in their order: 16 at a time if images have a small `size`."""
    return torch.utils.data.DataLoader(
        items,
        batch_size=16 if size[0] * size[1] <= 256 * 512 else 1,
        num_workers=workers,
        collate_fn=list,
        worker_init_fn=data.ignore_signals,
        generator=torch.Generator(),  # not torch's own, which training draws from
    )


def scores(confusion: torch.Tensor, classes, scored) -> dict:
    """{"miou", "iou" by name} over the scored classes. The mean leaves out absent classes.

    Labels of one class alone say nothing, since any network would read 100 %: then "only_class"
    names it, and there is no "miou".
    """
    by_name = dict(zip(classes, iou(confusion).tolist(), strict=True))
    by_name = {name: by_name[name] for name in scored}
    present = [value for value in by_name.values() if not np.isnan(value)]
    if not present:
        raise ValueError(f"no labelled pixel of {', '.join(scored)}: check labels and classes.json")
    absent_is_none = {k: None if np.isnan(v) else v for k, v in by_name.items()}  # null in JSON
    counts = dict(zip(classes, confusion.sum(dim=1).tolist(), strict=True))
    occur = [name for name in scored if counts[name] > 0]
    if len(occur) == 1:
        return {"only_class": occur[0], "iou": absent_is_none}
    return {"miou": float(np.mean(present)), "iou": absent_is_none}


def report(confusion: torch.Tensor, source: data.DataSet, target: data.DataSet) -> dict:
    """The scores of a confusion matrix, and the names of the classes that were left out."""
    _, scored, left_out = data.shared_classes(source, target)
    result = scores(confusion, source.classes, scored)
    if source.name == "synthia" and target.name == "cityscapes":
        of_13 = scores(confusion, source.classes, SYNTHIA_13)
        result |= {"miou_13": of_13["miou"]} if "miou" in of_13 else {}
    return result | {"left_out": list(left_out), "images": len(target)}


def score(
    G,
    source: data.DataSet,
    target: data.DataSet,
    *,
    device: torch.device,
    amp: bool = False,
    workers: int = 0,
    bar: Progress | None = None,
) -> dict:
    """IoU of G on a split of the target, by the classes that it shares with the source."""
    share_buffers(G)
    to_source_ids, _, _ = data.shared_classes(source, target)
    how: Any = {"device": device, "amp": amp, "workers": workers, "bar": bar}
    confusion = evaluate(G, target, to_source_ids, **how)
    return report(confusion, source, target)


# Tables and pictures.


def no_score(result: dict, name: str) -> str:
    """Why a result has no mIoU."""
    if "only_class" in result:
        return (
            f"no score: only {result['only_class']} occurs in the labels of {name}, so a network "
            "that says nothing else would read 100 %"
        )
    return f"no score: {name} has no labels of the source's classes"


OWN_SOURCE = "source only ({}'s)"  # the paper's name of a system's own source-only network


def paper_row(src: str, tgt: str, backbone: str, method: str) -> dict | None:
    """The paper's scores for the same task, backbone and method, if it has them.

    `iou` by class; their mean, `miou_13` on SYNTHIA and else `miou`; `printed`, the mean as the
    paper prints it, with one slip; `base`, the mean of the source-only network of this system.
    """
    if tgt != "cityscapes" or src not in ("gta5", "synthia"):
        return None
    tables = json.loads((Path(__file__).parent / "docs" / "paper_tables.json").read_text())
    rows = {row["method"]: row for row in tables[src] if row["backbone"] == backbone}
    name = METHODS[method].label
    if name not in rows:
        return None
    short = {"light": "traffic light", "sign": "traffic sign"}
    by_name = {short.get(k, k): v / 100 for k, v in rows[name]["iou"].items()}
    printed, gain = rows[name]["miou"], rows[name]["gain"] or 0.0
    mean = 100 * float(np.mean([*by_name.values()]))
    base = rows.get(OWN_SOURCE.format(name), rows["source only"])["miou"]
    if method != "source" and abs(printed - gain - base) > 0.1:  # Cross-city's is not in the table
        base = printed - gain
    mean = printed if abs(mean - printed) < 0.1 else mean
    key = "miou_13" if src == "synthia" else "miou"  # Table 2 has 13 classes
    return {key: mean / 100, "iou": by_name, "printed": printed / 100, "base": base / 100}


def score_table(title: str, columns: Mapping[str, dict | None]) -> Table:
    """Per-class IoU and mIoU in %, a column for each of `columns` (values in [0, 1])."""
    known = {name: column for name, column in columns.items() if column}
    table = Table("class", title=title)
    for name in known:
        table.add_column(name, justify="right")
    for name in next(iter(known.values()))["iou"]:
        table.add_row(name, *(percent(c["iou"].get(name)) for c in known.values()))
    table.add_section()
    for key, label in (("miou", "mIoU"), ("miou_13", "mIoU, 13 classes")):
        if any(key in c for c in known.values()):
            table.add_row(label, *(percent(c.get(key)) for c in known.values()), style="bold")
    return table


def share_table(title: str, columns: Mapping[str, dict]) -> Table:
    """What `unlabelled` found, a column for each of `columns`: class shares, confidence, M."""
    table = Table("class", title=title)
    for name in columns:
        table.add_column(name, justify="right")
    for name in next(iter(columns.values()))["shares"]:
        table.add_row(name, *(percent(c["shares"][name]) for c in columns.values()))
    table.add_section()
    table.add_row("mean confidence", *(percent(c["confidence"]) for c in columns.values()))
    table.add_row("mean M", *(f"{c['m']:.4f}" for c in columns.values()))
    for key, label in (("d_source", "D: source is source"), ("d_target", "D: target is source")):
        if any(key in c for c in columns.values()):
            table.add_row(label, *(f"{c[key]:.3f}" if key in c else "" for c in columns.values()))
    return table


DPI = 110


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def picture(rows: list[list[tuple[str, np.ndarray]]], classes: Sequence[str]) -> Figure:
    """Titled panels; H W arrays are coloured as train ids, with a legend."""
    palette = palette_of(classes)
    height, width = rows[0][0][1].shape[:2]
    columns = len(rows[0])
    w = 3.2 * columns
    h = 3.2 * len(rows) * height / width + 0.9
    figure = Figure(figsize=(w, h), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    shown: set[int] = set()
    for row, panels in zip(axes, rows, strict=True):
        for ax, (title, pixels) in zip(row, panels, strict=True):
            if pixels.ndim == 2:
                shown |= set(np.unique(pixels).tolist())
                pixels = palette[pixels]
            ax.imshow(pixels, interpolation="nearest")
            ax.set_title(title, fontsize=9)
            ax.axis("off")
    patches = [
        Patch(color=palette[i] / 255, label=name) for i, name in enumerate(classes) if i in shown
    ]
    figure.legend(handles=patches, loc="outside lower center", ncols=7, fontsize=7, frameon=False)
    return figure


def draw(
    dataset: data.DataSet,
    to_source_ids: np.ndarray | None,
    networks: dict,
    device: torch.device,
    classes: Sequence[str],
    count: int = 2,
) -> Figure:
    """The first images of a split: image, each network's prediction, truth (None: without it)."""
    rows = []
    for i in range(min(count, len(dataset))):
        _, image, label = data.Pairs(dataset)[i]
        label = label.numpy()
        row = [("target image", data.image_at(dataset, i))]
        for name, G in networks.items():
            pred = predict(G, image[None].to(device), [label.shape])[0].cpu().numpy()
            row.append((name, pred))
        rows.append(row if to_source_ids is None else [*row, ("truth", to_source_ids[label])])
    return picture(rows, classes)


# Programs.


def save_labels(folder: Path, dataset: data.DataSet, classes: Sequence[str]):
    """A `save` for evaluate(): labelIds PNGs with the names and ids of the official scorer."""
    if tuple(classes) != CLASSES:
        raise ValueError("--save-predictions writes Cityscapes labelIds: the run has other classes")
    stems = Counter(Path(data.image_name(dataset, i)).stem for i in range(len(dataset)))
    twice = [stem for stem, count in stems.items() if count > 1]
    if twice:
        raise ValueError(
            f"{len(twice)} names occur twice, the first is {twice[0]}, and would get one file in "
            f"{folder}: use eval.py predict, which keeps the folders"
        )
    folder.mkdir(parents=True, exist_ok=True)

    def save(i: int, pred: np.ndarray) -> None:
        stem = Path(data.image_name(dataset, i)).stem.removesuffix("_leftImg8bit")
        Image.fromarray(LABEL_IDS[pred]).save(folder / f"{stem}_pred_labelIds.png")

    return save


def said_before(file: Path, checkpoint: Path) -> dict:
    """What an earlier score of this checkpoint says, such as the student's beside it. Else {}."""
    if not file.exists():
        return {}
    try:
        earlier = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is damaged: delete it") from error
    return earlier if earlier.get("checkpoint") == str(checkpoint) else {}


def eval_name(args: argparse.Namespace, settings: dict, metadata: dict, tgt: str) -> str:
    """What the files of this score are called: `eval` if it is that of the run, else another name.

    So the run keeps its own score. A folder counts by its name: it may have been moved.
    """
    if not settings:
        return "eval"
    of_the_run = (tgt, args.split) == (settings["tgt"], settings["split"])
    if args.tgt_dir and settings.get("tgt_dir"):
        of_the_run = of_the_run and args.tgt_dir.name == Path(settings["tgt_dir"]).name
    resized = args.tgt_size and list(args.tgt_size) != metadata.get("tgt_size")
    size = f"-{args.tgt_size[0]}x{args.tgt_size[1]}" if resized else ""
    return "eval" if of_the_run and not resized else f"eval-{tgt}-{args.split}{size}"


def evaluate_main(args: argparse.Namespace) -> None:
    console = Console()
    path = newest_checkpoint(args.run)
    metadata = read_metadata(path)
    settings = metadata.get("settings", {})
    src, tgt = args.src or settings.get("src"), args.tgt or settings.get("tgt")
    if not (src and tgt):
        raise ValueError(f"{path} does not name its data sets: give --src and --tgt")

    def folder_of(name: str, flag: Path | None, key: str) -> Path | None:
        saved = settings.get(key) if settings.get(key.split("_")[0]) == name else None
        root = args.data or Path(settings.get("data", "data"))
        return flag or (saved and Path(saved)) or data.default_folder(name, root)

    size = args.tgt_size or (metadata.get("tgt_size") if tgt == settings.get("tgt") else None)
    tgt_dir = folder_of(tgt, args.tgt_dir, "tgt_dir")
    if not data.has_split(tgt, tgt_dir, args.split):
        raise ValueError(
            f"{tgt} has no split {args.split} to score on: give --split, or --tgt and --tgt-dir of "
            "labelled images, or use eval.py predict"
        )
    drawn = {key: settings[key] for key in ("shift", "scenes") if key in settings}
    backbone = settings.get("backbone", args.backbone)
    optional: Any = {"labels": "optional", "short_side": short_side(backbone)} | drawn
    target = data.open_dataset(tgt, "target", args.split, tgt_dir, size, **optional)
    if not target.has_labels and not args.save_predictions:
        raise ValueError(
            f"{tgt} {args.split} has no labels to score with: add them, give "
            "--save-predictions, or use eval.py predict"
        )
    out = args.run if args.run.is_dir() else args.run.parent
    name = eval_name(args, settings, metadata, tgt)
    file = out / f"{name}.json"
    earlier = said_before(file, path)
    source = source_classes(src, metadata, folder_of(src, args.src_dir, "src_dir"))
    G, _ = load_generator(
        path,
        backbone=args.backbone,
        lineage=args.lineage,
        classes=source.classes,
        say=console.print,
    )
    device = find_device(args.device)
    join_processes(device)
    G = place(G, device)
    unlabelled_ids = np.full(256, IGNORE, np.uint8)
    to_source_ids = data.shared_classes(source, target)[0] if target.has_labels else unlabelled_ids
    save = args.save_predictions and save_labels(args.save_predictions, target, source.classes)
    amp = uses_bfloat16(settings.get("amp", "off"), device)  # as in training
    workers = count_workers(args.workers, drawn=target.name == "streets")
    how = {"device": device, "amp": amp, "workers": workers, "save": save}
    with progress_bar(console) as bar:
        confusion = evaluate(G, target, to_source_ids, **how, bar=bar)
    rank, _ = ranks()
    leave_processes()
    if rank > 0:  # only the first process prints and writes
        return
    if not confusion.any() and save:  # the test split of Cityscapes has labels without classes
        console.print(
            f"no score: {tgt} {args.split} has no labelled pixel; {len(target)} predictions in "
            f"{args.save_predictions}",
            soft_wrap=True,
        )
        return
    result = report(confusion, source, target)

    paper = paper_row(src, tgt, backbone, settings.get("method", "clan"))
    if "miou" in result:
        console.print(score_table(f"{src} to {tgt} {args.split}", {"%": result, "paper": paper}))
    else:
        console.print(no_score(result, tgt), soft_wrap=True)
    if result["left_out"]:
        console.print(f"not scored, in one data set only: {', '.join(result['left_out'])}")
    result |= {"checkpoint": str(path), "settings": settings}
    file.write_text(json.dumps(earlier | result, indent=1))
    figure = draw(target, to_source_ids, {"prediction": G}, device, source.classes)
    figure.savefig(out / f"{name}.png", dpi=DPI)
    console.print(
        f"{path}: mIoU {percent(result.get('miou'))} over {len(target)} images; "
        f"{out / name}.json and .png",
        soft_wrap=True,
    )


def source_classes(src: str, metadata: dict, folder: Path | None) -> data.DataSet:
    """The class names of the source, as a data set without images. A checkpoint has them."""
    classes = tuple(metadata.get("classes", CLASSES))
    if not metadata and src == "folder":
        if folder is None:
            raise ValueError("the classes of these weights are unknown: name their --src-dir")
        classes = read_classes(Path(folder) / "classes.json").names
    absent = SYNTHIA_ABSENT if src == "synthia" else ()
    labelled = tuple(c for c in classes if c not in absent)
    return data.DataSet(src, classes, labelled, (0, 0), (0, 0), ())


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(description="Score a run, `predict`, or `export` it.")
    top.add_argument("run", type=Path, help="a run folder or a file of weights")
    top.add_argument("--backbone", default="r101", help="for weights that do not name theirs")
    top.add_argument("--lineage", help="for weights that do not name theirs")
    top.add_argument("--device", default="auto", help="cpu, cuda, cuda:1; auto: a GPU if any")
    return top


def remedy_for(run: Callable, args: argparse.Namespace, in_worker: bool) -> str:
    """The flags that would lower the memory of this command, in a sentence.

    in_worker: a process that reads images has been killed.
    """
    if run is export_main:
        return "No flag lowers it: use a machine with more memory."
    if in_worker:
        return "Give fewer --workers."
    words = ["a smaller --tgt-size"]
    if run is predict_main:
        words = ["a smaller --short-side"]
        if args.window:  # without --short-side it sees photographs at their own sizes
            words = [f"a {'smaller ' * bool(args.short_side)}--short-side", "a smaller --window"]
        elif args.short_side:
            words.append("a --window")
    on_gpu = args.device != "cpu" and torch.cuda.is_available()
    if on_gpu and args.run.suffix.lower() not in KINDS:  # an exported file runs on the CPU
        words.append("--device cpu")
    return f"Give {one_of(words)}."


def main(argv=None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    command = parser()
    if argv[:1] == ["predict"]:
        add_flags(command)
        run, args = predict_main, command.parse_args(argv[1:])
    elif argv[:1] == ["export"]:
        command.add_argument("--out", type=Path, required=True, help="model.pt2 or model.onnx")
        run, args = export_main, command.parse_args(argv[1:])
    else:
        names = tuple(data.DATASETS)
        command.add_argument("--src", choices=names, help="source, whose classes G has [the run's]")
        command.add_argument("--tgt", choices=names, help="data set to score on [the run's]")
        command.add_argument("--split", default="val")
        command.add_argument("--data", type=Path, help="folder of data sets [the run's, or data]")
        command.add_argument("--src-dir", type=Path, help="the source's own folder")
        command.add_argument("--tgt-dir", type=Path, help="the target's own folder")
        command.add_argument("--tgt-size", type=int, nargs=2, help="H W of the network's input")
        command.add_argument("--workers", type=int, default=-1, help="as in train.py")
        command.add_argument("--save-predictions", type=Path, help="folder for labelIds PNGs")
        run, args = evaluate_main, command.parse_args(argv)
    try:
        run(args)
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        if not does_not_fit(error):
            if isinstance(error, (ValueError, OSError)):
                sys.exit(f"error: {error}")
            raise
        first = (str(error) or "no memory").splitlines()[0].rstrip(". ")
        sys.exit(f"error: {first}. {remedy_for(run, args, 'DataLoader worker' in first)}")
    except KeyboardInterrupt:
        sys.exit("stopped before the end: predictions so far are written, and no score")


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    main()
