"""Compiled steps, used only where they give the losses and gradients of the eager ones.

    steps = CompiledSteps(METHODS["clan"], "steps", G, console.print)
    with steps.chosen(G, D, state, batch, phase, hyper, autocast):  # around each step of a run
        train.one_step(steps.method, ...)

A compiler can return right losses with wrong gradients: that of torch 2.13 does, if a step
up-samples with F.interpolate. So the first batch of each kind of step is computed both ways. The
check changes nothing that a run depends on.
"""

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

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
WORTH = 2000  # steps of a run from which --compile auto compiles: a shorter one ends sooner without
FIRST = 100  # steps after a check whose time is reported
Parts = dict[str, list[Tensor]]  # the losses of a step by name, and the gradients of each part

# What is compiled.


def what_to_compile(choice: str, device: torch.device, steps: int) -> str:
    """--compile in words: "eager", "steps" (g_step and d_step) or "blocks" (of E alone)."""
    if choice == "auto":
        choice = "on" if device.type == "cuda" and steps >= WORTH else "off"
    return {"on": "steps", "off": "eager"}.get(choice, choice)


def compile_options() -> dict[str, Any]:
    """Arguments of torch.compile, and the settings of it that have no argument."""
    torch._dynamo.config.recompile_limit = 64  # kinds of step, twice under autocast
    torch._dynamo.config.optimize_ddp = False  # else DistributedDataParallel cuts the step up
    # Dropout draws what it draws in eager steps
    options = {"fallback_random": True} if BACKEND == "inductor" else None
    return {"fullgraph": True, "backend": BACKEND, "options": options}


class Switch:
    """Compiled functions that run as they were written, except within `on()`."""

    compiled = False

    def compile(self, function: Callable, **options: Any) -> Callable:
        """`function`, compiled within `on()`."""
        fast = torch.compile(function, **compile_options(), **options)
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

        Equal blocks share one small graph, so this compiles sooner than whole steps.
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


def evaluate(
    method: Method,
    G: Generator,
    D: Discriminator | None,
    state: State,
    batch: Batch,
    phase: Phase,
    hyper: Hyper,
    autocast: torch.autocast,
) -> Parts:
    """The losses of a step and the gradients of E, C1, C2 and D. Leaves everything as it was."""
    own_state = (state,) if method.first_state else ()
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
    return found | {name: [value] for name, value in terms.items()}


# The comparison.


def norm(tensors: list[Tensor]) -> float:
    return float(torch.nn.utils.get_total_norm(tensors))


def differences(found: Parts, wanted: Parts) -> dict[str, float]:
    """|found - wanted| / |wanted| of each part; 0 where both are 0."""
    result = {}
    for name, tensors in wanted.items():
        error = norm([a - b for a, b in zip(found[name], tensors, strict=True)])
        size = norm(tensors)
        result[name] = error / size if size else math.inf if error else 0.0
    return result


def gradients_and_losses(parts: Parts) -> Parts:
    """The same with all losses as one part.

    A single loss can be right by chance in one precision, which would say nothing of its rounding.
    """
    losses = {name: values for name, values in parts.items() if values and not values[0].ndim}
    joined = [value for values in losses.values() for value in values]
    return {k: v for k, v in parts.items() if k not in losses} | {"the losses": joined}


def wrong_parts(found: dict[str, float], limits: dict[str, float], where: str) -> list[str]:
    """What exceeds its limit, in words. A NaN exceeds every limit."""
    return [
        f"{name} {where} is off by {error:.2g} of its own size, more than {limits[name]:.2g}"
        for name, error in found.items()
        if not error <= limits[name]
    ]


def compare(
    switch: Switch,
    method: Method,
    G: Generator,
    D: Discriminator | None,
    state: State,
    batch: Batch,
    phase: Phase,
    hyper: Hyper,
    autocast: torch.autocast,
) -> tuple[list[str], dict[str, float]]:
    """What is wrong with the compiled step on this batch, and its differences in float32.

    The batch is taken as it is, and with every label ignored. Then the gradient of Eq. 3 is 0, and
    that of Eq. 5 stands alone: it is a few percent of E's gradient, and an error in it would hide
    in the sum. In float32 each loss and each gradient must agree to TOLERANCE. Under autocast,
    the compiled step may be twice as far from the eager float32 step as the eager one is.
    """
    ignored = batch._replace(labels=torch.full_like(batch.labels, IGNORE))
    off = torch.autocast(batch.labels.device.type, enabled=False)
    with autocast:
        amp = torch.is_autocast_enabled(batch.labels.device.type)
    worst: dict[str, float] = {}
    for where, one in (("on the batch", batch), ("with every label ignored", ignored)):

        def taken(compiled: bool, precision: torch.autocast, one: Batch = one) -> Parts:
            with switch.on(compiled):
                return evaluate(method, G, D, state, one, phase, hyper, precision)

        with devices.convolutions_in("ieee"):
            exact = taken(False, off)
            found = differences(taken(True, off), exact)
        wrong = wrong_parts(found, dict.fromkeys(found, TOLERANCE), f"{where}, in float32,")
        worst = {name: max(error, worst.get(name, 0.0)) for name, error in found.items()}
        if wrong:
            return wrong, worst
        if amp:
            exact = gradients_and_losses(exact)
            plain, found = (
                differences(gradients_and_losses(taken(compiled, autocast)), exact)
                for compiled in (False, True)
            )
            limits = {name: max(2 * error, ROUNDING) for name, error in plain.items()}
            wrong = wrong_parts(found, limits, f"{where}, in bfloat16,")
            if wrong:
                return wrong, worst
    return [], worst


