"""Studies: many runs into one table or figure (Tables 1 and 2, Figures 3 to 6, controls).

    python study.py table                                    # streets, 3 methods, 5 seeds
    python study.py table --src gta5 --backbone r101 --data data
    python study.py control --jobs 2                         # where the weight, or how much of it?
    python study.py all --quick --jobs 2                     # everything, reduced

Every flag of train.py may follow and holds for all runs. A finished run is not run again, an
interrupted one goes on, and runs that agree until adaptation starts share their warm-up, which
changes no bit of them. Results (Markdown, JSON, PNG) land in --to. Scores are those of the last
checkpoint on the target's validation split.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import shlex
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

import clan
import data
import eval as evaluation
import train
from losses import discrepancy_map
from models import Discriminator, Generator

# Classes that the paper's text calls infrequent and prone to negative transfer (Sections 4.3 and
# 4.4; its tables show them in blue).
INFREQUENT = ("fence", "pole", "traffic light", "traffic sign")
LABELS = {"source": "source only", "tan": "TAN", "clan": "CLAN"}
TUNING_SEEDS = (10, 11)  # settings are chosen on these, and reported on others


@dataclass(frozen=True)
class Study:
    """What is asked for: which runs, and where they and the results lie."""

    given: dict  # flags of train.py for all runs
    tan: dict  # flags of TAN's own in the control
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    runs: Path
    to: Path
    jobs: int  # runs at a time
    images: int  # at most so many of each domain where features are measured
    marked: str  # the class of the curve of cluster distances
    command: str

    def cell(self, label: str, seed: int, **change) -> dict:
        """The flags of one run, in its own folder. A variant that changes nothing is CLAN itself.

        A flag that the method does not read (of CLAN alone, say) does not reach it.
        """
        flags = self.given | change
        idle = train.NOT_USED_BY.get(flags.get("method"), set())
        flags = {k: v for k, v in flags.items() if k not in idle}
        if train.configure(flags) == train.configure(self.given):
            label = "clan"
        return flags | {"seed": seed, "out": self.runs / f"{label}-seed{seed}"}

    @property
    def task(self) -> str:
        settings, _ = train.configure(self.given)
        return f"{settings.src}-{settings.tgt}-{settings.backbone}"


# Running cells.


def flat(settings: train.Settings, hyper: clan.Hyper) -> dict:
    """All fields of a run as its checkpoints write them."""
    return json.loads(json.dumps(asdict(settings) | asdict(hyper), default=str))


def last_checkpoint(out: Path) -> Path | None:
    """Where a run would go on."""
    found = sorted(out.glob("step_*.safetensors"))
    before = out / train.BEFORE
    return found[-1] if found else before if before.exists() else None


def finished(given: dict) -> dict | None:
    """The result of a run that is complete. Raises ValueError if its folder holds another run."""
    settings, hyper = train.configure(given)
    last, path = last_checkpoint(settings.out), settings.out / "eval.json"
    if last is None:
        return None
    wanted, found = flat(settings, hyper), evaluation.read_metadata(last)["settings"]
    changed = [k for k in wanted if k not in train.FREE and wanted[k] != found.get(k)]
    if changed:
        was = ", ".join(f"{train.flag_of(k)} {found.get(k)}, now {wanted[k]}" for k in changed)
        raise ValueError(f"{settings.out} was run with {was}: choose another --runs, or delete it")
    return json.loads(path.read_text()) if path.exists() else None


# Fields that no step before adv_start reads: the target takes no part in those.
LATER = train.ADVERSARIAL - {"d_channels"} | {"lambda_local", "eps", "adaptive_start"}
LATER |= {"detach_m", "weight_map", "shift"}


def warm_up(given: dict) -> str:
    """What the steps before adv_start depend on: runs that agree in it share them bit for bit."""
    settings, hyper = train.configure(given)
    if not 0 < hyper.adv_start < hyper.steps:
        return str(settings.out)  # nothing to share
    fields = {k: v for k, v in flat(settings, hyper).items() if k not in train.FREE | LATER}
    if hyper.method != "clan":  # neither reads Eq. 4's fields
        fields = {k: v for k, v in fields.items() if k not in train.CLAN_ONLY}
    return json.dumps(fields | {"method": hyper.method == "clan"}, sort_keys=True)


def adopt(donor: Path, given: dict) -> Path:
    """Makes the donor's warm-up this run's own: its log, and its checkpoint at adv_start.

    Scores on the target stay behind, since the donor's target may be another. Returns where to go
    on; for source only, which has no such checkpoint, that is the donor's.
    """
    settings, hyper = train.configure(given)
    lines = [line for line in metrics(donor) if "target_miou" not in line]
    lines = [line for line in lines if line["step"] <= hyper.adv_start]
    (settings.out / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    start = donor / train.BEFORE
    if hyper.method == "source":
        return start
    about = evaluation.read_metadata(start) | {"settings": flat(settings, hyper)}
    train.save(settings.out / train.BEFORE, train.load_file(start), about)
    return settings.out / train.BEFORE


def run_cell(given: dict, donor: Path | None, threads: int | None) -> tuple[dict, float]:
    """One run to its end: from its last checkpoint, from a donor's warm-up, or from step 0."""
    if threads:
        torch.set_num_threads(threads)
    settings, hyper = train.configure(given)
    out, since = settings.out, time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    start = last_checkpoint(out)
    if start is None and donor and (donor / train.BEFORE).exists():
        start = adopt(donor, given)
    with (out / "log.txt").open("a") as file, contextlib.redirect_stdout(file):
        return train.train(settings, hyper, start, Console(file=file)), time.monotonic() - since


