"""How fast the code is: ratios within one run, against a plain version of the same step.

    python bench.py step                                  # a step of python train.py, on the CPU
    python bench.py step --method all --to results        # each method's step over source only's
    python bench.py step --backbone r101 --device cuda --amp --sizes 720 1280 512 1024
    python bench.py loader                                # decoding of GTA5, SYNTHIA, Cityscapes
    python bench.py eval                                  # scoring of Cityscapes-sized predictions
    python bench.py growth                                # time and memory by size, batch, classes
    python bench.py gpu --minutes 9                       # all that only a GPU can answer

Plain computes the same losses the way the released code does: eager float32, contiguous memory, one
image of each domain a step, plain optimizers, every loss read with .item() at once. Ours is
train.one_step itself, without the log. Times are medians of at least 20 steps after a warm-up, with
quartiles. Memory on CUDA is that of tensors. On a CPU it is the highest resident memory of a
separate process. With --json the last line is one JSON object.
"""

import argparse
import json
import signal
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

# Imports may swallow Ctrl-C or abort on it. Until they are done it ends the program at once.
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

import clan
import data
import eval as evaluation
from checkpoints import commit
from devices import does_not_fit, find_device, has_bfloat16, machine
from gpu import PARTS, bench_gpu
from measure import (
    FILES,
    PAPER_SIZES,
    REPEATS,
    Case,
    Subject,
    ceiling,
    count_flops,
    make_files,
    median_and_quartiles,
    peak_bytes,
    reading_times,
    saved_bytes,
    scoring_times,
    step_times,
    steps_per_second,
    time_shares,
)
from methods import METHODS
from models import BACKBONES
from settings import OF_BACKBONE, configure, one_of
from tables import STEPS, as_recorded, numbers_of_step

GOAL = 0.025  # seconds a step: 100,000 of them in 42 minutes


# The commands. Each returns what --json prints.


def bench_method(args, console: Console) -> dict:
    """Time and peak memory of a method's step in adaptation, over those of source only.

    `all` measures all methods in turns, and writes their ratios to --to for `study.py table`.
    """
    table = Table("method", "s a step", "quartiles", "over source only", "peak GB", "over it")
    names = tuple(METHODS) if args.method == "all" else ("source", args.method)
    flags = {"backbone": args.backbone} | args.task
    hypers = {name: numbers_of_step(flags, name) for name in names}
    batch = args.batch or hypers["source"].batch
    case = Case(args.backbone, args.sizes, batch, device=args.device)
    case = replace(case, precision="bf16" if args.amp else "ieee")
    step = min(hyper.steps for hyper in hypers.values()) - 1
    subjects = {name: Subject(case, hyper, step) for name, hyper in hypers.items()}
    times = step_times(subjects, step, args.repeats)
    found = {name: median_and_quartiles(values) for name, values in times.items()}
    del subjects
    peaks = {name: peak_bytes(case, hyper, step) for name, hyper in hypers.items()}
    ratios = {}
    for name, (median, low, high) in found.items():
        ratios[name] = {
            "step_ratio": median / found["source"][0],
            "peak_ratio": peaks[name] / peaks["source"],
            "numbers": as_recorded(hypers[name]),
        }
        table.add_row(
            *(METHODS[name].label, f"{median:.4f}", f"{low:.4f} to {high:.4f}"),
            *(f"{ratios[name]['step_ratio']:.2f}", f"{peaks[name] / 1e9:.2f}"),
            f"{ratios[name]['peak_ratio']:.2f}",
        )
    console.print(table)
    if args.method != "all":
        return ratios[args.method]
    result = {"machine": machine(find_device(args.device)), "commit": commit(), "methods": ratios}
    args.to.mkdir(parents=True, exist_ok=True)
    path = args.to / STEPS.format(args.backbone)
    path.write_text(json.dumps(result, indent=1))
    console.print(f"wrote {path}")
    return result


