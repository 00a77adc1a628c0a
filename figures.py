"""Figures 3 to 6 of the paper, and a picture of the adaptive weight.

    ccd(study)              # distances between class centres, over training and by class
    distance = cluster_distance(G, source, val, to_source_ids, count=1000)

Each makes the runs that it needs and writes pictures and tables to the folder of the study.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich.console import Console

import clan
import data
import eval as evaluation
from checkpoints import BEFORE, newest_checkpoint, of_steps, read_metadata
from classes import INFREQUENT, palette_of
from devices import find_device
from methods import METHODS
from models import Discriminator, Generator
from predictions import ensemble_and_m
from runs import (
    INTERVALS,
    Study,
    difference,
    mean_and_deviation,
    miou,
    run_cells,
    run_groups,
    save_figure,
    spread,
    warm_up,
    write,
)
from settings import Flags, configure
from train import first_networks, open_all
from weights import load_generator, load_weights

# What networks have learnt: features of E, the map M.


def device_of(study: Study) -> torch.device:
    return find_device(study.flags.get("device", "auto"))


def load(path: Path, device: torch.device) -> Generator:
    G, _ = load_generator(path, say=lambda _: None)
    return G.to(device)


def load_d(path: Path, hyper: clan.Hyper, num_classes: int) -> Discriminator:
    """D of a checkpoint, on the CPU."""
    D = Discriminator(num_classes, hyper.d_channels, hyper.d_strides)
    load_weights(D, path, say=lambda _: None)
    return D


def open_target(flags: Flags) -> tuple[data.DataSet, data.DataSet, np.ndarray]:
    """Source, labelled validation split, and the map from the split's train ids to the source's."""
    source, _, val = open_all(configure(flags)[0])
    return source, val, data.shared_classes(source, val)[0]


def first_seed(study: Study) -> tuple[dict[str, Flags], dict[str, list[dict]]]:
    """Runs of all methods on the first seed, made if missing: (cells, results) by method."""
    groups = {method: [study.cell(study.seeds[0], method=method)] for method in study.methods}
    results = run_groups(study, groups, checkpoints=True)
    return {m: group[0] for m, group in groups.items()}, results


@torch.no_grad()
def labelled_features(
    G: Generator, dataset: data.DataSet, to_source_ids: np.ndarray, count: int
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """(index, features N d, train ids N) of each image, at the labelled pixels of E's grid.

    The paper does not define these features. Our choice is what the classifiers read (the deepest
    of VGG-16's three maps), in evaluation mode. A label is down-sampled to their grid: each cell
    takes the pixel nearest to its centre. to_source_ids: see data.shared_classes.
    """
    device = next(G.parameters()).device
    to_source = torch.from_numpy(to_source_ids)
    G.eval()
    for i, image, label in evaluation.spread_images(dataset, count):
        x = G.features(image[None].to(device))
        x = (x[-1] if isinstance(x, tuple) else x)[0].float().cpu()  # d h w
        label = to_source[label.int()][None, None].float()
        ids = F.interpolate(label, size=x.shape[-2:], mode="nearest-exact").flatten().long()
        seen = ids < G.num_classes
        yield i, x.flatten(1).T[seen], ids[seen]


def class_centres(
    G: Generator, dataset: data.DataSet, to_source_ids: np.ndarray, count: int
) -> torch.Tensor:
    """The mean feature of each class over the pixels of a split, C d float64; NaN if unseen."""
    total: torch.Tensor | int = 0
    pixels = torch.zeros(G.num_classes, dtype=torch.float64)
    for _, x, ids in labelled_features(G, dataset, to_source_ids, count):
        one_hot = F.one_hot(ids, G.num_classes).double()  # N C
        total = total + one_hot.T @ x.double()
        pixels += one_hot.sum(dim=0)
    return total / pixels[:, None]  # 0 / 0 is NaN


def mean_distance_within(
    G: Generator,
    dataset: data.DataSet,
    to_source_ids: np.ndarray,
    count: int,
    centres: torch.Tensor,
) -> torch.Tensor:
    """The mean distance of a pixel's feature from its class's centre, C float64; NaN if unseen."""
    total = torch.zeros(G.num_classes, dtype=torch.float64)
    pixels = torch.zeros_like(total)
    for _, x, ids in labelled_features(G, dataset, to_source_ids, count):
        total.index_add_(0, ids, (x.double() - centres[ids]).norm(dim=1))
        pixels += ids.bincount(minlength=G.num_classes)
    return total / pixels


def relative_distance(
    G: Generator, source: data.DataSet, target: data.DataSet, to_source_ids: np.ndarray, count: int
) -> torch.Tensor:
    """The domains' distance over the mean distance within a class, C float64: free of scale."""
    centres, within = [], []
    same_ids = np.arange(256, dtype=np.uint8)
    for dataset, ids in ((source, same_ids), (target, to_source_ids)):
        centres.append(class_centres(G, dataset, ids, count))
        within.append(mean_distance_within(G, dataset, ids, count, centres[-1]))
    return (centres[0] - centres[1]).norm(dim=1) / ((within[0] + within[1]) / 2)


def cluster_distance(
    G: Generator, source: data.DataSet, target: data.DataSet, to_source_ids: np.ndarray, count: int
) -> torch.Tensor:
    """Euclidean distance between the class centres of two domains, C float64 (Section 4.4)."""
    same_ids = np.arange(256, dtype=np.uint8)
    of_source = class_centres(G, source, same_ids, count)
    return (of_source - class_centres(G, target, to_source_ids, count)).norm(dim=1)


def over_training(cells: dict[str, Flags]) -> dict[str, dict[int, Path]]:
    """Checkpoints by method and step. Those of a shared warm-up are in one of the run folders."""
    curves = {
        method: {read_metadata(p)["step"]: p for p in of_steps(flags["out"])}
        for method, flags in cells.items()
    }
    for method, flags in cells.items():
        _, hyper = configure(flags)
        for other in cells:
            if warm_up(cells[other]) == warm_up(flags):
                curves[method] |= {s: p for s, p in curves[other].items() if s <= hyper.adv_start}
        if len(curves[method]) < min(10, hyper.steps):
            raise ValueError(f"{flags['out']} has too few checkpoints for a curve: delete it")
    return {method: dict(sorted(steps.items())) for method, steps in curves.items()}


def ccd(study: Study) -> None:
    """Figure 4 (left) and Figure 6: cluster-centre distances over training and by class.

    Distances are divided by those of the untrained network, so that every curve starts at 1. For
    r101, vgg16 and lite0 this network has ImageNet weights. For tiny it is random and its distances
    mean little: there only the comparison of methods counts. The target's labels are those of its
    validation split. Only the first seed is measured.
    """
    first = study.cell(study.seeds[0], method=study.methods[0])
    source, val, to_source_ids = open_target(first)
    if study.curve_class not in data.shared_classes(source, val)[1]:
        raise ValueError(f"--class {study.curve_class} is not in both {source.name} and {val.name}")
    cells, results = first_seed(study)
    device = device_of(study)

    def measure(G: Generator) -> torch.Tensor:
        return cluster_distance(G.to(device), source, val, to_source_ids, study.images)

    untrained, _ = first_networks(
        *configure(first), len(source.classes), device, None, Console(quiet=True)
    )
    start = measure(untrained)
    paths = over_training(cells)
    curves = {
        method: {step: measure(load(path, device)) / start for step, path in steps.items()}
        for method, steps in paths.items()
    }
    picks = {
        study.curve_class: lambda x: x[source.classes.index(study.curve_class)].item(),
        "mean over classes": lambda x: x.nanmean().item(),
    }
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    for ax, (title, pick) in zip(figure.subplots(1, 2), picks.items(), strict=True):
        for method, values in curves.items():
            ax.plot([0, *values], [1.0, *map(pick, values.values())], label=METHODS[method].label)
        ax.set(title=title, xlabel="step", ylabel="cluster distance / before training")
        ax.legend(fontsize=8)
    distinct = [r for group in results.values() for r in group]
    save_figure(study, figure, f"ccd-curve-{study.task}", distinct)

    last = {METHODS[m].label: values[max(values)] for m, values in curves.items()}
    last = {"before training": start / start} | last
    seen = [i for i in range(len(source.classes)) if not torch.isnan(start[i])]
    names = [source.classes[i] + " *" * (source.classes[i] in INFREQUENT) for i in seen]
    columns = {label: values[seen].tolist() for label, values in last.items()}
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    bars(figure.subplots(), names, columns)
    figure.axes[0].set_ylabel("cluster distance / before training")
    save_figure(study, figure, f"ccd-classes-{study.task}", distinct)

    for method, steps in paths.items():
        G = load(steps[max(steps)], device)
        relative = relative_distance(G, source, val, to_source_ids, study.images)
        columns[f"{METHODS[method].label}, free of scale"] = relative[seen].tolist()
    rows = [[name, *(f"{c[i]:.2f}" for c in columns.values())] for i, name in enumerate(names)]
    rows.append(["mean", *(f"{np.mean(c):.2f}" for c in columns.values())])
    note = (
        f"Euclidean distance between the domains' mean features, up to {study.images} images of "
        "each, divided by that before training; last checkpoint, first seed. Free of scale: "
        "divided by the mean distance of a feature from its class's mean instead, which a network "
        "cannot make smaller by shrinking all features. * infrequent."
    )
    write(study, f"ccd-{study.task}", ["class", *columns], rows, note, results)


def bars(ax: Any, names: list[str], groups: dict[str, list[float]]) -> None:
    """Grouped bars: a group for each name, a colour for each key."""
    width = 0.8 / len(groups)
    for k, (label, values) in enumerate(groups.items()):
        x = np.arange(len(names)) + (k - (len(groups) - 1) / 2) * width
        ax.bar(x, values, width, label=label)
    slanted = len(names) > 8
    ax.set_xticks(
        range(len(names)), names, rotation=40 if slanted else 0, ha="right" if slanted else "center"
    )
    ax.legend(fontsize=8, ncols=4)


# Figure 4 (right): the parameters of the adaptive weight.

EPS, SLOPES = (0.1, 0.2, 0.4, 0.8), (10.0, 20.0, 40.0, 80.0)  # the paper's


def values_of_params(study: Study) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(values of eps, values of lambda_local). On streets they span a wider range of weights."""
    settings, hyper = study.shared
    if settings.tgt != "streets":
        return EPS, SLOPES
    slopes = tuple(factor * hyper.lambda_local for factor in (0.25, 1.0, 4.0, 16.0))
    return tuple(factor * hyper.eps for factor in (0.25, 1.0, 4.0)), slopes


def params(study: Study) -> None:
    """Figure 4 (right): target mIoU (bars) and D's loss (line) over eps and lambda_local."""
    _, hyper = study.shared
    many_eps, slopes = values_of_params(study)
    groups: dict = {"TAN": study.cells(method="tan")}
    groups |= {("eps", v): study.cells(eps=v) for v in many_eps}
    groups |= {("lambda_local", v): study.cells(lambda_local=v) for v in slopes}
    results = run_groups(study, groups)
    losses = {name: spread(r["d_loss"] for r in group)[0] for name, group in results.items()}
    baseline = 100 * spread(map(miou, results["TAN"]))[0]

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    for ax, (label, values) in zip(
        figure.subplots(1, 2), (("eps", many_eps), ("lambda_local", slopes)), strict=True
    ):
        names = [f"{v:g}" for v in values]
        scores = [spread(map(miou, results[label, v])) for v in values]
        errors = [0 if np.isnan(s) else 100 * s for _, s in scores]
        ax.bar(names, [100 * m for m, _ in scores], yerr=errors, color="C0", alpha=0.7)
        ax.axhline(baseline, color="C2", ls="--", label="TAN")
        ax.legend(fontsize=8, loc="lower left")
        ax.set(xlabel=label, ylabel="target mIoU, %")
        right = ax.twinx()
        right.plot(names, [losses[label, v] for v in values], "C1o-")
        right.set_ylabel("loss of D", color="C1")
        right.set_ylim(bottom=0)
    save_figure(
        study, figure, f"params-{study.task}", [r for group in results.values() for r in group]
    )
    rows = [
        [
            name if name == "TAN" else f"{name[0]} {name[1]:g}",
            mean_and_deviation(map(miou, group)),
            difference(group, results["TAN"]),
            "" if name == "TAN" else f"{spread(r.get('mean_weight') for r in group)[0]:.2f}",
            f"{losses[name]:.2f}",
        ]
        for name, group in results.items()
    ]
    note = (
        f"eps at lambda_local = {hyper.lambda_local:g}, and lambda_local at eps = {hyper.eps:g}. "
        "Target mIoU in %, last checkpoint; the mean weight; D's loss over the last fifth of the "
        f"adversarial steps. {INTERVALS}"
    )
    header = ["parameter", "mIoU", "minus TAN", "mean weight", "D's loss"]
    write(study, f"params-{study.task}", header, rows, note, results)


# Figures 3 and 5, and what the adaptive weight looks like.

FIGURE_3 = ("building", "traffic sign", "pole", "vegetation")


def some_of_each(i: int, ids: torch.Tensor, wanted: list[int], most: int) -> np.ndarray:
    """Indices of at most `most` pixels of each class in image i, the same for all networks."""
    order = np.random.default_rng(i).permutation(len(ids))
    shuffled = ids.numpy()[order]
    return np.concatenate([order[shuffled == c][:most] for c in wanted])


def tsne(study: Study) -> None:
    """Figure 3: t-SNE of target features of four classes by source only, TAN and CLAN.

    At most 150 features a class, the same pixels for every network. First seed.
    """
    try:
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise ValueError("t-SNE needs scikit-learn: pip install scikit-learn") from error
    cells, results = first_seed(study)
    source, val, to_source_ids = open_target(next(iter(cells.values())))
    wanted = [source.classes.index(name) for name in FIGURE_3 if name in source.classes]
    palette = palette_of(source.classes) / 255

    figure = Figure(figsize=(4 * len(cells), 3.8), layout="constrained")
    axes = figure.subplots(1, len(cells), squeeze=False)[0]
    for ax, (method, flags) in zip(axes, cells.items(), strict=True):
        G = load(newest_checkpoint(flags["out"]), device_of(study))
        kept, kept_ids = [], []
        for i, features, ids in labelled_features(G, val, to_source_ids, study.images):
            picks = some_of_each(i, ids, wanted, 20)
            kept.append(features[picks])
            kept_ids.append(ids[picks])
        x, class_of = torch.cat(kept), torch.cat(kept_ids)
        picks = some_of_each(0, class_of, wanted, 150)
        if len(picks) < 8:
            raise ValueError(f"{val.name} has fewer than 8 features of {', '.join(FIGURE_3)}")
        perplexity = min(30, (len(picks) - 1) / 3)
        plane = TSNE(random_state=0, init="pca", perplexity=perplexity).fit_transform(x[picks])
        for c in wanted:
            at = plane[class_of[picks].numpy() == c]
            ax.scatter(*at.T, s=6, color=palette[c], label=source.classes[c])
        ax.set(title=METHODS[method].label, xticks=[], yticks=[])
    axes[-1].legend(fontsize=8)
    save_figure(study, figure, f"tsne-{study.task}", [r for g in results.values() for r in g])


def figure5(study: Study) -> None:
    """Figure 5: target image, each method's prediction, truth. First seed."""
    cells, results = first_seed(study)
    source, val, to_source_ids = open_target(next(iter(cells.values())))
    device = device_of(study)
    networks = {
        METHODS[m].label: load(newest_checkpoint(flags["out"]), device)
        for m, flags in cells.items()
    }
    figure = evaluation.draw(val, to_source_ids, networks, device, source.classes, count=4)
    save_figure(study, figure, f"figure5-{study.task}", [r for g in results.values() for r in g])


def weightmap(study: Study) -> None:
    """What the adaptive weight does: M, the weight and D's answer on one target image.

    One row shows the start of adaptation, the other its end. Both show the answer of the last D,
    because only this one has learnt. First seed of CLAN.
    """
    flags = study.cell(study.seeds[0], method="clan")
    results = run_cells(study, [flags], checkpoints=True)
    source, val, to_source_ids = open_target(flags)
    _, hyper = configure(flags)
    _, image, label = next(evaluation.spread_images(val, 1))
    last = newest_checkpoint(flags["out"])
    start = flags["out"] / BEFORE
    if not start.exists():  # adversarial from the first step on
        start = of_steps(flags["out"])[0]
    D = load_d(last, hyper, len(source.classes))
    figure = Figure(figsize=(14, 4.4), layout="constrained")
    axes = figure.subplots(2, 5)
    palette = palette_of(source.classes)
    left = {"target image": image.permute(1, 2, 0), "truth": palette[to_source_ids[label.numpy()]]}
    for row, (name, pixels), path in zip(axes, left.items(), (start, last), strict=True):
        step = read_metadata(path)["step"]
        p, m = ensemble_and_m(load(path, torch.device("cpu")), image, tuple(image.shape[-2:]))
        with torch.no_grad():
            answer = clan.domain_logits(D, p[None])[0, 0].sigmoid()
        row[0].imshow(pixels)
        row[1].imshow(palette[p.argmax(dim=0).numpy()])
        titles = (name, f"prediction, step {step}", "M", "weight lambda_local M + eps")
        weight = clan.adaptive_weight(m[None, None], hyper)[0, 0]
        for ax, values, colours, low, high in (
            (row[2], m, "magma", 0, None),
            (row[3], weight, "magma", 0, None),
            (row[4], answer, "coolwarm", 0, 1),
        ):
            drawn = ax.imshow(values, cmap=colours, vmin=low, vmax=high)
            figure.colorbar(drawn, ax=ax, shrink=0.6)
        for ax, title in zip(row, (*titles, "final D: probability of source"), strict=True):
            ax.set_title(title, fontsize=9)
            ax.axis("off")
    save_figure(study, figure, f"weightmap-{study.task}", results)