def run_cells(study: Study, cells: list[dict]) -> list[dict]:
    """The result (as eval.json) of each cell, in order; what is missing is run."""
    missing = [given for given in cells if finished(given) is None]
    donors: dict[str, Path] = {}
    for given in sorted(cells, key=lambda given: not (given["out"] / train.BEFORE).exists()):
        if given.get("method", "clan") != "source":  # which has no checkpoint at adv_start
            donors.setdefault(warm_up(given), given["out"])
    donor_of = {given["out"]: donors.get(warm_up(given)) for given in missing}
    first = [given for given in missing if donor_of[given["out"]] in (None, given["out"])]
    rest = [given for given in missing if given not in first]
    done = len(cells) - len(missing)
    for wave in (first, rest):
        tasks = [(given, donor_of[given["out"]]) for given in wave]
        for given, (result, seconds) in run_all(tasks, study.jobs):
            done += 1
            name, score = given["out"].name, 100 * result["miou"]
            print(f"[{done}/{len(cells)}] {name}: mIoU {score:.1f} ({seconds:.0f} s)", flush=True)
    return [finished(given) for given in cells]


def run_all(tasks: list, jobs: int) -> Iterator[tuple[dict, tuple[dict, float]]]:
    """(given, what run_cell returned) of each task as it ends; each in a process if jobs > 1."""
    if jobs == 1:
        yield from ((given, run_cell(given, donor, None)) for given, donor in tasks)
        return
    threads = max(1, (os.cpu_count() or 1) // jobs)
    fresh = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    with ProcessPoolExecutor(jobs, mp_context=fresh) as pool:
        futures = {pool.submit(run_cell, given, donor, threads): given for given, donor in tasks}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in multiprocessing.active_children():
                child.terminate()  # a run saves and ends when it is asked to
            raise


# Statistics over seeds.


def spread(values: Iterable[float | None]) -> tuple[float, float]:
    """Mean and sample standard deviation (NaN for less than two values; None is left out)."""
    there = np.array([v for v in values if v is not None], float)
    if len(there) == 0:
        return float("nan"), float("nan")
    return float(there.mean()), float(there.std(ddof=1)) if len(there) > 1 else float("nan")


def interval(differences: Iterable[float], draws: int = 10_000) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean of paired differences (one a seed).

    NaN for fewer than two. With few seeds it is too narrow: read it as a lower bound of the doubt.
    """
    there = np.array(list(differences), float)
    if len(there) < 2:
        return float("nan"), float("nan")
    picks = np.random.default_rng(0).integers(0, len(there), (draws, len(there)))
    low, high = np.percentile(there[picks].mean(axis=1), (2.5, 97.5))
    return float(low), float(high)


def percent(values: Iterable[float | None], signed: bool = False) -> str:
    """'42.8 ± 6.1' of values in [0, 1]."""
    mean, deviation = spread(values)
    if np.isnan(mean):
        return "-"
    text = f"{100 * mean:+.1f}" if signed else f"{100 * mean:.1f}"
    return text if np.isnan(deviation) else f"{text} ± {100 * deviation:.1f}"


def difference(a: list[dict], b: list[dict], key: str = "miou") -> str:
    """'-0.6 [-2.1, 0.9]': the paired mean of a - b in points, and its bootstrap interval."""
    pairs = [x[key] - y[key] for x, y in zip(a, b, strict=True)]
    low, high = interval(pairs)
    text = f"{100 * np.mean(pairs):+.1f}"
    return text if np.isnan(low) else f"{text} [{100 * low:+.1f}, {100 * high:+.1f}]"


# Writing results.


def cpu_name() -> str:
    """The processor in words, for the line under a table."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(": ", 1)[1] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def provenance(study: Study, results: list[dict]) -> str:
    """Command, commits of the runs, seeds and machine."""
    commits = {evaluation.read_metadata(Path(r["checkpoint"]))["commit"] for r in results}
    seeds = sorted({r["settings"]["seed"] for r in results})
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name()
    return (
        f"`{study.command}`; {len(results)} runs, commit {', '.join(sorted(commits))}; seeds "
        f"{', '.join(map(str, seeds))}; {machine}, torch {torch.__version__}, "
        f"{time.strftime('%Y-%m-%d')}"
    )


def write(study: Study, name: str, header: list[str], rows: list[list], notes: list[str]) -> None:
    """The table on the screen, and as NAME.md and NAME.json (numbers as shown) in --to."""
    study.to.mkdir(parents=True, exist_ok=True)
    table = Table(title=name)
    for i, title in enumerate(header):
        table.add_column(title, justify="right" if i else "left")
    for row in rows:
        table.add_row(*row)
    console = Console()
    console.print(table)
    lines = ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)]
    path = study.to / f"{name}.md"
    path.write_text("\n".join([*lines, "", *notes]) + "\n")
    content = {"header": header, "rows": rows, "notes": notes}
    path.with_suffix(".json").write_text(json.dumps(content, indent=1))
    console.print(*notes, f"wrote {path}", sep="\n", soft_wrap=True)


