"""Studies: many runs into one table or figure (Tables 1 and 2, Figures 3 to 6, controls).

    python study.py table                                    # streets, 3 methods, 5 seeds
    python study.py table --src gta5 --backbone r101 --data data
    python study.py control --jobs 2                         # where the weight, or how much of it?
    python study.py all --quick --jobs 2                     # everything, reduced

Every flag of train.py may follow and holds for all runs. A finished run is not run again, an
interrupted one goes on, and runs that agree until adaptation starts share their warm-up, which
changes no bit of them. Results (Markdown, JSON with every seed's scores, PNG) land in --to. Scores
are those of the last checkpoint on the target's validation split.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console
from rich.table import Table

import clan
import data
import eval as evaluation
import train
from checkpoints import (
    BEFORE,
    newest_checkpoint,
    owned,
    read_checkpoint,
    read_metadata,
    save,
    saved,
)
from losses import discrepancy_map
from models import Discriminator, Generator, load_weights

# Classes that the paper's text calls infrequent and prone to negative transfer (Sections 4.3 and
# 4.4; its tables show them in blue).
INFREQUENT = ("fence", "pole", "traffic light", "traffic sign")
LABELS = {"source": "source only", "tan": "TAN", "clan": "CLAN"}
TUNING_SEEDS = (10, 11)  # settings are chosen on these, and reported on others


@dataclass(frozen=True)
class Study:
    """What is asked for: which runs, and where they and the results lie."""

    given: dict  # flags of train.py for all runs
    tan: dict  # TAN's own flags, where the two methods are tuned apart
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    runs: Path
    to: Path
    jobs: int  # runs at a time
    images: int  # at most so many of each domain where features are measured
    marked: str  # the class of the curve of cluster distances
    command: str

    @property
    def task(self) -> str:
        """Names data sets and backbone: the folder in --runs that the runs lie in."""
        settings, _ = train.configure(self.given)
        sides = ((settings.src, settings.src_dir), (settings.tgt, settings.tgt_dir))
        names = [Path(own or name).name if name == "folder" else name for name, own in sides]
        if settings.shift != train.Settings.shift:
            names.append("shift{},{}".format(*settings.shift))
        return "-".join([*names, settings.backbone])

    def cell(self, seed: int, **change) -> dict:
        """The flags of one run. Its folder is named by its method and by what `change` changes.

        A flag that the method does not read (CLAN's alone, say) does not reach it. On the first
        seed the plain runs of the methods keep checkpoints, for curves over training.
        """
        if change.get("method") == "tan":
            change = self.tan | change
        # D's width is read by no loss of source only, but D's weights lie in the checkpoint that
        # it shares with TAN.
        idle = train.NOT_USED_BY.get(change.get("method"), set()) - {"d_channels"}
        flags = {k: v for k, v in (self.given | change).items() if k not in idle}
        base, own = flat(self.given), flat(flags)
        changed = [k for k in sorted(change) if k in flags and own[k] != base[k] and k != "method"]
        name = "-".join([own["method"], *(f"{k}{own[k]}".replace(" ", "") for k in changed)])
        adaptation = own["steps"] - own["adv_start"]
        flags.setdefault("log_every", max(1, min(50, adaptation // 50)))  # enough for means of M
        if seed == self.seeds[0] and set(changed) <= self.tan.keys():
            flags |= {"save_every": max(1, own["steps"] // 16), "keep": 100}
        return flags | {"seed": seed, "out": self.runs / self.task / f"{name}-seed{seed}"}

    def cells(self, **change) -> list[dict]:
        """`cell` for every seed."""
        return [self.cell(seed, **change) for seed in self.seeds]


# Running cells.

RESULT = "study.json"  # of a finished run: its scores, time and machine


def flat(given: dict) -> dict:
    """All fields of a run, as its checkpoints write them."""
    settings, hyper = train.configure(given)
    return json.loads(json.dumps(asdict(settings) | asdict(hyper), default=str))


def checkpoints(out: Path) -> list[Path]:
    return sorted(out.glob("step_*.safetensors"))


def last_checkpoint(out: Path) -> Path | None:
    """Where a run would go on."""
    return [None, *saved(out)][-1]


def finished(given: dict) -> dict | None:
    """The result of a run that is complete. Raises ValueError if its folder holds another run."""
    out = given["out"]
    last = last_checkpoint(out)
    if last is None:
        return None
    wanted, found = flat(given), read_metadata(last)["settings"]
    compared = wanted.keys() - (train.FREE - {"src_dir", "tgt_dir"})
    compared -= train.NOT_USED_BY.get(wanted["method"], set()) - {"d_channels"}
    changed = [k for k in sorted(compared) if wanted[k] != found.get(k)]
    if changed:
        was = ", ".join(f"{train.flag_of(k)} {found.get(k)}, now {wanted[k]}" for k in changed)
        raise ValueError(f"{out} was run with {was}: choose another --runs, or delete it")
    return json.loads((out / RESULT).read_text()) if (out / RESULT).exists() else None


# Fields that no step before adv_start reads: the target takes no part in those.
ADAPTATION_ONLY = train.ADVERSARIAL - {"d_channels"} | {"lambda_local", "eps", "adaptive_start"}
ADAPTATION_ONLY |= {"detach_m", "weight_map", "shift"}


def warm_up(given: dict) -> str:
    """What the steps before adv_start depend on: runs that agree in it share them bit for bit."""
    settings, hyper = train.configure(given)
    if not 0 < hyper.adv_start < hyper.steps:
        return str(settings.out)  # nothing to share
    fields = {k: v for k, v in flat(given).items() if k not in train.FREE | ADAPTATION_ONLY}
    if hyper.method != "clan":  # neither of the others reads Eq. 4's fields
        fields = {k: v for k, v in fields.items() if k not in train.CLAN_ONLY}
    fields |= {"method": hyper.method == "clan"}
    fields |= {
        "batchnorm": clan.uses_batch_statistics(0, hyper)
    }  # "batch" and "before" differ later
    return json.dumps(fields, sort_keys=True)


def adopt(donor: Path, given: dict) -> Path:
    """Makes the donor's warm-up this run's own: its log, and its checkpoint at adv_start.

    Scores on the target stay behind, since the donor's target may be another. Returns where to go
    on; for source only, which has no such checkpoint, that is the donor's.
    """
    settings, hyper = train.configure(given)
    lines = [line for line in metrics(donor) if "target_miou" not in line]
    lines = [line for line in lines if line["step"] <= hyper.adv_start]
    (settings.out / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    start = donor / BEFORE
    if hyper.method == "source":
        return start
    about = read_metadata(start) | {"settings": flat(given)}
    save(settings.out / BEFORE, read_checkpoint(start)[0], about)
    return settings.out / BEFORE


def run_cell(given: dict, donor: Path | None, threads: int | None) -> dict:
    """One run to its end: from its last checkpoint, from a donor's warm-up, or from step 0."""
    if threads:
        torch.set_num_threads(threads)
    settings, hyper = train.configure(given)
    out, since = settings.out, time.monotonic()
    with owned(out):
        start = last_checkpoint(out)
        if start is None and donor and (donor / BEFORE).exists():
            start = adopt(donor, given)
        with (out / "log.txt").open("a") as file, contextlib.redirect_stdout(file):
            result = train.train(settings, hyper, start, Console(file=file))
    result["seconds"] = time.monotonic() - since
    result["machine"] = evaluation.machine(evaluation.find_device(settings.device)) + " a run"
    result["commit"] = read_metadata(Path(result["checkpoint"]))["commit"]
    beside = out / f"{RESULT}.tmp"
    beside.write_text(json.dumps(result))
    beside.replace(out / RESULT)
    return result


def run_cells(study: Study, cells: list[dict]) -> list[dict]:
    """The result of each cell, in order; what is missing is run, a shared warm-up first."""
    cells_of = {given["out"]: given for given in cells}  # two groups may hold the same run
    missing = [given for given in cells_of.values() if finished(given) is None]
    donors = choose_donors(list(cells_of.values()))
    donor_of = {given["out"]: donors.get(warm_up(given)) for given in missing}
    first = [given for given in missing if donor_of[given["out"]] in (None, given["out"])]
    rest = [given for given in missing if given not in first]
    done = len(cells_of) - len(missing)
    for wave in (first, rest):
        tasks = [(given, donor_of[given["out"]]) for given in wave]
        for given, result in run_all(tasks, study.jobs):
            done += 1
            score, seconds = 100 * result["miou"], result["seconds"]
            name = given["out"].name
            print(
                f"[{done}/{len(cells_of)}] {name}: mIoU {score:.1f} ({seconds:.0f} s)", flush=True
            )
    return [finished(given) for given in cells]


def choose_donors(cells: list[dict]) -> dict[str, Path]:
    """Whose warm-up to share, by what it depends on: a finished one, else one with checkpoints."""
    adapted = [given for given in cells if given.get("method") != "source"]  # the others keep none
    adapted.sort(key=lambda given: "keep" not in given)
    adapted.sort(key=lambda given: not (given["out"] / BEFORE).exists())
    donors: dict[str, Path] = {}
    for given in adapted:
        donors.setdefault(warm_up(given), given["out"])
    return donors


def run_groups(study: Study, groups: dict) -> dict:
    """run_cells of several lists of cells, by their names."""
    results = iter(run_cells(study, [given for group in groups.values() for given in group]))
    return {name: [next(results) for _ in group] for name, group in groups.items()}


def run_all(tasks: list, jobs: int) -> Iterator[tuple[dict, dict]]:
    """(given, result) of each task as it ends; each in a process if jobs > 1."""
    if jobs == 1:
        yield from ((given, run_cell(given, donor, None)) for given, donor in tasks)
        return
    threads = max(1, (os.cpu_count() or 1) // jobs)
    fresh = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    with ProcessPoolExecutor(jobs, mp_context=fresh, initializer=own_signals) as pool:
        waiting, running = list(tasks), {}
        try:
            while waiting or running:
                while waiting and len(running) < jobs:  # no more: a queued run could not be stopped
                    given, donor = waiting.pop(0)
                    running[pool.submit(run_task, given, donor, threads)] = given
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield running.pop(future), future.result()
        except BrokenProcessPool as error:  # which has asked the others to end
            raise OSError("a run was killed (for memory?); the same command goes on") from error
        except BaseException:
            for child in multiprocessing.active_children():
                child.terminate()  # a run saves and ends when it is asked to once
            raise


def own_signals() -> None:
    """A process of runs is asked to end by its parent alone, and between two runs not at all.

    In the parent's process group a Ctrl-C would reach a run twice, which ends it unsaved.
    """
    os.setpgrp()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def run_task(given: dict, donor: Path | None, threads: int) -> dict:
    """`run_cell` in a process of its own: SIGTERM stops it wherever it is."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return run_cell(given, donor, threads)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def metrics(out: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl."""
    return list(map(json.loads, (out / "metrics.jsonl").read_text().splitlines()))


# Statistics over seeds. Scores are in [0, 1], or None for a class that does not occur.

Pick = Callable[[dict], float | None]  # a score of a result


def miou(result: dict) -> float:
    return result["miou"]


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


def percent(values: Iterable[float | None]) -> str:
    """'42.8 ± 6.1' of scores."""
    mean, deviation = spread(values)
    if np.isnan(mean):
        return "-"
    return f"{100 * mean:.1f}" + ("" if np.isnan(deviation) else f" ± {100 * deviation:.1f}")


def difference(a: list[dict], b: list[dict], pick: Pick = miou) -> str:
    """'-0.6 [-2.1, 0.9]': the paired mean of a - b in points, and its bootstrap interval."""
    both = [(pick(x), pick(y)) for x, y in zip(a, b, strict=True)]
    pairs = [100 * (x - y) for x, y in both if None not in (x, y)]
    if not pairs:
        return "-"
    low, high = interval(pairs)
    return f"{np.mean(pairs):+.1f}" + ("" if np.isnan(low) else f" [{low:+.1f}, {high:+.1f}]")


# Writing results.

INTERVALS = (
    "Brackets: 95 % bootstrap interval of the difference paired by seed; with this few seeds it is "
    "too narrow, a lower bound of the doubt."
)


def provenance(study: Study, results: list[dict]) -> str:
    """Command, commits of the runs, seeds, computing time and machine."""
    commits, machines = ({r[key] for r in results} for key in ("commit", "machine"))
    seeds = sorted({r["settings"]["seed"] for r in results})
    distinct = {r["checkpoint"]: r["seconds"] for r in results}
    return (
        f"`{study.command}`; {len(distinct)} runs of {sum(distinct.values()) / 60:.0f} minutes in "
        f"all, commit {', '.join(sorted(commits))}; seeds {', '.join(map(str, seeds))}; "
        f"{'; '.join(sorted(machines))}; torch {torch.__version__}, {time.strftime('%Y-%m-%d')}"
    )


def write(study: Study, name: str, header: list, rows: list[list], note: str, groups: dict) -> None:
    """The table on the screen, as NAME.md, and with the scores of each run as NAME.json."""
    notes = [note, provenance(study, [r for group in groups.values() for r in group])]
    path = study.to / f"{name}.md"
    study.to.mkdir(parents=True, exist_ok=True)
    table = Table(title=name)
    for i, title in enumerate(header):
        table.add_column(title, justify="right" if i else "left")
    for row in rows:
        table.add_row(*row)
    console = Console()
    console.print(table)
    lines = ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)]
    path.write_text("\n".join([*lines, "", *notes]) + "\n")
    kept = ("miou", "miou_13", "miou_before", "iou", "seconds", "commit")
    runs = {
        name if isinstance(name, str) else ", ".join(map(str, name)): [
            {"seed": r["settings"]["seed"]} | {k: r[k] for k in kept if k in r} for r in group
        ]
        for name, group in groups.items()
    }
    content = {"header": header, "rows": rows, "notes": notes, "runs": runs}
    path.with_suffix(".json").write_text(json.dumps(content, indent=1))
    console.print(*notes, f"wrote {path} and .json", sep="\n", soft_wrap=True)


