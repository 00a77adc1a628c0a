"""Training: one step, the run around it, what follows each step, and the end (Section 4.2).

    python train.py                                   # drawn streets, minutes on a laptop
    python train.py --src gta5 --backbone r101        # the paper's run, on the GPU if there is one
    python train.py --resume runs/RUN                 # goes on with a stopped run

Every field of settings.Settings and of clan.Hyper is a flag (python train.py --help). A run folder
holds metrics.jsonl, the last checkpoints, and at the end eval.json and result.png.
"""

import contextlib
import errno
import itertools
import json
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

# Imports may swallow Ctrl-C or abort on it. Until they are done it ends the program at once.
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from torch.optim import Optimizer

import clan
import data
import devices
import eval as evaluation
from baselines import Images
from checkpoints import (
    BEFORE,
    commit,
    drop_oldest,
    drop_unfinished,
    name_of,
    newest_checkpoint,
    owned,
    pack,
    read_checkpoint,
    read_metadata,
    save,
    saved,
    unpack,
)
from clan import Batch, Hyper, Phase, Terms
from compilation import Arguments, CompiledSteps, what_to_compile
from methods import METHODS, Method, State, state_of, uses_target
from models import (
    Discriminator,
    Generator,
    cells_of,
    merge_heads,
    recompute_blocks,
    set_batchnorm,
)
from runlog import Log, Stop, Stopped, last_answers, progress_bar, remedies
from settings import (
    Flags,
    Settings,
    both_parts,
    configure,
    flag_of,
    less_memory,
    parse,
    refuse_stage_without_start,
    refuse_unused_flags,
    restarted,
    resumed,
    run_folder,
    short_side,
)
from weights import LoadReport, load_generator, load_weights

# One step, and the run around it.


def one_step(
    method: Method,
    G: Generator,
    D: Discriminator | None,
    opt_g: Optimizer,
    opt_d: Optimizer | None,
    state: State,
    batch: Batch,
    phase: Phase,
    hyper: Hyper,
    autocast: torch.autocast,
) -> Terms:
    """A step of G and then one of D (Eq. 7). Returns the scalars to log."""
    own_state = (state,) if method.first_state else ()
    with autocast:
        g_loss, terms, predictions = method.g_step(G, D, batch, phase, hyper, *own_state)  # Eq. 6
    opt_g.zero_grad()
    g_loss.backward()
    terms["grad"] = gradient_norm(opt_g)
    if method.moves_g(state, phase, hyper):  # CLAN: in every step
        opt_g.step()

    for later_step in method.later_steps(hyper) if phase.adversarial else ():  # CLAN has none
        with autocast:
            later_loss, later_terms = later_step(G, batch, phase, hyper, *own_state)
        opt_g.zero_grad()
        later_loss.backward()
        opt_g.step()
        terms |= later_terms

    if opt_d is not None and predictions is not None:
        with autocast:
            d_loss, d_terms = method.d_step(D, predictions)  # Eq. 5, or Eq. 2
        opt_d.zero_grad()
        d_loss.backward()
        terms |= d_terms | {"d_grad": gradient_norm(opt_d)}
        opt_d.step()

    if method.next_state:
        state |= method.next_state(state, G, terms, hyper)
    return terms