def bench_step(args, console: Console) -> dict:
    """Times a step before and a step with adaptation, and computes a whole run from both.

    With --method: that method's step over one of source only.
    """
    if args.method:
        return bench_method(args, console)
    _, hyper = configure({"backbone": args.backbone} | args.task)
    plain = Case(args.backbone, args.sizes, 1, device=args.device, plain=True)
    ours = replace(plain, batch=args.batch or hyper.batch, plain=False, compile=args.compile)
    ours = replace(ours, precision="bf16" if args.amp else "ieee", recompute=args.recompute)
    ours = replace(ours, merge_heads=args.merge_heads)
    cases = {"plain": plain, "ours": ours}
    if ours.batch > 1:
        cases["plain, our batch"] = replace(plain, batch=ours.batch)
    if args.device == "cpu" and not args.amp and has_bfloat16(torch.device("cpu")):
        cases["ours, bf16"] = replace(ours, precision="bf16")
    if args.device != "cpu":  # float32 of the released code's time, and that of torch today
        cases = {"plain": plain, "plain, TF32": replace(plain, precision="tf32"), **cases}
    phases = {"adversarial": (hyper.steps - 1, hyper.steps - hyper.adv_start)}
    if hyper.adv_start:
        phases = {"source only": (0, hyper.adv_start)} | phases

    device = torch.device(args.device)
    best = {p: ceiling(device, p) for p in sorted({case.precision for case in cases.values()})}
    result: dict[str, Any] = {}
    run = dict.fromkeys(cases, 0.0)  # seconds of compute of all steps, for one image a domain
    for phase, (step, count) in phases.items():
        start = time.perf_counter()
        subjects = {name: Subject(case, hyper, step) for name, case in cases.items()}
        for subject in subjects.values():
            subject.step(step)
            subject.wait()
        compiling = time.perf_counter() - start
        times = step_times(subjects, step, args.repeats)
        del subjects, subject
        title = f"{args.backbone}, {phase} step, sizes {args.sizes}"
        table = Table("", "images", "s a step", "quartiles", "images/s", title=title)
        for name in ("GFLOP", "% of ceiling", "peak GB"):
            table.add_column(name, justify="right")
        domains = 2 if phase == "adversarial" else 1
        for name, case in cases.items():
            median, low, high = median_and_quartiles(times[name])
            flops = count_flops(case, hyper, step)
            peak = peak_bytes(case, hyper, step)
            share = flops["step"] / median / best[case.precision]
            images = domains * case.batch
            run[name] += count * median / case.batch
            table.add_row(
                *(name, str(images), f"{median:.4f}", f"{low:.4f} to {high:.4f}"),
                *(f"{images / median:.1f}", f"{flops['step'] / 1e9:.0f}"),
                *(f"{100 * share:.0f}", f"{peak / 1e9:.2f}"),
            )
            if phase == "adversarial" and name == "ours":
                result |= {"share_of_ceiling": share, "peak_bytes": peak, "gflop": flops}
                result |= {"step_s": median, "spread_s": (low, high)}
        console.print(table)
        if args.compile != "off":
            console.print(f"the first steps, compilation included: {compiling:.0f} s")
    products = ", ".join(f"{name} {v / 1e12:.2f}" for name, v in best.items())
    console.print(f"ceiling, one large matrix product in TFLOP/s: {products}")
    parts = ", ".join(f"{k} {v / 1e9:.1f}" for k, v in result["gflop"].items())
    console.print(f"GFLOP of ours, adversarial: {parts}")
    saved, within = saved_bytes(ours, hyper, hyper.steps - 1)
    console.print(
        f"G's step keeps {saved / 1e9:.2f} GB for its backward in float32"
        + f", and {within / 1e9:.2f} GB more while a block is computed again" * args.recompute
    )
    for name in list(cases)[1:]:
        console.print(
            f"all {hyper.steps} steps, in seconds for each pair of images of a batch: plain "
            f"{run['plain']:.1f}, {name} {run[name]:.1f}, ratio {run['plain'] / run[name]:.2f}"
        )
    result |= {"plain_s": run["plain"], "ours_s": run["ours"]}
    return result | {"ratio": run["plain"] / run["ours"]}