def save_figure(study: Study, figure: Figure, name: str, results: list[dict]) -> None:
    """NAME.png in 256 colours, which keeps it small, and its provenance."""
    study.to.mkdir(parents=True, exist_ok=True)
    path = study.to / f"{name}.png"
    figure.savefig(path, dpi=100)
    with Image.open(path) as image:
        small = image.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    small.save(path, optimize=True)
    print(f"wrote {path}: {provenance(study, results)}", flush=True)


# Tables 1 and 2.


def method_groups(study: Study) -> dict[str, list[dict]]:
    return {method: study.cells(method=method) for method in study.methods}


def table(study: Study) -> None:
    """Tables 1 and 2: IoU by class and mIoU, mean ± deviation over seeds, beside the paper's."""
    results = run_groups(study, method_groups(study))
    settings, _ = train.configure(study.given)
    papers = {
        m: evaluation.paper_row(settings.src, settings.tgt, settings.backbone, m) for m in results
    }
    papers = {m: row for m, row in papers.items() if row}
    paired = {"clan", "tan"} <= results.keys()

    def row(label: str, pick: Pick) -> list[str]:
        cells = [percent(map(pick, group)) for group in results.values()]
        cells += [difference(results["clan"], results["tan"], pick)] if paired else []
        return [label, *cells, *(evaluation.percent(pick(p)) for p in papers.values())]

    def gain(label: str, pick: Pick) -> list[str]:
        cells = [difference(group, results["source"], pick) for group in results.values()]
        both = [(pick(p), pick(papers["source"])) for p in papers.values()]
        theirs = ("-" if None in (a, b) else f"{100 * (a - b):+.1f}" for a, b in both)
        return [label, *cells, *[""] * paired, *theirs]

    header = ["class", *(LABELS[m] for m in results)]
    header += ["CLAN - TAN"] * paired + [f"{LABELS[m]}, paper" for m in papers]
    first = next(iter(results.values()))[0]
    rows = [
        row(name + " *" * (name in INFREQUENT), lambda r, name=name: r["iou"].get(name))
        for name in first["iou"]
    ]
    means = {"miou": "mIoU"}
    if "miou_13" in first:  # SYNTHIA's two ways of counting
        means = {"miou": "mIoU, 16 classes", "miou_13": "mIoU, 13 classes"}
    for key, label in means.items():
        rows.append(row(label, lambda r, key=key: r.get(key)))
        if "source" in results:
            rows.append(gain(f"gain, {label}", lambda r, key=key: r.get(key)))
    note = (
        "IoU in % on the validation split, last checkpoint, mean ± standard deviation over seeds. "
        f"{INTERVALS} * infrequent."
    )
    write(study, f"table-{study.task}", header, rows, note, results)