def train(settings: Settings, hyper: Hyper, resume: Path | None, console: Console) -> dict:
    """One run, from its first step or from a checkpoint, to its score (as in eval.json)."""
    start = first_step(settings.folder, resume)
    device = devices.find_device(settings.device)
    devices.join_processes(device)
    rank, world = devices.ranks()
    devices.choose_algorithms(settings.cudnn)
    amp = devices.uses_bfloat16(settings.amp, device)
    method = METHODS[hyper.method]
    source, target, val = open_all(settings)
    if method.result and not resume:
        check_start(settings, hyper, source, console)
    drawn = settings.src == settings.tgt == "streets"
    workers = devices.count_workers(settings.workers, drawn)

    G, D = first_networks(settings, hyper, len(source.classes), device, resume, console)
    opt_g, opt_d = build_optimizers(G, D, hyper)
    state = state_of(method, G, hyper)
    parts = (G, D, opt_g, opt_d, state)  # all that a step changes, and a checkpoint holds
    introduce(settings, hyper, source, target, val, device, console)
    decisions = restore(resume, target.size, device, console, *parts) if resume else {}
    # Sets requires_grad before DDP collects the parameters.
    set_batchnorm(G, train_affine=hyper.bn_affine, batch_statistics=True)
    what = what_to_compile(settings.compile, device, hyper, settings.recompute)
    compiled = CompiledSteps(method, what, G, console.print, decisions)
    method = devices.data_parallel(compiled.method, G, D, hyper)

    log = open_log(settings, hyper, start, rank, console)
    batches = read_ahead(source, target, hyper, start, settings.seed, workers, device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=amp)
    images = Images(
        partial(target_images, target, device, workers), partial(source_labels, source, workers)
    )
    score = partial(scored, source=source, val=val, device=device, amp=amp, workers=workers)
    origin = {"classes": source.classes, "tgt_size": target.size, "world": world}
    origin["compiled"] = compiled.known
    keep = partial(checkpoint, settings, hyper, origin, parts, log)
    stop = Stop(grace=2.0 if world > 1 else 0.0)
    with log.bar, stop, remedies(settings.folder):
        if method.result and start == hyper.adv_start == 0:  # a second stage of another run
            record_score(0, log, partial(score, G, bar=log.bar))
            keep(0, BEFORE)
        for step, batch in zip(range(start, hyper.steps), batches, strict=True):
            # VGG-16's dropout and --m-control shuffled draw from torch's generator. Reseeding each
            # step makes resuming exact.
            torch.manual_seed(seed_of(settings.seed, step, rank))
            batch = to_device(batch, device)
            phase = clan.phase_at(step, hyper, device)
            set_rates(opt_g, opt_d, step, hyper)
            set_mode(G, phase, hyper)
            if method.before_step:
                state |= method.before_step(step, G, images, hyper)
            with compiled.chosen(Arguments(G, D, state, batch, phase, hyper, autocast)):
                terms = one_step(method, *parts, batch, phase, hyper, autocast)
            count = world * hyper.batch * (2 if uses_target(step, hyper) else 1)
            log.add(step + 1, terms, count)
            result = partial(network_of, method, G, state, step + 1, hyper)
            after_step(step + 1, settings, hyper, log, stop, result, score, keep)
    network = network_of(method, G, state, hyper.steps, hyper)
    return finish(settings, hyper, source, val, G, network, score, device, console)


# Before the loop.

FEW_CELLS = 8  # on a side of D's answer; the paper's has 16x32


def first_step(out: Path, resume: Path | None) -> int:
    """The step that a run begins with. Raises ValueError if its folder holds another run."""
    if (not resume or resume.parent != out) and saved(out):
        raise ValueError(f"{out} holds a run: go on with --resume {out}, or choose another --out")
    return read_metadata(resume)["step"] if resume else 0


def open_all(settings: Settings) -> tuple[data.DataSet, data.DataSet, data.DataSet]:
    """Source and target for training, and the target's split to score on.

    Without that split it is the target's training images, which have no labels here. Labels that
    have no class in common with the source count as none.
    """

    def folder(name: str, flag: Path | None) -> Path | None:
        return flag or data.default_folder(name, settings.data)

    tgt, shift = settings.tgt, settings.shift
    tgt_dir = folder(tgt, settings.tgt_dir)
    size = settings.tgt_size
    drawn: Any = {"shift": shift, "scenes": settings.scenes}
    drawn["short_side"] = short_side(settings.backbone)
    target = data.open_dataset(tgt, "target", "train", tgt_dir, size, labels="none", **drawn)
    val = target
    if data.has_split(tgt, tgt_dir, settings.split):
        where = (tgt, "target", settings.split, tgt_dir, target.size)
        val = data.open_dataset(*where, labels="optional", **drawn)
    src_size = settings.src_size
    if settings.src == "streets" and not src_size:  # drawn at the size of its target
        src_size = target.size
    src_dir = folder(settings.src, settings.src_dir)
    drawn["mixed"] = settings.looks == "mixed"
    role = "target" if settings.looks == "city" else "source"
    source = data.open_dataset(settings.src, role, "train", src_dir, src_size, **drawn)
    if val.has_labels and not set(source.classes) & set(val.classes):  # labels of another field
        val = replace(val, items=tuple((image, None) for image, _ in val.items))
    return source, target, val