def bench_loader(args, console: Console) -> dict:
    """Times each part of reading. Says how many cores it takes for a step of GOAL seconds."""
    result: dict[str, Any] = {}
    table = Table("ms a sample", title="reading, one core")
    for name in ("decode image", "decode label", "resize", "mirror", "copy", "images/s a core"):
        table.add_column(name, justify="right")
    hyper = replace(clan.PAPER, crop=False, mirror=1.0, batch=1)
    with tempfile.TemporaryDirectory() as folder:
        sets = {}
        for name in FILES:
            root = make_files(name, Path(folder) / name, args.frames, args.count)
            role = "target" if name == "cityscapes" else "source"
            sets[name] = data.open_dataset(name, role, "train", root)
        for name, dataset in sets.items():
            parts = reading_times(dataset, args.repeats, labels=name != "cityscapes")
            total = sum(parts.values())
            table.add_row(name, *(f"{1000 * v:.1f}" for v in parts.values()), f"{1 / total:.1f}")
            result[name] = parts | {"images_per_s": 1 / total}
        console.print(table)
        for source in ("gta5", "synthia"):
            steps = data.Steps(sets[source], sets["cityscapes"], hyper, seed=0)
            for workers in args.workers:
                rate = steps_per_second(steps, workers, max(args.repeats, 4 * workers))
                result[f"{source}, {workers} workers"] = rate
                cores = max(workers, 1) / (GOAL * rate)
                console.print(
                    f"{source} to cityscapes, {workers} workers: {rate:.1f} steps/s; for a step "
                    f"of {1000 * GOAL:.0f} ms it takes {cores:.1f} cores like these"
                )
    return result


def bench_eval(args, console: Console) -> dict:
    """Scores Cityscapes-sized predictions, ours and the released code's way."""
    device, size = torch.device(args.device), FILES["cityscapes"]
    result = scoring_times(device, args.repeats, args.count)
    plain, median, memory = result["plain_s"], result["ours_s"], result["memory"]
    low, high = result["quartiles"]
    console.print(
        f"{args.count} predictions of {size[1]}x{size[0]}, 19 classes, {device}: "
        f"{1000 * median:.1f} ms an image ({1000 * low:.1f} to {1000 * high:.1f}); numpy way "
        f"{1000 * plain:.1f} ms, ratio {plain / median:.1f}; resident memory from image "
        f"{args.count // 10} to the last {(memory[-1] - memory[0]) / 1e6:+.1f} MB"
    )
    return result | {"ratio": plain / median}


# Growth.


def bench_growth(args, console: Console) -> dict:
    """Time and memory of an adversarial step against image size, batch and number of classes."""
    _, hyper = configure({"backbone": args.backbone} | args.task)
    base = Case(args.backbone, args.sizes, args.batch or hyper.batch, device=args.device)
    base = replace(base, precision="bf16" if args.amp else "ieee")
    h, w = args.sizes[:2]
    axes = {
        "pixels": [replace(base, sizes=(h * k, w * k) * 2) for k in (1, 2, 3)],
        "batch": [replace(base, batch=k) for k in (1, 2, 4, 8, 16)],
        "classes": [replace(base, classes=k) for k in (2, 19, 38, 76, 152)],
    }
    result: dict[str, Any] = {}
    table = Table("grows", "to", "s a step", "peak GB", "convolutions", "resampling", "the rest")
    for axis, cases in axes.items():
        rows = []
        for case in cases:
            at = {"pixels": case.sizes[0] * case.sizes[1]}.get(axis) or getattr(case, axis)
            step = hyper.steps - 1
            subject = Subject(case, hyper, step)
            median = statistics.median(step_times({"": subject}, step, args.repeats)[""])
            shares = time_shares(subject, step)
            del subject
            peak = peak_bytes(case, hyper, step)
            rows.append((at, median, peak, shares))
            shown = ("-" if np.isnan(x) else f"{100 * x:.0f} %" for x in shares.values())
            table.add_row(axis, str(at), f"{median:.3f}", f"{peak / 1e9:.2f}", *shown)
        result[axis] = rows
        table.add_section()
    console.print(table)
    for axis, rows in result.items():
        (x0, t0, m0, _), (x1, t1, m1, _) = rows[-2:]
        scale = np.log(x1 / x0)
        console.print(
            f"{axis}: at the largest sizes time grows as the power {np.log(t1 / t0) / scale:.2f}, "
            f"memory as {np.log(m1 / m0) / scale:.2f}"
        )
    args.to.mkdir(parents=True, exist_ok=True)
    growth_figure(result).savefig(args.to / "growth.png", dpi=evaluation.DPI)
    console.print(f"wrote {args.to / 'growth.png'}")
    return result


