"""What only a GPU can answer, part by part, the most valuable first: `python bench.py gpu`.

Each part is a generator of rows and runs in a process of its own, so that a crash or a slow
compiler ends that part alone. Every row is written to gpu.json and gpu.md as soon as it is known.
`--dry` runs every part on the CPU, at toy sizes and with an eager "compiler": it shows that the
parts work, and its numbers mean nothing.
"""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import checkpoints
import clan
import compilation
import data
import train
from devices import machine
from measure import (
    PAPER_SIZES,
    Case,
    Subject,
    as_in,
    ceiling,
    count_flops,
    make_files,
    median_and_quartiles,
    peak_bytes,
    scoring_times,
    step_times,
    steps_per_second,
)
from settings import configure

Row = dict[str, Any]  # "what", then values by the name of their column
HERE = Path(__file__).resolve().parent
BENCH = HERE / "bench.py"  # the program whose processes take the parts


@dataclass(frozen=True)
class Scale:
    """How large the parts are."""

    device: str = "cuda"
    backbone: str = "r101"
    whole: tuple[int, int, int, int] = PAPER_SIZES
    crops: tuple[int, int, int, int] = (512, 1024, 512, 1024)
    small: tuple[int, int, int, int] = (96, 160, 96, 160)
    repeats: int = 12  # timings
    batches: int = 64  # largest batch to try
    steps: int = 20  # of a run that is made twice
    run_steps: int = 200  # of train.py on files
    files: int = 16  # of each data set
    predictions: int = 500
    workers: int = 8

    @property
    def hyper(self) -> clan.Hyper:
        """The paper's recipe, with one image of each domain."""
        hyper = configure({"backbone": self.backbone, "src": "gta5"})[1]
        return replace(hyper, batch=1)

    @property
    def ours(self) -> Case:
        """A step as train.py takes it by default on such a device, not compiled."""
        return Case(self.backbone, self.whole, 1, device=self.device, precision="bf16")


FULL = Scale()
TOY = Scale("cpu", "tiny", *((32, 64) * 2,) * 3, 1, 2, 2, 4, 2, 2, 0)


# The parts.


def precision(scale: Scale) -> Iterator[Row]:
    """Losses and gradients of the device in float32 against the CPU; TF32 and bfloat16 against it.

    The table has relative differences: of the worst loss, and of the gradients of E, C1, C2, D.
    """
    case = replace(scale.ours, sizes=scale.small, precision="ieee")
    reference = evaluated(replace(case, device="cpu"), scale)
    exact = evaluated(case, scale)
    yield compared(f"float32 (IEEE) on {scale.device} against the CPU", exact, reference)
    yield compared("TF32 against IEEE", evaluated(replace(case, precision="tf32"), scale), exact)
    yield compared("bf16 against IEEE", evaluated(replace(case, precision="bf16"), scale), exact)


def evaluated(case: Case, scale: Scale) -> compilation.Parts:
    hyper, step = scale.hyper, scale.hyper.steps - 1
    subject = Subject(case, hyper, step)
    batch, phase = train.to_device(subject.batch, subject.device), phase_of(subject, step)
    with as_in(case):
        rest = (batch, phase, hyper, subject.autocast)
        found = compilation.evaluate(subject.method, subject.G, subject.D, {}, *rest)
    return {name: [x.cpu().double() for x in tensors] for name, tensors in found.items()}


def phase_of(subject: Subject, step: int) -> clan.Phase:
    return clan.phase_at(step, subject.hyper, subject.device)


def compared(what: str, found: compilation.Parts, wanted: compilation.Parts) -> Row:
    parts = compilation.differences(found, wanted)
    gradients = {name: parts.pop(name) for name in ("E", "C1", "C2", "D")}
    worst = max(parts, key=lambda name: parts[name])
    return {"what": what, "losses": parts[worst], "worst of them": worst} | gradients


