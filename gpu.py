"""What only a GPU can answer, part by part, the most valuable first: `python bench.py gpu`.

Each part is a generator of rows and runs in a process of its own, so that a crash or a slow
compiler ends that part alone. Every row is written to gpu.json and gpu.md as soon as it is known.
`--dry` runs every part on the CPU, at toy sizes and with an eager "compiler": it shows that the
parts work, and its numbers mean nothing.
"""

import contextlib
import functools
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console

import checkpoints
import clan
import compilation
import data
import train
from devices import choose_algorithms, does_not_fit, machine
from measure import (
    PAPER_SIZES,
    Case,
    Subject,
    as_in,
    ceiling,
    count_flops,
    interpolated,
    make_files,
    median_and_quartiles,
    noise,
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
    repeats: int = 5  # timings; on CUDA each is of five steps
    batches: int = 64  # largest batch to try
    steps: int = 20  # of a run that is made twice
    run_steps: int = 200  # of train.py on files
    files: int = 4  # of each data set
    predictions: int = 500
    workers: int = 8

    @property
    def hyper(self) -> clan.Hyper:
        """The paper's recipe, with one image of each domain."""
        hyper = configure({"backbone": self.backbone, "src": "gta5"})[1]
        return replace(hyper, batch=1)

    @property
    def ours(self) -> Case:
        """An eager step as train.py takes it by default on such a device."""
        return Case(self.backbone, self.whole, 1, device=self.device, precision="bf16")


FULL = Scale()
SMALL = (32, 64, 32, 64)
TOY = Scale(
    device="cpu",
    backbone="tiny",
    whole=SMALL,
    crops=SMALL,
    small=SMALL,
    repeats=1,
    batches=2,
    steps=2,
    run_steps=4,
    files=2,
    predictions=2,
    workers=0,
)


# The parts.


def precision(scale: Scale) -> Iterator[Row]:
    """Losses and gradients in float32 against the CPU, TF32 and bfloat16 against float32.

    The table has relative differences, of the losses that of the worst.
    """
    case = replace(scale.ours, sizes=scale.small, precision="ieee")
    reference = evaluated(replace(case, device="cpu"), scale)
    exact = evaluated(case, scale)
    yield compared(f"float32 (IEEE) on {scale.device} against the CPU", exact, reference)
    yield compared("TF32 against IEEE", evaluated(replace(case, precision="tf32"), scale), exact)
    yield compared("bf16 against IEEE", evaluated(replace(case, precision="bf16"), scale), exact)


def last_step(case: Case, scale: Scale) -> tuple[Subject, int, compilation.Arguments]:
    """A subject, the number of the last step of its run, and the arguments of this step."""
    step = scale.hyper.steps - 1
    subject = Subject(case, scale.hyper, step)
    batch = train.to_device(subject.batch, subject.device)
    phase = clan.phase_at(step, subject.hyper, subject.device)
    rest = batch, phase, subject.hyper, subject.autocast
    return subject, step, compilation.Arguments(subject.G, subject.D, {}, *rest)


def evaluated(case: Case, scale: Scale) -> compilation.Parts:
    """Losses and gradients of one step, on the CPU in float64."""
    subject, _, arguments = last_step(case, scale)
    with as_in(case), subject.switch.on():
        found = compilation.evaluate(subject.method, arguments)
    return {name: [x.cpu().double() for x in tensors] for name, tensors in found.items()}


def compared(what: str, found: compilation.Parts, wanted: compilation.Parts) -> Row:
    parts = compilation.differences(found, wanted)
    others = {name: parts.pop(name) for name in ("E", "C1", "C2", "D", "BatchNorm")}
    worst = max(parts, key=lambda name: parts[name])
    return {"what": what, "losses": parts[worst], "worst of them": worst} | others


def compiled_tiny(scale: Scale) -> Iterator[Row]:
    """Is the compiler right on this device? The check of compiled steps with the small network."""
    case = replace(scale.ours, backbone="tiny", sizes=(64, 128, 64, 128), compile="on")
    yield from checked(case, scale)


def compiled(scale: Scale) -> Iterator[Row]:
    """Compiled steps at the paper's sizes under autocast: gain, memory, kernels, then the check."""
    yield from gain(replace(scale.ours, compile="on"), scale)
    yield from checked(replace(scale.ours, compile="on"), scale)


def compiled_blocks(scale: Scale) -> Iterator[Row]:
    """Compiled blocks of E, the rest eager: gain, memory, kernels, then the check."""
    yield from gain(replace(scale.ours, compile="blocks"), scale)
    yield from checked(replace(scale.ours, compile="blocks"), scale)


def checked(case: Case, scale: Scale) -> Iterator[Row]:
    """The check as a run makes it, and whether a compiled step has the same bits each time."""
    subject, _, arguments = last_step(case, scale)
    began = time.perf_counter()
    wrong, worst = compilation.compare(subject.switch, subject.method, arguments)
    name = max(worst, key=lambda part: worst[part])
    largest = {"largest difference in float32": f"{worst[name]:.1e}, {name}"}
    seconds = time.perf_counter() - began
    yield {"what": "check", "result": "; ".join(wrong) or "agrees", "seconds": seconds} | largest
    with as_in(case), subject.switch.on():
        one, other = (compilation.evaluate(subject.method, arguments) for _ in range(2))
    yield {"what": "the same bits twice", "result": differing(one, other)}


def gain(case: Case, scale: Scale) -> Iterator[Row]:
    """Seconds of the first compiled step, time against eager, memory, the dearest kernels."""
    subject, step, _ = last_step(case, scale)
    began = time.perf_counter()
    subject.step(step)
    subject.wait()
    yield {"what": "first compiled step", "seconds": time.perf_counter() - began}
    subjects = {"eager": Subject(scale.ours, scale.hyper, step), "compiled": subject}
    times = step_times(subjects, step, scale.repeats)
    eager = median_and_quartiles(times["eager"])[0]
    for name, values in times.items():
        row = {"what": name, "gain": eager / median_and_quartiles(values)[0]}
        yield row | milliseconds(values) | memory(subjects[name], step)
    yield from dearest(subject, step)


def differing(one: compilation.Parts, other: compilation.Parts) -> str:
    """The parts whose bits differ, in words."""
    names = [
        name
        for name, tensors in one.items()
        if not all(torch.equal(a, b) for a, b in zip(tensors, other[name], strict=True))
    ]
    return f"no: {', '.join(names)}" if names else "yes"


def milliseconds(times: list[float]) -> Row:
    median, low, high = median_and_quartiles(times)
    return {"ms a step": 1000 * median, "quartiles": f"{1000 * low:.1f} to {1000 * high:.1f}"}


def memory(subject: Subject, step: int) -> Row:
    """The peak of a step's tensors, those of other subjects included; on CUDA alone."""
    if subject.device.type != "cuda":
        return {}
    torch.cuda.reset_peak_memory_stats(subject.device)
    subject.step(step)
    subject.wait()
    return {"peak GB": torch.cuda.max_memory_allocated(subject.device) / 1e9}


def step_times_and_memory(scale: Scale) -> Iterator[Row]:
    """A step against the plain version, at the paper's sizes; share of the ceiling; memory."""
    ours = scale.ours
    plain = replace(ours, precision="ieee", plain=True)
    cases = {
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
    first = timed("plain, IEEE float32", plain, scale, best["ieee"])
    yield with_ratio(first, first)
    for name, case in cases.items():
        yield with_ratio(timed(name, case, scale, best[case.precision]), first)
    batch = largest_batch(ours, scale)
    row = timed(f"ours, bf16, batch {batch}", replace(ours, batch=batch), scale, best["bf16"])
    yield with_ratio(row, first)


def with_ratio(row: Row, first: Row) -> Row:
    """The row with its speed over that of the first; without one if either does not fit."""
    known = "images/s" in row and "images/s" in first
    return row | ({"ratio": row["images/s"] / first["images/s"]} if known else {})


def largest_batch(case: Case, scale: Scale) -> int:
    """The largest power of 2 that fits the card, at most scale.batches."""
    batch, step = 1, scale.hyper.steps - 1
    while 2 * batch <= scale.batches:
        try:
            subject = Subject(replace(case, batch=2 * batch), scale.hyper, step)
            subject.step(step)
            subject.wait()
        except RuntimeError as error:
            if not does_not_fit(error):
                raise
            break
        batch *= 2
    return batch


def timed(what: str, case: Case, scale: Scale, best: float) -> Row:
    """Time, speed, share of the ceiling `best`, and memory of a case."""
    step = scale.hyper.steps - 1
    try:
        subject = Subject(case, scale.hyper, step)
        times = step_times({"": subject}, step, scale.repeats)[""]
        peak = memory(subject, step)
    except RuntimeError as error:
        if not does_not_fit(error):
            raise
        return {"what": what, "note": "does not fit"}
    median = median_and_quartiles(times)[0]
    share = case.batch * operations_of_a_pair(case.sizes, scale) / median / best
    speed = {"images/s": 2 * case.batch / median, "% of ceiling": 100 * share}
    return {"what": what} | milliseconds(times) | speed | peak


@functools.cache
def operations_of_a_pair(sizes: tuple[int, int, int, int], scale: Scale) -> int:
    """Operations of a step on one image of each domain, recomputed blocks counted once."""
    case = Case(scale.backbone, sizes, 1)
    return count_flops(case, scale.hyper, scale.hyper.steps - 1)["step"]


def kernels(scale: Scale) -> Iterator[Row]:
    """The ten dearest kernels of a step, and what each change does to the step."""
    ours = scale.ours
    cases = {
        "as built": ours,
        "up-sampling by F.interpolate (before)": replace(ours, interpolate=True),
        "--merge-heads": replace(ours, merge_heads=True),
        "--cudnn deterministic": replace(ours, cudnn="deterministic"),
    }
    yield from compared_kernels(cases, scale)


def fastest(scale: Scale) -> Iterator[Row]:
    """`--cudnn fastest`, in a process of its own: cuDNN keeps what it chose first for a size."""
    yield from compared_kernels({"--cudnn fastest": replace(scale.ours, cudnn="fastest")}, scale)


def compared_kernels(cases: dict[str, Case], scale: Scale) -> Iterator[Row]:
    step = scale.hyper.steps - 1
    for name, case in cases.items():
        subject = Subject(case, scale.hyper, step)
        times = step_times({"": subject}, step, scale.repeats)[""]
        yield {"what": f"**{name}**, the step", "ms": 1000 * median_and_quartiles(times)[0]}
        yield from dearest(subject, step)
        del subject


def dearest(subject: Subject, step: int, count: int = 10) -> Iterator[Row]:
    """The kernels that take longest, in milliseconds a step; on a CPU the operations."""
    rounds = 3
    with torch.profiler.profile(acc_events=True) as profile:
        for _ in range(rounds):
            subject.step(step)
        subject.wait()
    cuda = subject.device.type == "cuda"
    wanted = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
    found = []
    for event in profile.key_averages():
        time_of_it = event.self_device_time_total if cuda else event.self_cpu_time_total
        span = getattr(event, "is_user_annotation", False)  # of an optimizer or a compiled region
        if event.device_type == wanted and not span:
            found.append((time_of_it / 1000 / rounds, event.key[:120].replace("|", " ")))
    if not found:
        yield {"what": "the system hides the times of kernels"}
    for ms, name in sorted(found, reverse=True)[:count]:
        yield {"what": f"`{name}`", "ms": ms}


def repeated(scale: Scale) -> Iterator[Row]:
    """Whether the same run twice, and a killed run that goes on, end with the same bits."""
    small = replace(scale.ours, sizes=scale.small)
    fixed = replace(small, cudnn="deterministic")
    cases = {
        "--cudnn deterministic": fixed,
        "--cudnn auto": small,
        "--cudnn deterministic, F.interpolate": replace(fixed, interpolate=True),
    }
    for name, case in cases.items():
        one, other = (state_after(case, scale) for _ in range(2))
        differ = [k for k in one if not torch.equal(one[k], other[k])]
        yield {
            "what": f"{scale.steps} steps twice, {name}",
            "same bits": not differ,
            "tensors that differ": f"{len(differ)} of {len(one)}",
        }
    for choice in ("deterministic", "auto"):
        choose_algorithms(choice)
        for name, operation in operations(scale).items():
            what = f"gradient of {name}, four times, --cudnn {choice}"
            yield {"what": what, "same bits": same_each_time(operation, scale.device)}
    choose_algorithms("auto")
    cuda = scale.device == "cuda"
    for flags in ("--cudnn deterministic", *["--cudnn auto"] * cuda):
        yield {"what": f"killed and resumed, {flags}"} | killed_and_resumed(scale, flags.split())


def state_after(case: Case, scale: Scale) -> dict[str, torch.Tensor]:
    """What a checkpoint would hold after the first steps of a short run."""
    subject = Subject(case, replace(scale.hyper, steps=scale.steps, adv_start=0), 0)
    for step in range(scale.steps):
        subject.step(step)
    return checkpoints.pack(subject.G, subject.D, subject.opt_g, subject.opt_d, {})


def operations(scale: Scale) -> dict[str, tuple[Any, list[torch.Tensor]]]:
    """The operations of a step whose gradients may add in a random order, with their inputs."""

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=scale.device)

    size = scale.crops[2:]
    h, w = (side // 8 + 1 for side in size)  # the grid of G's features
    maps, probabilities = noise(1, 19, h, w), noise(1, 19, *size).softmax(1)
    features = noise(1, 256, h, w)
    labels = torch.randint(0, 19, (1, *size), device=scale.device)
    return {
        "up-sampling by products": (lambda x: clan.upsample_by_products(x, size), [maps]),
        "up-sampling by F.interpolate": (lambda x: interpolated(x, size), [maps]),
        "a 3x3 convolution, dilation 2": (
            lambda x, w: F.conv2d(x, w, None, 1, 2, 2),
            [features, noise(256, 256, 3, 3)],
        ),
        "a 1x1 convolution": (F.conv2d, [features, noise(1024, 256, 1, 1)]),
        "a head's convolution": (
            lambda x, w: F.conv2d(x, w, None, 1, 24, 24),
            [features, noise(19, 256, 3, 3)],
        ),
        "D's first convolution": (
            lambda x, w: F.conv2d(x, w, None, 2, 1),
            [probabilities, noise(64, 19, 4, 4)],
        ),
        "BatchNorm": (
            lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True),
            [features, noise(256), noise(256)],
        ),
        "max-pooling": (lambda x: F.max_pool2d(x, 3, 2, 1), [features]),
        "Eq. 3": (lambda x: clan.segmentation_loss(x, labels), [noise(1, 19, *size)]),
        "M": (lambda x: clan.discrepancy_map(x, x.flip(1)), [probabilities]),
    }


def same_each_time(operation: tuple[Any, list[torch.Tensor]], device: str) -> bool:
    """Whether four evaluations under autocast, as in a step, give the same gradients' bits."""
    function, inputs = operation
    last = torch.channels_last
    inputs = [(x.to(memory_format=last) if x.ndim == 4 else x).detach() for x in inputs]
    for x in inputs:
        x.requires_grad_()
    with torch.autocast(device, torch.bfloat16):
        torch.manual_seed(0)
        towards = torch.randn_like(function(*inputs))
        outputs = [function(*inputs) for _ in range(4)]
    found = [torch.autograd.grad(output, inputs, towards) for output in outputs]
    return all(
        torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True)
    )