def save_figure(study: Study, figure: Figure, name: str) -> None:
    study.to.mkdir(parents=True, exist_ok=True)
    path = study.to / f"{name}.png"
    figure.savefig(path, dpi=100)
    print(f"wrote {path}", flush=True)


# Tables 1 and 2.


def method_cells(study: Study) -> dict[str, list[dict]]:
    """The runs of the table; those of the first seed keep checkpoints for curves over training."""
    _, hyper = train.configure(study.given)
    every = max(1, hyper.steps // 16)
    cells = {}
    for method in study.methods:
        cells[method] = [study.cell(method, seed, method=method) for seed in study.seeds]
        cells[method][0] |= {"save_every": every, "keep": 16}
    return cells


def run_groups(study: Study, groups: dict) -> dict:
    """run_cells of several lists of cells, by their names."""
    results = iter(run_cells(study, [given for group in groups.values() for given in group]))
    return {name: [next(results) for _ in group] for name, group in groups.items()}


def table(study: Study, title: str = "") -> None:
    """Tables 1 and 2: IoU by class and mIoU, mean ± deviation over seeds, beside the paper's."""
    results = run_groups(study, method_cells(study))
    settings, _ = train.configure(study.given)
    task = (settings.src, settings.tgt, settings.backbone)
    papers = {m: evaluation.paper_row(*task, m) for m in study.methods}
    papers = {m: row for m, row in papers.items() if row}
    paired = {"clan", "tan"} <= set(study.methods)

    header = ["class", *(LABELS[m] for m in study.methods)]
    header += ["CLAN - TAN"] * paired + [f"{LABELS[m]}, paper" for m in papers]
    rows = []
    for name in results[study.methods[0]][0]["iou"]:
        ious = {m: [r["iou"][name] for r in results[m]] for m in study.methods}
        row = [name + " *" * (name in INFREQUENT), *map(percent, ious.values())]
        if paired:
            both = [(a, b) for a, b in zip(ious["clan"], ious["tan"], strict=True)]
            row.append(percent([a - b for a, b in both if None not in (a, b)], signed=True))
        rows.append([*row, *(evaluation._percent(p["iou"].get(name)) for p in papers.values())])
    for key, label in (("miou", "mIoU"), ("miou_13", "mIoU, 13 classes")):
        if not all(key in group[0] for group in results.values()):
            continue
        rows.append([label, *(percent(r[key] for r in group) for group in results.values())])
        if paired:
            rows[-1].append(difference(results["clan"], results["tan"], key))
        rows[-1] += [evaluation._percent(p.get(key)) for p in papers.values()]
        if "source" in results:
            rows.append([f"gain, {label}"])
            rows[-1] += [difference(group, results["source"], key) for group in results.values()]
            rows[-1] += [""] * (len(header) - len(rows[-1]))
    notes = [
        "IoU in % on the validation split, last checkpoint, mean ± standard deviation over seeds; "
        "differences of mIoU are paired by seed, with a 95 % bootstrap interval. * infrequent.",
        provenance(study, [r for group in results.values() for r in group]),
    ]
    write(study, f"table-{title or study.task}", header, rows, notes)


# What networks have learnt: features of E, the map M.


def all_images(dataset: data.DataSet, count: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(image 3 H W, label H' W') of `count` images spread over a split."""
    picks = np.linspace(0, len(dataset) - 1, min(count, len(dataset))).round().astype(int)
    pairs = torch.utils.data.Subset(data.Pairs(dataset), picks.tolist())
    for _, image, label in data.checked(pairs[i] for i in range(len(pairs))):
        yield image, label


@torch.no_grad()
def labelled_features(
    G: Generator, dataset: data.DataSet, table: np.ndarray, count: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(features N d, train ids N) of each image, at the labelled pixels of E's grid.

    Ours, as the paper does not say: the features are what the classifiers read (of VGG-16's three
    maps the deepest), in evaluation mode; a label is down-sampled to their grid by taking the
    pixel nearest to each cell's centre. table: from the split's train ids to G's classes.
    """
    device = next(G.parameters()).device
    to_source = torch.from_numpy(table)
    G.eval()
    for image, label in all_images(dataset, count):
        x = G.features(image[None].to(device))
        x = (x[-1] if isinstance(x, tuple) else x)[0].float().cpu()  # d h w
        label = to_source[label.int()][None, None].float()
        ids = F.interpolate(label, size=x.shape[-2:], mode="nearest-exact").flatten().long()
        yield x.flatten(1).T[ids < G.num_classes], ids[ids < G.num_classes]


def class_centres(G, dataset, table, count: int) -> torch.Tensor:
    """The mean feature of each class over the pixels of a split, C d float64; NaN if unseen."""
    total, pixels = 0, torch.zeros(G.num_classes, dtype=torch.float64)
    for x, ids in labelled_features(G, dataset, table, count):
        one_hot = F.one_hot(ids, G.num_classes).double()  # N C
        total = total + one_hot.T @ x.double()
        pixels += one_hot.sum(dim=0)
    return total / pixels[:, None]  # 0 / 0 is NaN


def cluster_distance(G, source, target, table, count: int) -> torch.Tensor:
    """Euclidean distance between the class centres of two domains, C float64 (Section 4.4)."""
    same = np.arange(256, dtype=np.uint8)
    a, b = class_centres(G, source, same, count), class_centres(G, target, table, count)
    return (a - b).norm(dim=1)


def opened(given: dict):
    """(source, labelled target validation split, table of train ids) of a run."""
    source, _, val = train.open_all(train.configure(given)[0])
    return source, val, data.shared_classes(source, val)[0]


def load(path: Path, device: str = "cpu") -> Generator:
    G, _ = evaluation.load_generator(path, say=lambda _: None)
    return G.to(device)


def untrained(given: dict) -> Generator:
    """G with the weights that a run starts from."""
    settings, hyper = train.configure(given)
    run = train.prepare(settings, hyper, None, Console(quiet=True))
    return run.G


def ccd(study: Study) -> None:
    """Figure 4 (left) and Figure 6: cluster-centre distances over training and by class.

    Distances are divided by those of the network before any training, so that this is at 1. The
    target's labels come from its validation split. First seed.
    """
    groups = method_cells(study)
    results = run_groups(study, groups)
    cells = {method: group[0] for method, group in groups.items()}
    first = next(iter(cells.values()))
    source, val, table = opened(first)
    device = evaluation.find_device(study.given.get("device", "auto"))

    def measure(G):
        return cluster_distance(G.to(device), source, val, table, study.images)

    start = measure(untrained(first))
    curves = {}
    for method, given in cells.items():
        paths = sorted(given["out"].glob("step_*.safetensors"))
        steps = [evaluation.read_metadata(path)["step"] for path in paths]
        curves[method] = (steps, torch.stack([measure(load(path)) for path in paths]) / start)
    if study.marked not in source.classes:
        raise ValueError(f"--class {study.marked} is none of {', '.join(source.classes)}")
    marked = source.classes.index(study.marked)

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    for ax, title, pick in zip(
        figure.subplots(1, 2),
        (study.marked, "mean over classes"),
        (lambda x: x[:, marked], lambda x: x.nanmean(dim=1)),
        strict=True,
    ):
        for method, (steps, values) in curves.items():
            ax.plot([0, *steps], [1.0, *pick(values).tolist()], label=LABELS[method])
        ax.set(title=title, xlabel="step", ylabel="cluster distance / before training")
        ax.legend(fontsize=8)
    save_figure(study, figure, f"ccd-curve-{study.task}")

    last = {"before training": start / start} | {LABELS[m]: v[-1] for m, (_, v) in curves.items()}
    seen = [i for i in range(len(source.classes)) if not torch.isnan(start[i])]
    names = [source.classes[i] + " *" * (source.classes[i] in INFREQUENT) for i in seen]
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    bars(figure.subplots(), names, {k: v[seen].tolist() for k, v in last.items()})
    figure.axes[0].set_ylabel("cluster distance / before training")
    save_figure(study, figure, f"ccd-classes-{study.task}")

    columns = [v[seen].tolist() for v in last.values()]
    rows = [[name, *(f"{c[i]:.2f}" for c in columns)] for i, name in enumerate(names)]
    rows.append(["mean", *(f"{np.mean(c):.2f}" for c in columns)])
    notes = [
        f"Euclidean distance between the domains' mean features, up to {study.images} images of "
        "each, over the distance before training; last checkpoint, first seed. * infrequent.",
        provenance(study, [group[0] for group in results.values()]),
    ]
    write(study, f"ccd-{study.task}", ["class", *last], rows, notes)


def bars(ax, names: list[str], groups: dict[str, list[float]], errors: dict | None = None) -> None:
    """Grouped bars, one group a name, one colour a key."""
    width = 0.8 / len(groups)
    for k, (label, values) in enumerate(groups.items()):
        x = np.arange(len(names)) + (k - (len(groups) - 1) / 2) * width
        ax.bar(x, values, width, label=label, yerr=errors and errors[label])
    slanted = len(names) > 8
    ax.set_xticks(
        range(len(names)), names, rotation=40 if slanted else 0, ha="right" if slanted else "center"
    )
    ax.legend(fontsize=8, ncols=4)


# Figure 4 (right): the parameters of the adaptive weight.

GRID = tuple((eps, 40.0) for eps in (0.1, 0.2, 0.4, 0.8))
GRID += tuple((0.4, slope) for slope in (10.0, 20.0, 40.0, 80.0))


def metrics(out: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl."""
    return list(map(json.loads, (out / "metrics.jsonl").read_text().splitlines()))


def d_loss(given: dict) -> float:
    """The mean loss of D over the last fifth of the adversarial steps of a finished run."""
    values = [line["d"] for line in metrics(given["out"]) if "d" in line]
    return float(np.mean(values[-max(1, len(values) // 5) :]))


def params(study: Study) -> None:
    """Figure 4 (right): target mIoU (bars) and D's loss (line) over eps and lambda_local."""
    cells = {
        (eps, slope): [
            study.cell(f"eps{eps:g}-lambda{slope:g}", seed, eps=eps, lambda_local=slope)
            for seed in study.seeds
        ]
        for eps, slope in GRID
    }
    tan = [study.cell("tan", seed, method="tan") for seed in study.seeds]
    results = run_groups(study, cells | {"tan": tan})
    miou = {name: [r["miou"] for r in group] for name, group in results.items()}

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    rows = []
    for ax, points, label in zip(
        figure.subplots(1, 2), (GRID[:4], GRID[4:]), ("eps", "lambda_local"), strict=True
    ):
        names = [f"{p[label != 'eps']:g}" for p in points]
        scores = [spread(miou[p]) for p in points]
        losses = [float(np.mean([d_loss(given) for given in cells[p]])) for p in points]
        errors = [0 if np.isnan(s) else 100 * s for _, s in scores]
        ax.bar(names, [100 * m for m, _ in scores], yerr=errors, color="C0", alpha=0.7)
        ax.axhline(100 * np.mean(miou["tan"]), color="C2", ls="--", label="TAN")
        ax.legend(fontsize=8, loc="lower left")
        ax.set(xlabel=label, ylabel="target mIoU, %")
        right = ax.twinx()
        right.plot(names, losses, "C1o-")
        right.set_ylabel("loss of D", color="C1")
        right.set_ylim(bottom=0)
        rows += [
            [f"{p[0]:g}", f"{p[1]:g}", percent(miou[p]), f"{loss:.2f}"]
            for p, loss in zip(points, losses, strict=True)
        ]
    loss = np.mean([d_loss(given) for given in tan])
    rows.append(["TAN", "", percent(miou["tan"]), f"{loss:.2f}"])
    save_figure(study, figure, f"params-{study.task}")
    notes = [
        "Target mIoU in %, last checkpoint; D's loss over the last fifth of the adversarial steps.",
        provenance(study, [r for group in results.values() for r in group]),
    ]
    write(study, f"params-{study.task}", ["eps", "lambda_local", "mIoU", "D's loss"], rows, notes)


# Figures 3 and 5, and what the adaptive weight looks like.

FOUR = ("building", "traffic sign", "pole", "vegetation")  # the classes of Figure 3


def tsne(study: Study) -> None:
    """Figure 3: t-SNE of target features of four classes, source only, TAN and CLAN. First seed.

    At most 150 features a class, the same pixels for every network.
    """
    try:
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise ValueError("t-SNE needs scikit-learn: pip install scikit-learn") from error
    groups = method_cells(study)
    run_groups(study, groups)
    cells = {method: group[0] for method, group in groups.items()}
    source, val, table = opened(next(iter(cells.values())))
    wanted = [source.classes.index(name) for name in FOUR if name in source.classes]
    palette = evaluation.palette_of(source.classes) / 255

    figure = Figure(figsize=(4 * len(cells), 3.8), layout="constrained")
    axes = figure.subplots(1, len(cells), squeeze=False)[0]
    for ax, (method, given) in zip(axes, cells.items(), strict=True):
        G = load(evaluation.newest_checkpoint(given["out"]))
        parts = list(labelled_features(G, val, table, min(study.images, 100)))
        x, ids = (torch.cat(part) for part in zip(*parts, strict=True))
        rng = np.random.default_rng(0)
        where = [np.flatnonzero((ids == c).numpy()) for c in wanted]
        picks = np.concatenate([rng.permutation(w)[:150] for w in where])
        if len(picks) < 8:
            raise ValueError(f"fewer than 8 labelled features of {', '.join(FOUR)} in {val.name}")
        perplexity = min(30, (len(picks) - 1) / 3)
        flat_x = TSNE(random_state=0, init="pca", perplexity=perplexity).fit_transform(x[picks])
        for c in wanted:
            at = flat_x[ids[picks].numpy() == c]
            ax.scatter(*at.T, s=6, color=palette[c], label=source.classes[c])
        ax.set(title=LABELS[method], xticks=[], yticks=[])
    axes[-1].legend(fontsize=8)
    save_figure(study, figure, f"tsne-{study.task}")


def figure5(study: Study) -> None:
    """Figure 5: target image, each method's prediction, truth. First seed."""
    groups = method_cells(study)
    run_groups(study, groups)
    cells = {method: group[0] for method, group in groups.items()}
    source, val, table = opened(next(iter(cells.values())))
    networks = {LABELS[m]: load(evaluation.newest_checkpoint(c["out"])) for m, c in cells.items()}
    study.to.mkdir(parents=True, exist_ok=True)
    path = study.to / f"figure5-{study.task}.png"
    evaluation.draw(path, val, table, networks, "cpu", source.classes, count=4)
    print(f"wrote {path}", flush=True)


def load_discriminator(path: Path) -> Discriminator:
    """D as a checkpoint of train.py holds it."""
    meta = evaluation.read_metadata(path)
    D = Discriminator(len(meta["classes"]), meta["settings"]["d_channels"])
    tensors = train.load_file(path)
    D.load_state_dict({k[2:]: v for k, v in tensors.items() if k.startswith("D.")})
    return D.eval()


@torch.no_grad()
def look(G, image: torch.Tensor, size) -> tuple[torch.Tensor, torch.Tensor]:
    """(p, M) of one image 3 H W: the ensemble C h' w' and the discrepancy h' w' at `size`."""
    G.eval()
    logits_1, logits_2 = (clan.upsample(x, size) for x in G(image[None]))
    m = discrepancy_map(logits_1.softmax(dim=1), logits_2.softmax(dim=1))
    return (logits_1 + logits_2).softmax(dim=1)[0], m[0, 0]


def weightmap(study: Study) -> None:
    """What the adaptive weight does: M, the weight and D's answer on one target image.

    Before adaptation, where it is to act, and after. First seed of CLAN.
    """
    given = study.cell("clan", study.seeds[0], method="clan")
    run_cells(study, [given])
    source, val, table = opened(given)
    _, hyper = train.configure(given)
    image, label = next(all_images(val, 1))
    truth = table[label.numpy()]
    last = evaluation.newest_checkpoint(given["out"])
    paths = {"before": given["out"] / train.BEFORE, "after": last}
    figure = Figure(figsize=(14, 4.4), layout="constrained")
    axes = figure.subplots(2, 5)
    palette = evaluation.palette_of(source.classes)
    for row, (when, path) in zip(axes, paths.items(), strict=True):
        if not path.exists():  # adversarial from the first step: no state before adaptation
            path = sorted(given["out"].glob("step_*.safetensors"))[0]
        G, D = load(path), load_discriminator(last)
        p, m = look(G, image, tuple(image.shape[-2:]))
        with torch.no_grad():
            answer = clan.domain_logits(D, p[None])[0, 0].sigmoid()
        pred = p.argmax(dim=0).numpy()
        row[0].imshow(image.permute(1, 2, 0) if when == "before" else palette[truth])
        row[1].imshow(palette[pred])
        shown = [(m, "magma", None), (hyper.lambda_local * m + hyper.eps, "magma", 0)]
        shown += [(answer, "coolwarm", 0)]
        titles = ("target image" if when == "before" else "truth", f"prediction {when}")
        titles += ("M", "weight lambda_local M + eps", "D: probability of source")
        for ax, (values, colours, low) in zip(row[2:], shown, strict=True):
            high = 1 if colours == "coolwarm" else None
            drawn = ax.imshow(values, cmap=colours, vmin=low, vmax=high)
            figure.colorbar(drawn, ax=ax, shrink=0.6)
        for ax, title in zip(row, titles, strict=True):
            ax.set_title(title, fontsize=9)
            ax.axis("off")
    save_figure(study, figure, f"weightmap-{study.task}")


# Does M tell where the ensemble is wrong?


def auc(scores: np.ndarray, wrong: np.ndarray) -> float:
    """Probability that a wrong pixel scores higher than a right one (ties count a half)."""
    positive, negative = int(wrong.sum()), int((~wrong).sum())
    if not positive or not negative:
        return float("nan")
    _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]  # mean rank of equal scores, from 1
    return float((ranks[wrong].sum() - positive * (positive + 1) / 2) / (positive * negative))


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's; NaN where one of the two is constant."""
    if len(a) < 2 or a.std() == 0 or b.std() == 0:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])