# What a second stage learns from, which should be as it was in the run that it goes on with.
LEARNT_FROM: tuple[str, ...] = ("src", "src_dir", "src_size", "tgt", "tgt_dir", "tgt_size")
LEARNT_FROM += ("shift", "scenes", "looks", "seg_heads", "fourier")


def check_start(settings: Settings, hyper: Any, source: data.DataSet, console: Console) -> None:
    """Says which flags of LEARNT_FROM differ from those of the run that a second stage begins with.

    Raises ValueError if it would not begin with a network of the source's classes, or could not
    paste the source into the target.
    """
    if hyper.class_mix and hyper.scales != (1.0,):
        raise ValueError(
            "--class-mix needs images of one scale: give --scales 1 --scale-probs 1, or "
            "--no-class-mix"
        )
    classes = source.classes
    if settings.init in ("none", "imagenet"):
        if hyper.adv_start == 0:
            raise ValueError(
                "--method selftrain goes on with a network that has learnt: give --init RUN, or "
                "--adv-start N to learn the source first"
            )
        return
    metadata = read_metadata(newest_checkpoint(Path(settings.init)))
    theirs = tuple(metadata.get("classes", classes))
    if theirs != classes:
        names = sorted({*theirs} ^ {*classes}) or ["another order"]
        raise ValueError(
            f"{settings.init} was trained on other classes ({', '.join(names)}): take a run on the "
            "same source"
        )
    before = metadata.get("settings", {})
    now = json.loads(json.dumps(vars(settings) | vars(hyper), default=str))
    changed = [
        f"{flag_of(name)} {now[name]} (was {before[name]})"
        for name in LEARNT_FROM
        if name in before and before[name] != now[name]
    ]
    if changed:
        text = f"warning: {settings.init} was made with other flags: {', '.join(changed)}"
        console.print(f"{text}. Give them again if this is not meant", soft_wrap=True)


def first_networks(
    settings: Settings,
    hyper: Hyper,
    num_classes: int,
    device: torch.device,
    resume: Path | None,
    console: Console,
) -> tuple[Generator, Discriminator | None]:
    """G and D of step 0, which depend on the seed and --init. With `resume`, --init is not read."""
    if device.type == "cpu":
        devices.keep_freed_memory()
    torch.manual_seed(settings.seed)
    G = Generator(settings.backbone, num_classes, settings.lineage, hyper.head_std)
    D = second_network(G, hyper)
    if settings.init != "none" and not resume:
        check_heads(settings, hyper, load_weights(G, settings.init, say=console.print))
    if settings.merge_heads:
        merge_heads(G)
    if settings.recompute:
        recompute_blocks(G)
    return devices.place(G, device), D if D is None else devices.place(D, device)


def check_heads(settings: Settings, hyper: Hyper, report: LoadReport) -> None:
    """Raises ValueError if a second stage would begin with heads that have learnt nothing."""
    heads = [name for name in report.initial if name.startswith(("C1.", "C2."))]
    if hyper.method == "selftrain" and hyper.adv_start == 0 and heads:
        raise ValueError(
            f"{settings.init} has no weights for {', '.join(heads)}, and a second stage goes on "
            "with both heads: give --init RUN, or --adv-start N to learn the source first"
        )


def second_network(G: Generator, hyper: Hyper) -> Any:
    """D, or what the method has in its place; None if it has neither."""
    method = METHODS[hyper.method]
    if method.build_d:
        return method.build_d(G, hyper)
    if not method.has_d:
        return None
    return Discriminator(G.num_classes, hyper.d_channels, hyper.d_strides)