def killed_and_resumed(scale: Scale, flags: list[str]) -> Row:
    """Runs train.py whole, and once more with a kill -9; compares the last checkpoints."""
    with tempfile.TemporaryDirectory() as folder:
        line = [*STREETS, "--backbone", scale.backbone, "--init", "none", "--device", scale.device]
        line += ["--steps", "4", "--adv-start", "0", "--save-every", "2", "--log-every", "1"]
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
    """Its output. Raises RuntimeError with the end of it if it failed."""
    output, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{process.args!r} ended with {process.returncode}:\n{output[-3000:]}")
    return output


def random_scales(scale: Scale) -> Iterator[Row]:
    """Compiling the small network over the nine pairs of random scales: seconds, graphs so far."""
    small = replace(scale.ours, backbone="tiny", sizes=scale.small)
    case, step = replace(small, compile="on"), scale.hyper.steps - 1
    subject = Subject(case, scale.hyper, step)
    labels, size = subject.batch.labels, subject.batch.target_size
    h, w, t_h, t_w = scale.small
    for a, b in itertools.product(clan.RELEASED.scales, repeat=2):
        sizes = (round(h * a), round(w * a), round(t_h * b), round(t_w * b))
        images = noise(replace(case, sizes=sizes))
        subject.batch = clan.Batch(images.source, labels, images.target, size)
        began = time.perf_counter()
        subject.step(step)
        subject.wait()
        seconds = time.perf_counter() - began
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        yield {"what": f"scales {a} and {b}", "first step, s": seconds, "graphs": graphs}


