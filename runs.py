"""Many runs: which are missing, shared warm-ups, processes, statistics over seeds, results.

    results = run_cells(study, study.cells(method="tan"))        # one a seed; runs what is missing
    mean, deviation = spread(map(miou, results))

A cell is one run of a study, given by its flags. A finished run is not run again. An interrupted
one goes on. Runs that are equal until adaptation starts share this warm-up. Sharing changes no bit
of their results.

Each finished run adds a line to TASK.jsonl in the folder --results: its settings, where it ran, and
what it found. A study that needs no checkpoint takes a run from there, so it can go on where the
run folders are gone. Scores of the same settings by another commit count as well: the line names
its commit, and tables show it.
"""

import contextlib
import hashlib
import json
import math
import multiprocessing
import os
import re
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console
from rich.table import Table

import clan
import eval as evaluation
import train
from checkpoints import BEFORE, commit, owned, pack, read_checkpoint, read_metadata, save, saved
from devices import find_device, machine
from methods import ADVERSARIAL, CLAN_ONLY, D_SHAPE, METHODS, state_of, unused_fields
from settings import FREE, Flags, Settings, configure, flag_of, refuse_other_version


@dataclass(frozen=True)
class Study:
    """What the user asks for: which runs, and the folders of runs and results."""

    flags: Flags  # flags of train.py for all runs
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    runs: Path
    to: Path
    results: Path  # the folder of recorded runs
    jobs: int  # runs at a time
    images: int  # most images of each domain for measuring features
    curve_class: str  # the class whose cluster distance over training is drawn
    numbers: int  # how many of a method's numbers are chosen, the first ones
    command: str
    # Trials: runs that are not compared seed by seed, and may diverge.
    unpaired: bool = False
    # The runs that second stages of this study go on with, by folder.
    starts: dict[str, Flags] = field(default_factory=dict)

    @property
    def shared(self) -> tuple[Settings, clan.Hyper]:
        """Settings and numbers that hold unless a run changes them."""
        return configure(read_by(clan.Hyper.method, self.flags))

    @property
    def task(self) -> str:
        """The folder of the runs in --runs. Its name says the data sets and the backbone."""
        settings, _ = self.shared
        sides = ((settings.src, settings.src_dir), (settings.tgt, settings.tgt_dir))
        names = [Path(at or name).name if name == "folder" else name for name, at in sides]
        if settings.shift != Settings.shift:
            names.append("shift{},{}".format(*settings.shift))
        return "-".join([*names, settings.backbone])

    def cell(self, seed: int, **change) -> Flags:
        """The flags of one run. Its folder is named by its method and by what `change` changes.

        A number that `tune` has chosen changes something too, so that the names of trials last.
        Flags that the method does not read are dropped. On the first seed the runs that change
        nothing keep their checkpoints, for curves over training.
        """
        method = change.get("method", clan.Hyper.method)
        flags = read_by(method, self.flags | change)
        start = {k: change[k] for k in ("init",) if k in change}  # a second stage has its numbers
        usual_flags = read_by(method, self.flags) | {"method": method} | start
        usual, untuned = (all_fields(usual_flags, tuned) for tuned in (True, False))
        fields = all_fields(flags)
        changed = [k for k in sorted(change) if k in flags and k not in FREE | {"method"}]
        changed = [
            k for k in changed if k in start or not fields[k] == usual.get(k) == untuned.get(k)
        ]
        shown = fields | {"init": name_of_init(fields["init"])}
        parts = (f"{k}{shown[k]}".replace(" ", "") for k in changed)
        name = "-".join([method, *parts])
        adaptation = fields["steps"] - fields["adv_start"]
        flags.setdefault("log_every", max(1, min(50, adaptation // 50)))  # enough for means of M
        if self.shared[0].tgt == "streets":  # scores by step, from quick scoring
            flags.setdefault("eval_every", min(50, max(1, adaptation // 5)))
        if seed == self.seeds[0] and not changed:
            flags |= {"save_every": max(1, fields["steps"] // 16), "keep": 100}
        return flags | {"seed": seed, "out": self.runs / self.task / f"{name}-seed{seed}"}

    def cells(self, **change) -> list[Flags]:
        """`cell` for every seed."""
        return [self.cell(seed, **change) for seed in self.seeds]


def read_by(method: str, flags: Flags) -> Flags:
    """Those flags that the runs of a method read.

    No loss of source only reads D's shape. But D's weights are in the checkpoint that it shares
    with TAN.
    """
    unused = unused_fields(method) - D_SHAPE
    return {k: v for k, v in flags.items() if k not in unused}


# Running cells.

RESULT = "study.json"  # of a finished run: its scores, time and machine
# What is recorded of a result besides where it was made.
KEPT: tuple[str, ...] = ("miou", "miou_13", "miou_before", "iou", "images", "left_out")
KEPT += ("seconds", "threads", "mean_weight", "d_loss", "d_source", "d_target")
KEPT += (*train.UNLABELLED, "before", "student", "curve", "terms", "diverged", "date", "torch")


def same_run(fields: dict, starts: dict[str, Flags] | None = None) -> dict:
    """The fields that decide what a run computes. Data folders count by their names.

    starts: the runs that stages go on with, by folder, where they need not have been made here.
    """
    unused = unused_fields(fields["method"]) - D_SHAPE
    kept = {k: v for k, v in fields.items() if k not in FREE | unused | {"seed"}}
    for side in ("src_dir", "tgt_dir"):
        kept[side] = fields[side] and Path(fields[side]).name
    return kept | {"init": start_of(fields["init"], starts)}


def start_of(init: str, starts: dict[str, Flags] | None = None) -> str:
    """Of --init what decides how a run goes on: for a run its name and a sum of its settings."""
    found = last_checkpoint(Path(init)) if Path(init).is_dir() else None
    if starts and init in starts:
        fields = all_fields(starts[init])
    elif found:
        fields = read_metadata(found)["settings"]
    else:
        return name_of_init(init)
    usual = usual_fields()  # a field that is added later, with this value, changes no sum
    unusual = {k: v for k, v in same_run(fields).items() if v != usual.get(k)}
    text = json.dumps(unusual, sort_keys=True)
    return f"{name_of_init(init)}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def name_of_init(init: str) -> str:
    """The folder name of --init without its seed: one name for all runs of a row."""
    return re.sub(r"-seed\d+$", "", Path(init).name)


def key_of(settings: dict, seed: int) -> str:
    return json.dumps([settings, seed], sort_keys=True)


def key_of_line(line: dict) -> str:
    """What a recorded run computes. A field that is newer than its line had its default."""
    return key_of(same_run(usual_fields() | line["settings"]), line["seed"])


Recorded = dict[str, list[dict]]  # results by what they compute, in the order of their file


def recorded_lines(study: Study) -> Recorded:
    """The recorded results. One run may be there from several machines.

    A line without what the studies of today read is not taken.
    """
    path = study.results / f"{study.task}.jsonl"
    found: Recorded = {}
    for number, text in enumerate(path.read_text().splitlines() if path.exists() else [], 1):
        try:
            line = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}, is damaged: delete this line") from error
        read_today = {"before", "diverged"} & line["result"].keys()
        read_today = read_today or not METHODS[line["settings"]["method"]].reads_target
        if read_today and counts_in(study, line["result"]):
            result = line["result"] | {key: line[key] for key in ("commit", "machine")}
            found.setdefault(key_of_line(line), []).append(result)
    return found


def counts_in(study: Study, result: dict) -> bool:
    """Whether a result counts. Only trials keep a diverged run. Others run it again."""
    return study.unpaired or "diverged" not in result


def lines_of(study: Study, lines: Recorded, flags: Flags) -> list[dict]:
    fields = all_fields(flags)
    return lines.get(key_of(same_run(fields, study.starts), fields["seed"]), [])


MADE = ("machine", "threads", "torch")  # runs that share them round alike


def made(result: dict) -> tuple[str, ...]:
    return tuple(str(result.get(key)) for key in MADE)


def known_results(
    study: Study, lines: Recorded, done: dict[Path, dict], cells: list[Flags]
) -> dict[Path, dict]:
    """The results that count, by run folder: recorded ones, or `done`, of finished run folders.

    Runs of one seed are compared with each other, so they come from one machine: the first that
    has made them all, else this one. Trials that are not compared by seed may come from any.
    """
    found: dict[Path, dict] = {}
    for seed in {flags["seed"] for flags in cells}:
        of_seed = [flags for flags in cells if flags["seed"] == seed]
        folders = [[done[flags["out"]]] if flags["out"] in done else [] for flags in of_seed]
        known = [
            lines_of(study, lines, flags) + f for flags, f in zip(of_seed, folders, strict=True)
        ]
        first, *others = [[made(result) for result in results] for results in known]
        here = made_here(study, of_seed[0])
        wanted = next((m for m in first if all(m in other for other in others)), here)
        for flags, results in zip(of_seed, known, strict=True):
            best = [r for r in results if made(r) == wanted] or (results if study.unpaired else [])
            place = {"settings": all_fields(flags), "checkpoint": str(flags["out"])}
            found |= {flags["out"]: place | best[0]} if best else {}
    return found


def made_here(study: Study, flags: Flags) -> tuple[str, ...]:
    """What `made` says of a run of this study on this machine."""
    device = find_device(configure(flags)[0].device)
    threads = threads_of(study.jobs)
    return f"{machine(device, threads)} a run", str(threads), str(torch.__version__)


def record(study: Study, flags: Flags, result: dict) -> None:
    """Add a finished run to the recorded ones, in one write. The parent of a study does it.

    Raises ValueError if it was made with other settings: a file was changed in the meantime.
    """
    fields = all_fields(flags)
    made_with = json.loads(json.dumps(result["settings"], default=str))
    if same_run(made_with, study.starts) != same_run(fields, study.starts):
        raise ValueError(
            f"{flags['out']} was made with settings that have changed since: delete it"
        )
    study.results.mkdir(parents=True, exist_ok=True)
    line = {"seed": fields["seed"], "settings": same_run(fields, study.starts)}
    line |= {key: result[key] for key in ("commit", "machine")}
    line["result"] = {k: result[k] for k in KEPT if k in result}
    with (study.results / f"{study.task}.jsonl").open("ab", buffering=0) as file:
        file.write(json.dumps(line).encode() + b"\n")


def all_fields(flags: Flags, tuned: bool = True) -> dict:
    """All fields of a run, as its checkpoints write them. tuned: as `configure` says."""
    settings, hyper = configure(flags, tuned)
    return json.loads(json.dumps(asdict(settings) | asdict(hyper), default=str))


def usual_fields() -> dict:
    """The default of each field."""
    return json.loads(json.dumps(asdict(Settings()) | asdict(clan.PAPER), default=str))


def last_checkpoint(out: Path) -> Path | None:
    """The checkpoint that a run would go on from."""
    found = saved(out)
    return found[-1] if found else None


def finished(flags: Flags) -> dict | None:
    """The result of a complete run, else None. Raises ValueError if its folder holds another."""
    out = flags["out"]
    last = last_checkpoint(out)
    if last is None:
        return None
    metadata = read_metadata(last)
    refuse_other_version(last, metadata)
    if was := changed_since(metadata["settings"], flags):
        raise ValueError(f"{out} was run with {was}: choose another --runs, or delete it")
    return json.loads((out / RESULT).read_text()) if (out / RESULT).exists() else None


def changed_since(found: dict, flags: Flags) -> str:
    """In which settings a run differs from these flags, as one would say it; empty if in none."""
    wanted = all_fields(flags)
    compared = wanted.keys() - (FREE - {"src_dir", "tgt_dir"})
    compared -= unused_fields(wanted["method"]) - D_SHAPE
    changed = [k for k in sorted(compared) if wanted[k] != found.get(k)]
    return ", ".join(f"{flag_of(k)} {found.get(k)}, now {wanted[k]}" for k in changed)


# Fields that no step before adv_start reads, because these steps do not use the target.
ADAPTATION_ONLY = ADVERSARIAL - D_SHAPE | {"lambda_local", "eps", "adaptive_start"}
ADAPTATION_ONLY |= {"detach_m", "m_control", "m_mean1", "shift"}


def warm_up(flags: Flags) -> str:
    """What the steps before adv_start depend on. If it is equal, these steps are, bit for bit."""
    settings, hyper = configure(flags)
    if not 0 < hyper.adv_start < hyper.steps:
        return str(settings.out)  # nothing to share
    unread = FREE | ADAPTATION_ONLY
    if settings.looks == "city" or hyper.fourier:  # the source depends on the shift as well
        unread = unread - {"shift"}
    fields = {k: v for k, v in all_fields(flags).items() if k not in unread}
    method = METHODS[hyper.method]
    kind = method.warm_up
    if kind == "source":  # these steps read no field of Eq. 4 or of another method
        not_its_own = CLAN_ONLY | unused_fields("source")
        fields = {k: v for k, v in fields.items() if k not in not_its_own - D_SHAPE}
    fields |= {"method": kind}
    # "batch" and "before" differ only after adv_start
    fields |= {"batchnorm": clan.uses_batch_statistics(0, hyper)}
    return json.dumps(fields, sort_keys=True)


def adopt(donor: Path, flags: Flags) -> Path:
    """Copies the donor's warm-up into this run: its log, and its checkpoint at adv_start.

    Scores on the target are not copied, because the donor may have another target. Returns the
    checkpoint to go on from. Source only keeps none at adv_start, so it goes on from the donor's.
    """
    settings, hyper = configure(flags)
    lines = [line for line in metrics(donor) if "target_miou" not in line]
    lines = [line for line in lines if line["step"] <= hyper.adv_start]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (settings.folder / "metrics.jsonl").write_text(text)
    start = donor / BEFORE
    if not METHODS[hyper.method].reads_target:
        return start
    metadata = read_metadata(start) | {"settings": all_fields(flags), "commit": commit()}
    tensors = first_tensors(settings, hyper, len(metadata["classes"]))
    tensors = {k: v for k, v in tensors.items() if not k.startswith(OF_WARM_UP)}
    trained = read_checkpoint(start)[0]
    tensors |= {k: v for k, v in trained.items() if k.startswith(OF_WARM_UP)}
    save(settings.folder / BEFORE, tensors, metadata)
    return settings.folder / BEFORE


OF_WARM_UP = ("G.", "opt_g.")  # what steps before adv_start change: neither D nor a method's state


def first_tensors(settings: Settings, hyper: clan.Hyper, num_classes: int) -> dict:
    """What the first checkpoint of a run would hold, on the CPU."""
    cpu, quiet = torch.device("cpu"), Console(quiet=True)
    G, D = train.first_networks(settings, hyper, num_classes, cpu, settings.folder, quiet)
    method = METHODS[hyper.method]
    state = state_of(method, G, hyper)
    return pack(G, D, *train.build_optimizers(G, D, hyper), state)


def run_cell(flags: Flags, donor: Path | None, threads: int | None, trial: bool = False) -> dict:
    """One run to its end: from its last checkpoint, from a donor's warm-up, or from step 0.

    A trial that diverges in adaptation has a result too: mIoU 0, and `diverged` says what happened.
    """
    if threads:
        torch.set_num_threads(threads)
    settings, hyper = configure(flags)
    out, since = settings.folder, time.monotonic()
    with owned(out):
        start = last_checkpoint(out)
        if start is None and donor and (donor / BEFORE).exists():
            start = adopt(donor, flags)
        with (out / "log.txt").open("a") as file, contextlib.redirect_stdout(file):
            try:
                result = train.train(settings, hyper, start, Console(file=file))
            except FloatingPointError as error:
                found = saved(out)
                reached = max((read_metadata(path)["step"] for path in found), default=-1)
                if not trial or reached < hyper.adv_start:
                    raise
                result = {"miou": 0.0, "diverged": str(error), "settings": all_fields(flags)}
                result["checkpoint"] = str(found[-1])
    if "miou" not in result:
        raise ValueError(f"{out}: {evaluation.no_score(result, settings.tgt)}; studies need one")
    result["seconds"] = time.monotonic() - since
    result["machine"] = machine(find_device(settings.device)) + " a run"
    result["threads"] = torch.get_num_threads()
    result |= {"torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
    result |= logged(flags, result) if "diverged" not in result else {}
    result["commit"] = read_metadata(Path(result["checkpoint"]))["commit"]
    temporary = out / f"{RESULT}.tmp"
    temporary.write_text(json.dumps(result))
    temporary.replace(out / RESULT)
    return result


def logged(flags: Flags, result: dict) -> dict:
    """What a finished run's log says of the steps from adv_start on.

    The mean weight of Eq. 5; means over the last fifth of them of D's loss and answers, and of all
    other `terms`; and the curve, a row for each score on the target from adv_start to the last
    step: `miou`, `iou` and `shares` in the order of those of the result, `confidence`, `m`, and
    D's last answers.
    """
    _, hyper = configure(flags)
    found: dict[str, Any] = {}
    if (weight := mean_weight(flags)) is not None:
        found["mean_weight"] = weight
    lines = metrics(flags["out"])
    answers = [line for line in lines if "d" in line]
    for key, name in (("d", "d_loss"), ("d_source", "d_source"), ("d_target", "d_target")):
        if answers:
            last = answers[-max(1, len(answers) // 5) :]
            found[name] = float(np.mean([line[key] for line in last]))
    adapted = [line for line in lines if "grad" in line and line["step"] > hyper.adv_start]
    last = adapted[-max(1, len(adapted) // 5) :]
    names = sorted(set().union(*last) - {"step", "d", "d_source", "d_target"})
    others = [name for name in names if not name.startswith("target_")]
    means = {name: np.mean([line[name] for line in last if name in line]) for name in others}
    found["terms"] = {name: float(f"{mean:.4g}") for name, mean in means.items()}
    scores = {x["step"]: x for x in lines if "target_iou" in x and x["step"] > hyper.adv_start}
    points = {hyper.adv_start: result["before"]} if "before" in result else {}
    for step in sorted(scores):
        points[step] = {k.removeprefix("target_"): v for k, v in scores[step].items()}
    points[hyper.steps] = result
    found["curve"] = [point_of_curve(step, x, answers) for step, x in points.items()]
    return found


def point_of_curve(step: int, score: dict, answers: list[dict]) -> dict:
    """A row of a curve, rounded to four digits: `results/` is kept in git."""
    point: dict[str, Any] = {"step": step}
    for key in ("miou", "confidence", "m"):
        point[key] = round(score[key], 4)
    for key in ("iou", "shares"):
        point[key] = [None if x is None else round(x, 4) for x in score[key].values()]
    for line in [line for line in answers if line["step"] <= step][-1:]:
        point |= {key: round(line[key], 4) for key in ("d_source", "d_target")}
    return point


def mean_weight(flags: Flags) -> float | None:
    """The mean weight of Eq. 5 in a finished CLAN run, over pixels and logged steps."""
    _, hyper = configure(flags)
    lines = [line for line in metrics(flags["out"]) if "m" in line]
    if not lines or "lambda_local" in METHODS[hyper.method].unused:
        return None
    if hyper.m_mean1:
        return 1.0
    weights = [
        hyper.lambda_local * line["m"] + hyper.eps
        if clan.phase_at(line["step"] - 1, hyper).adaptive
        else 1.0
        for line in lines
    ]
    return float(np.mean(weights))


def run_cells(study: Study, cells: list[Flags], checkpoints: bool = False) -> list[dict]:
    """The result of each cell, in order. Missing runs are made, shared warm-ups first.

    checkpoints: the study reads the run folders, so a recorded result is not enough. Raises
    FloatingPointError if runs diverge that are no trials, when all others are made.
    """
    cells_of = {flags["out"]: flags for flags in cells}  # two groups may hold the same run
    lines, done = recorded_lines(study), done_of(study, [*cells_of.values()])
    for out, result in done.items():
        if is_new(study, lines, cells_of[out], result):  # the study was stopped before that
            record(study, cells_of[out], result)
    known = done if checkpoints else known_results(study, lines, done, [*cells_of.values()])
    missing = [flags for out, flags in cells_of.items() if out not in known]
    if elsewhere := [out for out in done if out not in known]:
        raise ValueError(
            f"{elsewhere[0]} was made by {', '.join(made(done[elsewhere[0]]))}, and other runs of "
            "its seed were not: delete it, or choose another --runs"
        )
    if recorded := len(known.keys() - done.keys()):
        place = study.results / f"{study.task}.jsonl"
        print(f"{recorded} of {len(cells_of)} runs are recorded in {place}", flush=True)
    if missing:
        need_labels(missing[0])
    donor_of = choose_donors(study, missing, [*cells_of.values()])
    first: list[Flags] = []
    rest: list[Flags] = []  # those that wait until another run's warm-up is there
    for flags in missing:
        out = flags["out"]
        waits = donor_of.get(out, out) != out and not (donor_of[out] / BEFORE).exists()
        (rest if waits else first).append(flags)
    count = len(known)
    lost: list[FloatingPointError] = []
    for wave in (first, rest):
        by_seed = sorted(wave, key=lambda flags: flags["seed"])  # the runs of one are compared
        tasks = [(flags, donor_of.get(flags["out"])) for flags in by_seed]
        for flags, ended in run_all(tasks, study.jobs, study.unpaired):
            if isinstance(ended, FloatingPointError):
                lost.append(ended)
                continue
            count += 1
            if is_new(study, lines, flags, ended):
                record(study, flags, ended)
            score, seconds = 100 * ended["miou"], ended["seconds"]
            name = flags["out"].name
            print(
                f"[{count}/{len(cells_of)}] {name}: mIoU {score:.1f} ({seconds:.0f} s)", flush=True
            )
    if lost:
        raise FloatingPointError(f"{len(lost)} of {len(cells_of)} runs diverged, first: {lost[0]}")
    return [known.get(flags["out"]) or result_of(flags) for flags in cells]


def done_of(study: Study, cells: list[Flags]) -> dict[Path, dict]:
    """The results of finished run folders that count."""
    found = {flags["out"]: finished(flags) for flags in cells}
    return {out: result for out, result in found.items() if result and counts_in(study, result)}


def unknown_seeds(study: Study, cells: list[Flags]) -> tuple[int, ...]:
    """The seeds of which one of these cells, at least, has neither a record nor a folder."""
    known = known_results(study, recorded_lines(study), done_of(study, cells), cells)
    return tuple(sorted({flags["seed"] for flags in cells if flags["out"] not in known}))


def is_new(study: Study, lines: Recorded, flags: Flags, result: dict) -> bool:
    """Whether no line holds this run as this machine computes it."""
    return made(result) not in map(made, lines_of(study, lines, flags))


def need_labels(flags: Flags) -> None:
    """Raises ValueError if these runs would have no score, before the first of them is made."""
    settings, _ = configure(flags)
    _, _, val = train.open_all(settings)
    if not val.has_labels:
        raise ValueError(f"{evaluation.no_score({}, settings.tgt)}; studies need one: use train.py")


def result_of(flags: Flags) -> dict:
    """The result of a run that has just been made."""
    result = finished(flags)
    if result is None:
        raise OSError(f"{flags['out'] / RESULT} is missing: run the same command again")
    return result


def choose_donors(study: Study, missing: list[Flags], cells: list[Flags]) -> dict[Path, Path]:
    """The run folder whose warm-up each missing run shares, by its own folder; often itself.

    A run that has finished its warm-up comes first, also one of TAN or CLAN that is not asked for;
    then one with TAN's D, with which source only can go on; then one that will keep checkpoints.
    """
    usual = [study.cell(seed, method=m) for m in ("tan", "clan") for seed in study.seeds]
    begun = {flags["out"] for flags in [*cells, *usual] if warm_up_is_there(flags)}
    wanted = {flags["out"] for flags in missing}

    def rank(flags: Flags) -> tuple[bool, bool, bool]:
        return flags["out"] not in begun, not with_usual_d(flags), "keep" not in flags

    donors: dict[str, list[Flags]] = {}
    for flags in sorted([*cells, *usual], key=rank):
        adapts = METHODS[flags.get("method", clan.Hyper.method)].reads_target
        if adapts and flags["out"] in begun | wanted:
            donors.setdefault(warm_up(flags), []).append(flags)
    found: dict[Path, Path] = {}
    for flags in missing:
        method = METHODS[flags.get("method", clan.Hyper.method)]
        fitting = donors.get(warm_up(flags), [])
        if not method.reads_target:
            fitting = [donor for donor in fitting if with_usual_d(donor)]
        found |= {flags["out"]: fitting[0]["out"]} if fitting else {}
    return found


def warm_up_is_there(flags: Flags) -> bool:
    """Whether this run's folder holds its checkpoint at adv_start, of these settings."""
    start = flags["out"] / BEFORE
    return start.exists() and not changed_since(read_metadata(start)["settings"], flags)


def with_usual_d(flags: Flags) -> bool:
    method = METHODS[flags.get("method", clan.Hyper.method)]
    return method.reads_target and method.has_d and method.build_d is None


def run_groups(study: Study, groups: dict, checkpoints: bool = False) -> dict:
    """`run_cells` for several lists of cells. Both are by name."""
    cells = [flags for group in groups.values() for flags in group]
    results = iter(run_cells(study, cells, checkpoints))
    return {name: [next(results) for _ in group] for name, group in groups.items()}


Outcome = dict | FloatingPointError  # a run's result, or how it diverged


def run_all(tasks: list, jobs: int, trials: bool = False) -> Iterator[tuple[Flags, Outcome]]:
    """(flags, outcome) of each task as it ends. If jobs > 1, each task has its own process."""
    if jobs == 1:
        for flags, donor in tasks:
            yield flags, outcome(partial(run_cell, flags, donor, None, trials))
        return
    threads = threads_of(jobs)
    fresh = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    with ProcessPoolExecutor(jobs, mp_context=fresh, initializer=leave_signals) as pool:
        waiting = list(tasks)
        running: dict[Future, Flags] = {}
        try:
            while waiting or running:
                while waiting and len(running) < jobs:  # a queued run could not be stopped
                    flags, donor = waiting.pop(0)
                    running[pool.submit(run_task, flags, donor, threads, trials)] = flags
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield running.pop(future), outcome(future.result)
        except BrokenProcessPool as error:  # the pool has asked the others to end
            remedy = "run the same command again, with fewer --jobs if the memory is too small"
            raise OSError(f"a run was killed: {remedy}") from error
        except BaseException:
            for child in multiprocessing.active_children():
                child.terminate()  # a run saves and ends at the first request
            raise


def outcome(run: Callable[[], dict]) -> Outcome:
    try:
        return run()
    except FloatingPointError as error:
        return error


def threads_of(jobs: int) -> int:
    """Threads of each of so many runs at a time."""
    return torch.get_num_threads() if jobs == 1 else max(1, (os.cpu_count() or 1) // jobs)


def leave_signals() -> None:
    """Worker processes ignore SIGTERM between runs and are not in the parent's process group.

    In that group a Ctrl-C would reach a run twice, from the terminal and from the parent, and the
    second would end it unsaved.
    """
    os.setpgrp()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def run_task(flags: Flags, donor: Path | None, threads: int, trial: bool) -> dict:
    """`run_cell` in a worker process. SIGTERM stops it at any point."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return run_cell(flags, donor, threads, trial)
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
    known = np.array([v for v in values if v is not None], float)
    if len(known) == 0:
        return float("nan"), float("nan")
    return float(known.mean()), float(known.std(ddof=1)) if len(known) > 1 else float("nan")


def interval(differences: Iterable[float], draws: int = 10_000) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean of paired differences (one a seed).

    NaN for fewer than two. With few seeds it is too narrow: the true uncertainty is larger.
    """
    values = np.array(list(differences), float)
    if len(values) < 2:
        return float("nan"), float("nan")
    picks = np.random.default_rng(0).integers(0, len(values), (draws, len(values)))
    low, high = np.percentile(values[picks].mean(axis=1), (2.5, 97.5))
    return float(low), float(high)


def t_quantile(p: float, freedom: int) -> float:
    """The value that Student's t, with so many degrees of freedom, stays below with probability p.

    Found by bisection over the integral of the density (Simpson's rule).
    """
    log_scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)
    scale = math.exp(log_scale) / math.sqrt(freedom * math.pi)

    def below(x: float) -> float:
        t = np.linspace(0, x, 2001)
        density = scale * (1 + t**2 / freedom) ** (-(freedom + 1) / 2)
        simpson = density[0] + density[-1] + 4 * density[1:-1:2].sum() + 2 * density[2:-1:2].sum()
        return 0.5 + simpson * x / 2000 / 3

    low, high = -200.0, 200.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if below(middle) < p else (low, middle)
    return low


def t_interval(differences: Iterable[float]) -> tuple[float, float]:
    """95 % interval of the mean of paired differences by Student's t; NaN for fewer than two."""
    mean, deviation = spread(differences := list(differences))
    if len(differences) < 2:
        return float("nan"), float("nan")
    half = t_quantile(0.975, len(differences) - 1) * deviation / math.sqrt(len(differences))
    return mean - half, mean + half


def detectable(differences: Iterable[float]) -> float:
    """The mean difference that so many pairs find in 80 % of all cases, at the 5 % level.

    (t.975 + t.80) s / sqrt(n), with the deviation s of these n differences.
    """
    _, deviation = spread(differences := list(differences))
    n = len(differences)
    if n < 2:
        return float("nan")
    return (t_quantile(0.975, n - 1) + t_quantile(0.8, n - 1)) * deviation / math.sqrt(n)


def mean_and_deviation(values: Iterable[float | None]) -> str:
    """Mean and deviation of scores in %, such as '42.8 ± 6.1'."""
    mean, deviation = spread(values)
    if np.isnan(mean):
        return "-"
    return f"{100 * mean:.1f}" + ("" if np.isnan(deviation) else f" ± {100 * deviation:.1f}")


def points_apart(a: list[dict], b: list[dict], pick: Pick = miou) -> list[float]:
    """The paired differences a - b in points. A seed on which a class does not occur is left out.

    Raises ValueError if the two are not of the same seeds, in the same order.
    """
    seeds_a, seeds_b = ([r["settings"]["seed"] for r in group] for group in (a, b))
    if seeds_a != seeds_b:
        raise ValueError(f"runs of seeds {seeds_a} and {seeds_b} make no pairs")
    for x, y in zip(a, b, strict=True):
        if made(x) != made(y):
            raise ValueError(
                f"seed {x['settings']['seed']} was run as {', '.join(made(x))} and as "
                f"{', '.join(made(y))}, which makes no pair: delete one of the two runs"
            )
    both = [(pick(x), pick(y)) for x, y in zip(a, b, strict=True)]
    return [100 * (x - y) for x, y in both if x is not None and y is not None]


def difference(a: list[dict], b: list[dict], pick: Pick = miou) -> str:
    """'-0.6 [-2.1, +0.9]': the paired mean of a - b in points, and its interval by Student's t."""
    pairs = points_apart(a, b, pick)
    return with_interval(pairs) if pairs else "-"


def with_interval(pairs: list[float]) -> str:
    """The mean of paired differences in points, and its interval by Student's t."""
    return f"{np.mean(pairs):+.1f}{brackets(t_interval(pairs))}"


def brackets(limits: tuple[float, float]) -> str:
    """' [-2.1, +0.9]', or nothing if there is no interval."""
    return "" if np.isnan(limits[0]) else f" [{limits[0]:+.1f}, {limits[1]:+.1f}]"


# Writing results.

INTERVALS = "Brackets: 95 % interval of the difference paired by seed, by Student's t."


def provenance(study: Study, results: list[dict]) -> str:
    """Command, commits of the runs, seeds, computing time and machine."""
    commits, machines, versions, dates = (
        sorted({str(r.get(key, "")) for r in results} - {""})
        for key in ("commit", "machine", "torch", "date")
    )
    ends = (dates[0], dates[-1]) if dates else ()
    seeds = sorted({r["settings"]["seed"] for r in results})
    distinct = {r["checkpoint"]: r["seconds"] for r in results}
    return (
        f"`{study.command}`; {len(distinct)} runs of {sum(distinct.values()) / 60:.0f} minutes in "
        f"all, commit {', '.join(commits)}; seeds {', '.join(map(str, seeds))}; "
        f"{'; '.join(machines)}; torch {', '.join(versions)}, {' to '.join(dict.fromkeys(ends))}"
    )


def write(study: Study, name: str, header: list, rows: list[list], note: str, groups: dict) -> None:
    """Print the table, write it to NAME.md, and write it with each run's scores to NAME.json."""
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
    """Write NAME.png in 256 colours, which keep it small, and print its provenance."""
    study.to.mkdir(parents=True, exist_ok=True)
    path = study.to / f"{name}.png"
    figure.savefig(path, dpi=100)
    with Image.open(path) as image:
        small = image.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    small.save(path, optimize=True)
    print(f"wrote {path}: {provenance(study, results)}", flush=True)
