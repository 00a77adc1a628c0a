"""CLAN, the algorithm: hyper-parameters, schedules and the two steps (Section 3.3, Eq. 3 to 7).

    phase = phase_at(step, PAPER)
    g_loss, terms, predictions = g_step(G, D, batch, phase, PAPER)  # then backward and step for G
    d_loss, terms = d_step(D, predictions)                          # then backward and step for D

The steps are pure: they compute losses and call no backward, optimizer, print or file. Dropout in
G and the control "shuffled" draw from torch's generator. The loop that calls the steps is in
train.py. The losses are in losses.py. The check of the hyper-parameters and the controls of the
studies are at the end of this file.

Shapes: B images, C classes, H W label grid, h w feature grid of G.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from losses import adversarial_loss, discrepancy_map, segmentation_loss, weight_discrepancy

Statistics = Literal["batch", "before", "running"]
Control = Literal["none", "shuffled", "moved", "doubt", "inverted"]
Terms = dict[str, Tensor]  # what a step reports: detached scalars by name


@dataclass(frozen=True)
class Hyper:
    """Every number of the algorithm. The defaults are the paper's; RELEASED lists what differs.

    Where the paper is silent, the comment says whose choice the default is.
    """

    # Method and steps.
    method: str = "clan"  # source (Eq. 3), tan (Eq. 3 and 2), clan (Eq. 6), a row of methods.py
    steps: int = 100_000  # iterations
    batch: int = 1  # images of each domain per step
    adv_start: int = 0  # first step with adversarial terms; earlier steps learn only the source

    # Losses of G, Eq. 3 to 6.
    seg_heads: Literal["ensemble", "each"] = "ensemble"  # Eq. 3 of summed logits | a loss per head
    head_std: float = 0.01  # deviation of the heads' initial filters (paper: not said; code: 0.01)
    gamma: float = 0.0  # focal exponent of Eq. 3 (0: cross-entropy)
    lambda_weight: float = 0.01  # weight of Eq. 4 in Eq. 6
    cos_offset: float = 0.0  # added to the cosine of Eq. 4; moves its value, not its gradient
    cos_biases: bool = False  # Eq. 4 compares the heads' biases too, not only their filters
    lambda_local: float = 40.0  # slope of the adaptive weight lambda_local * M + eps, Eq. 5
    eps: float = 0.4  # floor of the adaptive weight, Eq. 5
    adaptive_start: float = 0.0  # share of the adversarial steps that use Eq. 2 before Eq. 5
    detach_m: bool = False  # stop the gradient through M in G's loss (paper: not said; code: flows)
    m_control: Control = "none"  # for studies, where the weights go instead: `controlled_weight`
    m_mean1: bool = False  # for studies: the weights of each step divided by their mean
    lambda_adv: float = 0.001  # weight of Eq. 5 in Eq. 6
    damping: bool = False  # scale Eq. 4 and 5 in G's loss by (1 - step / steps)
    minimax: bool = False  # G ascends Eq. 5 as printed; else it descends -log D(target), as TAN

    # Rates of G.
    lr_g: float = 2.5e-4  # SGD, initial rate
    momentum: float = 0.9  # SGD
    weight_decay_g: float = 5e-4  # SGD, biases too
    head_lr: float = 10.0  # rate of the heads divided by that of E (paper: not said; DeepLab: 10)
    power: float = 0.9  # exponent of the poly schedule
    warmup: float = 0.0  # share of the steps in which the rates rise linearly
    # D and its rates.
    d_channels: int = 64  # channels of D's first convolution
    d_strides: tuple[int, ...] = (2, 2, 2, 2, 2)  # of D's five convolutions: 2 (4x4) or 1 (3x3)
    lr_d: float = 5e-5  # Adam, initial rate
    d_schedule: Literal["fixed", "poly"] = "fixed"  # schedule of D's rate
    beta1_d: float = 0.9  # Adam
    beta2_d: float = 0.99  # Adam
    weight_decay_d: float = 5e-4  # Adam

    # BatchNorm and images.
    batchnorm: Statistics = "batch"  # normalise by the batch: always | before adv_start | never
    bn_affine: bool = False  # train BatchNorm's scale and shift (paper: not said; the code: no)
    crop: bool = True  # train on random crops of the data set's crop size, not on whole images
    scales: tuple[float, ...] = (1.0,)  # random image sizes, relative to the data set's size
    scale_probs: tuple[float, ...] = (1.0,)  # probability of each scale
    mirror: float = 0.0  # probability that image and label are mirrored (paper: not said)
    jitter: float = 0.0  # colour jitter of the source: largest change of gain and offset (ours)
    fourier: float = 0.0  # FDA: the source has the target's style below it, in cycles a pixel

    def __post_init__(self) -> None:
        if "check" in globals():  # defined at the end, where it also checks the recipes
            check(self)


PAPER = Hyper()
RELEASED = Hyper(
    seg_heads="each",
    gamma=2.0,
    lambda_weight=0.02,  # 0.01 times a factor of 2 in its loop
    cos_offset=1.0,
    cos_biases=True,
    adaptive_start=0.05,
    damping=True,
    warmup=0.05,
    lr_d=1e-4,
    d_schedule="poly",
    weight_decay_d=0.0,
    crop=False,
    scales=(0.8, 1.0, 1.1),
    scale_probs=(0.3, 0.4, 0.3),
    mirror=0.5,
)
RECIPES = {"paper": PAPER, "released": RELEASED}


# The schedules: pure functions of the step, counted from 0.


def poly(step: int, hyper: Hyper) -> float:
    """The factor of a learning rate: linear rise over `warmup`, else (1 - step / steps)^power."""
    if step < hyper.warmup * hyper.steps:
        return step / (hyper.warmup * hyper.steps)  # rises to 1, then the poly curve
    return (1 - step / hyper.steps) ** hyper.power


def learning_rates(step: int, hyper: Hyper) -> tuple[float, float]:
    """The rates of G (its heads learn `head_lr` times as fast) and of D at this step."""
    d_factor = poly(step, hyper) if hyper.d_schedule == "poly" else 1.0
    return hyper.lr_g * poly(step, hyper), hyper.lr_d * d_factor


def progress(step: int, hyper: Hyper) -> float:
    """The share of the adversarial steps that is done: 0 at adv_start, 1 at the end."""
    return max(step - hyper.adv_start, 0) / max(hyper.steps - hyper.adv_start, 1)


def uses_batch_statistics(step: int, hyper: Hyper) -> bool:
    """Whether BatchNorm normalises with the statistics of the batch in this step.

    "before" also holds for source only: that baseline differs from the others by its loss alone.
    """
    if hyper.batchnorm == "before":
        return step < hyper.adv_start
    return hyper.batchnorm == "batch"


# What the steps take and return.


class Phase(NamedTuple):
    """What changes with the step's number. A compiled step is one graph for each pair of flags."""

    adversarial: bool  # from adv_start on: all methods but `source` use the target
    adaptive: bool  # CLAN's adversarial loss is Eq. 5, else Eq. 2
    batch_statistics: bool  # BatchNorm normalises by the batch
    strength: Tensor  # 0-dim float64: the factor of Eq. 4 and 5 in G's loss, 1 without damping


