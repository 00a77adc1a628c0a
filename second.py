"""The second stage: what it adds to what adaptation won, and whether M is a measure of trust.

    python study.py trials --jobs 2     # on dev: one change at a time, from one run of TAN
    python study.py decline --jobs 2    # on dev: what falls first where the stage loses
    python study.py fourier --jobs 2    # on dev: FDA's beta
    python study.py signs --jobs 2      # M and confidence against wrong labels of the teacher
    python study.py second --jobs 2     # starts, weights of the labels, controls
    python study.py reliable            # how many labels are right, the surest first

Each stage goes on with a finished run (--method selftrain --init RUN), and takes as many steps as
that run's adaptation. The result is the teacher of the last step.
"""

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

import data
import eval as evaluation
import train
from checkpoints import BEFORE, newest_checkpoint, of_steps, read_checkpoint, read_metadata
from classes import IGNORE
from control import BATCHNORM, MAIN, SHARED, on_streets
from figures import device_of, load, open_target
from models import Generator
from predictions import ensemble_and_m
from runs import (
    INTERVALS,
    Study,
    difference,
    mean_and_deviation,
    miou,
    points_apart,
    run_cells,
    run_groups,
    save_figure,
    spread,
    unknown_seeds,
    write,
)
from selftrain import READ_BY, SelftrainHyper, Trust, trust_of
from settings import Flags, configure
from tables import step_costs
from trust import auc, labelled_target, m_and_errors
from tuning import on_dev

Cells = list[Flags]