# What networks have learnt: features of E, the map M.


def device_of(study: Study) -> torch.device:
    return evaluation.find_device(study.given.get("device", "auto"))


def load(path: Path, device: torch.device) -> Generator:
    G, _ = evaluation.load_generator(path, say=lambda _: None)
    return G.to(device)


def open_target(given: dict):
    """(source, labelled validation split of the target, table of its train ids) of a run."""
    source, _, val = train.open_all(train.configure(given)[0])
    return source, val, data.shared_classes(source, val)[0]


def first_seed(study: Study):
    """The methods' runs on the first seed, made where missing: (cells, results) by method."""
    groups = {method: [study.cell(study.seeds[0], method=method)] for method in study.methods}
    results = run_groups(study, groups)
    return {m: group[0] for m, group in groups.items()}, results


def spread_images(dataset: data.DataSet, count: int) -> Iterator[tuple]:
    """(index, image 3 H W, label H' W') of at most `count` images, evenly over a split."""
    picks = np.linspace(0, len(dataset) - 1, min(count, len(dataset))).round().astype(int)
    pairs = data.Pairs(dataset)
    yield from data.checked(pairs[int(i)] for i in picks)


@torch.no_grad()
def labelled_features(
    G: Generator, dataset: data.DataSet, table: np.ndarray, count: int
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """(index, features N d, train ids N) of each image, at the labelled pixels of E's grid.

    Ours, as the paper does not say: the features are what the classifiers read (of VGG-16's three
    maps the deepest), in evaluation mode; a label is down-sampled to their grid by taking the
    pixel nearest to each cell's centre. table: from the split's train ids to G's classes.
    """
    device = next(G.parameters()).device
    to_source = torch.from_numpy(table)
    G.eval()
    for i, image, label in spread_images(dataset, count):
        x = G.features(image[None].to(device))
        x = (x[-1] if isinstance(x, tuple) else x)[0].float().cpu()  # d h w
        label = to_source[label.int()][None, None].float()
        ids = F.interpolate(label, size=x.shape[-2:], mode="nearest-exact").flatten().long()
        seen = ids < G.num_classes
        yield i, x.flatten(1).T[seen], ids[seen]


def class_centres(G, dataset, table, count: int) -> torch.Tensor:
    """The mean feature of each class over the pixels of a split, C d float64; NaN if unseen."""
    total, pixels = 0, torch.zeros(G.num_classes, dtype=torch.float64)
    for _, x, ids in labelled_features(G, dataset, table, count):
        one_hot = F.one_hot(ids, G.num_classes).double()  # N C
        total = total + one_hot.T @ x.double()
        pixels += one_hot.sum(dim=0)
    return total / pixels[:, None]  # 0 / 0 is NaN


def cluster_distance(G, source, target, table, count: int) -> torch.Tensor:
    """Euclidean distance between the class centres of two domains, C float64 (Section 4.4)."""
    own = np.arange(256, dtype=np.uint8)
    a, b = class_centres(G, source, own, count), class_centres(G, target, table, count)
    return (a - b).norm(dim=1)


def over_training(cells: dict[str, dict]) -> dict[str, dict[int, Path]]:
    """Checkpoints by method and step. Those of a shared warm-up lie with one of the runs."""
    own = {
        method: {read_metadata(p)["step"]: p for p in checkpoints(given["out"])}
        for method, given in cells.items()
    }
    for method, given in cells.items():
        start = train.configure(given)[1].adv_start
        for other in cells:
            if warm_up(cells[other]) == warm_up(given):
                own[method] |= {s: p for s, p in own[other].items() if s <= start}
        if len(own[method]) < min(10, train.configure(given)[1].steps):
            raise ValueError(f"{given['out']} kept too few checkpoints for a curve: delete it")
    return {method: dict(sorted(steps.items())) for method, steps in own.items()}


def ccd(study: Study) -> None:
    """Figure 4 (left) and Figure 6: cluster-centre distances over training and by class.

    Distances are divided by those before any training, so that this is at 1: an ImageNet network
    for r101, vgg16 and lite0; for tiny a random one, whose distances mean little, so that there
    only the comparison of methods counts. The target's labels are of its validation split. One
    seed, the first.
    """
    first = study.cell(study.seeds[0], method=study.methods[0])
    source, val, table = open_target(first)
    if study.marked not in data.shared_classes(source, val)[1]:
        raise ValueError(f"--class {study.marked} is not in both {source.name} and {val.name}")
    cells, results = first_seed(study)
    device = device_of(study)

    def measure(G):
        return cluster_distance(G.to(device), source, val, table, study.images)

    start = measure(train.prepare(*train.configure(first), None, Console(quiet=True)).G)
    curves = {
        method: {step: measure(load(path, device)) / start for step, path in steps.items()}
        for method, steps in over_training(cells).items()
    }
    picks = {
        study.marked: lambda x: x[source.classes.index(study.marked)].item(),
        "mean over classes": lambda x: x.nanmean().item(),
    }
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    for ax, (title, pick) in zip(figure.subplots(1, 2), picks.items(), strict=True):
        for method, values in curves.items():
            ax.plot([0, *values], [1.0, *map(pick, values.values())], label=LABELS[method])
        ax.set(title=title, xlabel="step", ylabel="cluster distance / before training")
        ax.legend(fontsize=8)
    distinct = [r for group in results.values() for r in group]
    save_figure(study, figure, f"ccd-curve-{study.task}", distinct)

    last = {LABELS[m]: values[max(values)] for m, values in curves.items()}
    last = {"before training": start / start} | last
    seen = [i for i in range(len(source.classes)) if not torch.isnan(start[i])]
    names = [source.classes[i] + " *" * (source.classes[i] in INFREQUENT) for i in seen]
    columns = {label: values[seen].tolist() for label, values in last.items()}
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    bars(figure.subplots(), names, columns)
    figure.axes[0].set_ylabel("cluster distance / before training")
    save_figure(study, figure, f"ccd-classes-{study.task}", distinct)

    rows = [[name, *(f"{c[i]:.2f}" for c in columns.values())] for i, name in enumerate(names)]
    rows.append(["mean", *(f"{np.mean(c):.2f}" for c in columns.values())])
    note = (
        f"Euclidean distance between the domains' mean features, up to {study.images} images of "
        "each, over the distance before training; last checkpoint, first seed. * infrequent."
    )
    write(study, f"ccd-{study.task}", ["class", *columns], rows, note, results)


def bars(ax, names: list[str], groups: dict[str, list[float]]) -> None:
    """Grouped bars, one group a name, one colour a key."""
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

EPS, SLOPES = (0.1, 0.2, 0.4, 0.8), (10.0, 20.0, 40.0, 80.0)


def d_loss(given: dict) -> float:
    """The mean loss of D over the last fifth of the adversarial steps of a finished run."""
    values = [line["d"] for line in metrics(given["out"]) if "d" in line]
    return float(np.mean(values[-max(1, len(values) // 5) :]))


def params(study: Study) -> None:
    """Figure 4 (right): target mIoU (bars) and D's loss (line) over eps and lambda_local."""
    groups = {"TAN": study.cells(method="tan")}
    groups |= {("eps", v): study.cells(eps=v, lambda_local=40.0) for v in EPS}
    groups |= {("lambda_local", v): study.cells(eps=0.4, lambda_local=v) for v in SLOPES}
    results = run_groups(study, groups)
    losses = {name: float(np.mean([d_loss(given) for given in groups[name]])) for name in groups}
    baseline = 100 * spread(map(miou, results["TAN"]))[0]

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    for ax, (label, values) in zip(
        figure.subplots(1, 2), (("eps", EPS), ("lambda_local", SLOPES)), strict=True
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
            percent(map(miou, group)),
            difference(group, results["TAN"]),
            f"{losses[name]:.2f}",
        ]
        for name, group in results.items()
    ]
    note = (
        "eps at lambda_local = 40, and lambda_local at eps = 0.4. Target mIoU in %, last "
        f"checkpoint; D's loss over the last fifth of the adversarial steps. {INTERVALS}"
    )
    header = ["parameter", "mIoU", "minus TAN", "D's loss"]
    write(study, f"params-{study.task}", header, rows, note, results)


# Figures 3 and 5, and what the adaptive weight looks like.

FIGURE_3 = ("building", "traffic sign", "pole", "vegetation")


def some_of_each(i: int, ids: torch.Tensor, wanted: list[int], most: int) -> np.ndarray:
    """Where at most `most` pixels of each class lie in image i: the same for all networks."""
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
    source, val, table = open_target(next(iter(cells.values())))
    wanted = [source.classes.index(name) for name in FIGURE_3 if name in source.classes]
    palette = evaluation.palette_of(source.classes) / 255

    figure = Figure(figsize=(4 * len(cells), 3.8), layout="constrained")
    axes = figure.subplots(1, len(cells), squeeze=False)[0]
    for ax, (method, given) in zip(axes, cells.items(), strict=True):
        G = load(newest_checkpoint(given["out"]), device_of(study))
        x, of = [], []
        for i, features, ids in labelled_features(G, val, table, min(study.images, 100)):
            picks = some_of_each(i, ids, wanted, 20)
            x.append(features[picks])
            of.append(ids[picks])
        x, of = torch.cat(x), torch.cat(of)
        picks = some_of_each(0, of, wanted, 150)
        if len(picks) < 8:
            raise ValueError(f"fewer than 8 labelled features of {', '.join(FIGURE_3)}: {val.name}")
        perplexity = min(30, (len(picks) - 1) / 3)
        flat_x = TSNE(random_state=0, init="pca", perplexity=perplexity).fit_transform(x[picks])
        for c in wanted:
            at = flat_x[of[picks].numpy() == c]
            ax.scatter(*at.T, s=6, color=palette[c], label=source.classes[c])
        ax.set(title=LABELS[method], xticks=[], yticks=[])
    axes[-1].legend(fontsize=8)
    save_figure(study, figure, f"tsne-{study.task}", [r for g in results.values() for r in g])


def figure5(study: Study) -> None:
    """Figure 5: target image, each method's prediction, truth. First seed."""
    cells, results = first_seed(study)
    source, val, table = open_target(next(iter(cells.values())))
    device = device_of(study)
    networks = {
        LABELS[m]: load(newest_checkpoint(given["out"]), device) for m, given in cells.items()
    }
    figure = evaluation.draw(val, table, networks, device, source.classes, count=4)
    save_figure(study, figure, f"figure5-{study.task}", [r for g in results.values() for r in g])


@torch.no_grad()
def ensemble_and_m(G, image: torch.Tensor, size) -> tuple[torch.Tensor, torch.Tensor]:
    """(p, M) of one image 3 H W on the CPU: the ensemble C h' w', the discrepancy h' w'."""
    G.eval()
    images = image[None].to(next(G.parameters()).device)
    logits_1, logits_2 = (clan.upsample(x, size) for x in G(images))
    m = discrepancy_map(logits_1.softmax(dim=1), logits_2.softmax(dim=1))
    return (logits_1 + logits_2).softmax(dim=1)[0].cpu(), m[0, 0].cpu()


def weightmap(study: Study) -> None:
    """What the adaptive weight does: M, the weight and D's answer on one target image.

    When adaptation starts and when it has ended, both judged by the D of the end, which alone has
    learnt. First seed of CLAN.
    """
    given = study.cell(study.seeds[0], method="clan")
    results = run_cells(study, [given])
    source, val, table = open_target(given)
    _, hyper = train.configure(given)
    _, image, label = next(spread_images(val, 1))
    last = newest_checkpoint(given["out"])
    start = given["out"] / BEFORE
    if not start.exists():  # adversarial from the first step on
        start = checkpoints(given["out"])[0]
    D = Discriminator(len(source.classes), hyper.d_channels)
    load_weights(D, last, say=lambda _: None)
    figure = Figure(figsize=(14, 4.4), layout="constrained")
    axes = figure.subplots(2, 5)
    palette = evaluation.palette_of(source.classes)
    left = {"target image": image.permute(1, 2, 0), "truth": palette[table[label.numpy()]]}
    for row, (name, pixels), path in zip(axes, left.items(), (start, last), strict=True):
        step = read_metadata(path)["step"]
        p, m = ensemble_and_m(load(path, torch.device("cpu")), image, tuple(image.shape[-2:]))
        with torch.no_grad():
            answer = clan.domain_logits(D, p[None])[0, 0].sigmoid()
        row[0].imshow(pixels)
        row[1].imshow(palette[p.argmax(dim=0).numpy()])
        titles = (name, f"prediction, step {step}", "M", "weight lambda_local M + eps")
        weight = clan.adaptive_weight(m[None, None], step, hyper)[0, 0]
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


def m_and_errors(G, val, table, count: int, most: int = 20_000):
    """M, 1 - confidence, wrong (bool) and class of labelled pixels, at most `most` of an image."""
    parts = []
    for i, image, label in spread_images(val, count):
        ids = torch.from_numpy(table[label.numpy()])
        p, m = ensemble_and_m(G, image, ids.shape)
        confidence, pred = p.max(dim=0)
        seen = (ids < G.num_classes).flatten().nonzero()[:, 0].numpy()
        picks = np.random.default_rng(i).permutation(seen)[:most]
        parts.append([x.flatten().numpy()[picks] for x in (m, 1 - confidence, pred != ids, ids)])
    return (np.concatenate(part) for part in zip(*parts, strict=True))


def agreement(G: Generator, val, table, classes, count: int) -> tuple[dict, dict]:
    """Of one network: numbers over all pixels, and the correlation of M with error by class."""
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


GRADIENT = {True: "no gradient through M", False: "gradient through M"}  # by detach_m
REGIMES = {"look and layout": (0.5, 0.5), "look alone": (0.5, 0.0)}  # of streets: --shift


def head_settings(study: Study) -> dict[str, dict]:
    """What may make the two heads disagree: the rows of `disagreement`."""
    _, hyper = train.configure(study.given)
    settings = {
        "as it is": {},
        GRADIENT[not hyper.detach_m]: {"detach_m": not hyper.detach_m},
        "lambda_weight 0": {"lambda_weight": 0.0},
        "lambda_weight 0.1": {"lambda_weight": 0.1},
        "heads from N(0, 0.06)": {"head_std": 0.06},
        "a loss for each head": {"seg_heads": "each"},
        "half the steps": {"steps": hyper.steps // 2, "adv_start": hyper.adv_start // 2},
    }
    if on_streets(study):
        settings["shift of look alone"] = {"shift": REGIMES["look alone"]}
    return settings


def on_streets(study: Study) -> bool:
    """Whether the target is streets at its default shift, so that other shifts can stand beside."""
    settings, _ = train.configure(study.given)
    return settings.tgt == "streets" and "shift" not in study.given


def disagreement(study: Study) -> None:
    """What makes M informative: M against the error of the ensemble on the target, by setting.

    When adaptation starts and at its end. Correlation is over pixels, between M and being wrong.
    """
    groups = {name: study.cells(**change) for name, change in head_settings(study).items()}
    results = run_groups(study, groups)
    count, device = min(study.images, 100), device_of(study)
    rows, classes = [], {}
    for name, cells in groups.items():
        source, val, table = open_target(cells[0])
        for when, path_of in (
            ("start", lambda out: out / BEFORE),
            ("end", newest_checkpoint),
        ):
            paths = [p for p in (path_of(given["out"]) for given in cells) if p.exists()]
            if not paths:  # adversarial from the first step on
                continue
            found = [agreement(load(p, device), val, table, source.classes, count) for p in paths]
            scores = [r.get("miou_before") if when == "start" else r["miou"] for r in results[name]]
            means = [spread([n[k] for n, _ in found])[0] for k in found[0][0]]
            rows.append([name, when, percent(scores), *(f"{v:.3f}" for v in means)])
            classes[name, when] = [
                spread([c[k] for _, c in found if not np.isnan(c[k])])[0] for k in source.classes
            ]
            header = ["setting", "adaptation's", "mIoU", *found[0][0]]
    note = (
        f"M against being wrong, over {count} images of the target's validation split, at most "
        "20,000 pixels of each; means over seeds. AUC is the chance that a wrong pixel has the "
        "larger value."
    )
    write(study, f"disagreement-{study.task}", header, rows, note, results)
    plain = {
        f"{name}, {when}": v for (name, when), v in classes.items() if name in list(groups)[:5]
    }
    columns = zip(source.classes, *plain.values(), strict=True)
    rows = [[name, *(f"{v:.2f}" for v in values)] for name, *values in columns]
    note = "Correlation of M with being wrong, by class, at adaptation's start and end."
    write(study, f"disagreement-classes-{study.task}", ["class", *plain], rows, note, results)
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    drawn = {name: v for name, v in plain.items() if name.startswith(tuple(list(groups)[:2]))}
    bars(figure.subplots(), list(source.classes), drawn)
    figure.axes[0].set_ylabel("correlation of M with error")
    distinct = [r for group in results.values() for r in group]
    save_figure(study, figure, f"disagreement-{study.task}", distinct)


# Where M puts the weight, or how much weight there is?


def mean_weight(given: dict) -> float | None:
    """The weight of the adversarial loss in a finished CLAN run, over pixels and logged steps."""
    _, hyper = train.configure(given)
    lines = [line for line in metrics(given["out"]) if "m" in line]
    if not lines:
        return None
    if hyper.weight_map == "mean1":
        return 1.0
    weights = [
        hyper.lambda_local * line["m"] + hyper.eps
        if clan.is_adaptive(line["step"] - 1, hyper)
        else 1.0
        for line in lines
    ]
    return float(np.mean(weights))


SCALED = "(a) TAN, lambda_adv times CLAN's mean weight"


def control(study: Study) -> None:
    """Is it where M puts the weight, or how large the weight is? On streets in two regimes.

    Only a shift of layout and class frequency can show negative transfer.
    """
    _, hyper = train.configure(study.given)
    regimes = {"": {}}
    if on_streets(study):
        regimes = {name: {"shift": shift} for name, shift in REGIMES.items()}
    groups = {
        (regime, name): study.cells(**shift, **change)
        for regime, shift in regimes.items()
        for name, change in variants(study).items()
    }
    results = run_groups(study, groups)
    for regime, shift in regimes.items():
        rates = [hyper.lambda_adv * mean_weight(given) for given in groups[regime, "CLAN"]]
        groups[regime, SCALED] = [
            study.cell(seed, **shift, method="tan", lambda_adv=rate)
            for seed, rate in zip(study.seeds, rates, strict=True)
        ]
    results = run_groups(study, groups)
    for regime in regimes:
        control_table(study, regime, groups, results)


def variants(study: Study) -> dict[str, dict]:
    """What each row of the control changes in CLAN, by its name."""
    settings, hyper = train.configure(study.given)
    recipe = "released" if settings.recipe == "paper" else "paper"
    return {
        "source only": {"method": "source"},
        "TAN": {"method": "tan"},
        "CLAN": {},
        "(b) M shuffled over the pixels": {"weight_map": "shuffled"},
        "(c) Eq. 4, every weight 1": {"lambda_local": 0.0, "eps": 1.0},
        "(d) Eq. 5, no Eq. 4": {"lambda_weight": 0.0},
        f"(e) {GRADIENT[not hyper.detach_m]}": {"detach_m": not hyper.detach_m},
        f"(f) recipe {recipe}": {"recipe": recipe},
        "(g) weights scaled to mean 1 (a deviation)": {"weight_map": "mean1"},
    }


def lost_classes(result: dict, baseline: dict) -> int:
    """How many classes fall more than 2 points of IoU below those of another result."""
    pairs = [(v, baseline["iou"][name]) for name, v in result["iou"].items()]
    return sum(a < b - 0.02 for a, b in pairs if None not in (a, b))


def control_table(study: Study, regime: str, groups: dict, results: dict) -> None:
    """The control in one regime of streets."""
    results = {name: group for (r, name), group in results.items() if r == regime}
    rows = []
    for name, group in results.items():
        rare = [spread(r["iou"].get(c) for c in INFREQUENT)[0] for r in group]
        lost = [lost_classes(*both) for both in zip(group, results["source only"], strict=True)]
        before = percent(r.get("miou_before") for r in group)
        row = [name, before, percent(map(miou, group)), percent(rare), f"{np.mean(lost):.1f}"]
        row += [difference(group, results["TAN"]), difference(group, results["CLAN"])]
        weight, _ = spread(mean_weight(given) for given in groups[regime, name])
        rows.append([*row, "" if np.isnan(weight) else f"{weight:.2f}"])
    header = ["variant", "before", "mIoU", "infrequent", "classes lost"]
    header += ["minus TAN", "minus CLAN", "mean weight"]
    note = (
        f"Streets, shift of {regime}. " * bool(regime) + "mIoU before adaptation and after it, "
        "and mean IoU of "
        f"{', '.join(INFREQUENT)} in %, last checkpoint, mean ± deviation. Classes lost: how many "
        f"fall more than 2 points below source only. {INTERVALS} Mean weight: "
        "lambda_local M + eps over the adversarial steps."
    )
    name = "-".join(["control", study.task, *regime.split()])
    write(study, name, header, rows, note, results)


RATES = (0.0005, 0.005, 0.02, 0.05)


def sweep(study: Study) -> None:
    """lambda_adv for TAN and for CLAN, each on its own: how a setting is chosen (tuning seeds)."""
    groups = {
        (method, rate): study.cells(method=method, lambda_adv=rate)
        for method in ("tan", "clan")
        for rate in RATES
    }
    results = run_groups(study, groups)
    rows = [
        [f"{rate:g}", *(percent(map(miou, results[m, rate])) for m in ("tan", "clan"))]
        for rate in RATES
    ]
    note = "Target mIoU in %, last checkpoint, on tuning seeds: for choosing, not for reporting."
    write(study, f"sweep-{study.task}", ["lambda_adv", "TAN", "CLAN"], rows, note, results)


# Photographs as the target.

DETACHED = {"detach_m": True}
REMEDIES = {
    "as it is": {},
    "no gradient through M": DETACHED,
    "so, M shuffled over the pixels": DETACHED | {"weight_map": "shuffled"},
    "so, lambda_local 10": DETACHED | {"lambda_local": 10.0},
    "so, and BatchNorm statistics of both domains": DETACHED
    | {"lambda_local": 10.0, "batchnorm": "batch"},
}


def remedies(study: Study) -> None:
    """What may help where adaptation gains little or harms: the weight's kind, BatchNorm."""
    groups = {
        (remedy, method): study.cells(method=method, **change)
        for remedy, change in REMEDIES.items()
        for method in study.methods
    }
    results = run_groups(study, groups)
    adapted = [m for m in study.methods if m != "source" and "source" in study.methods]
    rows = []
    for remedy in REMEDIES:
        row = [remedy, *(percent(map(miou, results[remedy, m])) for m in study.methods)]
        row += [difference(results[remedy, m], results[remedy, "source"]) for m in adapted]
        rows.append(row)
    header = ["setting", *(LABELS[m] for m in study.methods)]
    header += [f"gain of {LABELS[m]}" for m in adapted]
    note = (
        "Target mIoU in %, last checkpoint, mean ± deviation; gains over source only of the same "
        f"setting. {INTERVALS}"
    )
    write(study, f"remedies-{study.task}", header, rows, note, results)


DAY, DUSK = ("0006R0", "0016E5"), ("0001TP",)


def dusk(study: Study) -> None:
    """The table from CamVid's day to its dusk: --tgt-dir names the whole of CamVid.

    Source: the train frames 0006R0* and 0016E5*. Target: 0001TP* of the same split, every other
    frame without its label for adaptation, the rest for scoring.
    """
    camvid = study.given.get("tgt_dir")
    if camvid is None:
        raise ValueError("name CamVid's folder with --tgt-dir")
    images = sorted((camvid / "images" / "train").iterdir())
    by_day, at_dusk = ([p for p in images if p.name.startswith(names)] for names in (DAY, DUSK))
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
    folders = {"src": "folder", "src_dir": root / "day", "tgt": "folder", "tgt_dir": root / "dusk"}
    table(replace(study, given=study.given | folders))


def link(to: Path, path: Path) -> None:
    """A symbolic link at `path`, made anew if it points elsewhere."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_symlink() and path.readlink() != to.resolve():
        path.unlink()
    if not path.is_symlink():
        path.symlink_to(to.resolve())


# The program.

FOR_ALL = {"seeds", "quick", "jobs", "runs", "to"}  # flags of this program that every study reads
# Each study and the further ones that it reads.
COMMANDS = {
    table: {"methods", "tan_lambda_adv"},
    ccd: {"methods", "tan_lambda_adv", "images", "marked"},
    params: {"tan_lambda_adv"},
    tsne: {"methods", "tan_lambda_adv", "images"},
    figure5: {"methods", "tan_lambda_adv"},
    weightmap: set(),
    disagreement: {"images"},
    control: {"tan_lambda_adv"},
    sweep: set(),
    remedies: {"methods", "tan_lambda_adv"},
    dusk: {"methods", "tan_lambda_adv"},
}
NAMES = {function.__name__: function for function in COMMANDS}
APART = (sweep, remedies, dusk)  # left out of `all`: on other seeds, or in need of photographs
QUICK = {"steps": 240, "adv_start": 165}  # of streets
OPTIONS = FOR_ALL.union(*COMMANDS.values())
OWN = {"seed", "out", "method", "save_every", "keep"}  # what a study sets itself


def seeds_of(text: str) -> tuple[int, ...]:
    seeds = tuple(int(part) for part in text.split(","))
    if len(set(seeds)) < len(seeds):
        raise argparse.ArgumentTypeError(f"a seed stands twice in {text}")
    return seeds


def methods_of(text: str) -> tuple[str, ...]:
    found = tuple(text.split(","))
    if not set(found) <= set(LABELS) or len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"choose from {','.join(LABELS)}, each once")
    return found


def count_of(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return int(text)


def parser() -> argparse.ArgumentParser:
    about = "\n".join(f"  {name:13}{f.__doc__.splitlines()[0]}" for name, f in NAMES.items())
    top = argparse.ArgumentParser(
        description=f"{__doc__.splitlines()[0]}\n\n{about}",
        epilog="Every other flag of train.py holds for all runs.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    top.add_argument("what", choices=[*NAMES, "all"])
    top.add_argument("--seeds", type=seeds_of, help="such as 0,1,2 [0 to 4; sweep: 10,11]")
    top.add_argument("--quick", action="store_true", help="streets: short runs, two seeds")
    top.add_argument("--jobs", type=count_of, help="runs at a time [1]")
    top.add_argument("--runs", type=Path, help="where runs go [runs/study]")
    top.add_argument("--to", type=Path, help="where results go [the same folder]")
    top.add_argument("--methods", type=methods_of, help="[source,tan,clan]")
    top.add_argument("--images", type=count_of, help="of each domain, for features [1000]")
    top.add_argument("--class", dest="marked", help="of the curve of ccd [wall]")
    top.add_argument("--tan-lambda-adv", type=float, help="TAN's own [as CLAN's]")
    for cls in (train.Settings, clan.Hyper):
        train.add_flags(top, cls, without=OWN)
    return top


def parse(argv) -> tuple[list, Study]:
    """The studies that are asked for, and what for."""
    given = vars(parser().parse_args(argv))
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    what = given.pop("what")
    asked = [f for f in COMMANDS if f not in APART] if what == "all" else [NAMES[what]]
    idle = (OPTIONS & given.keys()) - FOR_ALL.union(*(COMMANDS[f] for f in asked))
    if idle:
        raise ValueError(f"{what} does not use {', '.join(map(train.flag_of, sorted(idle)))}")
    own = {key: given.pop(key) for key in OPTIONS & given.keys()}
    if dusk in asked:
        given = {"src": "folder", "tgt": "folder", "backbone": "lite0"} | given
    seeds = (0, 1, 2) if dusk in asked else TUNING_SEEDS if sweep in asked else (0, 1, 2, 3, 4)
    runs, images = Path("runs") / "study", 1000
    if own.pop("quick", False):
        if train.configure(given)[0].backbone != "tiny":
            raise ValueError("--quick is for streets: give --steps and --seeds of your own")
        given, seeds, runs, images = QUICK | given, (0, 1), Path("runs") / "study-quick", 100
    runs = own.pop("runs", runs)
    tan = {"lambda_adv": own.pop("tan_lambda_adv")} if "tan_lambda_adv" in own else {}
    defaults = {"methods": tuple(LABELS), "jobs": 1, "marked": "wall"}
    defaults |= {"seeds": seeds, "to": runs, "images": images}
    command = shlex.join(["python", "study.py", *argv])
    return asked, Study(given=given, tan=tan, runs=runs, command=command, **defaults | own)


def main(argv=None) -> None:
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    try:
        asked, study = parse(sys.argv[1:] if argv is None else argv)
        for run in asked:
            run(study)
    except (train.Stopped, KeyboardInterrupt):
        print("stopped; the same command goes on", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