def phase_at(step: int, hyper: Hyper, device: torch.device | str = "cpu") -> Phase:
    """The phase of this step, counted from 0, for networks on `device`."""
    strength = 1 - progress(step, hyper) if hyper.damping else 1.0
    return Phase(
        step >= hyper.adv_start,
        progress(step, hyper) >= hyper.adaptive_start,
        uses_batch_statistics(step, hyper),
        torch.full((), strength, dtype=torch.float64, device=device),
    )


class GeneratorLike(Protocol):
    """G: B 3 H' W' images to (logits_1, logits_2), each B C h w."""

    def __call__(self, images: Tensor, /) -> tuple[Tensor, Tensor]: ...

    def classifier_weights(self, biases: bool) -> tuple[list[Tensor], list[Tensor]]:
        """The parameters of C1 and of C2 that Eq. 4 compares."""


class DiscriminatorLike(Protocol):
    """D: B C H W probabilities to B 1 h w logits of "source"."""

    def __call__(self, p: Tensor, /) -> Tensor: ...


class Batch(NamedTuple):
    """What one step learns from.

    The source's loss is computed on the grid of its labels, the target's on `target_size`. Neither
    grid changes with the random scale of an image (released code).
    """

    source: Tensor  # B 3 H' W' images
    labels: Tensor  # B H W integers, train ids of the source
    target: Tensor | None  # B 3 H' W' images, no labels; None in a step on the source alone
    target_size: tuple[int, int] | None  # H W


