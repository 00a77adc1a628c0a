"""Tables 1 and 2: classes by method, and all systems side by side.

    python study.py table --jobs 2                  # source only, TAN, CLAN
    python study.py table --methods all --jobs 2    # the other systems too

The paper's numbers stand beside ours. They are of other networks.
"""

import json
from dataclasses import asdict

import numpy as np
from matplotlib.figure import Figure

import clan
import eval as evaluation
from classes import INFREQUENT
from control import lost_classes
from methods import METHODS
from runs import (
    INTERVALS,
    Pick,
    Study,
    difference,
    mean_and_deviation,
    miou,
    points_apart,
    read_by,
    run_groups,
    save_figure,
    spread,
    t_interval,
    write,
)
from settings import SECOND_STAGE, Flags, Settings, chosen_numbers, configure

COMPARED = ("source", "tan", "clan")  # unless --methods says others


def method_groups(study: Study) -> dict[str, list[Flags]]:
    return {method: study.cells(method=method) for method in study.methods}


BOUND = "target-trained (a bound)"


def bound_groups(study: Study) -> dict[str, list[Flags]]:
    """Runs that learn the target's own labels. They bound what adaptation can reach."""
    settings, _ = study.shared
    known = settings.src == settings.tgt == "streets" and "source" in study.methods
    known = known and settings.shift == Settings.shift
    return {BOUND: study.cells(method="source", looks="city")} if known else {}


# What `study.py tune` chose for TAN and CLAN by the eight trials that each method has, by backbone
# and method. Their defaults are of a longer search.
BY_EIGHT_TRIALS: dict[tuple[str, str], Flags] = {}


def eight_trial_groups(study: Study) -> dict[str, list[Flags]]:
    """TAN and CLAN once more, as well tuned as the others, where these are compared."""
    if set(study.methods) <= {*COMPARED}:
        return {}
    found = {m: BY_EIGHT_TRIALS.get((study.shared[0].backbone, m)) for m in study.methods}
    return {
        by_eight_trials(m): study.cells(method=m, **flags)
        for m, flags in found.items()
        if flags is not None
    }


def not_tuned(study: Study) -> list[str]:
    """Methods of the table of all systems whose numbers `study.py tune` has not chosen yet."""
    if set(study.methods) <= {*COMPARED}:
        return []
    backbone = study.shared[0].backbone
    missing = [m for m in study.methods if METHODS[m].tuned and not chosen_numbers(backbone, m)]
    return [METHODS[m].label for m in missing if (backbone, m) not in BY_EIGHT_TRIALS]


def by_eight_trials(method: str) -> str:
    return f"{METHODS[method].label}, by eight trials"


