"""Training: settings, data, networks, optimizers, the loop, the result (Section 4.2).

    python train.py                                   # drawn streets, minutes on a laptop
    python train.py --src gta5 --backbone r101        # the paper's run, on whatever GPU is there
    python train.py --resume runs/RUN                 # goes on where a run was stopped

Every field of Settings and of clan.Hyper is a flag (python train.py --help). A run folder holds
metrics.jsonl, the last checkpoints, and at the end eval.json and result.png.
"""

import argparse
import contextlib
import ctypes
import errno
import inspect
import itertools
import json
import math
import os
import re
import signal
import sys
import time
import types
import typing
from collections import deque
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TimeRemainingColumn

import clan
import data
import eval as evaluation
from checkpoints import (
    BEFORE,
    commit,
    newest_checkpoint,
    newest_valid,
    owned,
    pack,
    read_checkpoint,
    read_metadata,
    save,
    saved,
    to_disk,
    unpack,
)
from models import Discriminator, Generator, lineage_for, load_weights, set_batchnorm

Source = Literal["gta5", "synthia", "cityscapes", "streets", "folder"]
Target = Literal["cityscapes", "streets", "folder", "auto"]  # those with a split to score on
Backbone = Literal["r101", "vgg16", "tiny", "lite0", "auto"]


LEAST = {"log_every": 1, "save_every": 1, "keep": 1, "eval_every": 0, "workers": -1, "seed": 0}


@dataclass(frozen=True)
class Settings:
    """What a run is, apart from the algorithm (clan.Hyper)."""

    src: Source = "streets"  # labelled source
    tgt: Target = "auto"  # unlabelled target; auto: streets for streets, else cityscapes
    data: Path = Path("data")  # folder that holds GTA5/, SYNTHIA/RAND_CITYSCAPES/, Cityscapes/
    src_dir: Path | None = None  # the source's own folder, instead of its place in --data
    tgt_dir: Path | None = None  # the target's own folder
    src_size: tuple[int, int] | None = None  # H W the source is resized to; the data set's own
    tgt_size: tuple[int, int] | None = None  # H W the target is resized to; the data set's own
    backbone: Backbone = "auto"  # auto: tiny for streets to streets, else r101
    lineage: str | None = None  # whose ImageNet weights: caffe or torchvision; follows from --init
    init: str = "auto"  # first weights of G: a file, imagenet or none; auto: none for tiny alone
    shift: tuple[float, float] = (0.5, 0.5)  # of streets' city from its game: in look, in layout
    recipe: Literal["paper", "released"] = "paper"  # the numbers of the PDF or of the authors' code
    seed: int = 0  # of the initial weights, the order of the samples and their augmentation
    out: Path | None = None  # run folder; runs/SRC-TGT-BACKBONE-METHOD-seedN
    device: str = "auto"  # cpu, cuda, cuda:1; auto: the GPU if there is one
    amp: Literal["auto", "off", "bf16"] = "auto"  # bfloat16 where it is safe; auto: on CUDA
    compile: Literal["off", "on"] = "off"  # torch.compile of the two steps; CUDA alone, not run yet
    workers: int = -1  # processes that read images; -1: the cores, at most 8, and none for streets
    log_every: int = 50  # steps between lines of metrics.jsonl
    eval_every: int = 0  # steps between scores on the target's val split; 0: at the end alone
    save_every: int = 1000  # steps between checkpoints
    keep: int = 3  # checkpoints kept

    def __post_init__(self):
        for name, least in LEAST.items():
            if getattr(self, name) < least:
                raise ValueError(f"{flag_of(name)} must be at least {least}")
        if not all(0 <= x <= 1 for x in self.shift):
            raise ValueError(f"--shift {self.shift[0]} {self.shift[1]} must lie in [0, 1], both")
        for side in ("src", "tgt"):
            size = getattr(self, f"{side}_size")
            if size and min(size) < 32:
                raise ValueError(f"--{side}-size must be at least 32 32: D halves it five times")
            if getattr(self, side) == "streets" and getattr(self, f"{side}_dir"):
                raise ValueError(f"--{side} streets is drawn, not read: drop --{side}-dir")
        if self.tgt not in ("streets", "auto") and self.shift != (0.5, 0.5):
            raise ValueError(f"--shift is of the city of streets: drop it, or --tgt {self.tgt}")


