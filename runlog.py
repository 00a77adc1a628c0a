"""What a run reports while it trains, and how it is asked to stop.

    log = Log(out / "metrics.jsonl", start, hyper, every=50, console=Console())
    with log.bar, Stop() as stop:
        log.add(step + 1, terms, images=8)      # scalars, read when they have arrived

`Log.read` catches a NaN. `Log.watch` warns of a D that is stuck.
"""

import contextlib
import json
import math
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, TextIO, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column
from torch import Tensor

from checkpoints import saved, to_disk
from clan import Hyper, Terms
from methods import METHODS, uses_target

# Warn if D's mean probability of "source" is above SURE or below 1 - SURE for STUCK steps.
SURE, STUCK = 0.999, 200
TIMED = 20  # steps from which the time of all is estimated
AHEAD = 8  # steps whose terms may still be under way: the device is at most so far behind the host
D_WON = "try a smaller --lr-d, or a larger --lambda-adv"
D_LOST = "try a smaller --lr-d, or a smaller --lambda-adv"


def last_answers(path: Path) -> dict[str, float]:
    """D's mean probability of "source" on each domain, in the last line of a log that has them."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    found = [line for line in lines if "d_source" in line][-1:]
    return {key: line[key] for line in found for key in ("d_source", "d_target")}


def progress_bar(console: Console) -> Progress:
    """A bar with the time left and a line of text (the field `terms`), in a terminal alone."""
    line = Column(no_wrap=True, overflow="ellipsis", ratio=1)
    return Progress(
        *("{task.description}", BarColumn(bar_width=20), "{task.completed}/{task.total}"),
        *(TimeRemainingColumn(), TextColumn("{task.fields[terms]}", table_column=line)),
        console=console,
        disable=not console.is_terminal,
        expand=True,
        speed_estimate_period=120,  # seconds: steps of r101 on a CPU take many
    )


T = TypeVar("T")


def tracked(items: Iterable[T], bar: Progress | None, title: str, total: int) -> Iterator[T]:
    """The items, each a part of `total` images; a bar that is shown shows how many are done."""
    if bar is None:
        yield from items
        return
    task = bar.add_task(title, total=total, terms="")
    for item in items:
        yield item
        bar.advance(task, len(item) if isinstance(item, list) else 1)
    bar.remove_task(task)


def duration(seconds: float) -> str:
    """'2 h 5 min', '3 min', '40 s'."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


