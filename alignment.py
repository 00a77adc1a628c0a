"""More systems of Tables 1 and 2: those that align features, class sizes or label distributions.

Each section is one system, as in baselines.py.

    CyCADA, feature level   Hoffman et al., ICML 2018
    FCNs in the wild        Hoffman et al., 2016 (arXiv 1612.02649)
    Cross-city              Chen et al., ICCV 2017
    CDA                     Zhang et al., ICCV 2017

Shapes: B images, C classes, H W label grid, h w feature grid of G, F channels of E's features.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import clan
from baselines import (
    Axes,
    Images,
    State,
    ensemble,
    evaluating,
    frozen_copy,
    labelled_loss,
    labeller_of,
    no_copy,
    over_processes,
    source_loss,
    target_images,
)
from clan import Batch, Hyper, Phase, Predictions, Terms, without_gradient
from losses import adversarial_loss, segmentation_loss
from models import Generator


class PixelD(nn.Module):
    """A D of 1x1 convolutions: B F h w to B `outputs` h w logits of "source".

    Each output has layers of its own, as if it were a D by itself.
    """

    def __init__(self, channels: int, widths: tuple[int, int], dropout: float, outputs: int = 1):
        super().__init__()
        first, second = (n * outputs for n in widths)
        self.layers = nn.Sequential(
            nn.Conv2d(channels, first, 1),
            nn.Dropout2d(dropout),
            nn.ReLU(),
            nn.Conv2d(first, second, 1, groups=outputs),
            nn.Dropout2d(dropout),
            nn.ReLU(),
            nn.Conv2d(second, outputs, 1, groups=outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).float()


def check_pixel_d(width: int, dropout: float) -> None:
    if width < 2 or not 0 <= dropout < 1:
        raise ValueError("d_width must be at least 2, and d_dropout in [0, 1)")


def feature_channels(G: Generator) -> int:
    """F: how many channels the features have that D sees."""
    head = next(m for m in reversed(list(G.C1.modules())) if isinstance(m, nn.Conv2d))
    return head.in_channels


def last(features: Any) -> Tensor:
    """The features that D sees, B F h w: of FCN8s' three the last, fc7."""
    return features[-1] if isinstance(features, tuple) else features


def cell_means(x: Tensor, size: Sequence[int]) -> Tensor:
    """B C H W to the means over cells, B C rows columns."""
    return F.adaptive_avg_pool2d(x, (size[0], size[1]))


def heads(G: Generator, features: Any) -> tuple[Tensor, Tensor]:
    return G.C1(features), G.C2(features)


def not_begun(G: Generator, hyper: Hyper) -> State:
    """Of a method, a part of whose losses counts from a share of the adaptation on: not yet."""
    return {"begun": torch.zeros(())}


def begins(step: int, G: Generator, images: Images, hyper: Any, share: str) -> State:
    """Whether that part counts in this step, 1 or 0. share: the name of the number that says it."""
    begun = step >= hyper.adv_start and clan.progress(step, hyper) >= getattr(hyper, share)
    return {"begun": torch.tensor(float(begun))}


def pixel_d_step(D: nn.Module, predictions: Predictions) -> tuple[Tensor, Terms]:
    """The mean of D's cross-entropy over cells, of both domains; `d_acc`: how often it is right."""
    d_source, d_target = D(predictions.source), D(predictions.target)
    loss = adversarial_loss(d_source, is_source=True) + adversarial_loss(d_target, is_source=False)
    right = (d_source > 0).float().mean() + (d_target < 0).float().mean()
    return loss, {
        "d": loss.detach(),
        "d_source": d_source.detach().sigmoid().mean(),
        "d_target": d_target.detach().sigmoid().mean(),
        "d_acc": right / 2,
    }


# CyCADA, feature level alone (Hoffman et al., ICML 2018): D sees the logits, and G moves only while
# D can tell the domains apart. Procedure and numbers: the authors' code.


@dataclass(frozen=True)
class CycadaHyper(Hyper):
    """Of CyCADA."""

    gate: float = 0.6  # G moves while D's mean accuracy is above it (its code: 0.6)
    gate_window: float = 0.01  # this mean's share of the adaptation (its code: 100 steps)
    d_width: int = 512  # channels of D's first layer, twice those of its second (its code: 512)
    d_dropout: float = 0.5  # share of D's channels that are dropped (its code: 0.5)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_pixel_d(self.d_width, self.d_dropout)
        if not 0 < self.gate_window <= 1 or not 0 <= self.gate < 1:
            raise ValueError("gate_window must be in (0, 1], and gate in [0, 1)")