class Predictions(NamedTuple):
    """What `g_step` passes to `d_step`, detached: D's loss gives G no gradient."""

    source: Tensor  # B C H W, the ensemble p on the source
    target: Tensor  # B C H W, the ensemble p on the target
    weight: Tensor | None  # B 1 H W, lambda_local * M + eps; None for Eq. 2


def upsample(x: Tensor, size: Sequence[int]) -> Tensor:
    """B C h w to B C H W, bilinear with aligned corners, in float32 at least: autocast ends here.

    Two ways, equal within rounding. On CUDA the gradient of F.interpolate adds with atomics, in a
    random order. In a compiled step inductor (torch 2.13) loses gradients with it. There the map is
    two matrix products. Elsewhere F.interpolate is as fast or faster.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if x.is_cuda or torch.compiler.is_compiling():
        return upsample_by_products(x, size)
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=True)


def upsample_by_products(x: Tensor, size: Sequence[int]) -> Tensor:
    """`upsample` as a product with a matrix of row weights, H h, and one of column weights, W w."""
    weights = hat_weights if torch.compiler.is_compiling() else kept_weights
    (h, w), (H, W) = x.shape[-2:], size
    rows, columns = weights(h, H, x.dtype, x.device), weights(w, W, x.dtype, x.device)
    with torch.autocast(x.device.type, enabled=False):
        return rows @ x @ columns.T


@functools.lru_cache(maxsize=64)
def kept_weights(n: int, m: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`hat_weights`, made once: its dozen small kernels would take longer than the products."""
    with torch.inference_mode(False):  # else a backward pass could not use what scoring has made
        return hat_weights(n, m, dtype, device)