# The steps of a run.


def kind_of(batch: Batch, phase: Phase, hyper: Hyper) -> str:
    """What a compiled graph depends on, in words: the flags of the phase, and the sizes.

    Several processes draw random scales each for itself but must check at the same step. There the
    flags alone count.
    """
    part = "source alone" if batch.target is None else "adversarial"
    if hyper.method == "clan" and batch.target is not None:
        part = "Eq. 5" if phase.adaptive else "Eq. 2"
    kind = f"{part}, {'batch' if phase.batch_statistics else 'running'} statistics"
    if devices.ranks()[1] > 1:
        return kind
    images = [x for x in (batch.source, batch.target) if x is not None]
    return ", ".join([kind, *("x".join(map(str, x.shape[-2:])) for x in images)])


class CompiledSteps:
    """The steps of one run, compiled or not, and what has been decided for each kind of step.

    `method` has the steps to take. `what` is "eager", "steps" or "blocks". `decisions` maps each
    kind of step met so far to "eager" or `what`; checkpoints hold it. `before` is that of the
    checkpoint that a run goes on from: a decision that differs is reported.
    """

    def __init__(
        self,
        method: Method,
        what: str,
        G: Generator,
        say: Callable[..., None],
        before: dict[str, str] | None = None,
    ):
        self.method, self.what, self.say, self.switch = method, what, say, Switch()
        self.before, self.decisions = before or {}, dict[str, str]()
        self.taken = FIRST  # steps since the last check; at FIRST there is nothing to report
        self.checked_at = 0.0  # when they began
        self.eager_costs = 0.0  # seconds that an eager step takes more
        if what == "steps":
            self.method = self.switch.steps(method)
        if what == "blocks":
            self.switch.blocks(G)

    def chosen(
        self,
        G: Generator,
        D: Discriminator | None,
        state: State,
        batch: Batch,
        phase: Phase,
        hyper: Hyper,
        autocast: torch.autocast,
    ) -> AbstractContextManager[Any]:
        """The context to take this step in. Checks first, if it is the first of its kind."""
        kind = kind_of(batch, phase, hyper)
        if self.what == "eager":
            self.decide(kind, "eager")
            return contextlib.nullcontext()
        self.report(batch.labels.device)
        if devices.any_rank(kind not in self.decisions):
            self.check(kind, G, D, state, batch, phase, hyper, autocast)
        return self.switch.on(self.decisions[kind] == self.what)

    def check(self, kind: str, *step: Any) -> None:
        """Compare compiled and eager step, decide, and say so. All processes decide alike."""
        began, worst = time.perf_counter(), dict[str, float]()
        try:
            wrong, worst = compare(self.switch, self.method, *step)
        except torch.OutOfMemoryError:
            wrong = ["the comparison does not fit into memory"]
        except Exception as error:  # if the step itself is at fault, the eager one raises it again
            wrong = [f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"]
        if devices.any_rank(bool(wrong)):
            reason = "; ".join(wrong) or "another process found them wrong"
            self.say(f"{kind}: eager steps, not compiled ones: {reason}", soft_wrap=True)
            self.decide(kind, "eager")
            self.taken = FIRST
            return
        name = max(worst, key=lambda part: worst[part])
        self.say(
            f"{kind}: compiled {self.what} agree with eager ones (largest difference: "
            f"{worst[name]:.1g}, {name}); used after {time.perf_counter() - began:.0f} s",
            soft_wrap=True,
        )
        self.decide(kind, self.what)
        self.eager_costs = self.cost(False, *step) - self.cost(True, *step)
        self.checked_at, self.taken = time.perf_counter(), 0

    def decide(self, kind: str, decision: str) -> None:
        if self.before.get(kind, decision) != decision:
            self.say(
                f"this run took {self.before[kind]} steps before and takes {decision} ones now: "
                "its bits will differ from those of a run that was never stopped",
                soft_wrap=True,
            )
            self.before = {}
        self.decisions[kind] = decision

    def cost(self, compiled: bool, *step: Any) -> float:
        """Median seconds of the losses and gradients of a step."""
        times = []
        for _ in range(3):
            start = time.perf_counter()
            with self.switch.on(compiled):
                parts = evaluate(self.method, *step)
            norm(parts["E"])  # waits for the device
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    def report(self, device: torch.device) -> None:
        """After FIRST steps since the last check, say how long they took, and eager ones would."""
        if self.taken == FIRST:
            return
        self.taken += 1
        if self.taken < FIRST:
            return
        devices.wait(device)
        seconds = (time.perf_counter() - self.checked_at) / FIRST
        self.say(
            f"compiled: {1000 * seconds:.1f} ms a step over the first {FIRST}, eager ones would "
            f"take {1000 * (seconds + self.eager_costs):.1f} ms (losses and gradients of one batch "
            f"take {1000 * self.eager_costs:+.1f} ms)",
            soft_wrap=True,
        )