def stage_after(study: Study, firsts: Cells, file: str = "", **numbers) -> Cells:
    """The second stages that go on with these runs, one a seed. numbers: what they change.

    Each takes as many steps as adaptation did, and keeps its checkpoints, five in these steps.
    --trusted and --tau of the study hold for the weights that read them. file: a checkpoint of the
    first runs; else they are complete.
    """
    _, hyper = configure(firsts[0])
    length = hyper.steps - hyper.adv_start
    study.starts.update({str(flags["out"] / file): flags for flags in firsts})
    change: Flags = {"steps": length, "save_every": max(1, length // 5), "keep": 99} | numbers
    trust = (study.flags | change).get("trust", SelftrainHyper.trust)
    read = {k for k, weights in READ_BY.items() if trust in weights}
    change = {k: v for k, v in study.flags.items() if k in read} | change
    rest = {k: v for k, v in study.flags.items() if k not in {"steps", "adv_start", *READ_BY}}
    of_stage = replace(study, flags=rest)
    return [
        of_stage.cell(flags["seed"], method="selftrain", init=str(flags["out"] / file), **change)
        for flags in firsts
    ]


def stage_weighed_by(study: Study, firsts: Cells, trust: Trust, **numbers) -> Cells:
    """`stage_after` with this weight of the labels. The tau of M is --tau, or `start_tau`."""
    if trust in READ_BY["tau"] and "tau" not in study.flags:
        run_cells(study, firsts[:1], checkpoints=True)
        numbers["tau"] = start_tau(study, firsts[0])
    return stage_after(study, firsts, trust=trust, **numbers)


def numbers_of_stage(study: Study, flags: Flags) -> SelftrainHyper:
    """The numbers of the second stage after a run, as the study's flags say."""
    hyper: Any = configure(stage_after(study, [flags])[0])[1]
    return hyper


def first_runs(study: Study, changes: dict[str, Flags]) -> tuple[dict[str, Cells], dict]:
    """(cells, results) of the runs that second stages begin with, made with their checkpoints."""
    cells = {name: study.cells(**change) for name, change in changes.items()}
    return cells, run_groups(study, cells, checkpoints=True)


# What decides whether it keeps what was won. On dev, with tuning seeds.

# First a teacher of momentum .99 and changes of it, then slower and faster ones. That of .999 was
# the first that kept what was won. The rest change it in one thing, or in more. The last is the
# default.
SLOW: Flags = {"teacher_momentum": 0.999, "lr_g": 0.002, "class_mix": False, "batchnorm": "before"}
FASTER = SLOW | {"teacher_momentum": 0.99}
MIX = SLOW | {"class_mix": True}
ALL_THREE = MIX | {"batchnorm": "batch", "teacher_momentum": 0.997}
LOSING = "teacher's momentum .99"  # what `decline` looks at
CHANGES: dict[str, Flags] = {
    LOSING: FASTER,
    "momentum .99, rate x 1/5": FASTER | {"lr_g": 0.0004},
    "momentum .99, rate x 5": FASTER | {"lr_g": 0.01},
    "momentum .99, every label counts": FASTER | {"trust": "constant"},
    "momentum .9": SLOW | {"teacher_momentum": 0.9},
    "momentum .999": SLOW,
    "momentum .9997": SLOW | {"teacher_momentum": 0.9997},
    "rate x 2.5": SLOW | {"lr_g": 0.005},
    "every label counts": SLOW | {"trust": "constant"},
    "a third counts": SLOW | {"trusted": 0.2},
    "colours as they are": SLOW | {"colours": 0.0},
    "BatchNorm of both domains": SLOW | {"batchnorm": "batch"},
    "half hidden": SLOW | {"masked": 0.5},
    "class mix": MIX,
    "class mix, half hidden": MIX | {"masked": 0.5},
    "class mix, rate x 1/2": MIX | {"lr_g": 0.001},
    "class mix, momentum .997": MIX | {"teacher_momentum": 0.997},
    "class mix, BatchNorm": MIX | {"batchnorm": "batch"},
    "class mix, BatchNorm, momentum .997": ALL_THREE,
    "the same, rate x 2.5": ALL_THREE | {"lr_g": 0.005},
}


def trials(study: Study) -> None:
    """What makes the second stage keep or lose what TAN has won: one change at a time, on dev.

    Labels: how many of the trusted ones are right, and how many are trusted, at three moments.
    """
    study = replace(on_dev(study), unpaired=True)
    cells, firsts = first_runs(study, {"TAN": MAIN["TAN"]})
    trust = numbers_of_stage(study, cells["TAN"][0]).trust
    known = {k: v for k, v in CHANGES.items() if "trusted" not in v or trust in READ_BY["trusted"]}
    stages = {k: stage_after(study, cells["TAN"], **v) for k, v in known.items()}
    results = run_groups(study, stages, checkpoints=True)
    rows = []
    length = configure(next(iter(stages.values()))[0])[1].steps
    moments = (0, max(1, length // 5), length)
    for name, group in results.items():
        if lost := [result["diverged"] for result in group if "diverged" in result]:
            rows.append([name, "", "diverged", *[""] * (len(moments) + 2)])
            print(f"{name}, {len(lost)} of {len(group)} runs: {lost[0]}", flush=True)
            continue
        labels = [labels_over_time(study, flags, moments) for flags in stages[name]]
        means = [np.mean([x[step] for x in labels], axis=0) for step in moments]
        shown = [f"{100 * right:.1f} of {100 * share:.0f}" for right, share in means]
        students = (r["student"]["miou"] for r in group)
        gain = f"{np.mean(points_apart(group, firsts['TAN'])):+.1f}"
        early = mean_and_deviation(score_at(r, moments[1]) for r in group)
        rows.append([name, early, mean_and_deviation(map(miou, group)), gain,
                     mean_and_deviation(students), *shown])  # fmt: skip
    header = ["change", f"mIoU on {study.shared[0].split}, step {moments[1]}", "at the end"]
    header += ["minus TAN", "student", *(f"labels at step {step}" for step in moments)]
    note = (
        "Target mIoU in % of the teacher and of the student after the second stage, tuning seeds: "
        "for choosing, not reporting. Labels: % of the trusted ones that are right, of the % of "
        f"the pixels that are trusted, on {study.images} of the target's training images, where a "
        "batch is one image. There is no adversary in this stage."
    )
    write(study, f"trials-{study.task}", header, rows, note, results | firsts)


def score_at(result: dict, step: int) -> float | None:
    """mIoU of the teacher at a step, or None where it was not scored then."""
    return next((x["miou"] for x in result.get("curve", []) if x["step"] == step), None)


def teachers(flags: Flags) -> dict[int, Path]:
    """The checkpoints of a second stage by step, its start included."""
    start = flags["out"] / BEFORE
    found = {read_metadata(p)["step"]: p for p in of_steps(flags["out"])}
    return ({0: start} if start.exists() else {}) | found


def labels_over_time(
    study: Study, flags: Flags, moments: tuple[int, ...]
) -> dict[int, tuple[float, float]]:
    """By step: (accuracy of the teacher's labels, each with its weight; their mean weight)."""
    target, to_source_ids = labelled_target(flags)
    hyper: Any = configure(flags)[1]
    found, paths = {}, teachers(flags)
    for step in moments:
        G = load(paths[step], device_of(study))
        found[step] = accuracy_of_labels(G, target, to_source_ids, hyper, study.images)
    return found


def trusted_labels(
    G: Generator, target: data.DataSet, to_source_ids: np.ndarray, hyper: SelftrainHyper, count: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(labels, their weights, the truth) on the labelled pixels of `count` images, by image."""
    for _, image, label in evaluation.spread_images(target, count):
        ids = torch.from_numpy(to_source_ids[label.numpy()])
        p, m = ensemble_and_m(G, image, ids.shape)
        weight = trust_of(hyper, p[None], m[None, None])[0]
        known = ids != IGNORE
        yield p.argmax(dim=0)[known], weight[known], ids[known]


def decline(study: Study) -> None:
    """What falls first where the second stage loses what TAN has won: labels, teacher or student.

    On dev, with the setting LOSING, and with the same but no labels of the target, at each 25th of
    the stage up to a fifth of it, and at the end. Labels: the trusted ones, as in `trials`. Their
    accuracy is also shown as a mean over the classes that they name, with no regard to size.
    """
    study = replace(on_dev(study), unpaired=True)
    cells, _ = first_runs(study, {"TAN": MAIN["TAN"]})
    length = numbers_of_stage(study, cells["TAN"][0]).steps
    losing = FASTER | {"save_every": max(1, length // 25)}
    changes = {LOSING: losing, "the same, no labels of the target": losing | {"lambda_target": 0.0}}
    stages = {name: stage_after(study, cells["TAN"], **v) for name, v in changes.items()}
    results = run_groups(study, stages, checkpoints=True)
    _, dev, _ = open_target(cells["TAN"][0])
    device = device_of(study)
    rows = []
    for name, group in stages.items():
        target, to_source_ids = labelled_target(group[0])
        hyper: Any = configure(group[0])[1]
        steps = set.intersection(*({*teachers(flags)} for flags in group))
        for step in sorted(x for x in steps if x <= length // 5 or x == length):
            found = []
            for flags in group:
                path = teachers(flags)[step]
                G = load(path, device)
                student = student_in(path, G)
                labels = label_accuracies(G, target, to_source_ids, hyper, study.images)
                found.append([*labels, score_on(G, dev, device), score_on(student, dev, device)])
            columns = zip(*found, strict=True)
            rows.append([name, str(step), *(mean_and_deviation(values) for values in columns)])
    header = ["change", "step", "labels right", "mean over classes", "mIoU of the teacher"]
    header += ["of the student"]
    note = (
        f"In %, mean ± deviation over tuning seeds. Labels: the trusted ones on {study.images} of "
        f"the target's training images. mIoU: on {study.shared[0].split}."
    )
    write(study, f"decline-{study.task}", header, rows, note, results)


def labels_by_class(
    G: Generator, target: data.DataSet, to_source_ids: np.ndarray, hyper: SelftrainHyper, count: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """By the class that a label names, C: the weight of the right ones, and of all; the pixels."""
    right, total, pixels = np.zeros(G.num_classes), np.zeros(G.num_classes), 0
    for labels, weight, ids in trusted_labels(G, target, to_source_ids, hyper, count):
        total += np.bincount(labels, weight, G.num_classes)
        right += np.bincount(labels, weight * (labels == ids), G.num_classes)
        pixels += len(ids)
    return right, total, pixels


def label_accuracies(
    G: Generator, target: data.DataSet, to_source_ids: np.ndarray, hyper: SelftrainHyper, count: int
) -> tuple[float, float]:
    """Accuracy of the trusted labels on `count` images: of all, and the mean over their classes."""
    right, total, _ = labels_by_class(G, target, to_source_ids, hyper, count)
    named = total > 0
    return float(right.sum() / total.sum()), float((right[named] / total[named]).mean())


def student_in(path: Path, teacher: Generator) -> Generator:
    """G of a second stage's checkpoint, of which `load` has given the teacher."""
    tensors, student = read_checkpoint(path)[0], copy.deepcopy(teacher)
    weights = {k.removeprefix("G."): v for k, v in tensors.items() if k.startswith("G.")}
    student.load_state_dict(weights)
    return student


def score_on(G: Generator, val: data.DataSet, device: torch.device) -> float:
    """mIoU in [0, 1] on a split that has the classes of the source."""
    confusion = evaluation.evaluate(G, val, np.arange(256, dtype=np.uint8), device=device)
    return evaluation.scores(confusion, val.classes, val.classes)["miou"]


def accuracy_of_labels(
    G: Generator, target: data.DataSet, to_source_ids: np.ndarray, hyper: SelftrainHyper, count: int
) -> tuple[float, float]:
    """Over the labelled pixels of `count` images: as `labels_over_time` says."""
    right, total, pixels = labels_by_class(G, target, to_source_ids, hyper, count)
    return right.sum() / max(total.sum(), 1e-9), total.sum() / max(pixels, 1)


# Is M a measure of trust?

USELESS = 0.05  # a spread of exp(-M / tau) below this cannot matter


def signs(study: Study) -> None:
    """M and confidence against the wrong labels of the teacher, while the second stage goes on.

    AUC: the chance that a wrong label has the larger M, or the smaller confidence. With Eq. 4 and
    without.
    """
    changes = {"TAN": MAIN["TAN"], "CLAN": {}, "CLAN without Eq. 4": {"lambda_weight": 0.0}}
    cells, _ = first_runs(study, changes)
    stages = {name: stage_after(study, group) for name, group in cells.items()}
    results = run_groups(study, stages, checkpoints=True)
    rows: list[list[str]] = []
    curves: dict[str, dict[int, dict[str, float]]] = {}
    for name, group in stages.items():
        target, to_source_ids = labelled_target(group[0])
        hyper: Any = configure(group[0])[1]
        taus: dict[int, float] = {}  # by seed, from the first step on
        for step in sorted(set.intersection(*({*teachers(flags)} for flags in group))):
            found = []
            for flags in group:
                G = load(teachers(flags)[step], device_of(study))
                m, doubt, wrong, _ = m_and_errors(G, target, to_source_ids, study.images)
                if flags["seed"] not in taus:
                    taus[flags["seed"]] = tau_before(study, m, hyper)
                found.append(numbers_of_m(m, doubt, wrong, taus[flags["seed"]]))
            means = {key: spread(x[key] for x in found)[0] for key in found[0]}
            matters = "" if means["spread"] >= USELESS else "could not matter"
            rows.append([name, str(step), *(f"{x:.3g}" for x in means.values()), matters])
            curves.setdefault(name, {})[step] = means
    header = ["start", "step", *NUMBERS_OF_M, ""]
    note = (
        f"Labelled pixels of {study.images} images of the target (streets: training images), "
        f"teacher's heads, means over seeds. {ABOUT_TAU}"
    )
    write(study, f"signs-{study.task}", header, rows, note, results)
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    ax = figure.subplots()
    for i, (name, values) in enumerate(curves.items()):
        for key, style in (("AUC of M", "-"), ("AUC of 1 - confidence", "--")):
            ax.plot([*values], [x[key] for x in values.values()], f"C{i}{style}",
                    label=f"{name}, {key.removeprefix('AUC of ')}")  # fmt: skip
    ax.set(xlabel="step of the second stage", ylabel="AUC against wrong labels")
    figure.legend(loc="outside right upper", fontsize=8)  # no place in the axes is free of lines
    save_figure(study, figure, f"signs-{study.task}", [r for g in results.values() for r in g])


def tau_for(m: np.ndarray, mean: float) -> float:
    """The tau with which exp(-M / tau) has this mean, in (0, 1), by bisection."""
    low, high = 1e-9, 1e3
    for _ in range(80):
        tau = (low * high) ** 0.5
        low, high = (tau, high) if np.exp(-m / tau).mean() < mean else (low, tau)
    return tau


def tau_before(study: Study, m: np.ndarray, hyper: SelftrainHyper) -> float:
    """--tau, or what ABOUT_TAU says. m: before the stage."""
    return study.flags.get("tau") or tau_for(m, hyper.trusted)


ABOUT_TAU = (
    "tau: as given, or with it the mean of exp(-M / tau) is the trusted share before the stage. "
    f"Spread: standard deviation of exp(-M / tau); below {USELESS} its weight could not matter."
)
NUMBERS_OF_M = ("AUC of M", "AUC of 1 - confidence", "wrong", "mean M", "tau", "spread")


def numbers_of_m(m: np.ndarray, doubt: np.ndarray, wrong: np.ndarray, tau: float) -> dict:
    """What `signs` says of one network."""
    chances = auc(m, wrong), auc(doubt, wrong)
    values = *chances, float(wrong.mean()), float(m.mean()), tau, float(np.exp(-m / tau).std())
    return dict(zip(NUMBERS_OF_M, values, strict=True))


# The results.

# What a label's weight is made from, as the rows say it.
BY: dict[Trust, str] = {
    "confidence": "by confidence",
    "m": "by M",
    "both": "by both",
    "constant": "constant",
    "least_m": "by least M",
}
# Of FDA, for `fourier`: the first three, then outwards to the largest that there is.
BETAS = (0.01, 0.02, 0.08, 0.2, 0.4, 0.5)
FDA = 0.5  # --fourier of the rows with it


def second(study: Study) -> None:
    """What the second stage adds: to each start, by the weight of its labels, without source.

    A row has as many steps of the second stage as its start has of adaptation. On streets the
    weights and controls are those of TAN's runs, and FDA has a second stage too. Elsewhere M's
    weight and a constant one follow, from the best of the three starts. BatchNorm alone, which the
    README advises for photographs, is there a fourth start, compared with its own stage alone.
    """
    firsts = {name: study.cells(**change) for name, change in MAIN.items()}
    trust = numbers_of_stage(study, firsts["TAN"][0]).trust
    groups = dict(firsts)
    groups |= with_stages(study, firsts, trust)
    results = with_starts(study, firsts, groups)
    best = max(firsts, key=lambda name: mean_miou(results[f"{name}, {BY[trust]}"]))
    start = "TAN" if on_streets(study) else best
    wanted: tuple[Trust, ...] = tuple(BY) if on_streets(study) else ("m", "constant")
    groups |= {f"{start}, {BY[w]}": stage_weighed_by(study, firsts[start], w) for w in wanted}
    results = with_starts(study, firsts, groups)
    if on_streets(study):
        groups |= controls(study, firsts, results, trust)
        groups[f"CLAN, {BY['least_m']}"] = stage_weighed_by(study, firsts["CLAN"], "least_m")
    fda: Flags = {"fourier": FDA}
    names = ("source only", "TAN")
    styled = {f"{name}, FDA": study.cells(**MAIN[name], **fda) for name in names}
    groups |= styled
    if on_streets(study):
        groups |= with_stages(study, styled, trust, **fda)
        results = with_starts(study, firsts | styled, groups)
    else:
        fourth = {BATCHNORM: study.cells(**SHARED[BATCHNORM])}
        results = with_starts(study, firsts, groups)
        results |= with_starts(study, fourth, fourth | with_stages(study, fourth, trust))
    write_second(study, start, BY[trust], results)


def with_stages(
    study: Study, firsts: dict[str, Cells], trust: Trust, **numbers
) -> dict[str, Cells]:
    """The second stage of each of these runs, by their names."""
    return {
        f"{name}, {BY[trust]}": stage_weighed_by(study, cells, trust, **numbers)
        for name, cells in firsts.items()
    }


def with_starts(
    study: Study, firsts: dict[str, Cells], groups: dict[str, Cells]
) -> dict[str, list[dict]]:
    """The results of all groups, those of one seed from one machine.

    Where a stage of a seed has to be made, the runs that it goes on with are made before it.
    """
    cells = [flags for group in groups.values() for flags in group]
    if seeds := unknown_seeds(study, cells):
        starts = [flags for group in firsts.values() for flags in group if flags["seed"] in seeds]
        run_cells(study, starts, checkpoints=True)
    return run_groups(study, groups)


def controls(
    study: Study, firsts: dict[str, Cells], results: dict[str, list[dict]], trust: Trust
) -> dict[str, Cells]:
    """What else could explain a gain.

    The weights of the better of confidence and M at random places. No source, and so no class mix.
    No label of the target, which leaves more steps, the mean of the weights and BatchNorm's
    statistics of both domains. All steps after the warm-up without adaptation.
    """
    names: tuple[Trust, ...] = ("confidence", "m")
    better = max(names, key=lambda w: mean_miou(results[f"TAN, {BY[w]}"]))
    _, hyper = configure(firsts["TAN"][0])
    twice = 2 * (hyper.steps - hyper.adv_start)

    def stage(**numbers) -> Cells:
        return stage_weighed_by(study, firsts["TAN"], trust, **numbers)

    return {
        f"TAN, {BY[better]}, shuffled": stage_weighed_by(
            study, firsts["TAN"], better, trust_shuffled=True
        ),
        f"TAN, {BY[trust]}, no class mix": stage(class_mix=False),
        f"TAN, {BY[trust]}, no class mix, source-free": stage(source_free=True, class_mix=False),
        "TAN, no labels of the target": stage(lambda_target=0.0),
        f"warm-up alone, {BY[trust]}, {twice} steps": stage(file=BEFORE, steps=twice),
    }


def write_second(study: Study, start_of_all: str, by: str, results: dict[str, list[dict]]) -> None:
    """The table: a row for each of `results`. by: the weight of the row that others are held
    against, which goes on with `start_of_all`."""
    rows, usual = [], f"{start_of_all}, {by}"
    taus = {f"{x['settings']['tau']:g}" for group in results.values() for x in group
            if x["settings"].get("trust") in READ_BY["tau"]}  # fmt: skip
    starts = [name for name, group in results.items() if "student" not in group[0]]
    for name, group in results.items():
        start = max((x for x in starts if name.startswith(f"{x}, ")), key=len, default="")
        gain = difference(group, results[start]) if start else ""
        students = [r["student"]["miou"] for r in group if "student" in r]
        held_against = students and name != usual and start != BATCHNORM
        apart = difference(group, results[usual]) if held_against else ""
        kept = [r["terms"]["kept"] for r in group if "kept" in r.get("terms", {})]
        weight = f"{np.mean(kept):.2f}" if kept else ""
        rows.append([name, mean_and_deviation(map(miou, group)), gain, apart,
                     mean_and_deviation(students), weight])  # fmt: skip
    fitted = (
        ", as given"
        if "tau" in study.flags
        else ": with it the mean of exp(-M / tau) is the share that counts by confidence, on "
        f"{start_of_all}'s first seed before the stage"
    )
    header = ["start, weight of the labels", "mIoU", "minus the start alone", f"minus {usual}"]
    header += ["student", "mean weight"]
    note = (
        "Target mIoU in %, mean ± deviation over seeds: of the teacher at the last step, and of "
        f"the student; paired differences. {INTERVALS} The stage's numbers were chosen on streets' "
        "dev with tiny, TAN's runs and labels weighed by confidence, and for no other row. The "
        "loss divides by the sum of the weights. Their mean over the last fifth of the stage is "
        f"the last column. tau is {', '.join(sorted(taus))}{fitted}. FDA styles the source from "
        "the first step on. "
    )
    write(study, f"second-{study.task}", header, rows, note + cost_of_a_step(study), results)


def cost_of_a_step(study: Study) -> str:
    """What bench.py has recorded, as a sentence. How labels are weighed makes no difference."""
    rest = {k: v for k, v in study.flags.items() if k not in {"trust", *READ_BY}}
    costs = step_costs(replace(study, flags=rest))
    if not {"selftrain", "clan"} <= costs.keys():
        return "What a step costs is not measured: python bench.py step --method all --to results"
    time, memory = (a / b for a, b in zip(costs["selftrain"], costs["clan"], strict=True))
    return f"A step takes {time:.2f} times as long as CLAN's, and {memory:.2f} of its memory."


def mean_miou(results: list[dict]) -> float:
    return spread(map(miou, results))[0]


def fourier(study: Study) -> None:
    """How FDA's beta is chosen: source only with each of BETAS, on dev."""
    study = replace(on_dev(study), unpaired=True)
    cells = {beta: study.cells(method="source", fourier=beta) for beta in (0.0, *BETAS)}
    groups = {f"{beta:g}": group for beta, group in cells.items()}
    results = run_groups(study, groups)
    rows = [[name, mean_and_deviation(map(miou, group))] for name, group in results.items()]
    note = "Target mIoU in % of source only, tuning seeds: for choosing, not reporting."
    header = ["beta", f"mIoU on {study.shared[0].split}"]
    write(study, f"fourier-{study.task}", header, rows, note, results)
    save_figure(study, styled_image(cells[0.0][0]), f"fourier-{study.task}", results["0"])


def styled_image(flags: Flags) -> Figure:
    """A source image, the same in the style of one target image by each of BETAS, and that one."""
    source, target, _ = train.open_all(configure(flags)[0])
    image = data.image_at(source, 0)
    shown = {"source": image}
    shown |= {f"beta {b:g}": data.in_style(image, target, 0, 0, b) for b in BETAS}
    shown["target"] = data.image_at(target, data.sample_index(0, len(target), 0, 2))
    figure = Figure(figsize=(10, 2.9), layout="constrained")
    places = figure.subplots(2, 4).ravel()
    for ax, (name, pixels) in zip(places, shown.items(), strict=True):
        ax.imshow(pixels)
        ax.set_title(name, fontsize=9)
        ax.axis("off")
    return figure


def start_tau(study: Study, flags: Flags) -> float:
    """The tau with which M's mean weight is that of confidence, on a network before the stage.

    Over all pixels of training images of the target. No label is read.
    """
    hyper: Any = configure(stage_after(study, [flags], trust="confidence")[0])[1]
    G = load(newest_checkpoint(flags["out"]), device_of(study))
    _, target, _ = train.open_all(configure(flags)[0])
    values, weights = [], []
    for _, image, _ in evaluation.spread_images(target, study.images):
        p, m = ensemble_and_m(G, image, image.shape[-2:])
        values.append(m.flatten().numpy())
        weights.append(trust_of(hyper, p[None], m[None, None]).mean().item())
    return float(f"{tau_for(np.concatenate(values), float(np.mean(weights))):.2g}")


# Accuracy by trust.


def reliability(
    values: np.ndarray, wrong: np.ndarray, bins: int = 10
) -> tuple[list[float], list[float]]:
    """Accuracy in each tenth of the labels, those of the smallest value first.

    Two lists: the middle of the tenth, as a share of the labels, and the accuracy. Labels of one
    value count alike: each has their mean.
    """
    place = np.unique(values, return_inverse=True)[1]
    right = np.bincount(place, weights=~wrong) / np.bincount(place)
    parts = np.array_split(right[np.sort(place)], bins)
    return [(i + 0.5) / bins for i in range(bins)], [float(x.mean()) for x in parts]


def coverage(
    G: Generator,
    classes: tuple[str, ...],
    target: data.DataSet,
    to_source_ids: np.ndarray,
    hyper: SelftrainHyper,
    count: int,
) -> dict[str, float]:
    """By class of the truth: the share of its pixels that has a trusted label, by its weight.

    classes: of G. Only those that the target has too are in the result.
    """
    trusted, pixels = np.zeros(G.num_classes), np.zeros(G.num_classes)
    for _, weight, ids in trusted_labels(G, target, to_source_ids, hyper, count):
        trusted += np.bincount(ids, weight, G.num_classes)
        pixels += np.bincount(ids, minlength=G.num_classes)
    shares = trusted / np.maximum(pixels, 1)
    return {name: float(shares[i]) for i, name in enumerate(classes) if i in to_source_ids}


def reliable(study: Study) -> None:
    """Accuracy of the labels from the surest tenth to the last, by confidence and by M.

    Before the second stage and after it, on TAN's first seed; the share of each class that has a
    trusted label; and the numbers of M as in `signs`. A figure and three tables.
    """
    study = replace(study, seeds=study.seeds[:1])
    cells, _ = first_runs(study, {"TAN": MAIN["TAN"]})
    flags = stage_after(study, cells["TAN"])
    results = run_groups(study, {"TAN": flags}, checkpoints=True)
    target, to_source_ids = labelled_target(flags[0])
    hyper: Any = configure(flags[0])[1]
    paths = teachers(flags[0])
    tenths, covered, of_m = [], {}, []
    tau = 0.0  # of both rows
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, (when, step) in enumerate((("before", min(paths)), ("after", max(paths)))):
        G = load(paths[step], device_of(study))
        m, doubt, wrong, _ = m_and_errors(G, target, to_source_ids, study.images)
        for color, name, values in (("C0", "confidence", doubt), ("C1", "M", m)):
            x, y = reliability(values, wrong)
            tenths.append([f"{name}, {when}", *(f"{100 * value:.1f}" for value in y)])
            left.plot(x, y, color + ("--", "-")[i], label=f"{name}, {when}")
        tau = tau or tau_before(study, m, hyper)
        numbers = numbers_of_m(m, doubt, wrong, tau)
        of_m.append([when, *(f"{x:.3g}" for x in numbers.values())])
        classes = tuple(read_metadata(paths[step])["classes"])
        shares = coverage(G, classes, target, to_source_ids, hyper, study.images)
        covered[when] = shares
        heights = [100 * share for share in shares.values()]
        right.bar(np.arange(len(shares)) + 0.4 * i, heights, 0.4, label=when)
    left.set(xlabel="labels, the surest first", ylabel="accuracy in this tenth")
    left.legend(fontsize=8)
    right.set_xticks(range(len(shares)), shares, rotation=60, ha="right", fontsize=7)
    right.set_ylabel("% of its pixels with trusted label")
    right.legend(fontsize=8)
    header = ["labels by", *(f"tenth {i + 1}" for i in range(len(x)))]
    note = "Accuracy in % of the teacher's labels, the surest tenth first."
    write(study, f"reliable-{study.task}", header, tenths, note, results)
    rows = [[name, *(f"{100 * x[name]:.0f}" for x in covered.values())] for name in shares]
    note = "% of the pixels of each class that have a trusted label, by the truth."
    write(study, f"coverage-{study.task}", ["class", *covered], rows, note, results)
    note = f"Of the teacher. {ABOUT_TAU}"
    write(study, f"m-{study.task}", ["the stage", *NUMBERS_OF_M], of_m, note, results)
    save_figure(study, figure, f"reliable-{study.task}", results["TAN"])