def table_1_and_2(study: Study) -> None:
    """Tables 1 and 2: IoU by class and mIoU, mean ± deviation over seeds, beside the paper's.

    On streets there is a bound too: the same network and steps, on the target's labels.
    """
    groups = method_groups(study)
    eight = eight_trial_groups(study)
    if names := not_tuned(study):
        print(f"not tuned, so with their first numbers: {', '.join(names)}", flush=True)
    all_results = run_groups(study, groups | bound_groups(study) | eight)
    results = {method: all_results[method] for method in groups}
    bound = all_results.get(BOUND)
    settings, _ = study.shared
    task = (settings.src, settings.tgt, settings.backbone)
    in_paper = {method: evaluation.paper_row(*task, method) for method in results}
    papers = {method: row for method, row in in_paper.items() if row}
    paired = {"clan", "tan"} <= results.keys()

    def row(label: str, pick: Pick) -> list[str]:
        cells = [mean_and_deviation(map(pick, group)) for group in results.values()]
        cells += [difference(results["clan"], results["tan"], pick)] if paired else []
        cells += [mean_and_deviation(map(pick, bound))] if bound else []
        return [label, *cells, *(evaluation.percent(pick(p)) for p in papers.values())]

    def gain(label: str, pick: Pick) -> list[str]:
        cells = [difference(group, results["source"], pick) for group in results.values()]
        both = [(pick(p), p["base"]) for p in papers.values()]  # of the system's own network
        paper_gains = ("-" if a is None else f"{100 * (a - b):+.1f}" for a, b in both)
        return [label, *cells, *[""] * (paired + bool(bound)), *paper_gains]

    def closed(label: str, pick: Pick) -> list[str]:
        """How much of the way from source only to the bound each method goes, of the means."""
        means = [spread(map(pick, group))[0] for group in results.values()]
        least, most = (spread(map(pick, group))[0] for group in (results["source"], bound or []))
        shares = [(mean - least) / (most - least) if most > least else np.nan for mean in means]
        cells = ["-" if np.isnan(x) else f"{100 * x + 0.0:.0f} %" for x in shares]
        return [label, *cells, *[""] * paired, "100 %", *[""] * len(papers)]

    header = ["class", *(METHODS[m].label for m in results)]
    header += ["CLAN - TAN"] * paired + [BOUND] * bool(bound)
    header += [f"{METHODS[m].label}, paper" for m in papers]
    first = next(iter(results.values()))[0]

    def of_class(name: str) -> Pick:
        return lambda result: result["iou"].get(name)

    def of_mean(key: str) -> Pick:
        return lambda result: result.get(key)

    rows = [row(name + " *" * (name in INFREQUENT), of_class(name)) for name in first["iou"]]
    means = {"miou": "mIoU"}
    if "miou_13" in first:  # SYNTHIA is scored in two ways
        means = {"miou": "mIoU, 16 classes", "miou_13": "mIoU, 13 classes"}
    for key, label in means.items():
        rows.append(row(label, of_mean(key)))
        if "source" in results:
            rows.append(gain(f"gain, {label}", of_mean(key)))
        if bound:
            rows.append(closed("gap closed", of_mean(key)))
    note = (
        "IoU in % on the validation split, last checkpoint, mean ± standard deviation over seeds. "
        f"{INTERVALS} * infrequent."
    )
    if bound:
        note += " The bound learns the target's labels for as many steps, and is no method."
    shown = {name: group for name, group in all_results.items() if name not in eight}
    write(study, f"table-{study.task}", header, rows, note, shown)
    if "source" in results and not results.keys() <= {*COMPARED}:
        systems(study, results | {name: all_results[name] for name in eight})


# All systems side by side.


def systems(study: Study, results: dict[str, list[dict]]) -> None:
    """A row for each method: score, gain, rare classes, classes lost, costs, and the paper's score.

    And a figure of the gains.
    """
    source = results["source"]
    costs = {m: (f"{t:.2f}", f"{memory:.2f}") for m, (t, memory) in step_costs(study).items()}
    papers = {m: (of_paper("gta5", m), of_paper("synthia", m)) for m in METHODS}
    method_of = {by_eight_trials(m): m for m in METHODS} | {m: m for m in METHODS}
    results = {k: results[k] for k in sorted(results, key=lambda k: not any(papers[method_of[k]]))}
    rows = []
    for name, group in results.items():
        method = method_of[name]
        gain = "" if method == "source" else difference(group, source)
        rare = [spread(r["iou"].get(c) for c in INFREQUENT)[0] for r in group]
        lost = [lost_classes(*both) for both in zip(group, source, strict=True)]
        rows.append([
            label_of(name) + " †" * (not any(papers[method])),
            numbers_of(method, group[0]["settings"]),
            mean_and_deviation(map(miou, group)),
            gain,
            mean_and_deviation(rare),
            f"{np.mean(lost):.1f}",
            *costs.get(method, ("not measured", "not measured")),
            *papers[method],
        ])  # fmt: skip
    header = ["method", "numbers", "mIoU", "gain over source only", "infrequent", "classes lost"]
    header += ["time a step", "memory", "paper, GTA5", "paper, SYNTHIA"]
    note = (
        "Numbers: those that were tuned. The grid of TAN, CLAN, AdvEnt and multi level is finer, "
        "around values that were known to be good for TAN. "
        "Target mIoU in %, last checkpoint, mean ± standard deviation over seeds; the gain; mean "
        "IoU of the infrequent classes "
        f"({', '.join(INFREQUENT)}); how many classes end more than 2 points below source only. "
        f"Time and peak memory of a step of adaptation over those of source only's step, from "
        f"{STEPS.format(study.shared[0].backbone)} beside the recorded runs (bench.py "
        "step --method all); what a method does between two steps, such as labelling for a round, "
        "is not in them. † not in the paper's tables. The "
        "paper's: mIoU with VGG-16 (of 13 classes on SYNTHIA), in brackets that of the source-only "
        "network that the row is compared with. These networks differ from each other and from "
        "ours. * The paper prints 36.1 for CBST on SYNTHIA. Its 13 classes average 40.7. "
        f"{INTERVALS}"
    )
    if names := not_tuned(study):
        note += f" Not tuned, so with their first numbers: {', '.join(names)}."
    write(study, f"systems-{study.task}", header, rows, note, results)
    draw_gains(study, results)