def m_and_errors(G, val, table, count: int):
    """M, 1 - confidence, wrong (bool) and class of the labelled pixels of a split, each flat."""
    parts = []
    for image, label in all_images(val, count):
        ids = torch.from_numpy(table[label.numpy()])
        p, m = look(G, image, ids.shape)
        confidence, pred = p.max(dim=0)
        seen = ids < G.num_classes
        values = (m, 1 - confidence, pred != ids, ids)
        parts.append([x[seen].numpy() for x in values])
    return (np.concatenate(part) for part in zip(*parts, strict=True))


def disagreement_row(path: Path, val, table, classes, count: int) -> tuple[dict, dict]:
    """Of one checkpoint: numbers over all pixels, and the correlation of M with error by class."""
    G = load(path)
    m, doubt, wrong, ids = m_and_errors(G, val, table, count)
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


DISAGREE = {
    "lambda_weight 0": {"lambda_weight": 0.0},
    "lambda_weight 0.01": {"lambda_weight": 0.01},
    "lambda_weight 0.03": {"lambda_weight": 0.03},
    "lambda_weight 0.1": {"lambda_weight": 0.1},
    "a loss for each head": {"seg_heads": "each", "lambda_weight": 0.01},
    "each head, 0.1": {"seg_heads": "each", "lambda_weight": 0.1},
}