def build_optimizers(
    G: Generator, D: Discriminator | None, hyper: Hyper, fused: bool = True
) -> tuple[Optimizer, Optimizer | None]:
    """SGD for E and the two heads, Adam for D. The heads learn `head_lr` times as fast as E.

    `set_rates` sets the rates of each step.
    """
    groups = [
        {"params": list(G.E.parameters())},
        {"params": [*G.C1.parameters(), *G.C2.parameters()]},
    ]
    more: Any = getattr(D, "of_g", None)  # a head of the method's own
    if more is not None:  # by itself, since it begins later
        groups.append({"params": list(more.parameters())})
    decay_g, decay_d = hyper.weight_decay_g, hyper.weight_decay_d
    opt_g = torch.optim.SGD(groups, hyper.lr_g, hyper.momentum, weight_decay=decay_g, fused=fused)
    if D is None:
        return opt_g, None
    betas = (hyper.beta1_d, hyper.beta2_d)
    of_d = [p for name, p in D.named_parameters() if not name.startswith("of_g.")]
    opt_d = torch.optim.Adam(of_d, hyper.lr_d, betas, weight_decay=decay_d, fused=fused)
    return opt_g, opt_d


def introduce(
    settings: Settings,
    hyper: Hyper,
    source: data.DataSet,
    target: data.DataSet,
    val: data.DataSet,
    device: torch.device,
    console: Console,
) -> None:
    """Say what will run, whether D can tell places apart, and which classes will not be scored."""
    rows, columns = cells_of(hyper.d_strides, target.crop if hyper.crop else target.size)
    method = METHODS[hyper.method]
    adversarial = method.has_d and method.reads_target and "d_strides" not in method.unused
    console.print(
        f"{settings.src} ({len(source)} images, {source.size[0]}x{source.size[1]}) to "
        f"{settings.tgt} ({len(target)}, {target.size[0]}x{target.size[1]}), {settings.backbone}, "
        f"{hyper.method}, {f'D of {rows}x{columns} cells, ' * adversarial}{hyper.steps} steps, "
        f"{device}, into {settings.out}",
        soft_wrap=True,
    )
    resized = [name for name in ("src", "tgt") if getattr(settings, name) == "folder"
               and not getattr(settings, f"{name}_size")]  # fmt: skip
    if resized:
        flags = " or ".join(flag_of(f"{name}_size") for name in resized)
        console.print(
            f"a folder's images have a short side of {short_side(settings.backbone)} with "
            f"{settings.backbone}: {flags} H W changes it",
            soft_wrap=True,
        )
    weighs = "lambda_local" not in method.unused
    if weighs and min(rows, columns) < FEW_CELLS:
        console.print(
            f"warning: D answers with {rows}x{columns} numbers for an image, so the place of the "
            "weight cannot matter: give --d-strides with fewer 2s",
            soft_wrap=True,
        )
    if not val.has_labels:
        console.print(
            f"{settings.tgt} {settings.split} has no labels of the source's classes: confidence, "
            "M and class shares of its images are reported in place of a score",
            soft_wrap=True,
        )
        return
    _, _, left_out = data.shared_classes(source, val)
    if left_out:
        console.print(f"not scored, in one data set only: {', '.join(left_out)}", soft_wrap=True)


def restore(
    path: Path, size: data.Size, device: torch.device, console: Console, *parts: Any
) -> dict[str, str]:
    """Load a checkpoint into the parts of a run, which stand in the order of `pack`.

    size: of the target now. Returns what the run had decided about compiled steps.
    """
    before = tuple(read_metadata(path)["tgt_size"])
    if before != tuple(size):
        raise ValueError(
            f"{path} was trained at {before[0]}x{before[1]}, and the target is {size[0]}x{size[1]} "
            f"now: give --tgt-size {before[0]} {before[1]} to a new run, or the old images"
        )
    try:
        unpack(read_checkpoint(path)[0], *parts)
    except ValueError as error:
        raise ValueError(f"{path} does not fit: {error}; use an older checkpoint") from error
    if device.type == "cuda":
        console.print("on CUDA a resumed run is not promised to end with the same bits")
    return read_metadata(path).get("compiled", {})