def compiled(scale: Scale) -> Iterator[Row]:
    """The check of the compiled steps at the paper's sizes, under autocast, and their gain."""
    yield from compiled_case(replace(scale.ours, compile="steps"), scale)


def compiled_case(case: Case, scale: Scale) -> Iterator[Row]:
    hyper, step = scale.hyper, scale.hyper.steps - 1
    subject = Subject(case, hyper, step)
    batch, phase = train.to_device(subject.batch, subject.device), phase_of(subject, step)
    began = time.perf_counter()
    compare = partial(compilation.compare, subject.switch, subject.method, subject.G, subject.D, {})
    wrong, worst = compare(batch, phase, hyper, subject.autocast)
    name = max(worst, key=lambda part: worst[part])
    yield {
        "what": f"check of compiled {case.compile}",
        "result": "; ".join(wrong) or "agrees",
        "largest difference in float32": f"{worst[name]:.1e}, {name}",
        "seconds": time.perf_counter() - began,
    }
    subjects = {"eager": Subject(scale.ours, hyper, step), f"compiled {case.compile}": subject}
    times = step_times(subjects, step, scale.repeats)
    eager = median_and_quartiles(times["eager"])[0]
    for name, values in times.items():
        median, low, high = median_and_quartiles(values)
        yield {
            "what": name,
            "ms a step": 1000 * median,
            "quartiles": f"{1000 * low:.1f} to {1000 * high:.1f}",
            "gain": eager / median,
        }


def step_times_and_memory(scale: Scale) -> Iterator[Row]:
    """A step against the plain version, at the paper's sizes; share of the ceiling; memory."""
    ours = scale.ours
    plain = replace(ours, precision="ieee", plain=True)
    cases = {
        "plain, IEEE float32": plain,
        "plain, TF32": replace(plain, precision="tf32"),
        "ours, bf16": ours,
        "ours, IEEE float32": replace(ours, precision="ieee"),
        "ours, TF32": replace(ours, precision="tf32"),
        "ours, bf16, crops": replace(ours, sizes=scale.crops),
        "ours, IEEE float32, crops": replace(ours, sizes=scale.crops, precision="ieee"),
        "ours, bf16, --recompute": replace(ours, recompute=True),
        "ours, IEEE float32, --recompute": replace(ours, precision="ieee", recompute=True),
    }
    best = {p: ceiling(torch.device(scale.device), p) for p in ("ieee", "tf32", "bf16")}
    for name, value in best.items():
        yield {"what": f"ceiling: one large matrix product, {name}", "TFLOP/s": value / 1e12}
    base = None
    for name, case in cases.items():
        row = timed(name, case, scale, best[case.precision])
        base = base or row.get("images/s")
        yield row | ({"ratio": row["images/s"] / base} if base and "images/s" in row else {})
    batch, fits = 2, True
    while fits and batch <= scale.batches:
        row = timed(f"ours, bf16, batch {batch}", replace(ours, batch=batch), scale, best["bf16"])
        fits, batch = "images/s" in row, 2 * batch
        yield row


def timed(what: str, case: Case, scale: Scale, best: float) -> Row:
    hyper, step = scale.hyper, scale.hyper.steps - 1
    try:
        subject = Subject(case, hyper, step)
        median, low, high = median_and_quartiles(step_times({"": subject}, step, scale.repeats)[""])
        del subject
        peak = peak_bytes(case, hyper, step)
    except torch.OutOfMemoryError:
        return {"what": what, "note": "does not fit"}
    return {
        "what": what,
        "ms a step": 1000 * median,
        "quartiles": f"{1000 * low:.1f} to {1000 * high:.1f}",
        "images/s": 2 * case.batch / median,
        "% of ceiling": 100 * count_flops(case, hyper, step)["step"] / median / best,
        "peak GB": peak / 1e9,
    }