def hat_weights(n: int, m: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """How much each of n old positions weighs in each of m new ones, m n: 1 - distance, or 0."""
    old, new = (torch.arange(k, dtype=dtype, device=device) for k in (n, m))
    position = (new * ((n - 1) / max(m - 1, 1))).clamp(max=n - 1)  # of a new row among the old ones
    distance = (position[:, None] - old).abs()  # m n
    return (1 - distance).clamp(min=0)


def domain_logits(D: Callable[[Tensor], Tensor], p: Tensor) -> Tensor:
    """D's answer for each pixel: B C H W probabilities to B 1 H W logits of "source"."""
    return upsample(D(p), p.shape[-2:])


def without_gradient(module: DiscriminatorLike) -> Callable[[Tensor], Tensor]:
    """The module as a function whose input receives a gradient but whose parameters do not."""
    network = cast(nn.Module, module)
    constants = {name: p.detach() for name, p in network.named_parameters()}
    return lambda x: torch.func.functional_call(network, constants, (x,))


def adaptive_weight(m: Tensor, hyper: Hyper) -> Tensor:
    """The weight of each pixel's adversarial loss, B 1 H W: lambda_local * M + eps (Eq. 5)."""
    return hyper.lambda_local * m + hyper.eps  # Eq. 5


# The steps.


def g_step(
    G: GeneratorLike, D: DiscriminatorLike, batch: Batch, phase: Phase, hyper: Hyper
) -> tuple[Tensor, Terms, Predictions | None]:
    """The loss of G in this phase: the terms of Eq. 6 that `hyper.method` has.

    G: images to (logits_1, logits_2), each B C h w. D: B C H W to B 1 h w; it gets no gradient.
    phase: what `phase_at` says of the step.
    Returns (loss, terms, predictions): a scalar; a dict of detached scalars (the unweighted losses
    `seg`, `cos` and `adv`, and the mean of the map, `m`); Predictions, or None if D has no step.
    """
    labels, size = batch.labels.long(), batch.labels.shape[-2:]
    logits_1, logits_2 = G(batch.source)  # B C h w each
    if hyper.seg_heads == "ensemble":  # the paper
        logits = upsample(logits_1 + logits_2, size)  # linear: up-sample only the sum
        loss = segmentation_loss(logits, labels, gamma=hyper.gamma)  # Eq. 3
    else:  # the released code: a loss for each head
        logits_1, logits_2 = upsample(logits_1, size), upsample(logits_2, size)
        loss_1 = segmentation_loss(logits_1, labels, gamma=hyper.gamma)
        loss = loss_1 + segmentation_loss(logits_2, labels, gamma=hyper.gamma)
        logits = logits_1 + logits_2
    terms = {"seg": loss.detach()}

    if hyper.method == "clan":
        l_weight = weight_discrepancy(*G.classifier_weights(hyper.cos_biases))  # Eq. 4
        l_weight = l_weight + hyper.cos_offset
        loss = loss + (hyper.lambda_weight * phase.strength).to(loss.dtype) * l_weight
        terms["cos"] = l_weight.detach()
    if hyper.method == "source" or not phase.adversarial:
        return loss, terms, None

    if batch.target is None or batch.target_size is None:
        raise ValueError("an adversarial step needs a batch with a target: see data.batch_at")
    p_source = logits.softmax(dim=1)  # B C H W
    logits_1, logits_2 = (upsample(x, batch.target_size) for x in G(batch.target))
    p_target = (logits_1 + logits_2).softmax(dim=1)  # B C H W
    weight = None  # Eq. 2: all pixels count alike
    if hyper.method == "clan":
        m = discrepancy_map(logits_1.softmax(dim=1), logits_2.softmax(dim=1))  # B 1 H W
        terms["m"] = m.detach().mean()
        if phase.adaptive:
            weight = adaptive_weight(m.detach() if hyper.detach_m else m, hyper)
            if hyper.m_control != "none" or hyper.m_mean1:
                weight = controlled_weight(weight, p_target, hyper)

    fixed_D = without_gradient(D)
    d_target = domain_logits(fixed_D, p_target)
    if hyper.minimax:  # Eq. 7 as printed: G maximises the loss that D minimises
        l_adv = -adversarial_loss(domain_logits(fixed_D, p_source), is_source=True)
        l_adv = l_adv - adversarial_loss(d_target, is_source=False, weight=weight)
    else:  # G makes the target look like the source to D
        l_adv = adversarial_loss(d_target, is_source=True, weight=weight)
    terms["adv"] = l_adv.detach()
    loss = loss + (hyper.lambda_adv * phase.strength).to(loss.dtype) * l_adv  # Eq. 6
    weight = None if weight is None else weight.detach()
    return loss, terms, Predictions(p_source.detach(), p_target.detach(), weight)


def d_step(D: DiscriminatorLike, predictions: Predictions) -> tuple[Tensor, Terms]:
    """The loss of D: Eq. 5, or Eq. 2 if `predictions` have no weight.

    lambda_adv is left out (released code): D has this one term, and Adam ignores its scale.
    Returns (loss, terms): a scalar, and a dict of detached scalars: the loss `d` and D's mean
    probability of "source" on each domain, `d_source` and `d_target` (0.5 if it cannot tell).
    """
    d_source = domain_logits(D, predictions.source)
    d_target = domain_logits(D, predictions.target)
    loss = adversarial_loss(d_source, is_source=True)
    loss = loss + adversarial_loss(d_target, is_source=False, weight=predictions.weight)
    return loss, {
        "d": loss.detach(),
        "d_source": d_source.detach().sigmoid().mean(),
        "d_target": d_target.detach().sigmoid().mean(),
    }


# Not part of the algorithm: the controls of the studies, and the check of a Hyper.


def controlled_weight(weight: Tensor, p: Tensor, hyper: Hyper) -> Tensor:
    """The weight of Eq. 5, B 1 H W, changed by a control; p: B C H W, the ensemble on the target.

    The controls separate *where* M puts the weight from *how much* weight there is. Each image
    keeps its weights to the last one; only their places change:
    shuffled: an order drawn from torch's generator. train.py seeds it before each step.
    moved: the whole map rolled by half its height and width, which keeps it as smooth as it is.
    doubt: the largest weights where the ensemble is least confident.
    inverted: the largest weights where M is smallest.
    With m_mean1 the weights are then divided by their mean.
    """
    values = weight.flatten(1)  # B HW
    if hyper.m_control == "shuffled":
        values = values[:, torch.randperm(values.shape[1], device=weight.device)]
    elif hyper.m_control == "moved":
        height, width = weight.shape[-2:]
        values = weight.roll((height // 2, width // 2), dims=(-2, -1)).flatten(1)
    elif hyper.m_control != "none":
        doubt = 1 - p.max(dim=1).values.flatten(1)
        places = (doubt if hyper.m_control == "doubt" else -values).argsort(dim=1, stable=True)
        values = torch.zeros_like(values).scatter(1, places, values.sort(dim=1).values)
    weight = values.view_as(weight)
    return weight / weight.mean() if hyper.m_mean1 else weight


def check(hyper: Hyper) -> None:
    """Raises ValueError, with the field's name, if a number makes no sense."""

    def require(condition: bool, sentence: str) -> None:
        if not condition:
            raise ValueError(sentence)

    for name, value in vars(hyper).items():
        for number in value if isinstance(value, tuple) else (value,):
            finite = isinstance(number, str) or math.isfinite(number)
            require(finite, f"{name} must be finite, not {number}")
    require(hyper.steps >= 1 and hyper.batch >= 1, "steps and batch must be at least 1")
    require(
        hyper.method == "source" or 0 <= hyper.adv_start < hyper.steps,
        f"adv_start {hyper.adv_start} must lie in [0, steps = {hyper.steps}): no step would be "
        "adversarial; give a smaller adv_start (--adv-start), or method source",
    )
    require(
        len(hyper.scales) == len(hyper.scale_probs)
        and min(hyper.scales) > 0
        and min(hyper.scale_probs) >= 0
        and abs(sum(hyper.scale_probs) - 1) < 1e-6,
        f"scales {hyper.scales} must be positive and need as many scale_probs that sum to 1, not "
        f"{hyper.scale_probs}",
    )
    require(hyper.d_channels >= 1, "d_channels must be at least 1")
    require(
        len(hyper.d_strides) == 5 and set(hyper.d_strides) <= {1, 2},
        f"d_strides {hyper.d_strides} must be five numbers, each 1 or 2",
    )
    require(
        hyper.momentum < 1 and hyper.beta1_d < 1 and hyper.beta2_d < 1,
        "momentum, beta1_d and beta2_d must be below 1",
    )
    require(hyper.fourier <= 0.5, "fourier must be at most 0.5 cycles a pixel")
    for name in ("adaptive_start", "warmup", "mirror", "jitter"):
        require(0 <= getattr(hyper, name) <= 1, f"{name} must lie in [0, 1]")
    rates = ("lr_g", "lr_d", "head_lr", "weight_decay_g", "weight_decay_d", "power")
    shares = ("momentum", "beta1_d", "beta2_d", "gamma")
    others = ("lambda_adv", "lambda_local", "lambda_weight", "eps", "head_std", "fourier")
    for name in (*rates, *shares, *others):
        require(getattr(hyper, name) >= 0, f"{name} must not be negative")


for recipe in RECIPES.values():
    check(recipe)