def open_log(settings: Settings, hyper: Hyper, start: int, rank: int, console: Console) -> Log:
    """The log of a run. Only the first of several processes writes it, to the run folder."""
    if rank > 0:
        return Log(None, start, hyper, settings.log_every, console)
    settings.folder.mkdir(parents=True, exist_ok=True)
    drop_unfinished(settings.folder)
    return Log(settings.folder / "metrics.jsonl", start, hyper, settings.log_every, console)


def read_ahead(
    source: data.DataSet,
    target: data.DataSet,
    hyper: Hyper,
    start: int,
    seed: int,
    workers: int,
    device: torch.device,
) -> Any:
    """The batches of the steps from `start` on, read ahead by `workers` processes."""
    rank, world = devices.ranks()
    loader: Any = torch.utils.data.DataLoader(
        data.Steps(source, target, hyper, seed=seed, rank=rank, world=world),
        batch_size=None,
        sampler=range(start, hyper.steps),
        generator=torch.Generator(),  # not torch's own, which the networks draw from
        num_workers=workers,
        worker_init_fn=data.ignore_signals,
        pin_memory=device.type == "cuda",
    )
    return data.checked(loader)


def target_images(target: data.DataSet, device: torch.device, workers: int) -> Iterator[Tensor]:
    """All training images of the target, B 3 H W, whole and at its size: this process's part."""
    rank, world = devices.ranks()
    part = torch.utils.data.Subset(data.Pairs(target), range(rank, len(target), world))
    for pairs in data.checked(evaluation.batches(part, target.size, workers)):
        yield torch.stack([image for _, image, _ in pairs]).to(device)


def source_labels(source: data.DataSet, workers: int) -> Iterator[Tensor]:
    """All labels of the source, 1 H W, at their own sizes."""
    for label in data.checked(evaluation.batches(data.LabelsOf(source), (0, 0), workers)):
        yield from (torch.from_numpy(x)[None] for x in label)


# In the loop.


def seed_of(*numbers: int) -> int:
    """One seed made from several numbers: randomness depends only on (seed, step, rank)."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Copies as uint8; G normalises and g_step casts the labels on the device."""
    source, labels, target, size = batch
    source, labels = (x.to(device, non_blocking=True) for x in (source, labels))
    target = None if target is None else target.to(device, non_blocking=True)
    return Batch(source, labels, target, size)


def set_mode(G: Generator, phase: Phase, hyper: Hyper) -> None:
    """G in training mode, with BatchNorm as the phase says. Scoring leaves G in another mode.

    Only a change is set, since a walk through all modules of r101 takes a millisecond.
    """
    norms = (m for m in G.modules() if isinstance(m, torch.nn.BatchNorm2d))
    first = next(norms, None)
    changes = first is not None and first.training != phase.batch_statistics
    if changes or not G.training:
        statistics = phase.batch_statistics
        set_batchnorm(G.train(), train_affine=hyper.bn_affine, batch_statistics=statistics)


def set_rates(opt_g: Optimizer, opt_d: Optimizer | None, step: int, hyper: Hyper) -> None:
    """The rates of this step: of E, of the heads, and of D."""
    lr_g, lr_d = clan.learning_rates(step, hyper)
    opt_g.param_groups[0]["lr"] = lr_g
    for group in opt_g.param_groups[1:]:
        group["lr"] = lr_g * hyper.head_lr
    if opt_d is not None:
        opt_d.param_groups[0]["lr"] = lr_d


def gradient_norm(optimizer: Optimizer) -> Tensor:
    """Euclidean norm of all gradients, a scalar: NaN or inf if any gradient is."""
    groups = (group["params"] for group in optimizer.param_groups)
    gradients = [p.grad for p in itertools.chain(*groups) if p.grad is not None]
    return torch.nn.utils.get_total_norm(gradients)


