"""How fast the code is: ratios within one run, against a plain version of the same step.

    python bench.py step                                  # a step of python train.py, on the CPU
    python bench.py step --backbone r101 --device cuda --amp --sizes 720 1280 512 1024
    python bench.py loader                                # decoding of GTA5, SYNTHIA, Cityscapes
    python bench.py eval                                  # scoring of Cityscapes-sized predictions
    python bench.py growth                                # time and memory by size, batch, classes

Plain computes the same losses the way the released code does: eager float32, contiguous memory, one
image of each domain a step, plain optimizers, every loss read with .item() at once. Ours is
train.one_step itself, without the log. Times are medians of at least 20 steps after a warm-up, with
quartiles. Memory on CUDA is that of tensors. On a CPU it is the highest resident memory of a
separate process. With --json the last line is one JSON object.
"""

import argparse
import json
import multiprocessing
import statistics
import struct
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

import clan
import data
import eval as evaluation
import streets
import train
from classes import LABEL_IDS, TO_TRAIN_IDS
from devices import find_device, machine, place, with_compiled_steps
from methods import METHODS
from models import BACKBONES, Discriminator, Generator, set_batchnorm
from settings import OF_BACKBONE, configure

REPEATS = 24  # timed steps or images, at least
GOAL = 0.025  # seconds a step: 100,000 of them in 42 minutes


@dataclass(frozen=True)
class Case:
    """One way of computing a step."""

    backbone: str = "tiny"
    sizes: tuple[int, int, int, int] = (64, 128, 64, 128)  # H W of the source, H W of the target
    batch: int = 4
    classes: int = 19
    device: str = "cpu"
    amp: bool = False
    compiled: bool = False
    plain: bool = False


class Subject:
    """Networks, optimizers and one batch of noise, ready to step."""

    def __init__(self, case: Case, hyper: clan.Hyper, step: int):
        torch.manual_seed(0)
        self.case, self.hyper, self.device = case, hyper, torch.device(case.device)
        self.G, self.D = networks(case, hyper, step)
        self.opt_g, self.opt_d = train.build_optimizers(self.G, self.D, hyper, not case.plain)
        self.method = METHODS[hyper.method]
        if case.compiled:
            self.method = with_compiled_steps(self.method)
        self.batch = noise(case, self.device)

    def step(self, step: int) -> None:
        """train.one_step on a batch that is on the device; in the plain case `plain_step`."""
        if self.case.plain:
            return plain_step(self.G, self.D, self.opt_g, self.opt_d, self.batch, step, self.hyper)
        parts = (self.method, self.G, self.D, self.opt_g, self.opt_d)
        train.one_step(*parts, {}, self.batch, step, self.hyper, self.autocast())

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.case.amp)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def plain_step(
    G: Generator, D: Discriminator, opt_g: Any, opt_d: Any, batch: clan.Batch, step: int, hyper: Any
) -> None:
    """One step as in the released code: no gradient norms, each loss read at once."""
    loss, terms, predictions = clan.g_step(G, D, batch, step, hyper)
    opt_g.zero_grad()
    loss.backward()
    opt_g.step()
    if predictions is not None:
        loss, d_terms = clan.d_step(D, predictions)
        opt_d.zero_grad()
        loss.backward()
        opt_d.step()
        terms |= d_terms
    for value in terms.values():
        value.item()


def networks(case: Case, hyper: clan.Hyper, step: int) -> tuple[Generator, Discriminator]:
    G = place(Generator(case.backbone, case.classes), case.device, case.plain)
    D = place(Discriminator(case.classes, hyper.d_channels), case.device, case.plain)
    statistics = clan.uses_batch_statistics(step, hyper)
    set_batchnorm(G.train(), train_affine=hyper.bn_affine, batch_statistics=statistics)
    return G, D