# Settings that a resumed run may change: where things lie and run, and what is written when.
# (Another device rounds differently; the bit-for-bit promise is for the same one.)
FREE = {"data", "src_dir", "tgt_dir", "out", "device", "compile", "workers", "log_every"}
FREE |= {"eval_every", "save_every", "keep"}


# Fields of Hyper without a meaning for a method: giving one is a contradiction.
CLAN_ONLY = {"lambda_weight", "weight_offset", "weight_biases", "lambda_local", "eps"}
CLAN_ONLY |= {"adaptive_start", "detach_m", "weight_map"}
ADVERSARIAL = {"lambda_adv", "damping", "minimax", "d_channels", "lr_d", "d_schedule"}
ADVERSARIAL |= {"beta1_d", "beta2_d", "weight_decay_d"}
NOT_USED_BY = {"tan": CLAN_ONLY, "source": CLAN_ONLY | ADVERSARIAL}


def defaults(settings: Settings) -> dict:
    """What the data set and the backbone change in the recipe; flags come on top."""
    change = {}
    if settings.src == "synthia" and settings.recipe == "released":
        change |= {"lambda_local": 10.0}
    if settings.backbone == "tiny" and settings.recipe == "paper":
        change |= {"detach_m": True}  # else M falls to near 0, and the weight to eps: RESULTS.md
    if settings.backbone == "tiny":  # trained from scratch: warm-up on the source, larger rates
        change |= {"steps": 1350, "adv_start": 1100, "batch": 4, "lr_g": 0.02, "head_lr": 1.0}
        change |= {"bn_affine": True, "batchnorm": "before", "crop": False}
        change |= {"lambda_adv": 0.005, "lr_d": 1e-4, "d_channels": 32}
    if settings.backbone == "lite0":
        change |= {"steps": 600, "adv_start": 350, "batch": 4, "lr_g": 0.02, "head_lr": 1.0}
        change |= {"bn_affine": True, "batchnorm": "before", "crop": False, "warmup": 0.05}
        change |= {"jitter": 0.2}
        change |= {"lambda_adv": 0.005, "lr_d": 1e-4, "d_channels": 32}
    return change


# The command line: one flag a field, its comment the help.


def comments(cls) -> dict[str, str]:
    """The comment of each field of a dataclass."""
    found = re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(cls), re.MULTILINE)
    return dict(found)


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def add_flags(parser: argparse.ArgumentParser, cls, without=frozenset()) -> None:
    """A flag for each field; one not given stays out of the parsed arguments."""
    group, help_of = parser.add_argument_group(cls.__name__), comments(cls)
    hints = typing.get_type_hints(cls)
    for field in fields(cls):
        if field.name in without:
            continue
        kind, options = hints[field.name], {}
        if isinstance(kind, types.UnionType):  # X | None
            kind = typing.get_args(kind)[0]
        if typing.get_origin(kind) is Literal:
            options = {"choices": typing.get_args(kind)}
        elif kind is bool:
            options = {"action": argparse.BooleanOptionalAction}
        elif typing.get_origin(kind) is tuple:
            inner = typing.get_args(kind)
            options = {"type": inner[0], "nargs": "+" if inner[1] is ... else len(inner)}
        else:
            options = {"type": kind}
        text = f"{help_of[field.name]} [{field.default}]".replace("%", "%%")
        group.add_argument(flag_of(field.name), help=text, default=argparse.SUPPRESS, **options)