def growth_figure(result: dict) -> Figure:
    figure = Figure(figsize=(9.6, 3.2), layout="constrained")
    for ax, (axis, rows) in zip(figure.subplots(1, len(result)), result.items(), strict=True):
        x = [row[0] for row in rows]
        ax.plot(x, [row[1] for row in rows], "o-", color="C0")
        ax.set(xlabel=axis, ylabel="seconds a step", ylim=(0, None), xlim=(0, None))
        ax.yaxis.label.set_color("C0")
        twin = ax.twinx()
        twin.plot(x, [row[2] / 1e9 for row in rows], "s--", color="C1")
        twin.set(ylabel="peak memory, GB", ylim=(0, None))
        twin.yaxis.label.set_color("C1")
    return figure


COMMANDS = {"step": bench_step, "loader": bench_loader, "eval": bench_eval, "growth": bench_growth}
COMMANDS |= {"gpu": bench_gpu}


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    top.add_argument("what", choices=COMMANDS)
    top.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1")
    top.add_argument("--backbone", choices=BACKBONES, default="tiny")
    top.add_argument("--sizes", type=int, nargs=4, help="H W of the source, H W of the target")
    top.add_argument("--batch", type=int, help="images of each domain [the backbone's]")
    top.add_argument("--method", choices=(*METHODS, "all"), help="of step: over source only")
    top.add_argument("--amp", action="store_true", help="ours in bfloat16")
    top.add_argument("--compile", choices=("off", "on", "blocks"), default="off")
    top.add_argument("--merge-heads", action="store_true", help="ours with merged heads")
    top.add_argument("--recompute", action="store_true", help="ours with blocks computed again")
    top.add_argument("--threads", type=int, help="of the CPU [torch's choice]")
    top.add_argument("--repeats", type=int, default=REPEATS, help="timed steps or images")
    top.add_argument("--count", type=int, help="files of loader (8), images of eval (500)")
    top.add_argument("--frames", type=Path, help="photographs for loader, instead of drawings")
    top.add_argument("--workers", type=int, nargs="+", default=[0, 2], help="of loader")
    top.add_argument("--to", type=Path, default=Path("runs/bench"), help="where files are written")
    top.add_argument("--minutes", type=float, default=9.0, help="that gpu may take in all")
    top.add_argument("--parts", nargs="+", choices=PARTS, help="of gpu [all]")
    top.add_argument("--dry", action="store_true", help="gpu at toy sizes on the CPU")
    top.add_argument("--part", choices=PARTS, help="of gpu: one part in this process, row by row")
    top.add_argument("--json", action="store_true", help="end with one line of JSON")
    return top


def remedy_for(args: argparse.Namespace) -> str:
    """The flags that would lower the memory of this benchmark, in a sentence."""
    if args.what == "loader" and max(args.workers) > 0:
        return "Give fewer --workers."
    if args.what not in ("step", "growth"):
        return "No flag lowers it: use a machine with more memory."
    batch = args.batch or configure({"backbone": args.backbone} | args.task)[1].batch
    words = ["smaller --sizes"] + ["a smaller --batch"] * (batch > 1) + ["--amp"] * (not args.amp)
    one_step = args.what == "step" and not args.method and args.compile == "off"
    if one_step and args.backbone != "vgg16" and not args.recompute:
        words.append("--recompute")
    return f"Give {one_of(words)}."


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    console = Console(width=110)
    try:
        if args.threads:
            torch.set_num_threads(args.threads)
        args.task = {} if args.backbone == "tiny" else {"src": "gta5", "tgt": "cityscapes"}
        args.sizes = tuple(
            args.sizes or ((64, 128) * 2 if args.backbone in OF_BACKBONE else PAPER_SIZES)
        )
        args.count = args.count or (500 if args.what == "eval" else 8)
        if args.what == "gpu":
            args.device = "cpu" if args.dry else "cuda"
        where = machine(find_device(args.device))
        console.print(f"{where}; torch {torch.__version__}", highlight=False)
        result = COMMANDS[args.what](args, console)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except (RuntimeError, MemoryError) as error:
        if not does_not_fit(error):
            raise
        first = (str(error) or "no memory").splitlines()[0].rstrip(". ")
        sys.exit(f"error: {first}. {remedy_for(args)}")
    except KeyboardInterrupt:
        kept = f"see {args.to}/gpu.md" if args.what == "gpu" else "nothing was measured"
        sys.exit(f"stopped: {kept}")
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    main()