def files(scale: Scale) -> Iterator[Row]:
    """Files like GTA5's and Cityscapes': the loader, a step that it feeds, and train.py itself."""
    with tempfile.TemporaryDirectory() as folder:
        roots = made_files(scale, Path(folder))
        source, target = (
            data.open_dataset(name, role, "train", roots[name])
            for name, role in (("gta5", "source"), ("cityscapes", "target"))
        )
        hyper = replace(scale.hyper, crop=False, mirror=1.0)
        steps = data.Steps(source, target, hyper, seed=0)
        count = max(scale.repeats, 4 * scale.workers)
        rate = steps_per_second(steps, scale.workers, count)
        yield {"what": f"reading alone, {scale.workers} workers", "ms a step": 1000 / rate}
        subject = Subject(scale.ours, scale.hyper, scale.hyper.steps - 1)
        if scale.device == "cuda":
            yield fed(subject, steps, scale.workers, count)
        times = step_times({"": subject}, scale.hyper.steps - 1, scale.repeats)[""]
        yield {"what": "the step alone"} | milliseconds(times)
        del subject
        yield whole_run(scale, roots, Path(folder) / "run")


def fed(subject: Subject, steps: data.Steps, workers: int, count: int) -> Row:
    """Steps on batches from the loader. If they take longer than steps alone, the device waits."""
    first = 2 + 2 * workers  # these are read ahead while the workers start
    loader: Any = torch.utils.data.DataLoader(
        steps, batch_size=None, sampler=range(first + count), num_workers=workers, pin_memory=True
    )
    for k, batch in enumerate(data.checked(loader)):
        if k == first:
            subject.wait()
            began = time.perf_counter()
        subject.batch = batch
        subject.step(subject.hyper.steps - 1)
    subject.wait()
    seconds = (time.perf_counter() - began) / count
    return {"what": f"steps fed by {workers} workers", "ms a step": 1000 * seconds}