def kernels(scale: Scale) -> Iterator[Row]:
    """The ten dearest kernels of a step, and what each change does to the step."""
    ours = scale.ours
    cases = {
        "as built": ours,
        "up-sampling by F.interpolate (before)": replace(ours, interpolate=True),
        "--merge-heads": replace(ours, merge_heads=True),
        "--cudnn fastest": replace(ours, cudnn="fastest"),
        "--cudnn deterministic": replace(ours, cudnn="deterministic"),
        "--compile blocks": replace(ours, compile="blocks"),
    }
    hyper, step = scale.hyper, scale.hyper.steps - 1
    for name, case in cases.items():
        subject = Subject(case, hyper, step)
        times = step_times({"": subject}, step, scale.repeats)[""]
        yield {"what": f"**{name}**, the step", "ms": 1000 * median_and_quartiles(times)[0]}
        for kernel, ms in dearest(subject, step):
            yield {"what": f"`{kernel}`", "ms": ms}
        del subject


def dearest(subject: Subject, step: int, count: int = 10) -> list[tuple[str, float]]:
    """(name, milliseconds a step) of the kernels that take longest; on a CPU of the operations."""
    rounds = 3
    with torch.profiler.profile(acc_events=True) as profile:
        for _ in range(rounds):
            subject.step(step)
        subject.wait()
    cuda = subject.device.type == "cuda"
    wanted = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
    found = [
        (event.key[:70].replace("|", " "), event.self_device_time_total if cuda else
         event.self_cpu_time_total)
        for event in profile.key_averages()
        if event.device_type == wanted
    ]  # fmt: skip
    found.sort(key=lambda item: -item[1])
    return [(name, microseconds / 1000 / rounds) for name, microseconds in found[:count]]


def repeated(scale: Scale) -> Iterator[Row]:
    """Whether the same run twice, and a killed run that goes on, end with the same bits."""
    small = replace(scale.ours, sizes=scale.small)
    cases = {
        "--cudnn auto": small,
        "--cudnn deterministic": replace(small, cudnn="deterministic"),
        "--cudnn deterministic, F.interpolate": replace(
            small, cudnn="deterministic", interpolate=True
        ),
        "--cudnn fastest": replace(small, cudnn="fastest"),
    }
    for name, case in cases.items():
        one, other = (weights_after(case, scale) for _ in range(2))
        differ = [k for k in one if not torch.equal(one[k], other[k])]
        yield {
            "what": f"{scale.steps} steps twice, {name}",
            "same bits": not differ,
            "tensors that differ": f"{len(differ)} of {len(one)}",
        }
    found = operations_without_order(small, scale)
    yield {"what": "operations that torch calls nondeterministic", "found": found or "none"}
    for flags in ("--cudnn auto", "--cudnn deterministic"):
        yield {"what": f"killed and resumed, {flags}"} | killed_and_resumed(scale, flags.split())


def weights_after(case: Case, scale: Scale) -> dict[str, torch.Tensor]:
    hyper, step = scale.hyper, scale.hyper.steps - scale.steps
    subject = Subject(case, hyper, step)
    for k in range(scale.steps):
        subject.step(step + k)
    networks = {"G": subject.G, "D": subject.D}
    return {
        f"{name}.{key}": value.cpu()
        for name, network in networks.items()
        for key, value in network.state_dict().items()
    }


def operations_without_order(case: Case, scale: Scale) -> str:
    """What `torch.use_deterministic_algorithms` warns of in a step."""
    subject = Subject(case, scale.hyper, scale.hyper.steps - 1)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            subject.step(scale.hyper.steps - 1)
    finally:
        torch.use_deterministic_algorithms(before)
    texts = (str(w.message) for w in caught if "determinis" in str(w.message))
    return ", ".join(sorted({text.split(" does not")[0] for text in texts}))


