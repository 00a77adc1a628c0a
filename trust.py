"""Signs that need no label: does M, or confidence, say where the network is wrong?

    python study.py disagreement    # M against errors, and what makes it informative
    python study.py calibration     # confidence against accuracy
    python study.py labels          # of ST, CBST and CDA: how many are right
    python study.py ranking         # of runs and checkpoints, against mIoU

Labels are read here to judge these signs, never to train.
"""

import json
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

import data
import eval as evaluation
from alignment import CdaHyper, class_sizes, easy_tasks, landmark_labels, last
from baselines import labeller_of, pseudo_labels
from checkpoints import BEFORE, newest_checkpoint, read_checkpoint
from classes import IGNORE
from control import GRADIENT, REGIMES, on_streets
from figures import bars, device_of, first_seed, load, open_target
from methods import METHODS
from models import Generator
from predictions import ensemble_and_m
from runs import (
    Study,
    all_fields,
    key_of_line,
    mean_and_deviation,
    miou,
    run_groups,
    save_figure,
    spread,
    usual_fields,
    write,
)
from settings import Flags, configure
from train import open_all

# Does M tell where the ensemble is wrong?


def mean_ranks(values: np.ndarray) -> np.ndarray:
    """The rank of each value, from 1. Equal values share their mean rank."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


def auc(scores: np.ndarray, wrong: np.ndarray) -> float:
    """Probability that a wrong pixel scores higher than a right one (ties count a half)."""
    positive, negative = int(wrong.sum()), int((~wrong).sum())
    if not positive or not negative:
        return float("nan")
    return float(
        (mean_ranks(scores)[wrong].sum() - positive * (positive + 1) / 2) / (positive * negative)
    )


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's; NaN where one of the two is constant."""
    if len(a) < 2 or a.std() == 0 or b.std() == 0:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])


def m_and_errors(
    G: Generator, val: data.DataSet, to_source_ids: np.ndarray, count: int, most: int = 20_000
) -> list[np.ndarray]:
    """M, 1 - confidence, wrong (bool) and class of labelled pixels, at most `most` of an image."""
    parts = []
    for i, image, label in evaluation.spread_images(val, count):
        ids = torch.from_numpy(to_source_ids[label.numpy()])
        p, m = ensemble_and_m(G, image, ids.shape)
        confidence, pred = p.max(dim=0)
        seen = (ids < G.num_classes).flatten().nonzero()[:, 0].numpy()
        picks = np.random.default_rng(i).permutation(seen)[:most]
        parts.append([x.flatten().numpy()[picks] for x in (m, 1 - confidence, pred != ids, ids)])
    return [np.concatenate(part) for part in zip(*parts, strict=True)]


def agreement(
    G: Generator, val: data.DataSet, to_source_ids: np.ndarray, classes: tuple[str, ...], count: int
) -> tuple[dict, dict]:
    """(numbers over all pixels, correlation of M with error by class) of one network."""
    m, doubt, wrong, ids = m_and_errors(G, val, to_source_ids, count)
    a, b = (torch.cat([w.flatten() for w in head]) for head in G.classifier_weights(False))
    numbers = {
        "cos of the heads": F.cosine_similarity(a, b, dim=0).item(),
        "mean M": float(m.mean()),
        "correlation": correlation(m, wrong),
        "AUC of M": auc(m, wrong),
        "AUC of 1 - confidence": auc(doubt, wrong),
    }
    by_class = {name: correlation(m[ids == i], wrong[ids == i]) for i, name in enumerate(classes)}
    return numbers, by_class


HEADS = {"each": "a loss for each head", "ensemble": "one loss, of the ensemble"}  # by seg_heads


