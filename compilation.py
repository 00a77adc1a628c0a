"""Compiled steps, used only where they give the losses and gradients of the eager ones.

    steps = CompiledSteps(METHODS["clan"], "on", G, console.print)
    with steps.chosen(Arguments(G, D, state, batch, phase, hyper, autocast)):  # around each step
        train.one_step(steps.method, ...)

A compiler can return right losses with wrong gradients: that of torch 2.13 does, if a step
up-samples with F.interpolate. So the first batch of each kind of step is computed both ways. The
check changes nothing that a run depends on.
"""

import contextlib
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import devices
from clan import Batch, Hyper, Phase
from classes import IGNORE
from methods import Method, State
from models import Discriminator, Generator, residual_blocks

BACKEND: Any = "inductor"  # of torch.compile; tests put others here
TOLERANCE = 1e-3  # largest difference in float32, relative to a loss or to a gradient's norm
ROUNDING = 2.0**-8  # of one bfloat16 number: smaller differences under autocast are not judged
LEAST_STEPS = 50_000  # of a run that --compile auto compiles; ms a step must repay minutes
REPORT_AFTER = 100  # steps after a check whose time is reported
Parts = dict[str, list[Tensor]]  # the losses of a step by name, and the gradients of each part

# What is compiled.


def what_to_compile(choice: str, device: torch.device, hyper: Hyper, recompute: bool) -> str:
    """--compile without auto: "off", "on" (g_step and d_step) or "blocks" (of E alone).

    auto is "on" for long runs on CUDA with one size of image: each further size takes minutes too.
    torch compiles no block that is computed again in the backward pass. Raises ValueError if both
    are asked for.
    """
    if choice == "auto":
        worth = hyper.steps >= LEAST_STEPS and len(hyper.scales) == 1 and not recompute
        return "on" if worth and device.type == "cuda" else "off"
    if choice != "off" and recompute:
        raise ValueError(f"--recompute cannot be compiled: drop it, or --compile {choice}")
    return choice


def set_up_compiler() -> dict[str, Any]:
    """Sets what torch.compile has no argument for, for the whole process. Returns the arguments."""
    limits: Any = torch._dynamo.config
    limits.recompile_limit = limits.accumulated_recompile_limit = 1024  # r101: 8 graphs a size
    limits.optimize_ddp = False  # else DistributedDataParallel cuts the step up
    # Dropout draws what it draws in eager steps
    options = {"fallback_random": True} if BACKEND == "inductor" else None
    return {"fullgraph": True, "backend": BACKEND, "options": options}


class Switch:
    """Compiled functions that run as they were written, except within `on()`."""

    compiled = False

    def compile(self, function: Callable, **options: Any) -> Callable:
        """`function`, compiled within `on()`."""
        fast = torch.compile(function, **set_up_compiler(), **options)
        return lambda *arguments: (fast if self.compiled else function)(*arguments)

    @contextlib.contextmanager
    def on(self, wanted: bool = True) -> Iterator[None]:
        before, self.compiled = self.compiled, wanted
        try:
            yield
        finally:
            self.compiled = before

    def steps(self, method: Method) -> Method:
        """The method with g_step and d_step behind this switch."""
        g_step, d_step = self.compile(method.g_step), self.compile(method.d_step)
        return replace(method, g_step=g_step, d_step=d_step)

    def blocks(self, G: Generator) -> None:
        """Puts each residual block of E behind this switch. Losses and up-sampling stay eager.

        Equal blocks share a graph: r101 has 8 small ones for each size of image. This compiles
        sooner than whole steps.
        """
        for block in residual_blocks(G):
            block.forward = self.compile(block.forward, dynamic=False)


# One step, evaluated without taking it.


@contextlib.contextmanager
def unchanged(*networks: nn.Module | None) -> Iterator[None]:
    """Puts back the buffers of the networks (BatchNorm's statistics) and torch's random states."""
    buffers = [b for network in networks if network is not None for b in network.buffers()]
    before = [b.clone() for b in buffers]
    try:
        with torch.random.fork_rng({b.device.index for b in buffers if b.is_cuda}):
            yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)


def gradients(loss: Tensor, parts: dict[str, nn.Module]) -> Parts:
    """The gradients of each part's parameters, zeros where there is none. Sets no `.grad`."""
    trained = {k: [p for p in part.parameters() if p.requires_grad] for k, part in parts.items()}
    together = [p for of_part in trained.values() for p in of_part]
    found = iter(torch.autograd.grad(loss, together, allow_unused=True, materialize_grads=True))
    return {name: [next(found) for _ in of_part] for name, of_part in trained.items()}


class Arguments(NamedTuple):
    """What one step is taken with."""

    G: Generator
    D: Discriminator | None
    state: State
    batch: Batch
    phase: Phase
    hyper: Hyper
    autocast: torch.autocast