def killed_and_resumed(scale: Scale, flags: list[str]) -> Row:
    """Runs train.py whole, and once more with a kill -9; compares the last checkpoints."""
    with tempfile.TemporaryDirectory() as folder:
        line = [*STREETS, "--backbone", scale.backbone, "--init", "none", "--device", scale.device]
        line += ["--steps", "6", "--adv-start", "2", "--save-every", "2", "--log-every", "1"]
        outs = [Path(folder) / name for name in ("whole", "killed")]
        finished(program("train.py", *line, *flags, "--out", str(outs[0])))
        process = program("train.py", *line, *flags, "--out", str(outs[1]))
        while process.poll() is None and not (outs[1] / "step_0000002.safetensors").exists():
            time.sleep(0.01)
        process.kill()
        killed = process.wait() == -signal.SIGKILL
        finished(program("train.py", *line, *flags, "--out", str(outs[1]), "--resume"))
        sums = [
            checkpoints.checksum(checkpoints.read_checkpoint(path)[0], {})
            for path in map(checkpoints.newest_checkpoint, outs)
        ]
    return {"same bits": sums[0] == sums[1], "note": "" if killed else "it ended before the kill"}


STREETS = ["--src", "streets", "--tgt", "streets", "--batch", "1"]
STREETS += ["--src-size", "64", "128", "--tgt-size", "64", "128"]


def program(*line: str) -> subprocess.Popen:
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, *line], cwd=HERE, **pipes)


def finished(process: subprocess.Popen) -> str:
    """Its output. Raises RuntimeError with the last line if it failed."""
    output, _ = process.communicate()
    if process.returncode:
        last = (output.strip().splitlines() or ["no output"])[-1]
        raise RuntimeError(f"{process.args!r} ended with {process.returncode}: {last}")
    return output


def random_scales(scale: Scale) -> Iterator[Row]:
    """Compilation of the steps over the nine pairs of random scales: seconds, and graphs in all."""
    hyper = scale.hyper
    case, step = replace(scale.ours, sizes=scale.small, compile="steps"), hyper.steps - 1
    subject = Subject(case, hyper, step)
    h, w, t_h, t_w = scale.small
    total = time.perf_counter()
    for a, b in itertools.product(clan.RELEASED.scales, repeat=2):
        sizes = (round(h * a), round(w * a), round(t_h * b), round(t_w * b))
        other = Subject(replace(scale.ours, sizes=sizes), hyper, step).batch
        labels, size = subject.batch.labels, subject.batch.target_size
        subject.batch = clan.Batch(other.source, labels, other.target, size)
        began = time.perf_counter()
        subject.step(step)
        subject.wait()
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        yield {
            "what": f"scales {a} and {b}",
            "first step, s": time.perf_counter() - began,
            "graphs so far": graphs,
        }
    yield {"what": "all nine", "first step, s": time.perf_counter() - total}


def reading(scale: Scale) -> Iterator[Row]:
    """How fast the loader reads files like GTA5's and Cityscapes', against the step."""
    with tempfile.TemporaryDirectory() as folder:
        roots = made_files(scale, Path(folder))
        source, target = (
            data.open_dataset(name, role, "train", roots[name])
            for name, role in (("gta5", "source"), ("cityscapes", "target"))
        )
        steps = data.Steps(source, target, replace(scale.hyper, crop=False, mirror=1.0), seed=0)
        rate = steps_per_second(steps, scale.workers, max(scale.repeats, 4 * scale.workers))
    hyper, step = scale.hyper, scale.hyper.steps - 1
    subject = Subject(scale.ours, hyper, step)
    median = median_and_quartiles(step_times({"": subject}, step, scale.repeats)[""])[0]
    yield {
        "what": f"{scale.workers} workers, whole images",
        "ms to read a step's batch": 1000 / rate,
        "ms a step": 1000 * median,
        "the device waits": rate * median < 1,
    }


def made_files(scale: Scale, folder: Path) -> dict[str, Path]:
    """Folders in the formats of GTA5 and Cityscapes, the latter with a few images of its val."""
    roots = {name: folder / name for name in ("gta5", "cityscapes")}
    for name, root in roots.items():
        make_files(name, root, None, scale.files)
    make_files("cityscapes", roots["cityscapes"], None, 2, split="val")
    return roots