def after_step(
    done: int,
    settings: Settings,
    hyper: Hyper,
    log: Log,
    stop: Stop,
    network: Callable[[], Generator],
    score: Callable[..., dict],
    keep: Callable[[int, str], None],
) -> None:
    """What is due after `done` steps: a score, a checkpoint, or the end if the run must stop.

    network: makes what is scored.
    """
    stopping = devices.any_rank(stop.asked)
    adapts_next = done == hyper.adv_start and METHODS[hyper.method].reads_target
    due = settings.eval_every and (done - hyper.adv_start) % settings.eval_every == 0
    if adapts_next or (due and hyper.adv_start < done < hyper.steps):
        record_score(done, log, partial(score, network(), bar=log.bar))
    if adapts_next:  # after the score, which a run resumed from here must have
        keep(done, BEFORE)
    if done % settings.save_every == 0 or done == hyper.steps or stopping:
        keep(done, name_of(done))
    if stopping and done < hyper.steps:
        raise Stopped(f"stopped after step {done}; go on with --resume {settings.out}")


def network_of(method: Method, G: Generator, state: State, done: int, hyper: Hyper) -> Generator:
    """What is scored after `done` steps: G, or in a second stage a copy with the teacher in it."""
    if method.result is None or done <= hyper.adv_start:
        return G
    teacher = Generator(G.backbone, G.num_classes, G.lineage)
    teacher.load_state_dict(method.result(state))
    return devices.place(teacher, next(G.parameters()).device)


def record_score(done: int, log: Log, score: Callable[[], dict]) -> None:
    """Score on the target, write a line of metrics.jsonl, and say it."""
    result = score()
    keys = [key for key in ("miou", "iou", *UNLABELLED) if key in result]
    log.record({"step": done} | {f"target_{key}": result[key] for key in keys})
    score_of = f"mIoU {100 * result['miou']:.1f}," if "miou" in result else "without a score:"
    shown = f"confidence {result['confidence']:.3f}, M {result['m']:.4f}"
    log.bar.console.print(f"step {done}: target {score_of} {shown}")


UNLABELLED = ("confidence", "m", "shares")  # what evaluation.unlabelled returns


def scored(
    G: Generator,
    source: data.DataSet,
    val: data.DataSet,
    device: torch.device,
    amp: bool,
    workers: int,
    bar: Progress,
) -> dict:
    """IoU on the target's split if it has labels, and what its images say without them."""
    result: dict = {"images": min(len(val), evaluation.MEASURED)}
    if val.has_labels:
        how: Any = {"device": device, "amp": amp, "workers": workers, "bar": bar}
        result = evaluation.score(G, source, val, **how)
    return result | evaluation.unlabelled(G, val, source.classes, bar)


def checkpoint(
    settings: Settings, hyper: Hyper, origin: dict, parts: tuple, log: Log, step: int, name: str
) -> None:
    """Save everything, then drop the oldest. If a loss was not finite, raise and save nothing."""
    log.read(wait=True)
    if devices.ranks()[0] > 0:
        return
    log.flush()
    metadata = origin | {"commit": commit(), "step": step}
    metadata |= {"settings": asdict(settings) | asdict(hyper)}
    save(settings.folder / name, pack(*parts), metadata)
    drop_oldest(settings.folder, settings.keep)


# After the loop.