def parse(argv) -> tuple[dict, Path | None]:
    """The flags that were given, by field name, and what to resume from."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument(
        "--resume",
        nargs="?",
        const=Path(),
        type=Path,
        help="go on: a run folder, a checkpoint, or nothing for the newest checkpoint of --out",
    )
    for cls in (Settings, clan.Hyper):
        add_flags(parser, cls)
    given = vars(parser.parse_args(argv))
    resume = given.pop("resume")
    return {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}, resume


def configure(given: dict) -> tuple[Settings, clan.Hyper]:
    """Settings and hyper-parameters of a run: the recipe, its defaults, then the flags given."""
    names = {field.name for field in fields(Settings)}
    own = {k: v for k, v in given.items() if k in names}
    src = own.get("src", "streets")
    if own.get("tgt", "auto") == "auto":
        own["tgt"] = "streets" if src == "streets" else "cityscapes"
    if own.get("backbone", "auto") == "auto":
        own["backbone"] = "tiny" if (src, own["tgt"]) == ("streets", "streets") else "r101"
    if own.get("init", "auto") == "auto":
        own["init"] = "none" if own["backbone"] == "tiny" else "imagenet"
    own.setdefault("lineage", lineage_for(own["backbone"], own["init"]))
    settings = Settings(**own)
    hyper = asdict(clan.RECIPES[settings.recipe]) | defaults(settings)
    method = given.get("method", hyper["method"])
    if own.get("out") is None:
        name = f"{settings.src}-{settings.tgt}-{settings.backbone}-{method}-seed{settings.seed}"
        own["out"] = Path("runs") / name
    return Settings(**own), clan.Hyper(**hyper | {k: v for k, v in given.items() if k not in names})


def refuse_idle_flags(given: dict) -> None:
    """No flag is dead: one that the chosen method never reads is a contradiction."""
    method = given.get("method", "clan")
    idle = [flag_of(name) for name in given if name in NOT_USED_BY.get(method, ())]
    if idle:
        raise ValueError(f"--method {method} does not use {', '.join(idle)}: drop one of the two")


def resumed(given: dict, resume: Path, say) -> tuple[dict, Path]:
    """The flags of the run to go on with, and its checkpoint. A flag may not contradict it."""
    folder = configure(given)[0].out if resume == Path() else resume
    path = newest_valid(folder, say)
    about = read_metadata(path)
    if not about:
        raise ValueError(f"{path} is no checkpoint of train.py: use it with --init")
    before = {k: tuple(v) if isinstance(v, list) else v for k, v in about["settings"].items()}
    known = {field.name for cls in (Settings, clan.Hyper) for field in fields(cls)}
    if before.keys() ^ known:
        names = ", ".join(sorted(before.keys() ^ known))
        raise ValueError(
            f"{path} was made by another version of this code ({names}): use commit "
            f"{about['commit']}, or its weights with --init"
        )
    changed = [
        f"{flag_of(k)} {v} (was {before[k]})"
        for k, v in given.items()
        if k not in FREE and v != before[k]
    ]
    if changed:
        raise ValueError(
            f"{path} was made with other settings: drop {', '.join(changed)}, or start a new run "
            "with --out"
        )
    world, now = about["world"], int(os.environ.get("WORLD_SIZE", 1))
    if world != now:
        raise ValueError(
            f"{path} was made by {world} processes, which is part of its batch, not by {now}: "
            f"use torchrun --nproc-per-node {world}, or start a new run with --out"
        )
    say(f"going on from {path}", soft_wrap=True)
    paths = {k: before[k] and Path(before[k]) for k in ("data", "src_dir", "tgt_dir", "out")}
    return before | paths | {"out": path.parent} | given, path


# What the loop reports.


# When to warn: D's mean probability of "source" beyond SURE, or below 1 - SURE, for STUCK steps.
SURE, STUCK = 0.999, 200
D_WON = "try a smaller --lr-d, or a larger --lambda-adv"
D_LOST = "try a smaller --lr-d, or a smaller --lambda-adv"


class Log:
    """metrics.jsonl, the progress shown, and the watch over what a run computes.

    The scalars of a step travel to the host while the device goes on; each is looked at as soon as
    it has arrived, on a CPU at once, so that no step waits and a NaN is named with its step. Of
    several processes each watches its own scalars, and the first writes its own.
    """

    def __init__(
        self, path: Path | None, start: int, hyper: clan.Hyper, every: int, console: Console
    ):
        self.file = path and self.open(path, start)
        self.hyper, self.every, self.console = hyper, every, console
        self.pending, self.images, self.since = deque(), 0, time.monotonic()
        self.stuck = {}
        self.bar = Progress(
            *("{task.description}", BarColumn(), "{task.completed}/{task.total}"),
            *(TimeRemainingColumn(), "{task.fields[terms]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task("steps", total=hyper.steps, completed=start, terms="")

    @staticmethod
    def open(path: Path, start: int):
        """The file with its lines up to `start`, to go on from there."""
        text = path.read_text() if start and path.exists() else ""
        lines = text[: text.rfind("\n") + 1].splitlines()  # a kill can leave half a line behind
        kept = [line for line in lines if json.loads(line)["step"] <= start]
        beside = path.with_suffix(".tmp")
        beside.write_text("".join(line + "\n" for line in kept))
        to_disk(beside)
        beside.replace(path)
        return path.open("a", buffering=1)

    def add(self, step: int, terms: dict[str, torch.Tensor], images: int) -> None:
        """The terms of a step; steps count from 1 here, as those that are done."""
        values, arrived = torch.stack(list(terms.values())), None
        if values.is_cuda:
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            values = host.copy_(values, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        self.pending.append((step, terms.keys(), values, arrived))
        self.images += images
        self.read()

    def read(self, wait: bool = False) -> None:
        """Look at the terms that have arrived, or with `wait` at all of them.

        Raises FloatingPointError for one that is not finite.
        """
        while self.pending:
            step, names, values, arrived = self.pending[0]
            if arrived is not None and not wait and not arrived.query():
                return
            if arrived is not None:
                arrived.synchronize()
            self.pending.popleft()
            terms = dict(zip(names, values.tolist(), strict=True))
            wrong = [name for name, value in terms.items() if not math.isfinite(value)]
            if wrong:
                shown = ", ".join(f"{k} {v:.4g}" for k, v in terms.items())
                raise FloatingPointError(f"{wrong[0]} is not finite at step {step}: {shown}")
            self.watch(step, terms)
            if step % self.every == 0 or step == self.hyper.steps:
                self.record({"step": step} | {k: float(f"{v:.6g}") for k, v in terms.items()})
                self.show(step, terms)

    def watch(self, step: int, terms: dict[str, float]) -> None:
        """Warn, once each, of a D that answers the same for STUCK steps without a break."""
        if "d_source" not in terms:
            return
        source, target = terms["d_source"], terms["d_target"]
        won = source > SURE and target < 1 - SURE
        lost = min(source, target) > SURE or max(source, target) < 1 - SURE
        for what, now, advice in (
            ("D tells the domains apart without a doubt, G learns nothing from it", won, D_WON),
            ("D gives one answer for both domains, G learns nothing from it", lost, D_LOST),
        ):
            self.stuck[what] = self.stuck.get(what, 0) + 1 if now else 0
            if self.stuck[what] == STUCK:
                self.bar.console.print(
                    f"warning: {what}, for {STUCK} steps up to step {step} (d_source {source:.4f}, "
                    f"d_target {target:.4f}): {advice}",
                    soft_wrap=True,
                )

    def record(self, line: dict) -> None:
        if self.file is None:  # rank 0 alone writes
            return
        try:
            self.file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise OSError(
                f"{self.file.name} could not be written ({error}): make room, then go on with "
                f"--resume {Path(self.file.name).parent}"
            ) from error

    def save(self) -> None:
        os.fsync(self.file.fileno())

    def show(self, step: int, terms: dict[str, float]) -> None:
        seconds = time.monotonic() - self.since
        speed = self.images / max(seconds, 1e-9)
        text = " ".join(f"{k} {v:.3f}" for k, v in terms.items()) + f" | {speed:.0f} images/s"
        self.bar.update(self.task, completed=step, terms=text)
        if not self.console.is_terminal and self.file:
            print(f"step {step}/{self.hyper.steps} {text}", flush=True)
        self.images, self.since = 0, time.monotonic()


class Stopped(Exception):
    """The run was asked to end before its last step, and is saved."""


class Stop:
    """Ctrl-C or SIGTERM: once asks the loop to save and end, twice ends at once.

    What arrives within `grace` seconds is one: torchrun passes a Ctrl-C on that came here already.
    """

    asked = False

    def __init__(self, grace: float = 0.0):
        self.grace, self.since = grace, 0.0

    def __enter__(self):
        numbers = (signal.SIGINT, signal.SIGTERM)
        self.before = {number: signal.signal(number, self.ask) for number in numbers}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def ask(self, number, frame) -> None:
        if self.asked and time.monotonic() - self.since >= self.grace:
            raise KeyboardInterrupt
        if self.asked:
            return
        self.asked, self.since = True, time.monotonic()
        print("stopping after this step; once more to stop at once", file=sys.stderr)


# The run.


@dataclass
class Run:
    """What the loop works with."""

    settings: Settings
    hyper: clan.Hyper
    device: torch.device
    amp: bool  # bfloat16 autocast
    workers: int
    source: data.DataSet
    target: data.DataSet
    val: data.DataSet  # the target's, labelled, for scoring alone
    table: np.ndarray  # its train ids as G's classes (data.shared_classes)
    G: Generator
    D: Discriminator
    opt_g: torch.optim.Optimizer
    opt_d: torch.optim.Optimizer
    rank: int  # of this process among the `world` of torchrun; 0 of 1 without it
    world: int

    @property
    def out(self) -> Path:
        return self.settings.out

    def score(self, network: Generator) -> dict:
        """IoU on the target's validation split."""
        if self.world > 1:  # the running statistics that are saved, not each process's own
            for buffer in network.buffers():
                torch.distributed.broadcast(buffer, src=0)
        how = {"device": self.device, "amp": self.amp, "workers": self.workers}
        confusion = evaluation.evaluate(network, self.val, self.table, **how)
        return evaluation.report(confusion, self.source, self.val)