def disagreement(study: Study) -> None:
    """What makes M informative: M against the error of the ensemble on the target, by setting.

    Means over seeds; correlation is between M and being wrong, over pixels.
    """
    cells = {
        label: [study.cell(f"m{i}", seed, **change) for seed in study.seeds]
        for i, (label, change) in enumerate(DISAGREE.items())
    }
    results = run_groups(study, cells)
    source, val, table = opened(cells["lambda_weight 0"][0])
    rows, classes = [], {}
    for label, group in cells.items():
        for when in ("before", "after"):
            paths = [
                g["out"] / train.BEFORE if when == "before" else last_checkpoint(g["out"])
                for g in group
            ]
            found = [
                disagreement_row(path, val, table, source.classes, min(study.images, 100))
                for path in paths
                if path.exists()
            ]
            if not found:
                continue
            numbers = {k: np.mean([n[k] for n, _ in found]) for k in found[0][0]}
            key = "miou_before" if when == "before" else "miou"
            score = percent(r[key] for r in results[label])
            rows.append([label, when, score, *(f"{v:.3f}" for v in numbers.values())])
            classes[f"{label}, {when}"] = [
                spread([c[name] for _, c in found if not np.isnan(c[name])])[0]
                for name in source.classes
            ]
            header = ["setting", "adaptation", "mIoU", *numbers]
    notes = [
        "M against being wrong, over the pixels of the target's validation split; AUC is the "
        "chance that a wrong pixel has the larger value.",
        provenance(study, [r for group in results.values() for r in group]),
    ]
    write(study, f"disagreement-{study.task}", header, rows, notes)
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    ax = figure.subplots()
    bars(ax, list(source.classes), {k: v for k, v in classes.items() if k.endswith("before")})
    ax.set_ylabel("correlation of M with error")
    save_figure(study, figure, f"disagreement-{study.task}")