def evaluate(method: Method, step: Arguments) -> Parts:
    """The losses of a step, the gradients of E, C1, C2 and D, and the change of BatchNorm's running
    statistics. Leaves everything as it was."""
    G, D, state, batch, phase, hyper, autocast = step
    own_state = (state,) if method.first_state else ()
    norms = [m for m in G.modules() if isinstance(m, nn.BatchNorm2d)]
    running = [b for m in norms for b in m.buffers()]
    before = [b.clone() for b in running]
    with unchanged(G, D):
        with autocast:
            loss, terms, predictions = method.g_step(G, D, batch, phase, hyper, *own_state)
        found = gradients(loss, {"E": G.E, "C1": G.C1, "C2": G.C2})
        terms = terms | {"G's loss": loss.detach()}
        if D is not None and predictions is not None:
            with autocast:
                d_loss, d_terms = method.d_step(D, predictions)
            found |= gradients(d_loss, {"D": D})
            terms |= d_terms
        found["BatchNorm"] = [(b - a).float() for a, b in zip(before, running, strict=True)]
    return found | {name: [value] for name, value in terms.items()}


# The comparison.


def norm(tensors: list[Tensor]) -> float:
    return float(torch.nn.utils.get_total_norm(tensors))


def relative(found: list[Tensor], wanted: list[Tensor]) -> float:
    """|found - wanted| / |wanted|; 0 where both are 0."""
    error = norm([a - b for a, b in zip(found, wanted, strict=True)])
    size = norm(wanted)
    return error / size if size else math.inf if error else 0.0


def differences(found: Parts, wanted: Parts) -> dict[str, float]:
    """`relative` of each part. Of BatchNorm's statistics each tensor counts by itself, since a few
    large variances would hide the rest; the result is the worst."""
    result = {name: relative(found[name], tensors) for name, tensors in wanted.items()}
    pairs = zip(found.get("BatchNorm", []), wanted.get("BatchNorm", []), strict=True)
    of_tensors = [relative([a], [b]) for a, b in pairs]
    # max() would lose a NaN
    worst = max(of_tensors, key=lambda x: math.inf if math.isnan(x) else x, default=0.0)
    return result | ({"BatchNorm": worst} if "BatchNorm" in wanted else {})


def with_losses_joined(parts: Parts) -> Parts:
    """The same parts, with all losses as one.

    The rounding of a single loss can be zero by chance. It is no measure of what is allowed.
    """
    losses = {name: values for name, values in parts.items() if values and not values[0].ndim}
    joined = [value for values in losses.values() for value in values]
    return {k: v for k, v in parts.items() if k not in losses} | {"the losses": joined}


def wrong_parts(found: dict[str, float], limits: dict[str, float], where: str) -> list[str]:
    """What exceeds its limit, in words. A NaN exceeds every limit."""
    return [
        f"{NAMES.get(name, name)} {where} differs by {error:.2g} of its size, more than the "
        f"allowed {limits[name]:.2g}"
        for name, error in found.items()
        if not error <= limits[name]
    ]


NAMES = {name: f"the gradient of {name}" for name in ("E", "C1", "C2", "D")}
NAMES["BatchNorm"] = "the change of BatchNorm's statistics"


def compare(switch: Switch, method: Method, step: Arguments) -> tuple[list[str], dict[str, float]]:
    """What is wrong with the compiled step on this batch, and its differences in float32.

    The batch is taken as it is, and with every label ignored. Then the gradient of Eq. 3 is 0, and
    that of Eq. 5 stands alone: it is a few percent of E's gradient, and an error in it would hide
    in the sum. In float32 each loss and each gradient must agree to TOLERANCE. Under autocast the
    compiled step may be twice as far from the eager float32 step as the eager one is, or as far as
    ROUNDING. The losses count as one part there.
    """
    labels, autocast = step.batch.labels, step.autocast
    ignored = step.batch._replace(labels=torch.full_like(labels, IGNORE))
    off = torch.autocast(labels.device.type, enabled=False)
    with autocast:
        amp = torch.is_autocast_enabled(labels.device.type)
    worst: dict[str, float] = {}
    for where, one in (("on the batch", step.batch), ("with every label ignored", ignored)):

        def taken(compiled: bool, precision: torch.autocast, one: Batch = one) -> Parts:
            with switch.on(compiled):
                return evaluate(method, step._replace(batch=one, autocast=precision))

        with devices.convolutions_in("ieee"):
            exact = taken(False, off)
            found = differences(taken(True, off), exact)
        wrong = wrong_parts(found, dict.fromkeys(found, TOLERANCE), f"{where}, in float32,")
        worst = {name: max(error, worst.get(name, 0.0)) for name, error in found.items()}
        if wrong:
            return wrong, worst
        if amp:
            exact = with_losses_joined(exact)
            plain, found = (
                differences(with_losses_joined(taken(compiled, autocast)), exact)
                for compiled in (False, True)
            )
            limits = {name: max(2 * error, ROUNDING) for name, error in plain.items()}
            wrong = wrong_parts(found, limits, f"{where}, in bfloat16,")
            if wrong:
                return wrong, worst
    return [], worst


# The steps of a run.

WORDS = {"off": "eager steps", "on": "compiled steps", "blocks": "steps with compiled blocks"}