def head_settings(study: Study) -> dict[str, Flags]:
    """What may make the two heads disagree: the rows of `disagreement`."""
    _, hyper = study.shared
    others = "ensemble" if hyper.seg_heads == "each" else "each"
    settings: dict[str, Flags] = {
        "as it is": {},
        GRADIENT[not hyper.detach_m]: {"detach_m": not hyper.detach_m},
        "lambda_weight 0": {"lambda_weight": 0.0},
        "lambda_weight 0.1": {"lambda_weight": 0.1},
        "heads from N(0, 0.06)": {"head_std": 0.06},
        HEADS[others]: {"seg_heads": others},
        "half the steps": {"steps": hyper.steps // 2, "adv_start": hyper.adv_start // 2},
    }
    if on_streets(study):
        settings["shift of look alone"] = {"shift": REGIMES["look alone"]}
    return settings


def disagreement(study: Study) -> None:
    """What makes M informative: M against the error of the ensemble on the target, by setting.

    It is measured at the start and at the end of adaptation. Correlations are over pixels, between
    M and whether the prediction is wrong.
    """
    groups = {name: study.cells(**change) for name, change in head_settings(study).items()}
    results = run_groups(study, groups, checkpoints=True)
    count, device = study.images, device_of(study)
    rows, classes = [], {}
    for name, cells in groups.items():
        source, val, to_source_ids = open_target(cells[0])
        for when, path_of in (
            ("start", lambda out: out / BEFORE),
            ("end", newest_checkpoint),
        ):
            paths = [p for p in (path_of(flags["out"]) for flags in cells) if p.exists()]
            if not paths:  # adversarial from the first step on
                continue
            found = [
                agreement(load(p, device), val, to_source_ids, source.classes, count) for p in paths
            ]
            scores = [r.get("miou_before") if when == "start" else r["miou"] for r in results[name]]
            means = [spread([n[k] for n, _ in found])[0] for k in found[0][0]]
            rows.append([name, when, mean_and_deviation(scores), *(f"{v:.3f}" for v in means)])
            classes[name, when] = [
                spread([c[k] for _, c in found if not np.isnan(c[k])])[0] for k in source.classes
            ]
            header = ["setting", "adaptation", "mIoU", *found[0][0]]
    note = (
        f"M against wrong predictions, over {count} images of the target's validation split, at "
        "most 20,000 pixels of each; means over seeds. AUC is the chance that a wrong pixel has "
        "the larger value."
    )
    write(study, f"disagreement-{study.task}", header, rows, note, results)
    plain = {
        f"{name}, {when}": v for (name, when), v in classes.items() if name in list(groups)[:5]
    }
    columns = zip(source.classes, *plain.values(), strict=True)
    rows = [[name, *(f"{v:.2f}" for v in values)] for name, *values in columns]
    note = "Correlation of M with wrong predictions, by class, at adaptation's start and end."
    write(study, f"disagreement-classes-{study.task}", ["class", *plain], rows, note, results)
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    drawn = {name: v for name, v in plain.items() if name.startswith(tuple(list(groups)[:2]))}
    bars(figure.subplots(), list(source.classes), drawn)
    figure.axes[0].set_ylabel("correlation of M with error")
    distinct = [r for group in results.values() for r in group]
    save_figure(study, figure, f"disagreement-{study.task}", distinct)


# Can its confidence be trusted?


def calibration_error(confidence: np.ndarray, right: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error: |accuracy - mean confidence| in bins of equal width, weighted.

    confidence: N in [0, 1]. right: N, whether the prediction is. 0: of all that is predicted with
    80 %, 80 % is right.
    """
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    counts = np.bincount(place, minlength=bins)
    known = counts > 0
    sums = (np.bincount(place, weights=x, minlength=bins)[known] for x in (confidence, right))
    gaps = np.abs(np.subtract(*sums)) / counts[known]
    return float((gaps * counts[known]).sum() / counts.sum())


THRESHOLDS = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99)


def calibration(study: Study) -> None:
    """How far confidence can be trusted: calibration error, coverage and accuracy above T.

    For `eval.py predict --confidence T`. Labelled pixels of the target's validation split, at most
    20,000 of an image. First seed, last checkpoint.
    """
    cells, results = first_seed(study)
    _, val, to_source_ids = open_target(next(iter(cells.values())))
    rows, figure = [], Figure(figsize=(9, 3.4), layout="constrained")
    left, right_panel = figure.subplots(1, 2)
    for method, flags in cells.items():
        G = load(newest_checkpoint(flags["out"]), device_of(study))
        _, doubt, wrong, _ = m_and_errors(G, val, to_source_ids, study.images)
        confidence, right = 1 - doubt, ~wrong
        label = METHODS[method].label
        coverage = [(confidence >= t).mean() for t in THRESHOLDS]
        accuracy = [right[confidence >= t].mean() if c else np.nan
                    for t, c in zip(THRESHOLDS, coverage, strict=True)]  # fmt: skip
        both = (f"{100 * c:.0f}, {100 * a:.1f}" for c, a in zip(coverage, accuracy, strict=True))
        rows.append([label, f"{100 * calibration_error(confidence, right):.1f}", *both])
        left.plot(THRESHOLDS, 100 * np.array(coverage), "o-", label=label)
        right_panel.plot(THRESHOLDS, 100 * np.array(accuracy), "o-", label=label)
    right_panel.plot((0, 1), (0, 100), "k:", lw=1)
    left.set(xlabel="T", ylabel="% of the pixels with confidence T or more")
    right_panel.set(xlabel="T", ylabel="% of these that are right")
    left.legend(fontsize=8)
    distinct = [r for group in results.values() for r in group]
    save_figure(study, figure, f"calibration-{study.task}", distinct)
    header = ["method", "calibration error", *(f"T = {t:g}" for t in THRESHOLDS)]
    note = (
        "Expected calibration error in % (15 bins); then for each T the % of the pixels with that "
        "confidence or more, and the % of these that are right. First seed, last checkpoint, "
        f"{min(study.images, len(val))} images."
    )
    write(study, f"calibration-{study.task}", header, rows, note, results)


# How good are the labels that the other systems learn from, and what they assume of class sizes?


def labelled_target(flags: Flags) -> tuple[data.DataSet, np.ndarray]:
    """The images on which labels are judged: streets' training images, else those of val."""
    settings, _ = configure(flags)
    source, _, judged = open_all(settings)
    if settings.tgt == "streets":
        place = ("streets", "target", "train", None, judged.size)
        judged = data.open_dataset(*place, shift=settings.shift, scenes=settings.scenes)
    return judged, data.shared_classes(source, judged)[0]


LABELLING = ("st", "cbst", "cda")


def labels(study: Study) -> None:
    """How many of the labels of ST, CBST and CDA are right, and how large the target's classes are.

    Labels of the target's images, as the method makes them at the end of a run: what makes them is
    in the last checkpoint. Then class sizes: those that CDA infers for each image, and whether the
    bounds of FCNs in the wild hold.
    """
    groups = {method: study.cells(method=method) for method in LABELLING}
    results = run_groups(study, groups, checkpoints=True)
    judged = {m: [judged_labels(study, flags) for flags in cells] for m, cells in groups.items()}
    rows = []
    for method, found in judged.items():
        shares = [
            mean_and_deviation(run[key] for run in found)
            for key in ("labelled", "right", "network")
        ]
        never = np.mean([run["never"] for run in found])
        score = mean_and_deviation(map(miou, results[method]))
        rows.append([METHODS[method].label, *shares, f"{never:.1f}", score])
    header = ["method", "labelled", "right", "network there", "classes without", "mIoU"]
    note = (
        f"% of the pixels that get a label at the end, on {study.images} images of the target "
        "(streets: training images); % of these labels that are right, and of the network's own "
        "answers there, as it was when it was frozen to label (CDA: when adaptation started); how "
        "many classes get no label. Mean ± deviation over seeds."
    )
    write(study, f"labels-{study.task}", header, rows, note, results)

    of_source, of_target = class_sizes_of_target(groups["cda"][0])
    inferred = mean_and_deviation(run["apart"] for run in judged["cda"])
    header = ["images of", "below the bound", "above", "the source's mean", "CDA"]
    note = (
        "In %, of all classes of all training images: how often a class covers less than the lower "
        "bound of FCNs in the wild (its mean in the source's images that have it), or more than "
        "the upper one. Then how many of an image's pixels would have to change their class until "
        "it had the class shares of the source's mean, or those that CDA infers: half the sum of "
        "differences, a mean over images."
    )
    rows = [["source", *of_source, ""], ["target", *of_target, inferred]]
    write(study, f"sizes-{study.task}", header, rows, note, {"cda": results["cda"]})


def labeller(flags: Flags) -> tuple[Generator, Callable[[torch.Tensor, torch.Tensor], tuple]]:
    """(frozen network, what labels) of a finished run.

    What labels takes an image 3 H' W' and the network's p, C H W. It returns labels, H W, and the
    class shares that it infers, C, or None.
    """
    path = newest_checkpoint(flags["out"])
    G = load(path, torch.device("cpu"))
    tensors, _ = read_checkpoint(path)
    state = {k.removeprefix("state."): v for k, v in tensors.items() if k.startswith("state.")}
    G.load_state_dict(labeller_of(state))
    G.eval()
    _, hyper = configure(flags)
    if not isinstance(hyper, CdaHyper):
        return G, lambda image, p: (pseudo_labels(p[None], state["thresholds"])[0], None)
    easy = easy_tasks(G, hyper)
    easy.load_state_dict({k[2:]: v for k, v in tensors.items() if k.startswith("D.")})

    @torch.no_grad()
    def of_easy_tasks(image: torch.Tensor, p: torch.Tensor) -> tuple:
        whole, cells = easy(last(G.features(image[None])))
        landmarks = landmark_labels(cells, hyper.landmarks, p.shape[-2:])[0]
        return landmarks, whole.softmax(dim=1)[0]

    return G, of_easy_tasks


def judged_labels(study: Study, flags: Flags) -> dict[str, float]:
    """Of one run, shares: pixels labelled, labels right, the network's answers there right; the
    number of classes without a label; of CDA how far inferred class shares are from the true ones.
    """
    G, label_image = labeller(flags)
    target, to_source_ids = labelled_target(flags)
    kept = right = of_network = pixels = 0
    counts = torch.zeros(G.num_classes)
    apart = []
    for _, image, label in evaluation.spread_images(target, study.images):
        ids = torch.from_numpy(to_source_ids[label.numpy()])
        p, _ = ensemble_and_m(G, image, ids.shape)
        found, inferred = label_image(image, p)
        labelled = (found != IGNORE) & (ids != IGNORE)
        pixels += int((ids != IGNORE).sum())
        kept += int(labelled.sum())
        right += int((found == ids)[labelled].sum())
        of_network += int((p.argmax(dim=0) == ids)[labelled].sum())
        counts += torch.bincount(found[labelled], minlength=G.num_classes)
        if inferred is not None:
            apart.append(float((inferred - shares_of(ids, G.num_classes)).abs().sum()) / 2)
    return {
        "labelled": kept / max(pixels, 1),
        "right": right / max(kept, 1),
        "network": of_network / max(kept, 1),
        "never": int((counts == 0).sum()),
        "apart": float(np.mean(apart)) if apart else float("nan"),
    }


def shares_of(ids: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Each class's share of the labelled pixels, C."""
    counts = torch.bincount(ids.flatten().long(), minlength=IGNORE + 1)[:num_classes].float()
    return counts / counts.sum().clamp(min=1)


def class_sizes_of_target(flags: Flags) -> tuple[list[str], list[str]]:
    """What FCNs in the wild and CDA assume of class sizes, in the source's and target's images.

    Of each, in %: how often a class of an image covers less than the lower bound, and more than the
    upper one; how far the image's class shares are from the source's mean.
    """
    source, _, _ = open_all(configure(flags)[0])
    target, to_source_ids = labelled_target(flags)
    C = len(source.classes)
    of_source = [torch.from_numpy(data.label_at(source, i)) for i in range(len(source))]
    ids = (to_source_ids[data.label_at(target, i)] for i in range(len(target)))
    of_target = [torch.from_numpy(x) for x in ids]
    _, least, most = class_sizes((x[None] for x in of_source), C)
    mean = torch.stack([shares_of(x, C) for x in of_source]).mean(dim=0)

    def row(images: list[torch.Tensor]) -> list[str]:
        shares = torch.stack([shares_of(x, C) for x in images])  # images C
        present = shares > 0
        below, above = (shares < least)[present], (shares > most)[present]
        apart = (shares - mean).abs().sum(dim=1) / 2
        return [f"{100 * x.float().mean():.1f}" for x in (below, above, apart)]

    return row(of_source), row(of_target)


# Which figure that needs no label ranks runs as mIoU does?

FIGURES: dict[str, Callable[[dict], float]] = {
    "confidence": lambda x: x["confidence"],
    "agreement of the heads, 1 - M": lambda x: 1 - x["m"],
    "entropy of the class shares": lambda x: entropy(x["shares"]),
    "D takes the target for the source": lambda x: x.get("d_target", float("nan")),
}


def entropy(shares: dict[str, float] | list[float]) -> float:
    """Of the classes' shares of the predicted pixels, in nats. High: no class is missing."""
    p = np.array(list(shares.values()) if isinstance(shares, dict) else shares, float)
    return float(-(p[p > 0] * np.log(p[p > 0])).sum())


def ranked(groups: list[list[dict]], figure: Callable[[dict], float]) -> tuple[float, float]:
    """(Spearman, loss): means over groups of at least three that a figure and mIoU can rank.

    loss: how far the mIoU of the candidate with the largest figure lies below the best, in points.
    """
    found = []
    for group in groups:
        known = [x for x in group if not np.isnan(figure(x))]
        a, b = (np.array([pick(x) for x in known]) for pick in (figure, miou))
        if len(known) >= 3 and np.ptp(a) > 0 and np.ptp(b) > 0:
            rank = correlation(mean_ranks(a), mean_ranks(b))
            found.append((rank, 100 * (b.max() - b[a.argmax()])))
    if not found:
        return float("nan"), float("nan")
    return float(np.mean([x for x, _ in found])), float(np.mean([x for _, x in found]))


def candidates(lines: list[dict]) -> dict[str, list[list[dict]]]:
    """Groups of runs or checkpoints that someone without labels would choose from."""

    def grouped(key: Callable[[dict], str]) -> list[list[dict]]:
        found: dict[str, list[dict]] = {}
        for line in lines:
            found.setdefault(key(line), []).append(line["result"])
        return list(found.values())

    curves = [line["result"].get("curve", []) for line in lines]
    return {
        "all runs": [[line["result"] for line in lines]],
        "the runs of one method": grouped(lambda x: x["settings"]["method"]),
        "the seeds of one setting": grouped(lambda x: json.dumps(x["settings"], sort_keys=True)),
        "the settings of one seed": grouped(lambda x: str(x["seed"])),
        "the checkpoints of one run": [x for x in curves if len(x) >= 3],
    }


def ranking(study: Study) -> None:
    """Which figure that needs no label ranks runs and checkpoints as mIoU does?

    Over the recorded runs of this target that are scored on val. It trains nothing.
    """
    path = study.results / f"{study.task}.jsonl"
    lines = list(map(json.loads, path.read_text().splitlines())) if path.exists() else []
    lines = [x for x in lines if x["settings"]["split"] == "val" and "confidence" in x["result"]]
    target = target_of(all_fields(study.cell(0)))
    lines = [x for x in lines if target_of(usual_fields() | x["settings"]) == target]
    lines = [x for x in lines if x["settings"].get("looks") != "city"]  # a bound, no choice
    made_once = {key_of_line(x): x for x in reversed(lines)}
    lines = list(reversed(made_once.values()))  # of a run from two machines the first counts
    if len(lines) < 3:
        raise ValueError(f"{path} has fewer than three scored runs: make some, by `control`")
    groups = candidates(lines)
    rows = []
    for name, figure in FIGURES.items():
        pairs = [ranked(group, figure) for group in groups.values()]
        rows.append([name, *(f"{rank:.2f}, loses {loss:.1f}" for rank, loss in pairs)])
    curves = groups["the checkpoints of one run"]
    lost = [100 * (max(map(miou, curve)) - miou(curve[-1])) for curve in curves]
    rows.append(["the last checkpoint", *[""] * (len(groups) - 1), f"loses {spread(lost)[0]:.1f}"])
    note = (
        "Spearman's correlation with target mIoU, a mean over groups, and how many points of mIoU "
        f"are lost by taking the largest figure. {len(lines)} recorded runs; groups of "
        "at least three."
    )
    results = {"recorded": [line["result"] | recorded_as(line) for line in lines]}
    write(study, f"ranking-{study.task}", ["figure", *groups], rows, note, results)


def target_of(fields: dict) -> tuple:
    """What makes the target's images: runs of two targets are no candidates for one."""
    return tuple(str(fields[key]) for key in ("shift", "scenes", "tgt_size"))


def recorded_as(line: dict) -> dict:
    """What tables say of a recorded run besides its result."""
    place = {"settings": line["settings"] | {"seed": line["seed"]}, "checkpoint": json.dumps(line)}
    return place | {key: line[key] for key in ("commit", "machine")}