class Log:
    """Writes metrics.jsonl, shows the progress, and watches what a run computes.

    The scalars of a step are copied to the host while the device goes on. They are read when they
    have arrived (on a CPU at once). So no step waits, unless the device is AHEAD steps behind. The
    error for a NaN names its step. Each process watches its own scalars. Only the first has a
    `path` to write to.
    """

    def __init__(self, path: Path | None, start: int, hyper: Hyper, every: int, console: Console):
        self.file = self.open(path, start) if path else None
        self.hyper, self.every, self.console = hyper, every, console
        self.pending: deque[tuple[int, list[str], Tensor, Any]] = deque()
        self.images, self.since = 0, time.monotonic()
        self.stuck: dict[str, int] = {}
        self.bar = progress_bar(console)
        self.timed: dict[bool, tuple[int, float]] = {}  # by kind of step: the first, and its time
        self.task = self.bar.add_task("steps", total=hyper.steps, completed=start, terms="")

    @staticmethod
    def open(path: Path, start: int) -> TextIO:
        """The file, cut to its lines up to `start` and open to append more."""
        text = path.read_text() if start and path.exists() else ""
        lines = text[: text.rfind("\n") + 1].splitlines()  # a kill can leave half a line behind
        kept = [line for line in lines if json.loads(line)["step"] <= start]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(line + "\n" for line in kept))
        to_disk(temporary)
        temporary.replace(path)
        return path.open("a", buffering=1)

    def add(self, step: int, terms: Terms, images: int) -> None:
        """Take the terms of a step and how many images it read. Here steps count from 1."""
        values: Tensor = torch.stack(list(terms.values()))
        arrived: Any = None  # the event after the copy; None on a CPU
        if values.is_cuda:
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            host.copy_(values, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record(torch.cuda.current_stream(values.device))
            values = host
        self.pending.append((step, list(terms), values, arrived))
        self.images += images
        self.bar.update(self.task, completed=step)
        self.estimate(step)
        self.read()

    def estimate(self, step: int) -> None:
        """Say what the run will take, once for each kind of step: from its first TIMED steps."""
        kind = uses_target(step - 1, self.hyper)
        first, since = self.timed.setdefault(kind, (step, time.monotonic()))
        adapts = METHODS[self.hyper.method].reads_target
        end = self.hyper.adv_start if adapts and not kind else self.hyper.steps
        if step - first != TIMED or end - step < TIMED or self.file is None:
            return
        each = (time.monotonic() - since) / TIMED
        if each * (end - step) < 5:
            return
        more = "; the steps of adaptation take longer" if adapts and not kind else ""
        self.bar.console.print(
            f"about {duration(each * (end - step))} to step {end}, {1000 * each:.0f} ms a "
            f"step{more}",
            highlight=False,
        )

    def read(self, wait: bool = False) -> None:
        """Read the terms that have arrived, or with `wait` all of them.

        Raises FloatingPointError for one that is not finite.
        """
        while self.pending:
            step, names, values, arrived = self.pending[0]
            late = wait or len(self.pending) > AHEAD
            if arrived is not None and not late and not arrived.query():
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
        """Warn once of a D that wins, and once of one that loses, for STUCK steps in a row."""
        if "d_source" not in terms:
            return
        source, target = terms["d_source"], terms["d_target"]
        won = source > SURE and target < 1 - SURE
        lost = min(source, target) > SURE or max(source, target) < 1 - SURE
        for what, now, advice in (
            ("D tells the domains apart with certainty, so G learns nothing from it", won, D_WON),
            ("D gives one answer for both domains, so G learns nothing from it", lost, D_LOST),
        ):
            self.stuck[what] = self.stuck.get(what, 0) + 1 if now else 0
            if self.stuck[what] == STUCK:
                self.bar.console.print(
                    f"warning: {what}, for {STUCK} steps up to step {step} (d_source {source:.4f}, "
                    f"d_target {target:.4f}): {advice}",
                    soft_wrap=True,
                )

    def record(self, line: dict) -> None:
        if self.file is None:  # only rank 0 writes
            return
        try:
            self.file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise OSError(
                f"{self.file.name} could not be written ({error}): make room, then go on with "
                f"--resume {Path(self.file.name).parent}"
            ) from error

    def flush(self) -> None:
        if self.file is not None:
            os.fsync(self.file.fileno())

    def show(self, step: int, terms: dict[str, float]) -> None:
        seconds = time.monotonic() - self.since
        speed = self.images / max(seconds, 1e-9)
        text = " ".join(f"{k} {v:.3f}" for k, v in terms.items()) + f" | {speed:.0f} images/s"
        self.bar.update(self.task, terms=text)
        if not self.console.is_terminal and self.file:
            print(f"step {step}/{self.hyper.steps} {text}", flush=True)
        self.images, self.since = 0, time.monotonic()


class Stopped(Exception):
    """The run was asked to end before its last step, and has been saved."""


class Stop:
    """Ctrl-C or SIGTERM: the first asks the loop to save and end, the second ends at once.

    Signals within `grace` seconds count as one: a Ctrl-C reaches a process twice, from the terminal
    and from torchrun.
    """

    asked = False

    def __init__(self, grace: float = 0.0):
        self.grace, self.since = grace, 0.0

    def __enter__(self) -> "Stop":
        numbers = (signal.SIGINT, signal.SIGTERM)
        self.before = {number: signal.signal(number, self.ask) for number in numbers}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked and time.monotonic() - self.since >= self.grace:
            raise KeyboardInterrupt
        if self.asked:
            return
        self.asked, self.since = True, time.monotonic()
        print("stopping after this step; interrupt again to stop at once", file=sys.stderr)


@contextlib.contextmanager
def remedies(out: Path) -> Iterator[None]:
    """Adds to a FloatingPointError the last good checkpoint and what to try."""
    try:
        yield
    except FloatingPointError as error:
        good = sorted(saved(out), key=lambda p: p.stat().st_mtime)
        last = f"the last good checkpoint is {good[-1]}" if good else "none was saved before"
        raise FloatingPointError(f"{error}; {last}; try a smaller --lr-g or --amp off") from error