def finish(
    settings: Settings,
    hyper: Hyper,
    source: data.DataSet,
    val: data.DataSet,
    G: Generator,
    network: Generator,
    score: Callable[..., dict],
    device: torch.device,
    console: Console,
) -> dict:
    """Score the weights before and after adaptation; print the table, write score and picture.

    network: the result: G, or in a second stage the teacher. Then G is the column "student".
    """
    networks, out = {}, settings.folder
    if (out / BEFORE).exists():
        before, _ = load_generator(out / BEFORE, say=lambda _: None)
        networks["before"] = devices.place(before, device)
    if network is not G:
        networks["student"] = G
    networks["after"] = network
    with progress_bar(console) as bar:
        columns = {name: score(x, bar=bar) for name, x in networks.items()}
    if devices.ranks()[0] > 0:
        return columns["after"]
    columns["after"] |= last_answers(out / "metrics.jsonl")
    if "miou" in columns["after"]:
        paper = evaluation.paper_row(settings.src, settings.tgt, settings.backbone, hyper.method)
        title = f"IoU on {settings.tgt} {settings.split}, %"
        console.print(evaluation.score_table(title, {**columns, "paper": paper}))
    else:
        if val.has_labels:  # else `introduce` has said it
            console.print(evaluation.no_score(columns["after"], settings.tgt), soft_wrap=True)
        title = f"predicted on {settings.tgt}, % of the pixels"
        console.print(evaluation.share_table(title, columns))

    path = newest_checkpoint(out)  # the loop's last
    result = columns["after"] | {
        "checkpoint": str(path),
        "settings": read_metadata(path)["settings"],
    }
    for name in columns.keys() & {"before", "student"}:
        keys = [key for key in ("miou", "iou", *UNLABELLED) if key in columns[name]]
        result[name] = {key: columns[name][key] for key in keys}
    if "miou" in result.get("before", {}):
        result["miou_before"] = result["before"]["miou"]
    (out / "eval.json").write_text(json.dumps(result, indent=1))
    to_source_ids = data.shared_classes(source, val)[0] if val.has_labels else None
    figure = evaluation.draw(val, to_source_ids, networks, device, source.classes)
    figure.savefig(out / "result.png", dpi=evaluation.DPI)
    for name in (path.name, "eval.json", "result.png", "metrics.jsonl"):
        console.print(f"wrote {out / name}", soft_wrap=True)
    return result


# The program.

NOT_BEGUN = "Make room in the memory: the run has not begun."


def train_first(flags: Flags, go_on: bool, console: Console) -> None:
    """The part of a run before --selftrain-start, or what is left of it."""
    refuse_unused_flags(flags)
    settings, hyper = configure(flags)
    resume = None
    done = (settings.folder / name_of(hyper.steps)).exists()
    if saved(settings.folder) and (go_on or done):  # also to compare its flags with these
        flags, resume = resumed(flags, settings.folder, console.print)
        settings, hyper = configure(flags)
    if done:
        return
    try:
        train(settings, hyper, resume, console)
    except Stopped as stopped:
        raise Stopped(f"{stopped}, or with the whole command and --resume") from stopped
    devices.any_rank(False)  # so all processes wait until the first has written its checkpoint


def main(argv: list[str] | None = None) -> None:
    flags, resume = parse(argv, __doc__ or "")
    place = devices.launch()
    console = Console(quiet=place.rank > 0)
    known: tuple[Settings, Hyper, bool] | None = None
    try:
        before, flags = both_parts(flags, resume)
        refuse_unused_flags(flags)
        folder = run_folder(flags, resume)
        if resume is None:
            refuse_stage_without_start(flags)
        with owned(folder) if place.rank == 0 else contextlib.nullcontext():
            resume = restarted(flags, resume)
            if before and (saved(before["out"]) or not saved(folder)):
                train_first(before, resume is not None or place.restarts > 0, console)
            if before and not saved(folder):
                resume = None
            if resume is not None:
                flags, resume = resumed(flags, resume, console.print)
            settings, hyper = configure(flags)
            known = settings, hyper, resume is not None
            train(settings, hyper, resume, console)
        devices.leave_processes()
    except Stopped as stopped:
        devices.leave_processes()
        console.print(str(stopped), soft_wrap=True, highlight=False)
        sys.exit(130)
    except KeyboardInterrupt:
        print("stopped at once; go on from the last checkpoint, if there is one, with --resume")
        sys.exit(130)
    except (ValueError, OSError, FloatingPointError, RuntimeError, MemoryError) as error:
        if devices.does_not_fit(error):
            first = (str(error) or "no memory").splitlines()[0].rstrip(". ")
            sys.exit(f"error: {first}. {less_memory(*known) if known else NOT_BEGUN}")
        if isinstance(error, (ValueError, OSError, FloatingPointError)):
            full = getattr(error, "errno", None) == errno.ENOSPC
            sys.exit(f"error: {error}" + "; make room, then go on with --resume" * full)
        lost = any(word in str(error) for word in ("gloo", "NCCL", "Connection"))
        if place.world == 1 or not lost:
            raise
        sys.exit(
            f"error: rank {place.rank} lost another process ({str(error).splitlines()[0][:120]}); "
            "after fixing the cause above, go on with --resume"
        )


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    main()