def kind_of(batch: Batch, phase: Phase) -> str:
    """What a compiled graph depends on, in words: the flags of the phase, and the sizes."""
    words = ["source alone"] if batch.target is None else ["adversarial"]
    if batch.target is not None and phase.adaptive:
        words.append("adaptive")
    words.append(f"{'batch' if phase.batch_statistics else 'running'} statistics")
    images = [x for x in (batch.source, batch.target) if x is not None]
    return ", ".join([*words, *("x".join(map(str, x.shape[-2:])) for x in images)])


class CompiledSteps:
    """The steps of one run, compiled or not, and what has been decided for each kind of step.

    `method` has the steps to take. `what` is "off", "on" or "blocks". `decisions` maps each kind of
    step that this process has met to "off" or `what`. A check that has compiled a graph clears it,
    since torch's graphs for any size serve other kinds too: these are checked again. `before` is
    what the checkpoint holds that a run goes on from: a decision that differs is reported. `known`
    has both, for checkpoints.
    """

    def __init__(
        self,
        method: Method,
        what: str,
        G: Generator,
        say: Callable[..., None],
        before: dict[str, str] | None = None,
    ):
        self.method, self.what, self.switch = method, what, Switch()
        self.say = partial(say, soft_wrap=True)
        self.before = before or {}
        self.known, self.decisions = dict(self.before), dict[str, str]()
        self.refused: set[str] = set()  # kinds whose compiled steps were once found wrong
        self.taken = REPORT_AFTER  # steps since the last check; then there is nothing to report
        self.checked_at = 0.0  # when they began
        self.eager_costs = 0.0  # seconds that an eager step takes more
        if what == "on":
            self.method = self.switch.steps(method)
        if what == "blocks":
            self.switch.blocks(G)

    def chosen(self, step: Arguments) -> AbstractContextManager[Any]:
        """The context to take this step in. Checks first, if it is the first of its kind.

        With several processes a step is checked by all of them if it is new to one.
        """
        kind = kind_of(step.batch, step.phase)
        if self.what == "off":
            self.decide(kind, "off")
            return contextlib.nullcontext()
        self.report(step.batch.labels.device)
        if devices.any_rank(kind not in self.decisions):
            self.check(kind, step)
        return self.switch.on(self.decisions[kind] == self.what)

    def check(self, kind: str, step: Arguments) -> None:
        """Compare compiled and eager step, decide, and say so. All processes decide alike."""
        began, worst = time.perf_counter(), dict[str, float]()
        graphs = torch._dynamo.utils.counters["stats"]
        before = graphs["unique_graphs"]
        try:
            wrong, worst = compare(self.switch, self.method, step)
            if not wrong:
                self.eager_costs = self.cost(False, step) - self.cost(True, step)
        except torch.OutOfMemoryError:
            wrong = ["the check needs the memory of a step in float32, and does not fit"]
        except Exception as error:  # if the step itself is at fault, the eager one raises it again
            wrong = [f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"]
        if graphs["unique_graphs"] > before:  # other kinds may take the new graphs too
            self.decisions.clear()
        rank, _ = devices.ranks()
        if wrong and rank > 0:  # its console is quiet
            print(f"rank {rank}, {kind}: {'; '.join(wrong)}", file=sys.stderr)
        if devices.any_rank(bool(wrong) or kind in self.refused):
            self.refused.add(kind)
            reason = "; ".join(wrong) or "compiled ones were found wrong in another process"
            self.say(f"{kind}: this run takes eager steps: {reason}")
            self.taken = REPORT_AFTER
            self.decide(kind, "off")
            return
        name = max(worst, key=lambda part: worst[part])
        self.say(
            f"{kind}: {WORDS[self.what]} agree with eager ones (largest difference: "
            f"{worst[name]:.1g}, {name}) and are used; the check took "
            f"{time.perf_counter() - began:.0f} s"
        )
        self.decide(kind, self.what)
        self.checked_at, self.taken = time.perf_counter(), 0

    def decide(self, kind: str, decision: str) -> None:
        earlier = self.before.get(kind, decision)
        if earlier != decision:
            self.say(
                f"this run took {WORDS[earlier]} before and takes {WORDS[decision]} now: its bits "
                "will differ from those of a run that was never stopped"
            )
            self.before = {}  # said once
        self.decisions[kind] = self.known[kind] = decision

    def cost(self, compiled: bool, step: Arguments) -> float:
        """Median seconds of the losses and gradients of a step."""
        times = []
        for _ in range(3):
            start = time.perf_counter()
            with self.switch.on(compiled):
                parts = evaluate(self.method, step)
            norm(parts["E"])  # waits for the device
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    def report(self, device: torch.device) -> None:
        """After REPORT_AFTER steps since the last check, say what compiling has gained."""
        if self.taken == REPORT_AFTER:
            return
        self.taken += 1
        if self.taken < REPORT_AFTER:
            return
        devices.wait(device)
        seconds = time.perf_counter() - self.checked_at
        eager = seconds + self.taken * self.eager_costs
        self.say(
            f"{self.taken} {WORDS[self.what]} took {seconds:.1f} s. Eager ones would take "
            f"about {eager:.1f} s, judged by losses and gradients: gain {eager / seconds:.2f}"
        )