ADVERSARIAL_RATES = ("lambda_adv", (0.003, 0.0125, 0.05, 0.2))
CYCADA_TUNED: Axes = (ADVERSARIAL_RATES, ("lr_d", (3.33e-4, 1e-3, 3e-3, 9e-3)))


def cycada_d(G: Generator, hyper: CycadaHyper) -> PixelD:
    return PixelD(G.num_classes, (hyper.d_width, hyper.d_width // 2), hyper.d_dropout)


def cycada_step(
    G: Generator, D: PixelD, batch: Batch, phase: Phase, hyper: CycadaHyper, state: State
) -> tuple[Tensor, Terms, Predictions | None]:
    """Source only + lambda_adv * Eq. 2 of the target's logits, each pixel by itself.

    `moved`: in what share of the steps of adaptation so far G has moved.
    Differs: the two losses of G are one sum (the original: two steps), and G's step comes first.
    """
    logits = G(batch.source)
    loss, terms = source_loss(logits, batch, phase, hyper)
    if not phase.adversarial:
        return loss, terms, None
    source = ensemble(logits, batch.labels.shape[-2:]).detach()
    target = ensemble(G(target_images(batch)), batch.target_size)
    l_adv = adversarial_loss(without_gradient(D)(target), is_source=True)
    moved = state["moves"] / state["known"].clamp(min=1)
    terms |= {"adv": l_adv.detach(), "moved": moved.to(l_adv.device)}
    return loss + hyper.lambda_adv * l_adv, terms, Predictions(source, target.detach(), None)


LEAST_STEPS = 5  # of a mean of D's accuracies


def first_accuracies(G: Generator, hyper: CycadaHyper) -> State:
    """D's accuracies in the last steps, the newest at the end; how many have been known in all, and
    in how many of these steps G moved.
    """
    steps = max(LEAST_STEPS, round(hyper.gate_window * (hyper.steps - hyper.adv_start)))
    return {"accuracies": torch.zeros(steps), "known": torch.zeros(()), "moves": torch.zeros(())}


def next_accuracies(state: State, G: Generator, terms: Terms, hyper: CycadaHyper) -> State:
    if "d_acc" not in terms:
        return {}
    both = over_processes(torch.stack([terms["d_acc"].cpu(), torch.ones(())]))
    accuracies = torch.cat([state["accuracies"][1:], both[:1] / both[1]])
    moves = state["moves"] + d_is_ready(state, hyper)
    return {"accuracies": accuracies, "known": state["known"] + 1, "moves": moves}


def d_is_ready(state: State, hyper: CycadaHyper) -> bool:
    """Whether D's mean accuracy in the last steps is above the gate. Before its first it is not."""
    known = min(int(state["known"]), len(state["accuracies"]))
    return bool(known and state["accuracies"][-known:].mean() > hyper.gate)


def gate_is_open(state: State, phase: Phase, hyper: CycadaHyper) -> bool:
    """Whether G moves in this step."""
    return not phase.adversarial or d_is_ready(state, hyper)


# FCNs in the wild (Hoffman et al., 2016): features that D cannot tell apart, and class sizes of the
# target within those of the source. Equations: the paper, by way of a third party's notes; the dual
# problem as in CCNN (Pathak et al., ICCV 2015); numbers: a third party's code.


@dataclass(frozen=True)
class FcnsWildHyper(Hyper):
    """Of FCNs in the wild."""

    lambda_size: float = 0.1  # weight of the loss of class sizes (third party: a tenth of the rate)
    slack: float = 2.0  # largest price of a lower bound (third party: 2)
    solver_steps: int = 50  # of the dual problem
    d_width: int = 1024  # channels of D's two hidden layers (third party: 1024)
    d_dropout: float = 0.5  # share of D's channels that are dropped (third party: 0.5)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_pixel_d(self.d_width, self.d_dropout)
        if self.solver_steps < 1 or min(self.lambda_size, self.slack) < 0:
            raise ValueError("solver_steps must be at least 1; lambda_size, slack not negative")


FCNS_WILD_TUNED: Axes = (("lambda_size", (0.001, 0.003, 0.01, 0.03)), ADVERSARIAL_RATES)


def fcns_wild_d(G: Generator, hyper: FcnsWildHyper) -> PixelD:
    return PixelD(feature_channels(G), (hyper.d_width, hyper.d_width), hyper.d_dropout)


def class_sizes(labels: Iterable[Tensor], num_classes: int) -> Tensor:
    """3 C: lower tenth, mean and upper tenth of each class's share of an image that contains it.

    labels: B H W each. 0 for a class that no image contains.
    """
    shares = []
    for batch in labels:
        for ids in batch:
            counts = torch.bincount(ids.flatten().long(), minlength=256)[:num_classes].double()
            shares.append(counts / counts.sum().clamp(min=1))
    sizes = torch.zeros(3, num_classes, dtype=torch.float64)
    for c, of_class in enumerate(torch.stack(shares).T):
        present = of_class[of_class > 0]
        if len(present):
            marks = present.quantile(torch.tensor([0.1, 0.9], dtype=torch.float64))
            sizes[:, c] = torch.stack(
                [marks[0], present.mean(), marks[1].clamp(min=present.mean())]
            )
    return sizes.float()


def present_classes(p: Tensor, lower: Tensor) -> Tensor:
    """C booleans for one image p, C n: whether a class has more than lower / 10 of the arg-max."""
    counts = torch.bincount(p.argmax(dim=0), minlength=len(p))
    return counts / p.shape[1] > 0.1 * lower


@torch.no_grad()
def within_sizes(
    z: Tensor, least: Tensor, most: Tensor, present: Tensor, slack: float, steps: int
) -> Tensor:
    """p* = argmin KL(p || softmax(z)) whose class means lie in [least, most]: C n, one image.

    z: C n logits. Absent classes get 0. The bounds' prices are mu = l_low - l_up with l_low in
    [0, slack] and l_up >= 0, and p* = softmax(z + mu). A step moves each class's mean to the bound
    that it violates, as if the others stood still, or its price back to 0.
    """
    z = z.double().masked_fill(~present[:, None], -torch.inf)
    mu = torch.zeros_like(least, dtype=torch.float64)
    least, most = (x.double().clamp(min=1e-12) for x in (least, most))
    for _ in range(steps):
        mean = (z + mu[:, None]).softmax(dim=0).mean(dim=1).clamp(min=1e-12)
        to_least, to_most = mu + (least / mean).log(), mu + (most / mean).log()
        wanted = to_least.clamp(min=0, max=slack).where(to_least > 0, to_most.clamp(max=0))
        mu = torch.where(present, (mu + wanted) / 2, mu)
    return (z + mu[:, None]).softmax(dim=0)


def size_loss(logits: Tensor, sizes: Tensor, hyper: FcnsWildHyper) -> Tensor:
    """KL(p* || p) per pixel of B C h w logits, a mean over images; p* is constant.

    The gradient of a class that covers more than a tenth of an image (lower tenth) counts a tenth.
    """
    lower, least, most = sizes
    damped = torch.where(lower > 0.1, 0.1, 1.0).view(1, -1, 1, 1).to(logits)
    logits = logits * damped + (logits * (1 - damped)).detach()
    log_p = logits.flatten(2).log_softmax(dim=1)  # B C n
    wanted = torch.stack([
        within_sizes(z.detach(), least, most, present_classes(z, lower), hyper.slack,
                     hyper.solver_steps)
        for z in log_p
    ]).to(log_p)  # fmt: skip
    return (torch.xlogy(wanted, wanted) - wanted * log_p).sum(dim=1).mean()


def confusion_loss(d_logits: Tensor) -> Tensor:
    """Cross-entropy of D's answer against (1/2, 1/2): log 2 where D cannot tell, else larger."""
    return (F.softplus(d_logits) + F.softplus(-d_logits)).mean() / 2


def fcns_wild_step(
    G: Generator, D: PixelD, batch: Batch, phase: Phase, hyper: FcnsWildHyper, state: State
) -> tuple[Tensor, Terms, Predictions | None]:
    """Source only + lambda_adv * confusion of D on both domains + lambda_size * class sizes.

    Differs: the three losses are one step (third party: three), lambda_adv does not rise from 0,
    whole channels of D are dropped, and sizes are of crops if G's images are (--no-crop).
    """
    f_source = G.features(batch.source)
    loss, terms = source_loss(heads(G, f_source), batch, phase, hyper)
    if not phase.adversarial:
        return loss, terms, None
    f_target = G.features(target_images(batch))
    fixed_d = without_gradient(D)
    l_adv = (confusion_loss(fixed_d(last(f_source))) + confusion_loss(fixed_d(last(f_target)))) / 2
    logits_1, logits_2 = heads(G, f_target)
    l_size = size_loss((logits_1 + logits_2).float(), state["sizes"], hyper)
    terms |= {"adv": l_adv.detach(), "size": l_size.detach()}
    loss = loss + hyper.lambda_adv * l_adv + hyper.lambda_size * l_size
    seen = Predictions(last(f_source).detach(), last(f_target).detach(), None)
    return loss, terms, seen


def first_sizes(G: Generator, hyper: Hyper) -> State:
    return {"sizes": torch.zeros(3, G.num_classes, device=next(G.parameters()).device)}


def sizes_of_source(step: int, G: Generator, images: Images, hyper: Hyper) -> State:
    """Read off the source's labels once, when adaptation starts."""
    if step != hyper.adv_start:
        return {}
    sizes = class_sizes(images.source_labels(), G.num_classes)
    return {"sizes": sizes.to(next(G.parameters()).device)}


# Cross-city (Chen et al., ICCV 2017): one D for all, and one for each class, on features.
# Equations: the paper's; procedure: code that may be the authors'. As in Table 2, without its
# static objects.


@dataclass(frozen=True)
class CrossCityHyper(Hyper):
    """Of Cross-city."""

    lambda_class: float = 0.001  # weight of the class-wise losses (paper: not known)
    class_start: float = 0.1  # share of the adaptation before these begin (code: 1000 of 10,000)
    d_width: int = 64  # channels of the hidden layers of each D (code: 1024)
    d_dropout: float = 0.5  # share of D's channels that are dropped (code: 0.5)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_pixel_d(self.d_width, self.d_dropout)
        if not 0 <= self.class_start <= 1:
            raise ValueError("class_start must be in [0, 1]")


CROSS_CITY_TUNED: Axes = (ADVERSARIAL_RATES, ("lambda_class", (0.0003, 0.001, 0.003, 0.01)))


class CellPredictions(NamedTuple):
    """What the D of Cross-city learn from: features B F h w, and each cell's labels B C h w."""

    source: Tensor
    target: Tensor
    source_cells: Tensor
    target_cells: Tensor


def cross_city_d(G: Generator, hyper: CrossCityHyper) -> PixelD:
    widths = hyper.d_width, hyper.d_width
    return PixelD(feature_channels(G), widths, hyper.d_dropout, 1 + G.num_classes)


def cell_labels(labels: Tensor, num_classes: int, size: Sequence[int]) -> Tensor:
    """Phi: each class's share of a cell, B C h w, of labels B H W; none of unlabelled ones."""
    known = labels < num_classes
    one_hot = F.one_hot(labels.where(known, 0).long(), num_classes) * known[..., None]
    return cell_means(one_hot.permute(0, 3, 1, 2).float(), size)


def class_domain_loss(d_logits: Tensor, cells: Tensor, is_source: bool) -> Tensor:
    """sum_c mean_images sum_n Phi_n^c BCE(D_c(f_n)) / (sum_n Phi_n^c + 5e-6), both B C h w."""
    each = F.softplus(-d_logits if is_source else d_logits)
    mass = cells.sum(dim=(2, 3)) + 5e-6
    return ((cells * each).sum(dim=(2, 3)) / mass).mean(dim=0).sum()


def cross_city_step(
    G: Generator, D: PixelD, batch: Batch, phase: Phase, hyper: CrossCityHyper, state: State
) -> tuple[Tensor, Terms, CellPredictions | None]:
    """Source only + lambda_adv * global + lambda_class * class-wise, with swapped domains.

    Differs: one step of G (the code: three), and lambda_adv does not rise from 0. The D of the
    classes learn from adv_start on, before G follows them. The code has the mean of both domains'
    labels in G's class-wise loss where the paper swaps them.
    """
    f_source = G.features(batch.source)
    logits = heads(G, f_source)
    loss, terms = source_loss(logits, batch, phase, hyper)
    if not phase.adversarial:
        return loss, terms, None
    f_target = G.features(target_images(batch))
    fixed_d = without_gradient(D)
    d_source, d_target = fixed_d(last(f_source)), fixed_d(last(f_target))
    l_adv = adversarial_loss(d_source[:, :1], is_source=False)
    l_adv = l_adv + adversarial_loss(d_target[:, :1], is_source=True)
    with torch.no_grad():
        source_cells = cell_labels(batch.labels, G.num_classes, d_source.shape[-2:])
        p = ensemble(heads(G, f_target), batch.target_size).softmax(dim=1)
        target_cells = cell_means(p, d_target.shape[-2:])
    l_class = class_domain_loss(d_source[:, 1:], source_cells, is_source=False)
    l_class = l_class + class_domain_loss(d_target[:, 1:], target_cells, is_source=True)
    begun = state["begun"].to(l_class)
    loss = loss + hyper.lambda_adv * l_adv + hyper.lambda_class * begun * l_class
    terms |= {"adv": l_adv.detach(), "class": l_class.detach()}
    seen = last(f_source).detach(), last(f_target).detach(), source_cells, target_cells
    return loss, terms, CellPredictions(*seen)


def cross_city_d_step(D: PixelD, predictions: CellPredictions) -> tuple[Tensor, Terms]:
    """The global D's cross-entropy + that of the D of all classes."""
    d_source, d_target = D(predictions.source), D(predictions.target)
    loss = adversarial_loss(d_source[:, :1], is_source=True)
    loss = loss + adversarial_loss(d_target[:, :1], is_source=False)
    loss = loss + class_domain_loss(d_source[:, 1:], predictions.source_cells, is_source=True)
    loss = loss + class_domain_loss(d_target[:, 1:], predictions.target_cells, is_source=False)
    return loss, {
        "d": loss.detach(),
        "d_source": d_source[:, :1].detach().sigmoid().mean(),
        "d_target": d_target[:, :1].detach().sigmoid().mean(),
    }


# CDA, curriculum domain adaptation (Zhang et al., ICCV 2017): easy tasks first. How often each
# class occurs in an image, and what the surest cells show, guide the pixels. Equations: the paper;
# numbers and the loss of landmarks: the authors' code.


@dataclass(frozen=True)
class CdaHyper(Hyper):
    """Of CDA."""

    lambda_layout: float = 0.1  # weight of the label distribution's loss (its code: 0.1)
    lambda_landmark: float = 1.0  # weight of the landmarks' cross-entropy (its code: 1)
    sharpness: float = 5.0  # exponent of the soft histogram (its code: 5)
    landmarks: float = 0.6  # share of an image's cells that are landmarks (paper: 0.6)
    easy_start: float = 0.2  # share of the adaptation before G follows the easy tasks (ours)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.landmarks <= 1 or self.sharpness <= 0 or not 0 <= self.easy_start <= 1:
            raise ValueError("0 < landmarks <= 1, 0 <= easy_start <= 1, and sharpness above 0")


CDA_TUNED: Axes = (
    ("lambda_landmark", (0.003, 0.01, 0.03, 0.1)),
    ("lambda_layout", (0.001, 0.003, 0.01, 0.03)),
)


CELL_ROWS = 8  # of the grid in place of about 100 superpixels


class EasyTasks(nn.Module):
    """Two linear layers on E's features: classes of an image, and of each cell."""

    def __init__(self, channels: int, num_classes: int):
        super().__init__()
        self.whole, self.cell = (nn.Conv2d(channels, num_classes, 1) for _ in range(2))

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """B F h w to logits of the image, B C, and of its cells, B C rows columns."""
        whole = self.whole(features.mean(dim=(2, 3), keepdim=True))
        cells = self.cell(cell_means(features, cells_in(features)))
        return whole[:, :, 0, 0].float(), cells.float()


def cells_in(x: Tensor) -> tuple[int, int]:
    """Rows and columns of cells that are about square."""
    return CELL_ROWS, max(1, round(CELL_ROWS * x.shape[-1] / x.shape[-2]))


class EasyPredictions(NamedTuple):
    """What the easy tasks learn from: the source's features and labels."""

    features: Tensor  # B F h w, of the frozen network
    labels: Tensor  # B H W


def easy_tasks(G: Generator, hyper: Hyper) -> EasyTasks:
    return EasyTasks(feature_channels(G), G.num_classes)


def before_the_easy_tasks(G: Generator, hyper: Hyper) -> State:
    return no_copy(G) | not_begun(G, hyper)


def easy_tasks_begin(step: int, G: Generator, images: Images, hyper: CdaHyper) -> State:
    """The network as it is when adaptation starts, kept for its features; and `begins`."""
    frozen = frozen_copy(G) if step == hyper.adv_start else {}
    return frozen | begins(step, G, images, hyper, "easy_start")


class Features(nn.Module):
    """G.features as a module, so that it can be called with other weights."""

    def __init__(self, G: Generator):
        super().__init__()
        self.G = G

    def forward(self, images: Tensor) -> Any:
        return self.G.features(images)


@torch.no_grad()
def frozen_features(G: Generator, state: State, images: Tensor) -> Tensor:
    """The features, B F h w, of the network as it was when adaptation started."""
    weights = {f"G.{k}": v for k, v in labeller_of(state).items()}
    with evaluating(G):
        return last(torch.func.functional_call(Features(G), weights, (images,)))


def soft_histogram(p: Tensor, sharpness: float) -> Tensor:
    """B C: the mean over pixels of (p_c / max p)^sharpness, over its sum; p: B C H W.

    For one-hot p it is the histogram of classes.
    """
    sharp = (p / p.amax(dim=1, keepdim=True).clamp(min=1e-12)) ** sharpness
    counts = sharp.mean(dim=(2, 3))
    return counts / counts.sum(dim=1, keepdim=True)


def label_distribution_loss(p: Tensor, wanted: Tensor, sharpness: float) -> Tensor:
    """The mean over images of -sum_c r_c log r'_c; r: wanted, B C; r': soft histogram of p."""
    found = soft_histogram(p, sharpness).clamp(min=1e-8)
    return -(wanted * found.log()).sum(dim=1).mean()


def landmark_labels(cells: Tensor, share: float, size: tuple[int, int] | torch.Size) -> Tensor:
    """B H W int64: the class of each cell whose confidence is among an image's surest, else 255.

    cells: B C rows columns logits.
    """
    confidence, classes = cells.softmax(dim=1).max(dim=1)
    kept = max(1, round(share * confidence[0].numel()))
    least = confidence.flatten(1).topk(kept, dim=1).values[:, -1]
    labels = classes.where(confidence >= least[:, None, None], 255)
    return F.interpolate(labels[:, None].float(), size=tuple(size), mode="nearest")[:, 0].long()


def cda_step(
    G: Generator, easy: EasyTasks, batch: Batch, phase: Phase, hyper: CdaHyper, state: State
) -> tuple[Tensor, Terms, EasyPredictions | None]:
    """Source only + lambda_layout * label distribution + lambda_landmark * CE of landmarks.

    The easy tasks see the features of the network as it was when adaptation started, so G does not
    change what it is to follow.
    Differs: they are linear layers on these features, where the original has other networks; cells
    of a grid, not superpixels; no balance of classes.
    """
    loss, terms = source_loss(G(batch.source), batch, phase, hyper)
    if not phase.adversarial:
        return loss, terms, None
    images = target_images(batch)
    logits = G(images)
    p = ensemble(logits, batch.target_size).softmax(dim=1)
    with torch.no_grad():
        whole, cells = easy(frozen_features(G, state, images))
        labels = landmark_labels(cells, hyper.landmarks, p.shape[-2:])
    l_layout = label_distribution_loss(p, whole.softmax(dim=1), hyper.sharpness)
    l_landmark = labelled_loss(logits, labels, hyper)
    terms |= {"layout": l_layout.detach(), "landmark": l_landmark.detach()}
    guide = hyper.lambda_layout * l_layout + hyper.lambda_landmark * l_landmark
    loss = loss + state["begun"].to(guide) * guide
    return loss, terms, EasyPredictions(frozen_features(G, state, batch.source), batch.labels)


def easy_d_step(easy: EasyTasks, predictions: EasyPredictions) -> tuple[Tensor, Terms]:
    """Both easy tasks on the source: its label histogram, and each cell's commonest class."""
    features, labels = predictions
    whole, cells = easy(features)
    shares = cell_labels(labels, whole.shape[1], cells.shape[-2:])  # B C rows columns
    histogram = shares.mean(dim=(2, 3))
    histogram = histogram / histogram.sum(dim=1, keepdim=True).clamp(min=1e-12)
    l_whole = -(histogram * whole.float().log_softmax(dim=1)).sum(dim=1).mean()
    most = shares.argmax(dim=1).where(shares.sum(dim=1) > 0, 255)
    l_cells = segmentation_loss(cells, most)
    return l_whole + l_cells, {"whole": l_whole.detach(), "cells": l_cells.detach()}