# Where M puts the weight, or how much weight there is?


def mean_weight(given: dict) -> float:
    """lambda_local * M + eps of a finished CLAN run, averaged over pixels and logged steps."""
    _, hyper = train.configure(given)
    if hyper.weight_map == "mean1":
        return 1.0
    m = [line["m"] for line in metrics(given["out"]) if "m" in line]
    return hyper.lambda_local * float(np.mean(m)) + hyper.eps


REGIMES = {"look and layout": (0.5, 0.5), "look alone": (0.5, 0.0)}


def control(study: Study) -> None:
    """Is it where M puts the weight, or how large the weight is? On streets in two regimes.

    Only a shift of layout and class frequency can show negative transfer.
    """
    settings, hyper = train.configure(study.given)
    regimes = {name: {"shift": shift} for name, shift in REGIMES.items()}
    if settings.tgt != "streets" or "shift" in study.given:
        regimes = {"": {}}

    def cells(regime: str, name: str, change: dict) -> list[dict]:
        letter = name[1] if name.startswith("(") else name.split()[0].lower()
        label = "look-" * (regime == "look alone") + letter
        if name == "TAN" and study.tan:
            label += f"-adv{study.tan['lambda_adv']:g}"
        return [study.cell(label, seed, **regimes[regime], **change) for seed in study.seeds]

    groups = {(r, name): cells(r, name, v) for r in regimes for name, v in variants(study).items()}
    results = run_groups(study, groups)
    scaled = {}
    for regime in regimes:
        means = [mean_weight(given) for given in groups[regime, "CLAN"]]
        group = cells(regime, SCALED, {"method": "tan"})
        for given, mean in zip(group, means, strict=True):
            given["lambda_adv"] = hyper.lambda_adv * mean
        scaled[regime, SCALED] = group
    groups, results = groups | scaled, results | run_groups(study, scaled)
    for regime in regimes:
        control_table(study, regime, groups, results)