def prepare(settings: Settings, hyper: clan.Hyper, resume: Path | None, console: Console) -> Run:
    """Data, networks and optimizers: from the seed and --init, or with resume from a checkpoint."""
    torch.manual_seed(settings.seed)
    device = evaluation.find_device(settings.device)
    evaluation.join_processes(device)
    rank, world = evaluation.ranks()
    if device.type == "cpu":
        keep_freed_memory()
    if settings.compile == "on" and device.type == "cpu":  # torch 2.13: right losses, and G's
        # gradient off by 4 %, or without the segmentation loss's for the focal form
        raise ValueError("--compile on loses gradients on a CPU with torch 2.13: drop it")
    amp = evaluation.uses_bfloat16(settings.amp, device)
    source, target, val = open_all(settings)
    table, _, left_out = data.shared_classes(source, val)
    workers = settings.workers
    if workers < 0:
        drawn = settings.src == settings.tgt == "streets"
        here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # processes that share this machine
        workers = 0 if drawn else min(8, (os.cpu_count() or 1) // here)

    G = Generator(settings.backbone, len(source.classes), settings.lineage, hyper.head_std)
    D = Discriminator(len(source.classes), hyper.d_channels)
    if settings.init != "none" and not resume:
        load_weights(G, settings.init, say=console.print)
    G = G.to(device, memory_format=torch.channels_last)
    D = D.to(device, memory_format=torch.channels_last)
    opt_g, opt_d = build_optimizers(G, D, hyper)
    console.print(
        f"{settings.src} ({len(source)} images, {source.size[0]}x{source.size[1]}) to "
        f"{settings.tgt} ({len(target)}, {target.size[0]}x{target.size[1]}), {settings.backbone}, "
        f"{hyper.method}, {hyper.steps} steps, {device}, into {settings.out}",
        soft_wrap=True,
    )
    if left_out:
        console.print(f"not scored, on one side only: {', '.join(left_out)}", soft_wrap=True)
    if resume:
        try:
            unpack(read_checkpoint(resume)[0], G, D, opt_g, opt_d)
        except ValueError as error:
            raise ValueError(f"{resume} does not fit: {error}; use an older one") from error
    parts = (settings, hyper, device, amp, workers, source, target, val, table)
    return Run(*parts, G, D, opt_g, opt_d, rank, world)


def keep_freed_memory() -> None:
    """Have glibc, where it is the C library, keep the memory of a step for the next one.

    It would give large blocks back to the system, and every step pay for their pages anew.
    """
    library = ctypes.CDLL(None) if os.name == "posix" else None
    if hasattr(library, "mallopt"):
        library.mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD: its largest value
        library.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


def open_all(settings: Settings):
    """Source and target for training, and the target's validation split."""

    def folder(name: str, own: Path | None):
        return own or data.default_folder(name, settings.data)

    tgt_dir = folder(settings.tgt, settings.tgt_dir)
    target = data.open_dataset(
        settings.tgt, "target", "train", tgt_dir, settings.tgt_size, False, settings.shift
    )
    val = data.open_dataset(
        settings.tgt, "target", "val", tgt_dir, target.size, shift=settings.shift
    )
    src_size = settings.src_size
    if settings.src == "streets" and not src_size:  # drawn at the size of its target
        src_size = target.size
    source = data.open_dataset(
        settings.src, "source", "train", folder(settings.src, settings.src_dir), src_size
    )
    return source, target, val


def build_optimizers(G, D, hyper: clan.Hyper, fused: bool = True):
    """SGD for E and, `head_lr` times as fast, the two heads; Adam for D. Rates: `set_rates`."""
    groups = [
        {"params": list(G.E.parameters())},
        {"params": [*G.C1.parameters(), *G.C2.parameters()]},
    ]
    decay_g, decay_d = hyper.weight_decay_g, hyper.weight_decay_d
    opt_g = torch.optim.SGD(groups, hyper.lr_g, hyper.momentum, weight_decay=decay_g, fused=fused)
    betas = (hyper.beta1_d, hyper.beta2_d)
    opt_d = torch.optim.Adam(D.parameters(), hyper.lr_d, betas, weight_decay=decay_d, fused=fused)
    return opt_g, opt_d


def set_rates(opt_g, opt_d, step: int, hyper: clan.Hyper) -> None:
    lr_g, lr_d = clan.learning_rates(step, hyper)
    opt_g.param_groups[0]["lr"] = lr_g
    opt_g.param_groups[1]["lr"] = lr_g * hyper.head_lr
    opt_d.param_groups[0]["lr"] = lr_d


def gradient_norm(optimizer) -> torch.Tensor:
    """Euclidean norm of all gradients, a scalar: what is wrong in one of them shows in it."""
    groups = (group["params"] for group in optimizer.param_groups)
    gradients = [p.grad for p in itertools.chain(*groups) if p.grad is not None]
    return torch.nn.utils.get_total_norm(gradients)


def loader(run: Run, start: int) -> torch.utils.data.DataLoader:
    """The batches of the steps from `start` on, read ahead by `workers` processes."""
    return torch.utils.data.DataLoader(
        data.Steps(
            *(run.source, run.target, run.hyper),
            **{"seed": run.settings.seed, "rank": run.rank, "world": run.world},
        ),
        batch_size=None,
        sampler=range(start, run.hyper.steps),
        generator=torch.Generator(),  # its own: a resumed run must not move the networks' one
        num_workers=run.workers,
        worker_init_fn=data.ignore_signals,
        pin_memory=run.device.type == "cuda",
    )


def to_device(batch: clan.Batch, device) -> clan.Batch:
    """Bytes travel; normalisation and the labels' int64 wait for the device."""
    source, labels, target, size = batch
    source, labels = (x.to(device, non_blocking=True) for x in (source, labels))
    target = None if target is None else target.to(device, non_blocking=True)
    return clan.Batch(source, labels, target, size)


# Several processes (torchrun): each takes its own samples, and gradients are averaged.


class Step(torch.nn.Module):
    """A step as a module that holds the network it trains: one forward for each backward."""

    def __init__(self, step, network: torch.nn.Module):
        super().__init__()
        self.step, self.network = step, network

    def forward(self, *arguments):
        return self.step(*arguments)


def data_parallel(step, network: torch.nn.Module):
    """The step, averaging the gradients of `network` over all processes in its backward.

    BatchNorm's running statistics are those of rank 0. A loss over unlabelled pixels is averaged
    process by process, so that each counts alike however many of its pixels are labelled.
    """
    return torch.nn.parallel.DistributedDataParallel(Step(step, network))


def any_rank(asked: bool) -> bool:
    """Whether any process was asked to stop: all must leave the loop after the same step."""
    if evaluation.ranks()[1] == 1:
        return asked
    flag = torch.tensor(int(asked))  # on the CPU: the device need not wait
    torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
    return bool(flag)


def seed_of(*numbers: int) -> int:
    """One seed of many numbers, so that randomness is a function of (seed, step, rank) alone."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def checkpoint(run: Run, log: Log, step: int, name: str | None = None) -> None:
    """Save everything, but no weights of a loss that was not finite; then drop the oldest."""
    log.read(wait=True)
    if run.rank > 0:
        return
    log.save()
    about = {"classes": run.source.classes, "tgt_size": run.target.size, "commit": commit()}
    about |= {"settings": asdict(run.settings) | asdict(run.hyper), "step": step}
    about |= {"world": run.world}
    tensors = pack(run.G, run.D, run.opt_g, run.opt_d)
    save(run.out / (name or f"step_{step:07d}.safetensors"), tensors, about)
    for old in sorted(run.out.glob("step_*.safetensors"))[: -run.settings.keep]:
        old.unlink()


def loop(run: Run, start: int, log: Log, stop: Stop) -> None:
    """The training itself: alternate steps of G and of D (Eq. 7), from `start` to the end."""
    settings, hyper, device = run.settings, run.hyper, run.device
    G, D, opt_g, opt_d = run.G, run.D, run.opt_g, run.opt_d
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=run.amp)
    compiled = settings.compile == "on"
    g_step = torch.compile(clan.g_step) if compiled else clan.g_step
    d_step = torch.compile(clan.d_step) if compiled else clan.d_step

    if run.world > 1:
        set_batchnorm(G, train_affine=hyper.bn_affine, batch_statistics=True)  # says what is learnt
        g_step, d_step = data_parallel(g_step, G), data_parallel(d_step, D)

    batches = data.checked(loader(run, start))
    for step, batch in zip(range(start, hyper.steps), batches, strict=True):
        batch = to_device(batch, device)
        torch.manual_seed(seed_of(settings.seed, step, run.rank))  # of dropout
        set_rates(opt_g, opt_d, step, hyper)
        G.train()
        statistics = clan.uses_batch_statistics(step, hyper)
        set_batchnorm(G, train_affine=hyper.bn_affine, batch_statistics=statistics)

        with autocast:
            loss, terms, predictions = g_step(G, D, batch, step, hyper)  # Eq. 6
        opt_g.zero_grad()
        loss.backward()
        terms["grad"] = gradient_norm(opt_g)
        opt_g.step()

        if predictions is not None:
            with autocast:
                loss, d_terms = d_step(D, predictions)  # Eq. 5, or Eq. 2
            opt_d.zero_grad()
            loss.backward()
            terms |= d_terms | {"d_grad": gradient_norm(opt_d)}
            opt_d.step()

        done = step + 1
        log.add(done, terms, images=run.world * hyper.batch * (1 if predictions is None else 2))
        stopping = any_rank(stop.asked)
        adapts_next = done == hyper.adv_start and hyper.method != "source"
        due = settings.eval_every and done % settings.eval_every == 0 and done < hyper.steps
        if adapts_next or due:
            miou = run.score(G)["miou"]
            log.record({"step": done, "target_miou": miou})
            log.bar.console.print(f"step {done}: target mIoU {100 * miou:.1f}")
        if adapts_next:  # after its score, which a run that goes on from here must have
            checkpoint(run, log, done, BEFORE)
        if done % settings.save_every == 0 or done == hyper.steps or stopping:
            checkpoint(run, log, done)
        if stopping and done < hyper.steps:
            raise Stopped(f"stopped after step {done}; go on with --resume {run.out}")


def finish(run: Run, console: Console) -> dict:
    """Score the last weights beside those before adaptation, and write table and picture."""
    networks, out = {}, run.out
    if (out / BEFORE).exists():
        before, _ = evaluation.load_generator(out / BEFORE, say=lambda _: None)
        networks["before"] = before.to(run.device, memory_format=torch.channels_last)
    networks["after"] = run.G
    columns = {name: run.score(network) for name, network in networks.items()}
    if run.rank > 0:
        return columns["after"]
    settings = run.settings
    paper = evaluation.paper_row(settings.src, settings.tgt, settings.backbone, run.hyper.method)
    title = f"IoU on {settings.tgt} val, %"
    console.print(evaluation.score_table(title, columns | {"paper": paper}))

    path = newest_checkpoint(out)  # the one that the loop has just written
    result = columns["after"] | {
        "checkpoint": str(path),
        "settings": read_metadata(path)["settings"],
    }
    if "before" in columns:
        result["miou_before"] = columns["before"]["miou"]
    (out / "eval.json").write_text(json.dumps(result, indent=1))
    figure = evaluation.draw(run.val, run.table, networks, run.device, run.source.classes)
    figure.savefig(out / "result.png", dpi=evaluation.DPI)
    for name in (path.name, "eval.json", "result.png", "metrics.jsonl"):
        console.print(f"wrote {out / name}", soft_wrap=True)
    return result


def train(settings: Settings, hyper: clan.Hyper, resume: Path | None, console: Console) -> dict:
    """One run, from its first step or from a checkpoint, to its score (as in eval.json)."""
    out = settings.out
    if (not resume or resume.parent != out) and saved(out):
        raise ValueError(f"{out} holds a run: go on with --resume {out}, or choose another --out")
    start = read_metadata(resume)["step"] if resume else 0
    run = prepare(settings, hyper, resume, console)
    path = out / "metrics.jsonl" if run.rank == 0 else None
    if path:
        out.mkdir(parents=True, exist_ok=True)
        for unfinished in (*out.glob("step_*.tmp"), *out.glob("before_*.tmp")):
            unfinished.unlink()
    log = Log(path, start, hyper, settings.log_every, console)
    try:
        with log.bar, Stop(grace=2.0 if run.world > 1 else 0.0) as stop:
            loop(run, start, log, stop)
    except FloatingPointError as error:
        good = sorted(saved(out), key=lambda p: p.stat().st_mtime)
        last = f"the last good checkpoint is {good[-1]}" if good else "none was saved before"
        raise FloatingPointError(f"{error}; {last}; try a smaller --lr-g or --amp off") from error
    return finish(run, console)


def owner(given: dict, resume: Path | None):
    """The lock of the folder that a run will write to; of several processes the first has it."""
    if int(os.environ.get("RANK", 0)) > 0:
        return contextlib.nullcontext()
    if resume in (None, Path()) or "out" in given:
        return owned(configure(given)[0].out)
    if not resume.exists():
        raise ValueError(f"{resume} does not exist: give a run folder or a checkpoint to --resume")
    return owned(resume.parent if resume.is_file() else resume)


def restarted(given: dict, resume: Path | None) -> Path | None:
    """What to go on from after torchrun --max-restarts has started this process again: what it has
    saved since, or else what it was given."""
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) == 0:
        return resume
    if resume in (None, Path()) or "out" in given:
        folder = configure(given)[0].out
    else:
        folder = resume if resume.is_dir() else resume.parent
    return folder if saved(folder) else resume


def main(argv=None) -> None:
    given, resume = parse(argv)
    rank, world = (int(os.environ.get(k, d)) for k, d in (("RANK", "0"), ("WORLD_SIZE", "1")))
    console = Console(quiet=rank > 0)
    try:
        refuse_idle_flags(given)
        with owner(given, resume):
            resume = restarted(given, resume)
            if resume is not None:
                given, resume = resumed(given, resume, console.print)
            settings, hyper = configure(given)
            train(settings, hyper, resume, console)
        evaluation.leave_processes()
    except Stopped as stopped:
        evaluation.leave_processes()
        console.print(str(stopped), soft_wrap=True, highlight=False)
        sys.exit(130)
    except KeyboardInterrupt:
        print("stopped at once; go on from the last checkpoint, if there is one, with --resume")
        sys.exit(130)
    except (ValueError, OSError, FloatingPointError) as error:
        full = getattr(error, "errno", None) == errno.ENOSPC
        sys.exit(f"error: {error}" + "; make room, then go on with --resume" * full)
    except RuntimeError as error:
        if world == 1 or not any(word in str(error) for word in ("gloo", "NCCL", "Connection")):
            raise
        sys.exit(
            f"error: rank {rank} lost another process ({str(error).splitlines()[0][:120]}); once "
            "its cause, said above, is mended, go on with --resume"
        )


if __name__ == "__main__":
    main()