def numbers_of(method: str, settings: dict) -> str:
    """The values of a method's two tuned numbers in a run."""
    names = dict.fromkeys(name for name, _ in METHODS[method].tuned)
    return ", ".join(f"{name} {settings[name]:g}" for name in names)


def label_of(name: str) -> str:
    return METHODS[name].label if name in METHODS else name


def draw_gains(study: Study, results: dict[str, list[dict]]) -> None:
    """The figure of `systems`: each method's gain over source only, with its interval."""
    source = results["source"]
    others = {m: points_apart(group, source) for m, group in results.items() if m != "source"}
    figure = Figure(figsize=(6, 0.6 + 0.3 * len(others)), layout="constrained")
    ax = figure.subplots()
    for place, pairs in enumerate(reversed(others.values())):
        low, high = t_interval(pairs)
        ax.plot((low, high), (place, place), "C0-")
        ax.plot(np.mean(pairs), place, "C0o")
    ax.set_yticks(range(len(others)), [*map(label_of, reversed(others))])
    ax.axvline(0, color="k", lw=0.8)
    ax.set_xlabel("gain over source only, points of mIoU")
    save_figure(study, figure, f"systems-{study.task}", [r for g in results.values() for r in g])


def step_costs(study: Study) -> dict[str, tuple[float, float]]:
    """(time, memory) of each method's step over source only's, as bench.py has recorded them.

    Only of steps with the numbers that the method has here.
    """
    backbone = study.shared[0].backbone
    path = study.results / STEPS.format(backbone)
    try:
        found = json.loads(path.read_text())["methods"] if path.exists() else {}
        of_today = {m: numbers_of_step(study.flags, m) for m in found}
        found = {m: row for m, row in found.items() if row["numbers"] == as_recorded(of_today[m])}
        return {m: (row["step_ratio"], row["peak_ratio"]) for m, row in found.items()}
    except (json.JSONDecodeError, KeyError) as error:
        remedy = "make it again with bench.py step --method all --to results"
        raise ValueError(f"{path} is damaged: {remedy}") from error


STEPS = "step-{}.json"  # written by bench.py step --method all, by backbone


def numbers_of_step(flags: Flags, method: str) -> clan.Hyper:
    """Those with which a method's step is measured: of a run with adaptation; of a second stage,
    its own numbers in a run of that length."""
    backbone = configure(flags)[0].backbone
    stage = SECOND_STAGE.get(backbone, {}) if method == "selftrain" else {}
    numbers = {k: v for k, v in stage.items() if k not in ("steps", "adv_start")}
    return configure(read_by(method, flags) | numbers | {"method": method})[1]


def as_recorded(hyper: clan.Hyper) -> dict:
    return json.loads(json.dumps(asdict(hyper)))


def of_paper(src: str, method: str) -> str:
    """The paper's mIoU with VGG-16, and that of its source-only network; '' if it has neither."""
    row = evaluation.paper_row(src, "cityscapes", "vgg16", method)
    if row is None:
        return ""
    mean = row["miou_13" if src == "synthia" else "miou"]
    slip = " *" * (mean != row["printed"])
    return f"{100 * mean:.1f}{slip}" + f" ({100 * row['base']:.1f})" * (method != "source")