def whole_run(scale: Scale, roots: dict[str, Path], out: Path, *more: str) -> Row:
    """train.py on the files: reading, copying, the step, the log, a checkpoint, the score."""
    flags = ["--src", "gta5", "--src-dir", str(roots["gta5"]), "--backbone", scale.backbone]
    flags += ["--tgt-dir", str(roots["cityscapes"]), "--init", "none", "--adv-start", "0"]
    flags += [
        "--batch",
        "1",
        "--steps",
        str(scale.run_steps),
        "--device",
        scale.device,
        "--no-crop",
    ]
    flags += ["--log-every", str(max(scale.run_steps // 4, 1)), "--workers", str(scale.workers)]
    if scale.device == "cpu":
        flags += ["--src-size", "32", "64", "--tgt-size", "32", "64"]
    began = time.perf_counter()
    output = finished(program("train.py", *flags, *more, "--out", str(out)))
    seconds = time.perf_counter() - began
    speed = int(re.findall(r"\| (\d+) images/s", output)[-1])
    return {
        "what": " ".join([f"train.py, {scale.run_steps} steps, its last quarter", *more]),
        "ms a step": 2000 / max(speed, 1),
        "seconds in all": seconds,
    }


def made_files(scale: Scale, folder: Path) -> dict[str, Path]:
    """Folders in the formats of GTA5 and Cityscapes, the latter with two images of its val."""
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


def compiled_run(scale: Scale) -> Iterator[Row]:
    """train.py with --compile on, on files as above: what a long run does by default on CUDA."""
    with tempfile.TemporaryDirectory() as folder:
        roots = made_files(scale, Path(folder))
        more = ["--compile", "on" if scale.device == "cuda" else "off"]  # no compiler in a dry run
        yield whole_run(scale, roots, Path(folder) / "run", *more)


# Most valuable first, with the seconds of nine minutes that each may take. What a part leaves over
# goes to the next ones. The last three take what is left.
PARTS = {
    "precision": (precision, 40),
    "compiled-tiny": (compiled_tiny, 60),
    "step": (step_times_and_memory, 110),
    "kernels": (kernels, 50),
    "fastest": (fastest, 25),
    "files": (files, 70),
    "repeated": (repeated, 80),
    "scoring": (scoring, 15),
    "torchrun": (one_process, 30),
    "streets": (streets_run, 30),
    "compiled": (compiled, 30),
    "blocks": (compiled_blocks, 0),
    "scales": (random_scales, 0),
    "compiled-run": (compiled_run, 0),
}


# All parts, and what is written.


def bench_gpu(args: Any, console: Console) -> dict:
    """Runs the parts, each in its own process; or one part in this process, which prints rows."""
    scale = TOY if args.dry else FULL
    if args.dry:
        compilation.BACKEND = "eager"
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # both end the part that runs
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
    later = {name: PARTS[name][1] * args.minutes / 9 for name in result["parts"]}
    for name, part in result["parts"].items():
        began = time.monotonic()
        del later[name]
        limit = deadline - began - sum(later.values())
        if limit < 5:
            part["note"] = "not run: no time was left"
        else:
            run_part(name, args.dry, part, limit, lambda: write(result, args.to))
        part["seconds"] = round(time.monotonic() - began, 1)
        write(result, args.to)
        console.print(
            f"{name}: {len(part['rows'])} rows, {part['seconds']} s", part.get("note", "")
        )
    console.print(f"wrote {args.to / 'gpu.json'} and {args.to / 'gpu.md'}", soft_wrap=True)
    failed = [name for name, part in result["parts"].items() if "failed" in part.get("note", "")]
    if failed:
        raise ValueError(f"these parts failed: {', '.join(failed)}; see {args.to / 'gpu.json'}")
    return result


def run_part(name: str, dry: bool, part: dict, limit: float, write_now: Any) -> None:
    """Collects the rows of a part while it runs, and ends it after `limit` seconds."""
    command = [sys.executable, "-X", "faulthandler", str(BENCH), "gpu", "--part", name]
    command += ["--dry"] * dry
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        with out.open("w") as stdout, err.open("w") as stderr:
            options: Any = {"stdout": stdout, "stderr": stderr, "start_new_session": True}
            process = subprocess.Popen(command, **options)
        end = time.monotonic() + limit
        try:
            while process.poll() is None and time.monotonic() < end:
                time.sleep(0.2)
                if collect(out, part):
                    write_now()
            if process.poll() is None:
                part["note"] = f"stopped after {limit:.0f} s"
        finally:  # also after Ctrl-C: no part goes on alone
            end_session(process)
        collect(out, part)
        if process.returncode and "note" not in part:
            part["note"] = "failed; gpu.json has the end of what it printed"
        if "note" in part:
            part["errors"] = err.read_text()[-6000:]


def collect(out: Path, part: dict) -> bool:
    """Whether the part has printed more rows; they are taken."""
    lines = [line for line in out.read_text().split("\n")[:-1] if line.startswith("{")]
    new = len(lines) > len(part["rows"])
    part["rows"] = [json.loads(line) for line in lines]
    return new


def end_session(process: subprocess.Popen) -> None:
    """Ends a part and every program that it has started, torchrun's workers with them."""
    pids = [process.pid, *descendants(process.pid)]
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        end = time.monotonic() + 3
        while time.monotonic() < end and any(map(runs, pids)):
            process.poll()
            time.sleep(0.05)
    process.wait()


def runs(pid: int) -> bool:
    """Whether a process is still there and has not ended as a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def descendants(pid: int) -> list[int]:
    """The processes that this one has started, and those that they have started."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            parent = int(path.read_text().rsplit(")", 1)[1].split()[1])
            children.setdefault(parent, []).append(int(path.parent.name))
    found, waiting = [], [pid]
    while waiting:
        of_one = children.get(waiting.pop(), [])
        found += of_one
        waiting += of_one
    return found


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
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return str(value)