def noise(case: Case, device: torch.device | str) -> clan.Batch:
    """Noise as uint8; channels_last like the loader's batches, except in the plain case."""
    h, w, t_h, t_w = case.sizes
    images, targets = (
        torch.randint(0, 256, (case.batch, *size, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
        for size in ((h, w), (t_h, t_w))
    )
    if case.plain:
        images, targets = images.contiguous(), targets.contiguous()
    labels = torch.randint(0, case.classes, (case.batch, h, w), dtype=torch.uint8)
    return clan.Batch(images.to(device), labels.to(device), targets.to(device), (t_h, t_w))


# Counting operations, and the highest speed of the machine.


def count_flops(case: Case, hyper: clan.Hyper, step: int) -> dict[str, int]:
    """Floating point operations of one step, forward and backward, counted without computing.

    They are counted for G on the source, for G on the target, and for D and all the rest.
    """
    case = replace(case, device="meta")
    (G, D), batch = networks(case, hyper, step), noise(case, "meta")
    parts: dict[str, int] = {}
    assert batch.target is not None
    for name, images in (("G, source", batch.source), ("G, target", batch.target)):
        with FlopCounterMode(display=False) as counter:
            logits_1, logits_2 = G(images)
            (logits_1.sum() + logits_2.sum()).backward()
        parts[name] = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        loss, _, predictions = clan.g_step(G, D, batch, step, hyper)
        loss.backward()
        if predictions is not None:
            clan.d_step(D, predictions)[0].backward()
    total = counter.get_total_flops()
    if not clan.is_adversarial(step, hyper):
        parts["G, target"] = 0
    parts["D"] = total - sum(parts.values())
    return parts | {"step": total}


def saved_bytes(case: Case, hyper: clan.Hyper, step: int) -> int:
    """Bytes that G's step keeps for its backward in float32, counted without computing.

    bfloat16 halves them.
    """
    case = replace(case, device="meta")
    G, D = networks(case, hyper, step)
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss, *_ = clan.g_step(G, D, noise(case, "meta"), step, hyper)
    del loss
    return sum(storage.nbytes() for storage in storages.values())


def ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of one large matrix product: the highest speed of this device here."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))

    def product() -> None:
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return 2 * n**3 / statistics.median(seconds(product, 10))


# Measuring.


def seconds(function: Callable[[], object], count: int, warm_up: int = 2) -> list[float]:
    times = []
    for i in range(warm_up + count):
        start = time.perf_counter()
        function()
        if i >= warm_up:
            times.append(time.perf_counter() - start)
    return times


def step_times(subjects: dict[str, Subject], step: int, rounds: int = REPEATS) -> dict:
    """Seconds a step of each subject. They take turns, so that all meet the same machine.

    On CUDA a time is the mean of five steps, so that waiting for the device does not count.
    """
    times: dict[str, list[float]] = {name: [] for name in subjects}
    for i in range(3 + rounds):
        for name, subject in subjects.items():
            inner = 5 if subject.device.type == "cuda" else 1
            subject.wait()
            start = time.perf_counter()
            for _ in range(inner):
                subject.step(step)
            subject.wait()
            if i >= 3:
                times[name].append((time.perf_counter() - start) / inner)
    return times


def median_and_quartiles(times: list[float]) -> tuple[float, float, float]:
    median, low, high = np.quantile(times, (0.5, 0.25, 0.75)).tolist()
    return median, low, high


def resident(key: str) -> int:
    """Bytes this process holds (VmRSS) or held at most (VmHWM); 0 where the system does not say."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key + ":"))


def peak_bytes(case: Case, hyper: clan.Hyper, step: int) -> int:
    """Peak memory of networks and three steps, without that of interpreter and libraries."""
    if case.device != "cpu":
        subject = Subject(case, hyper, step)
        torch.cuda.reset_peak_memory_stats(subject.device)
        for _ in range(3):
            subject.step(step)
        return torch.cuda.max_memory_allocated(subject.device)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(peak_here, (case, hyper, step, torch.get_num_threads()))


def peak_here(case: Case, hyper: clan.Hyper, step: int, threads: int) -> int:
    torch.set_num_threads(threads)
    before = resident("VmRSS")
    subject = Subject(case, hyper, step)
    for _ in range(3):
        subject.step(step)
    return resident("VmHWM") - before


# The commands. Each returns what --json prints.


def bench_step(args, console: Console) -> dict:
    """Times a step before and a step with adaptation, and computes a whole run from both."""
    _, hyper = configure({"backbone": args.backbone} | args.task)
    plain = Case(args.backbone, args.sizes, 1, device=args.device, plain=True)
    ours = replace(
        plain, batch=args.batch or hyper.batch, plain=False, amp=args.amp, compiled=args.compile
    )
    cases = {"plain": plain, "ours": ours}
    if ours.batch > 1:
        cases["plain, our batch"] = replace(plain, batch=ours.batch)
    if args.device == "cpu" and not args.amp:
        cases["ours, bf16"] = replace(ours, amp=True)
    phases = {"adversarial": (hyper.steps - 1, hyper.steps - hyper.adv_start)}
    if hyper.adv_start:
        phases = {"source only": (0, hyper.adv_start)} | phases

    dtypes = {case.amp for case in cases.values()}
    device = torch.device(args.device)
    best = {amp: ceiling(device, torch.bfloat16 if amp else torch.float32) for amp in dtypes}
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
            peak, share = peak_bytes(case, hyper, step), flops["step"] / median / best[case.amp]
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
        if args.compile:
            console.print(f"the first steps, compilation included: {compiling:.0f} s")
    products = ", ".join(f"{'bf16' if k else 'float32'} {v / 1e12:.2f}" for k, v in best.items())
    console.print(f"ceiling, one large matrix product in TFLOP/s: {products}")
    parts = ", ".join(f"{k} {v / 1e9:.1f}" for k, v in result["gflop"].items())
    console.print(f"GFLOP of ours, adversarial: {parts}")
    saved = saved_bytes(ours, hyper, hyper.steps - 1)
    console.print(f"G's step keeps {saved / 1e9:.2f} GB for its backward in float32")
    for name in list(cases)[1:]:
        console.print(
            f"all {hyper.steps} steps, in seconds for each pair of images of a batch: plain "
            f"{run['plain']:.1f}, {name} {run[name]:.1f}, ratio {run['plain'] / run[name]:.2f}"
        )
    result |= {"plain_s": run["plain"], "ours_s": run["ours"]}
    return result | {"ratio": run["plain"] / run["ours"]}


# Reading: files in the formats and sizes of the three data sets.

FILES = {  # H W of image and label on disk
    "gta5": (1052, 1914),
    "synthia": (760, 1280),
    "cityscapes": (1024, 2048),
}


def write_png16(path: Path, pixels: np.ndarray) -> Path:
    """A 16-bit RGB PNG of H W 3 uint16, which Pillow can read but not write."""
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width, _ = pixels.shape

    def chunk(kind: bytes, content: bytes) -> bytes:
        checked = kind + content
        return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)  # filter 0: none
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


def make_files(name: str, root: Path, frames: Path | None, count: int) -> Path:
    """The folder of a data set with `count` pairs: photographs of `frames`, or drawn with noise."""
    found = sorted(p for p in frames.rglob("*") if p.suffix in data.SUFFIXES) if frames else []
    if frames and not found:
        raise ValueError(f"no png, jpg or jpeg in {frames}: name a folder of photographs")
    size = FILES[name]
    rng = np.random.default_rng(0)
    for i in range(count):
        image, label = streets.render(i, "city", size=size)
        if found:
            image = data.resize(data.read_image(found[i % len(found)]), size)
        else:  # a camera's noise: without it PNG shrinks the drawing to next to nothing
            image = np.clip(image + rng.normal(0, 2, image.shape), 0, 255).astype(np.uint8)
        ids = np.append(LABEL_IDS, np.zeros(256 - 19, np.uint8))[label]
        if name == "gta5":
            save_png(root / "images" / f"{i:05d}.png", image)
            save_png(root / "labels" / f"{i:05d}.png", ids, palette=True)
        elif name == "synthia":
            save_png(root / "RGB" / f"{i:07d}.png", image)
            by_train_id = np.zeros(256, np.uint16)
            for synthia_id in range(1, 23):
                by_train_id[TO_TRAIN_IDS["synthia"][synthia_id]] = synthia_id
            channels = [by_train_id[label], np.full(size, i, np.uint16), np.zeros(size, np.uint16)]
            path = root / "GT" / "LABELS" / f"{i:07d}.png"
            write_png16(path, np.stack(channels, axis=2))
        else:
            stem = f"aachen/aachen_{i:06d}_000019"
            save_png(root / "leftImg8bit" / "train" / f"{stem}_leftImg8bit.png", image)
            save_png(root / "gtFine" / "train" / f"{stem}_gtFine_labelIds.png", ids)
    return root


def save_png(path: Path, pixels: np.ndarray, palette: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    if palette:
        image.putpalette(list(range(256)) * 3)
    image.save(path)


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


def reading_times(dataset: data.DataSet, repeats: int, labels: bool) -> dict[str, float]:
    """Median seconds of each part of data.batch_at for one image of a data set on disk."""
    times: dict[str, list[float]] = {
        name: [] for name in ("image", "label", "resize", "mirror", "copy")
    }
    for k in range(repeats + 2):
        i, marks = k % len(dataset), [time.perf_counter()]

        def mark(marks: list[float] = marks) -> None:
            marks.append(time.perf_counter())

        pixels: list = [data.image_at(dataset, i)]
        mark()
        if labels:
            pixels.append(data.label_at(dataset, i))
        mark()
        pixels = [data.resize(x, dataset.size) for x in pixels]
        mark()
        pixels = [x[:, ::-1] for x in pixels]
        mark()
        pixels = [torch.from_numpy(np.stack([x])) for x in pixels]
        mark()
        if k >= 2:
            for name, a, b in zip(times, marks, marks[1:], strict=False):
                times[name].append(b - a)
    return {name: statistics.median(values) for name, values in times.items()}


def steps_per_second(steps: data.Steps, workers: int, count: int) -> float:
    first = 2 + 2 * workers  # these are read ahead while the workers start
    loader = torch.utils.data.DataLoader(
        steps, batch_size=None, sampler=range(first + count), num_workers=workers
    )
    batches = data.checked(iter(loader))
    for _ in range(first):
        next(batches)
    start = time.perf_counter()
    for _ in range(count):
        next(batches)
    return count / (time.perf_counter() - start)


# Evaluation.


def bench_eval(args, console: Console) -> dict:
    """From logits to the confusion matrix, ours and the released code's way, image by image."""
    device, size = torch.device(args.device), FILES["cityscapes"]
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 19, 65, 129, generator=generator).to(device)
    ids = torch.randint(0, 34, size, generator=generator, dtype=torch.uint8)
    to_train_ids = TO_TRAIN_IDS["cityscapes"]
    on_device = torch.from_numpy(to_train_ids).to(device)
    G = Logits(logits)

    def ours(total):
        pred = evaluation.predict(G, torch.zeros(1, 3, 8, 8, device=device), [size])[0]
        return evaluation.confusion_matrix(pred, on_device[ids.to(device).int()], 19, total=total)

    def numpy_way(total):
        up = F.interpolate(logits, size, mode="bilinear", align_corners=True)
        pred = np.asarray(up.cpu()[0].numpy().transpose(1, 2, 0).argmax(axis=2), np.uint8)
        label = ids.numpy().copy()
        for label_id in range(34):  # the released code maps one class after another
            label[ids.numpy() == label_id] = to_train_ids[label_id]
        valid = label < 19
        both = 19 * label[valid].astype(int) + pred[valid]
        return total + np.bincount(both, minlength=19**2).reshape(19, 19)

    a, b = ours(torch.zeros(19, 19, dtype=torch.int64, device=device)), numpy_way(0)
    if not (a.cpu().numpy() == b).all():
        raise RuntimeError("the two ways disagree: their speeds mean nothing")
    plain = statistics.median(seconds(lambda: numpy_way(b), args.repeats))
    total, times, memory = a, [], []
    for i in range(args.count):
        start = time.perf_counter()
        total = ours(total)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
        if i in (args.count // 10, args.count - 1):
            memory.append(resident("VmRSS"))
    median, low, high = median_and_quartiles(times)
    console.print(
        f"{args.count} predictions of {size[1]}x{size[0]}, 19 classes, {device}: "
        f"{1000 * median:.1f} ms an image ({1000 * low:.1f} to {1000 * high:.1f}); numpy way "
        f"{1000 * plain:.1f} ms, ratio {plain / median:.1f}; resident memory from image "
        f"{args.count // 10} to the last {(memory[-1] - memory[0]) / 1e6:+.1f} MB"
    )
    return {"plain_s": plain, "ours_s": median, "ratio": plain / median, "memory": memory}


class Logits(torch.nn.Module):
    """A G that always gives the same answer, half of it from each head."""

    def __init__(self, logits: torch.Tensor):
        super().__init__()
        self.logits = logits / 2

    def forward(self, images):
        return self.logits, self.logits


# Growth.


def bench_growth(args, console: Console) -> dict:
    """Time and memory of an adversarial step against image size, batch and number of classes."""
    _, hyper = configure({"backbone": args.backbone} | args.task)
    base = Case(args.backbone, args.sizes, args.batch or hyper.batch, device=args.device)
    base = replace(base, amp=args.amp)
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


def time_shares(subject: Subject, step: int) -> dict[str, float]:
    """Shares of a step's time by kind of operation, from the profiler."""
    with torch.profiler.profile(acc_events=True) as profile:
        for _ in range(3):
            subject.step(step)
        subject.wait()
    cuda = subject.device.type == "cuda"
    spent = {"conv": 0.0, "upsample": 0.0, "": 0.0}
    for event in profile.key_averages():
        if event.device_type != torch.autograd.DeviceType.CPU:
            continue  # a kernel: its time counts for the operation that launched it
        time_of_it = event.self_device_time_total if cuda else event.self_cpu_time_total
        spent[next(kind for kind in spent if kind in event.key)] += time_of_it
    total = sum(spent.values())  # 0 where the system hides the GPU's counters
    return {kind: t / total if total else float("nan") for kind, t in spent.items()}


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


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    top.add_argument("what", choices=COMMANDS)
    top.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1")
    top.add_argument("--backbone", choices=BACKBONES, default="tiny")
    top.add_argument("--sizes", type=int, nargs=4, help="H W of the source, H W of the target")
    top.add_argument("--batch", type=int, help="images of each domain [the backbone's]")
    top.add_argument("--amp", action="store_true", help="ours in bfloat16")
    top.add_argument("--compile", action="store_true", help="ours compiled")
    top.add_argument("--threads", type=int, help="of the CPU [torch's choice]")
    top.add_argument("--repeats", type=int, default=REPEATS, help="timed steps or images")
    top.add_argument("--count", type=int, help="files of loader (8), images of eval (500)")
    top.add_argument("--frames", type=Path, help="photographs for loader, instead of drawings")
    top.add_argument("--workers", type=int, nargs="+", default=[0, 2], help="of loader")
    top.add_argument("--to", type=Path, default=Path("runs/bench"), help="folder of the plot")
    top.add_argument("--json", action="store_true", help="end with one line of JSON")
    return top


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    console = Console(width=110)
    try:
        if args.threads:
            torch.set_num_threads(args.threads)
        args.task = {} if args.backbone == "tiny" else {"src": "gta5", "tgt": "cityscapes"}
        paper_sizes = (720, 1280, 512, 1024)
        args.sizes = tuple(
            args.sizes or ((64, 128) * 2 if args.backbone in OF_BACKBONE else paper_sizes)
        )
        args.count = args.count or (500 if args.what == "eval" else 8)
        where = machine(find_device(args.device))
        console.print(f"{where}; torch {torch.__version__}", highlight=False)
        result = COMMANDS[args.what](args, console)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except torch.OutOfMemoryError as error:
        first = str(error).splitlines()[0]
        sys.exit(f"error: {first} Give smaller --sizes, a smaller --batch, or --amp.")
    except KeyboardInterrupt:
        sys.exit("stopped: nothing was measured")
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