def scoring(scale: Scale) -> Iterator[Row]:
    """From logits to the confusion matrix of Cityscapes-sized predictions."""
    found = scoring_times(torch.device(scale.device), min(scale.repeats, 4), scale.predictions)
    memory = found["memory"]
    yield {
        "what": f"{scale.predictions} predictions of 2048x1024",
        "ms an image": 1000 * found["ours_s"],
        "numpy way, ms": 1000 * found["plain_s"],
        "ratio": found["plain_s"] / found["ours_s"],
        "MB grown": (memory[-1] - memory[0]) / 1e6,
    }


def whole_run(scale: Scale) -> Iterator[Row]:
    """train.py itself on files: reading, copying, the step, the log, a checkpoint, the score."""
    with tempfile.TemporaryDirectory() as folder:
        roots = made_files(scale, Path(folder))
        flags = ["--src", "gta5", "--src-dir", str(roots["gta5"]), "--backbone", scale.backbone]
        flags += ["--tgt-dir", str(roots["cityscapes"]), "--init", "none", "--adv-start", "0"]
        flags += ["--batch", "1", "--steps", str(scale.run_steps), "--device", scale.device]
        flags += ["--log-every", str(max(scale.run_steps // 4, 1)), "--workers", str(scale.workers)]
        if scale.device == "cpu":
            flags += ["--src-size", "32", "64", "--tgt-size", "32", "64"]
        began = time.perf_counter()
        out = ["--out", str(Path(folder) / "run")]
        output = finished(program("train.py", *flags, *out))
        rates = [int(text) for text in re.findall(r"\| (\d+) images/s", output)]
    yield {
        "what": f"train.py, {scale.run_steps} steps",
        "images/s, last quarter": rates[-1],
        "images/s, first quarter": rates[0],
        "seconds in all": time.perf_counter() - began,
    }


def one_process(scale: Scale) -> Iterator[Row]:
    """torchrun with one process: nccl on CUDA, DistributedDataParallel, scoring."""
    with tempfile.TemporaryDirectory() as folder:
        flags = [*STREETS, "--steps", "6", "--adv-start", "2", "--device", scale.device]
        plain, wrapped = (Path(folder) / name for name in ("plain", "torchrun"))
        finished(program("train.py", *flags, "--out", str(plain)))
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
        began = time.perf_counter()
        finished(program(*launch, "train.py", *flags, "--out", str(wrapped)))
        scores = [json.loads((out / "eval.json").read_text())["miou"] for out in (plain, wrapped)]
    yield {
        "what": "6 steps under torchrun",
        "seconds": time.perf_counter() - began,
        "mIoU": 100 * scores[1],
        "mIoU without torchrun": 100 * scores[0],
    }


def streets_run(scale: Scale) -> Iterator[Row]:
    """The README's first command on this device."""
    with tempfile.TemporaryDirectory() as folder:
        short = ["--steps", "4", "--adv-start", "2", *STREETS] if scale.device == "cpu" else []
        out, began = Path(folder) / "run", time.perf_counter()
        finished(program("train.py", "--device", scale.device, *short, "--out", str(out)))
        score = json.loads((out / "eval.json").read_text())
    yield {
        "what": "python train.py",
        "seconds": time.perf_counter() - began,
        "mIoU before": 100 * score["miou_before"],
        "mIoU after": 100 * score["miou"],
    }


# Most valuable first, with the most seconds that each may take of nine minutes.
PARTS = {
    "precision": (precision, 60),
    "compiled": (compiled, 200),
    "step": (step_times_and_memory, 100),
    "kernels": (kernels, 120),
    "repeated": (repeated, 90),
    "scales": (random_scales, 90),
    "reading": (reading, 60),
    "scoring": (scoring, 30),
    "run": (whole_run, 90),
    "torchrun": (one_process, 60),
    "streets": (streets_run, 120),
}


# All parts, and what is written.


def bench_gpu(args: Any, console: Console) -> dict:
    """Runs the parts, each in its own process; or one part in this process, which prints rows."""
    scale = TOY if args.dry else FULL
    if args.dry:
        compilation.BACKEND = "eager"
    if args.part:
        for row in PARTS[args.part][0](scale):
            print(json.dumps(row), flush=True)
        return {}
    result: dict[str, Any] = {
        "device": machine(torch.device(scale.device)),
        "torch": torch.__version__,
        "commit": checkpoints.commit(),
        "date": time.strftime("%Y-%m-%d"),
        "dry": args.dry,
        "parts": {name: {"seconds": 0.0, "rows": []} for name in args.parts or PARTS},
    }
    args.to.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * args.minutes
    for name, part in result["parts"].items():
        began, left = time.monotonic(), deadline - time.monotonic()
        limit = min(left, PARTS[name][1] * args.minutes / 9)
        if left < 5:
            part["note"] = "not run: no time was left"
        else:
            run_part(name, args.dry, part, limit, lambda: write(result, args.to))
        part["seconds"] = round(time.monotonic() - began, 1)
        write(result, args.to)
        console.print(
            f"{name}: {len(part['rows'])} rows, {part['seconds']} s", part.get("note", "")
        )
    console.print(f"wrote {args.to / 'gpu.json'} and {args.to / 'gpu.md'}", soft_wrap=True)
    failed = [name for name, part in result["parts"].items() if "note" in part]
    if failed:
        raise ValueError(f"not complete: {', '.join(failed)}; see {args.to / 'gpu.md'}")
    return result


def run_part(name: str, dry: bool, part: dict, limit: float, write_now: Any) -> None:
    """Collects the rows of a part while it runs, and ends it after `limit` seconds."""
    command = [sys.executable, str(BENCH), "gpu", "--part", name, *["--dry"] * dry]
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        with out.open("w") as stdout, err.open("w") as stderr:
            process = subprocess.Popen(
                command, stdout=stdout, stderr=stderr, start_new_session=True
            )
        end, ended = time.monotonic() + limit, False
        while not ended:
            ended = process.poll() is not None
            if not ended and time.monotonic() > end:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                part["note"], ended = f"stopped after {limit:.0f} s", True
            lines = [line for line in out.read_text().split("\n")[:-1] if line.startswith("{")]
            if len(lines) > len(part["rows"]):
                part["rows"] = [json.loads(line) for line in lines]
                write_now()
            time.sleep(0.05)
        if process.returncode and "note" not in part:
            last = (err.read_text().strip().splitlines() or ["no message"])[-1]
            part["note"] = f"failed: {last[:300]}"


def write(result: dict, folder: Path) -> None:
    (folder / "gpu.json").write_text(json.dumps(result, indent=1))
    (folder / "gpu.md").write_text(markdown(result))


def markdown(result: dict) -> str:
    """A section for RESULTS.md."""
    lines = ["## On a GPU", ""]
    lines += ["**A dry run: its numbers mean nothing.**", ""] if result["dry"] else []
    lines += [f"`python bench.py gpu`, {result['device']}, torch {result['torch']}, commit "
              f"{result['commit']}, {result['date']}.", ""]  # fmt: skip
    for name, part in result["parts"].items():
        function, _ = PARTS[name]
        lines += [f"### {(function.__doc__ or name).splitlines()[0]}", ""]
        rows = part["rows"]
        columns = list(dict.fromkeys(key for row in rows for key in row))
        if rows:
            lines += ["| " + " | ".join(["", *columns[1:]]) + " |", "| --- " * len(columns) + "|"]
        for row in rows:
            lines.append("| " + " | ".join(shown(row.get(key, "")) for key in columns) + " |")
        lines += [""] if rows else []
        lines += [f"{part['note']}.", ""] if "note" in part else []
        lines += ["not run", ""] if not rows and "note" not in part else []
    return "\n".join(lines)


def shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return (
        f"{value:.3g}"
        if isinstance(value, float) and abs(value) < 100
        else (f"{value:.0f}" if isinstance(value, float) else str(value))
    )