SCALED = "(a) TAN, lambda_adv times CLAN's mean weight"


def variants(study: Study) -> dict[str, dict]:
    """What each row of the control changes in CLAN, by its name."""
    settings, hyper = train.configure(study.given)
    recipe = "released" if settings.recipe == "paper" else "paper"
    detached = "(e) gradient through M" if hyper.detach_m else "(e) no gradient through M"
    tan = {"method": "tan"} | study.tan
    return {
        "source only": {"method": "source"},
        "TAN": tan,
        "CLAN": {},
        "(b) M shuffled over the pixels": {"weight_map": "shuffled"},
        "(c) Eq. 4, every weight 1": {"lambda_local": 0.0, "eps": 1.0},
        "(d) Eq. 5, no Eq. 4": {"lambda_weight": 0.0},
        detached: {"detach_m": not hyper.detach_m},
        f"(f) recipe {recipe}": {"recipe": recipe},
        "(g) weights scaled to mean 1 (a deviation)": {"weight_map": "mean1"},
    }


def control_table(study: Study, regime: str, groups: dict, results: dict) -> None:
    """The control in one regime of streets."""
    results = {name: group for (r, name), group in results.items() if r == regime}
    baseline = results["source only"]
    rows = []
    for name, group in results.items():
        rare = [
            np.mean([r["iou"][c] for c in INFREQUENT if r["iou"].get(c) is not None]) for r in group
        ]
        lost = [
            sum(
                r["iou"][c] < b["iou"][c] - 0.02
                for c in r["iou"]
                if None not in (r["iou"][c], b["iou"][c])
            )
            for r, b in zip(group, baseline, strict=True)
        ]
        given = groups[regime, name]
        weights = [mean_weight(g) for g in given] if "m" in metrics(given[0]["out"])[-1] else []
        row = [name, percent(r["miou"] for r in group), percent(rare), f"{np.mean(lost):.1f}"]
        row += [difference(group, results["TAN"]), difference(group, results["CLAN"])]
        rows.append([*row, f"{np.mean(weights):.2f}" if weights else ""])
    header = ["variant", "mIoU", "infrequent", "classes lost", "minus TAN", "minus CLAN"]
    notes = [
        f"Streets, shift of {regime}. " * bool(regime) + "mIoU and mean IoU of "
        f"{', '.join(INFREQUENT)} in %, last checkpoint, mean ± deviation; classes lost: how many "
        "fall more than 2 points below source only; paired differences with 95 % bootstrap "
        "intervals; mean weight: lambda_local M + eps over the adversarial steps.",
        provenance(study, [r for group in results.values() for r in group]),
    ]
    name = "-".join(["control", study.task, *regime.split()])
    write(study, name, [*header, "mean weight"], rows, notes)


SWEEP = (0.0005, 0.005, 0.02, 0.05, 0.1)


def sweep(study: Study) -> None:
    """lambda_adv for TAN and for CLAN, each on its own: how a setting is chosen (tuning seeds)."""
    groups = {
        (method, value): [
            study.cell(f"{method}-adv{value:g}", seed, method=method, lambda_adv=value)
            for seed in study.seeds
        ]
        for method in ("tan", "clan")
        for value in SWEEP
    }
    results = run_groups(study, groups)
    rows = [
        [f"{v:g}", *(percent(r["miou"] for r in results[m, v]) for m in ("tan", "clan"))]
        for v in SWEEP
    ]
    notes = [
        "Target mIoU in %, on tuning seeds: for choosing, not for reporting.",
        provenance(study, [r for group in results.values() for r in group]),
    ]
    write(study, f"sweep-{study.task}", ["lambda_adv", "TAN", "CLAN"], rows, notes)


# Real to real: CamVid by day to CamVid at dusk.

DAY = ("0006R0", "0016E5")


def dusk(study: Study) -> None:
    """The table from CamVid's day to its dusk: --tgt-dir names the whole of CamVid.

    Source: the train frames 0006R0* and 0016E5*. Target: 0001TP* of the same split, every other
    frame without its label for adaptation, the rest for scoring.
    """
    camvid = study.given.get("tgt_dir")
    if camvid is None:
        raise ValueError("name CamVid's folder with --tgt-dir")
    images = sorted((camvid / "images" / "train").iterdir())
    by_day = [p for p in images if p.name.startswith(DAY)]
    at_dusk = [p for p in images if p.name.startswith("0001TP")]
    if not by_day or len(at_dusk) < 2:
        raise ValueError(f"{camvid}/images/train holds no 0006R0*, 0016E5* and 0001TP* of CamVid")
    parts = {
        ("day", "train"): by_day,
        ("dusk", "train"): at_dusk[::2],
        ("dusk", "val"): at_dusk[1::2],
    }
    root = study.runs / "camvid"
    for (name, split), files in parts.items():
        link(camvid / "classes.json", root / name / "classes.json")
        for image in files:
            label = Path("labels") / "train" / f"{image.stem}.png"
            link(image, root / name / "images" / split / image.name)
            link(camvid / label, root / name / "labels" / split / label.name)
    folders = {"src_dir": root / "day", "tgt_dir": root / "dusk"}
    table(replace(study, given=study.given | folders), "dusk")


def link(to: Path, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_symlink():
        path.symlink_to(to.resolve())


# The program.

COMMANDS = {
    f.__name__: f
    for f in (table, ccd, params, tsne, figure5, weightmap, disagreement, control, sweep, dusk)
}
EVERYTHING = (table, ccd, params, tsne, figure5, weightmap, disagreement, control)
QUICK = {"steps": 400, "adv_start": 275}  # a fourth of the default run on streets
OWN = {"seed", "out", "method", "save_every", "keep"}  # what a study sets itself


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def words(text: str) -> tuple[str, ...]:
    found = tuple(text.split(","))
    if not set(found) <= set(LABELS):
        raise argparse.ArgumentTypeError(f"choose from {','.join(LABELS)}")
    return found


def parse(argv) -> tuple[str, Study]:
    about = "\n".join(f"  {name:13}{f.__doc__.splitlines()[0]}" for name, f in COMMANDS.items())
    parser = argparse.ArgumentParser(
        description=f"{__doc__.splitlines()[0]}\n\n{about}",
        epilog="Every other flag of train.py holds for all runs.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("what", choices=[*COMMANDS, "all"])
    parser.add_argument("--methods", type=words, default=tuple(LABELS), help="of source,tan,clan")
    parser.add_argument("--seeds", type=numbers, help="such as 0,1,2; 0 to 4, 10 and 11 for sweep")
    parser.add_argument("--quick", action="store_true", help="streets: shorter runs, two seeds")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--runs", type=Path, help="where runs go; runs/study")
    parser.add_argument("--to", type=Path, help="where results go; the same folder")
    parser.add_argument("--images", type=int, default=1000, help="of each domain, for features")
    parser.add_argument("--class", dest="marked", default="wall", help="of the curve of ccd")
    parser.add_argument(
        "--tan-lambda-adv", type=float, help="TAN's own, where control has tuned it"
    )
    for cls in (train.Settings, clan.Hyper):
        train.add_flags(parser, cls, without=OWN)
    given = vars(parser.parse_args(argv))
    own = {k: given.pop(k) for k in ("what", "quick", "tan_lambda_adv", "seeds", "runs", "to")}
    parts = {k: given.pop(k) for k in ("methods", "jobs", "images", "marked")}
    if parts["jobs"] < 1 or parts["images"] < 1:
        raise ValueError("--jobs and --images must be at least 1")
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    if own["what"] == "dusk":
        given |= {"src": "folder", "tgt": "folder"}
    if own["quick"]:
        given = QUICK | given
        parts["images"] = min(parts["images"], 100)
    seeds = TUNING_SEEDS if own["what"] == "sweep" else (0, 1) if own["quick"] else tuple(range(5))
    runs = own["runs"] or Path("runs") / ("study-quick" if own["quick"] else "study")
    study = Study(
        given=given,
        seeds=own["seeds"] or seeds,
        runs=runs,
        to=own["to"] or runs,
        tan={} if own["tan_lambda_adv"] is None else {"lambda_adv": own["tan_lambda_adv"]},
        command=shlex.join(["python", "study.py", *argv]),
        **parts,
    )
    return own["what"], replace(study, runs=study.runs / study.task)


def main(argv=None) -> None:
    signal.signal(signal.SIGTERM, lambda number, frame: signal.raise_signal(signal.SIGINT))
    try:
        what, study = parse(sys.argv[1:] if argv is None else argv)
        for run in EVERYTHING if what == "all" else (COMMANDS[what],):
            run(study)
    except (train.Stopped, KeyboardInterrupt):
        print("stopped; the same command goes on", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
