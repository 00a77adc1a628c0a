"""The other systems of Tables 1 and 2, and those that came after: their losses and pure steps.

Each section is one system: its equation and source, its numbers, its steps, and what differs from
the original. Numbers that a section does not name (length, rates of G, segmentation loss) are those
of clan.Hyper, for all systems alike. Until adv_start each takes the step of source only. The
ensemble of C1 and C2 is the one classifier of a system that has one; labels are learnt as seg_heads
says. Losses need only torch and can be copied by themselves.

    MinEnt, AdvEnt   Vu et al., CVPR 2019 (not in the tables)
    MCD              Saito et al., CVPR 2018
    ST, CBST         Zou et al., ECCV 2018 (ST is not in the tables)
    multi level      Tsai et al., CVPR 2018 (AdaptSegNet; TAN is its single level)

Those that align features or class sizes stand in alignment.py.

Shapes: B images, C classes, H W label grid, h w feature grid of G.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

import clan
from clan import Batch, Hyper, Phase, Predictions, Terms, domain_logits, upsample, without_gradient
from losses import adversarial_loss, segmentation_loss
from models import DilatedHead, Discriminator, Generator

Logits = tuple[Tensor, Tensor]  # of the two heads, each B C h w
State = dict[str, Tensor]  # of a method, saved in each checkpoint

# The two numbers of a method that `study.py tune` chooses, one after the other, and their values
# for tiny on streets. No values: four more of the first number, around its best.
Axes = tuple[tuple[str, tuple[float, ...]], tuple[str, tuple[float, ...]]]
TUNED: Axes = (  # of TAN and CLAN
    ("lambda_adv", (0.0125, 0.025, 0.05, 0.1)),
    ("lr_d", (3.33e-5, 1e-4, 3e-4, 9e-4)),
)


class Images(NamedTuple):
    """What a method may read between two steps, each as an iterator over batches."""

    target: Callable[[], Iterable[Tensor]]  # training images, B 3 H W: this process's part
    source_labels: Callable[[], Iterable[Tensor]]  # B H W, all of them


def source_loss(logits: Logits, batch: Batch, phase: Phase, hyper: Hyper) -> tuple[Tensor, Terms]:
    """(loss, terms) of source only (Eq. 3), from both heads' logits of the source's images."""

    def no_d(p: Tensor) -> Tensor:
        raise ValueError("the step of source only asks no D")

    as_source = replace(hyper, method="source")
    loss, terms, _ = clan.g_step(as_generator(logits), no_d, batch, phase, as_source)
    return loss, terms


def as_generator(logits: Logits) -> clan.GeneratorLike:
    """A G whose answer is known already."""

    class Known:
        def __call__(self, images: Tensor, /) -> Logits:
            return logits

        def classifier_weights(self, biases: bool) -> tuple[list[Tensor], list[Tensor]]:
            raise ValueError("only CLAN compares the heads' weights")

    return Known()


def target_images(batch: Batch) -> Tensor:
    if batch.target is None or batch.target_size is None:
        raise ValueError("a step with the target needs a batch that has one: see data.batch_at")
    return batch.target


def ensemble(logits: Logits, size: tuple[int, int] | torch.Size | None) -> Tensor:
    """Both heads' B C h w to the logits of the ensemble, B C H W."""
    return upsample(logits[0] + logits[1], size or logits[0].shape[-2:])


def over_heads(
    loss: Callable[[Tensor], Tensor],
    logits: Logits,
    size: tuple[int, int] | torch.Size,
    hyper: Hyper,
) -> Tensor:
    """A loss of B C H W logits as seg_heads says: of the ensemble, or the sum of each head's."""
    if hyper.seg_heads == "ensemble":
        return loss(ensemble(logits, size))
    return loss(upsample(logits[0], size)) + loss(upsample(logits[1], size))


def labeller_of(state: State) -> State:
    """The weights of the frozen copy of G that a method's state holds."""
    of_copy = {k for k in state if k.startswith(LABELLER)}
    return {k.removeprefix(LABELLER): state[k] for k in of_copy}


LABELLER = "labeller."


def frozen_copy(G: Generator) -> State:
    return {LABELLER + k: v.detach().clone() for k, v in G.state_dict().items()}


def no_copy(G: Generator) -> State:
    """Before there is one, with the names and shapes of one."""
    return {LABELLER + k: torch.zeros_like(v) for k, v in G.state_dict().items()}


def labelled_loss(logits: Logits, labels: Tensor, hyper: Hyper) -> Tensor:
    """Eq. 3 on labels of the target, B H W."""
    loss = partial(segmentation_loss, labels=labels, gamma=hyper.gamma)
    return over_heads(loss, logits, labels.shape[-2:], hyper)


# CLAN from the warm-up that all others share.


def late_clan_step(
    G: Generator, D: Discriminator, batch: Batch, phase: Phase, hyper: Hyper
) -> tuple[Tensor, Terms, Predictions | None]:
    """CLAN whose Eq. 4 begins with adaptation; before that it is source only."""
    method = "clan" if phase.adversarial else "source"
    return clan.g_step(G, D, batch, phase, replace(hyper, method=method))


# MinEnt and AdvEnt (Vu et al., CVPR 2019): the network should be as sure of the target as it is of
# the source. Equations, and numbers of MinEnt: the authors' code.


def entropy_parts(p: Tensor) -> Tensor:
    """-p log p / log C of probabilities p over C, B C H W. Their sum over C lies in [0, 1].

    0 where p is 0, and its gradient is finite there. The even distribution has a sum of 1.
    """
    p = p.to(torch.promote_types(p.dtype, torch.float32))
    return -p * p.clamp(min=1e-30).log() / math.log(p.shape[1])


def entropy_loss(p: Tensor) -> Tensor:
    """The mean over pixels of the entropy of p, B C H W, over its largest value: in [0, 1]."""
    return entropy_parts(p).sum(dim=1).mean()


@dataclass(frozen=True)
class MinEntHyper(Hyper):
    """Of MinEnt."""

    lambda_ent: float = 0.001  # weight of the target's entropy (its code: 0.001)


MINENT_TUNED: Axes = (("lambda_ent", (0.003, 0.03, 0.3, 3.0)), ("lambda_ent", ()))


def minent_step(
    G: Generator, D: None, batch: Batch, phase: Phase, hyper: MinEntHyper
) -> tuple[Tensor, Terms, None]:
    """Source only + lambda_ent * entropy of the target: the original with one level."""
    loss, terms = source_loss(G(batch.source), batch, phase, hyper)
    if not phase.adversarial:
        return loss, terms, None
    p = ensemble(G(target_images(batch)), batch.target_size).softmax(dim=1)
    l_ent = entropy_loss(p)
    return loss + hyper.lambda_ent * l_ent, terms | {"ent": l_ent.detach()}, None


# A coarse grid over large factors: nothing is known of how much its D is worth. Its code: 0.001.
ADVENT_TUNED: Axes = (("lambda_adv", (0.0005, 0.002, 0.008, 0.03)), TUNED[1])


def advent_step(
    G: Generator, D: Discriminator, batch: Batch, phase: Phase, hyper: Hyper
) -> tuple[Tensor, Terms, Predictions | None]:
    """TAN, whose D sees -p log p / log C in place of p. Its D step is TAN's.

    Differs from the original's single level: two heads, a warm-up, and D's answers are resized to
    the label grid before their mean.
    """
    logits = G(batch.source)
    loss, terms = source_loss(logits, batch, phase, hyper)
    if not phase.adversarial:
        return loss, terms, None
    source = entropy_parts(ensemble(logits, batch.labels.shape[-2:]).softmax(dim=1))
    target = ensemble(G(target_images(batch)), batch.target_size)
    target = entropy_parts(target.softmax(dim=1))
    d_target = domain_logits(without_gradient(D), target)
    l_adv = adversarial_loss(d_target, is_source=True)
    loss = loss + hyper.lambda_adv * l_adv
    terms["adv"] = l_adv.detach()
    return loss, terms, Predictions(source.detach(), target.detach(), None)


# MCD, maximum classifier discrepancy (Saito et al., CVPR 2018): the heads look for what they can
# disagree on in the target, and E takes it away. Equations: paper; repetitions: the authors' code.


def classifier_discrepancy(p1: Tensor, p2: Tensor) -> Tensor:
    """d(p1, p2): the mean of |p1 - p2| over classes and pixels of two B C H W probabilities.

    A scalar in [0, 2/C]: 0 for equal predictions, 2/C for one-hot predictions that differ. Where
    p1 = p2 its gradient is zero, so two equal heads would stay equal.
    """
    dtype = torch.promote_types(p1.dtype, torch.float32)
    return (p1.to(dtype) - p2.to(dtype)).abs().mean()


@dataclass(frozen=True)
class McdHyper(Hyper):
    """Of MCD."""

    lambda_dis: float = 1.0  # weight of the discrepancy in B and C (its code: 1, of C alone)
    mcd_steps: int = 4  # how often E learns from one batch, step C (paper: 2 to 4; its code: 4)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mcd_steps < 1 or self.lambda_dis < 0:
            raise ValueError("mcd_steps must be at least 1, and lambda_dis not negative")


MCD_TUNED: Axes = (("lambda_dis", (0.3, 1.0, 3.0, 10.0)), ("mcd_steps", (1, 2, 3, 4)))


def mcd_step(
    G: Generator, D: None, batch: Batch, phase: Phase, hyper: McdHyper
) -> tuple[Tensor, Terms, None]:
    """Step A: source only with a loss for each head, for E, C1 and C2.

    Differs: the heads are score layers alone, and it begins with a warm-up. The original's heads
    for VGG have fully connected layers of their own, and heads learn as fast as E. With
    --batchnorm batch each of its forward passes moves BatchNorm's running statistics; "before"
    and "running" do not.
    """
    each = replace(hyper, seg_heads="each") if phase.adversarial else hyper
    return *source_loss(G(batch.source), batch, phase, each), None


def mcd_heads(G: Generator, batch: Batch, phase: Phase, hyper: McdHyper) -> tuple[Tensor, Terms]:
    """Step B: the same source loss - lambda_dis * d(target), for C1 and C2 alone."""
    with torch.no_grad():
        source, target = G.features(batch.source), G.features(target_images(batch))
    each = replace(hyper, seg_heads="each")
    loss, _ = source_loss((G.C1(source), G.C2(source)), batch, phase, each)
    l_dis = head_discrepancy((G.C1(target), G.C2(target)), batch)
    return loss - hyper.lambda_dis * l_dis, {"dis_heads": l_dis.detach()}


def mcd_features(G: Generator, batch: Batch, phase: Phase, hyper: McdHyper) -> tuple[Tensor, Terms]:
    """Step C: lambda_dis * d(target), for E alone; made mcd_steps times with the same batch."""
    target = G.features(target_images(batch))
    fixed = without_gradient(G.C1), without_gradient(G.C2)
    l_dis = head_discrepancy((fixed[0](target), fixed[1](target)), batch)
    return hyper.lambda_dis * l_dis, {"dis": l_dis.detach()}


def head_discrepancy(logits: Logits, batch: Batch) -> Tensor:
    size = batch.target_size or logits[0].shape[-2:]
    p1, p2 = (upsample(x, size).softmax(dim=1) for x in logits)
    return classifier_discrepancy(p1, p2)


def mcd_later_steps(hyper: McdHyper) -> tuple[Callable[..., tuple[Tensor, Terms]], ...]:
    return (mcd_heads, *[mcd_features] * hyper.mcd_steps)


# ST and CBST, (class-balanced) self-training (Zou et al., ECCV 2018). In rounds: a frozen copy of G
# labels the target's most confident pixels, then G learns from these and from the source.
# Equations: paper; histogram in place of sorting: ours.


def pseudo_labels(p: Tensor, thresholds: Tensor, ignore_index: int = 255) -> Tensor:
    """argmax_c p_c / t_c where that ratio is above 1, else `ignore_index`.

    p: B C H W probabilities. thresholds: C, in (0, 1]. Returns B H W int64. With equal thresholds
    it is the arg-max of p where p is above them.
    """
    ratio, labels = (p / thresholds.to(p).view(1, -1, 1, 1)).max(dim=1)
    return labels.where(ratio > 1, ignore_index)


BINS = 1000  # of confidence
LOWEST, HIGHEST = (
    -7.0,
    16.6,
)  # log-odds of a confidence of 0.001, and of the closest to 1 in float32


def confidence_counts(p: Tensor) -> Tensor:
    """How many pixels of p, B C H W, are predicted as each class with a confidence in each bin.

    Returns C BINS, float64. Bin k holds the confidences from `least_of_bin(k)` on. Bins have one
    width in log-odds, .024, since most confidences of a trained network are close to 1.
    Raises FloatingPointError if a probability is not finite.
    """
    confidence, classes = p.max(dim=1)
    if not confidence.isfinite().all():
        raise FloatingPointError("the confidence of the target's labels is not finite")
    place = (confidence.double().logit() - LOWEST) * (BINS / (HIGHEST - LOWEST))
    bins = place.clamp(0, BINS - 1).long()
    places = (classes * BINS + bins).flatten()
    return torch.bincount(places, minlength=p.shape[1] * BINS).view(-1, BINS).double()


def least_of_bin(k: Tensor) -> Tensor:
    """The confidence with which bin k begins."""
    return (k.double() * ((HIGHEST - LOWEST) / BINS) + LOWEST).sigmoid()


def class_thresholds(counts: Tensor, portion: float, balanced: bool) -> Tensor:
    """The confidences, C, above which `portion` of the predicted pixels lie: of each class (CBST),
    or of all (ST). From `confidence_counts`, so exact to a bin. 1 for a class never predicted.
    """
    if not balanced:
        counts = counts.sum(dim=0, keepdim=True).expand_as(counts)
    above = counts.flip(1).cumsum(dim=1).flip(1)  # C BINS: in this bin or a higher one
    total = counts.sum(dim=1, keepdim=True)
    enough = (above >= portion * total).sum(dim=1)  # this many lowest bins keep the portion
    threshold = least_of_bin((enough - 1).clamp(min=1))
    return threshold.where(total[:, 0] > 0, 1.0).float()


@dataclass(frozen=True)
class SelfTrainingHyper(Hyper):
    """Of ST and CBST."""

    lambda_st: float = 1.0  # weight of a pseudo-label; 1: that of a label of the source (paper: 1)
    rounds: int = 3  # rounds of labelling and learning (its code: 3 with ResNet-101)
    portion: float = 0.2  # share of the pixels that the first round labels (paper: 0.2)
    portion_step: float = 0.05  # by which it grows each round (paper: 0.05)
    portion_max: float = 0.5  # it grows no further (paper: 0.5)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rounds < 1 or not (0 < self.portion <= 1 and 0 < self.portion_max <= 1):
            raise ValueError("rounds must be at least 1; portion and portion_max in (0, 1]")
        if self.portion_step < 0:
            raise ValueError("portion_step must not be negative: the share grows")
        if self.lambda_st < 0:
            raise ValueError("lambda_st must not be negative: it is a weight")


SELF_TRAINING_TUNED: Axes = (
    ("portion", (0.2, 0.35, 0.5, 0.7)),
    ("lambda_st", (0.1, 0.3, 1.0, 3.0)),
)


def round_at(step: int, hyper: SelfTrainingHyper) -> int | None:
    """The round that begins with this step, from 0, or None. Rounds have equal lengths."""
    length = (hyper.steps - hyper.adv_start) / hyper.rounds
    starts = [hyper.adv_start + math.ceil(r * length) for r in range(hyper.rounds)]
    return starts.index(step) if step in starts else None


def portion_of(number: int, hyper: SelfTrainingHyper) -> float:
    """The share that this round labels. It grows up to portion_max, or stays if it is above."""
    grown = min(hyper.portion + number * hyper.portion_step, hyper.portion_max)
    return max(hyper.portion, grown)


def first_labeller(G: Generator, hyper: SelfTrainingHyper) -> State:
    """Before the first round: thresholds that nothing passes, and no labeller."""
    thresholds = torch.ones(G.num_classes, device=next(G.parameters()).device)
    return no_copy(G) | {"thresholds": thresholds}


@torch.no_grad()
def new_round(
    step: int, G: Generator, images: Images, hyper: SelfTrainingHyper, balanced: bool
) -> State:
    """The state of the round that begins with this step; {} if none does."""
    number = round_at(step, hyper)
    if number is None:
        return {}
    counts = torch.zeros(G.num_classes, BINS, dtype=torch.float64)
    with evaluating(G):
        for batch in images.target():
            p = ensemble(G(batch), batch.shape[-2:]).softmax(dim=1)
            counts += confidence_counts(p).cpu()
    counts = over_processes(counts)
    thresholds = class_thresholds(counts, portion_of(number, hyper), balanced)
    return frozen_copy(G) | {"thresholds": thresholds.to(next(G.parameters()).device)}


@contextlib.contextmanager
def evaluating(G: nn.Module) -> Iterator[None]:
    """G in evaluation mode, then each of its modules as it was."""
    modes = {module: module.training for module in G.modules()}
    G.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def over_processes(x: Tensor) -> Tensor:
    """The sum of x over all processes of the group, if there is one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(x)
    return x


def self_training_step(
    G: Generator, D: None, batch: Batch, phase: Phase, hyper: SelfTrainingHyper, state: State
) -> tuple[Tensor, Terms, None]:
    """Eq. 3 over the source's labels and the target's pseudo-labels, as one mean over all of them.

    A pseudo-label counts lambda_st times as much as a label. Each process has a mean of its own.
    Differs: no mining of rare classes, no spatial prior, no choice of images; labels from one
    scale, and of the pixels that G learns from, with no scale, crop or mirror of its own.
    """
    loss, terms = source_loss(G(batch.source), batch, phase, hyper)
    if not phase.adversarial:
        return loss, terms, None
    images, size = target_images(batch), batch.target_size
    with torch.no_grad(), evaluating(G):
        logits = torch.func.functional_call(G, labeller_of(state), (images,))
        labels = pseudo_labels(ensemble(logits, size).softmax(dim=1), state["thresholds"])
    l_st = labelled_loss(G(images), labels, hyper)
    terms |= {"st": l_st.detach(), "kept": (labels != 255).float().mean()}
    of_source, of_target = ((x != 255).sum() for x in (batch.labels, labels))
    of_target = hyper.lambda_st * of_target
    share = of_target / (of_source + of_target).clamp(min=1e-12)
    return (1 - share) * loss + share * l_st, terms, None


# AdaptSegNet with two levels (Tsai et al., CVPR 2018): TAN twice, on the prediction and on that of
# an auxiliary head one stage earlier. Equations and numbers: the authors' code.

MIDDLE = {  # channels and head's dilations of the stage before the last
    "r101": (1024, (6, 12, 18, 24)),
    "tiny": (64, (1, 2, 4, 6)),
    "lite0": (192, (1, 2, 4, 6)),
}


class Levels(nn.Module):
    """The auxiliary head and both D. The head learns with G (`of_g`)."""

    def __init__(self, G: Generator, hyper: Hyper):
        super().__init__()
        if G.backbone not in MIDDLE:
            raise ValueError(
                f"multi is not defined for {G.backbone}: use {', '.join(MIDDLE)}, or tan"
            )
        channels, dilations = MIDDLE[G.backbone]
        self.of_g = DilatedHead(channels, dilations, G.num_classes)
        for m in self.of_g.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.normal_(m.weight, std=hyper.head_std)
        self.main, self.aux = (
            Discriminator(G.num_classes, hyper.d_channels, hyper.d_strides) for _ in range(2)
        )


@dataclass(frozen=True)
class MultiHyper(Hyper):
    """Of AdaptSegNet's two levels."""

    lambda_seg_aux: float = 0.1  # weight of the auxiliary head's source loss (its code: 0.1)
    lambda_adv_aux: float = 0.0002  # of its adversarial loss (its code: a fifth of lambda_adv)


MULTI_TUNED: Axes = (TUNED[0], ("lambda_adv_aux", (0.001, 0.003, 0.01, 0.03)))


class TwoPredictions(NamedTuple):
    """What both D learn from."""

    main: Predictions
    aux: Predictions


def middle_and_logits(G: Generator, images: Tensor) -> tuple[Tensor, Logits]:
    """(features of the stage before the last, both heads' logits)."""
    found: list[Tensor] = []
    stages = {"r101": "layer3", "tiny": "4", "lite0": "blocks.14"}
    stage = G.E.get_submodule(stages[G.backbone])
    handle = stage.register_forward_hook(lambda module, inputs, output: found.append(output))
    try:
        logits = G(images)
    finally:
        handle.remove()
    return found[0], logits


def multi_step(
    G: Generator, levels: Levels, batch: Batch, phase: Phase, hyper: MultiHyper
) -> tuple[Tensor, Terms, TwoPredictions | None]:
    """TAN + lambda_seg_aux * CE(auxiliary) + lambda_adv_aux * its Eq. 2.

    Differs: the auxiliary head begins at adv_start, and the main prediction is of two heads.
    """
    if not phase.adversarial:
        return *source_loss(G(batch.source), batch, phase, hyper), None
    labels, size = batch.labels.long(), batch.labels.shape[-2:]
    middle, logits = middle_and_logits(G, batch.source)
    loss, terms = source_loss(logits, batch, phase, hyper)
    aux = upsample(levels.of_g(middle), size)
    l_aux = segmentation_loss(aux, labels, gamma=hyper.gamma)
    sources = ensemble(logits, size).softmax(dim=1), aux.softmax(dim=1)

    middle, logits = middle_and_logits(G, target_images(batch))
    aux = upsample(levels.of_g(middle), batch.target_size or size)
    targets = ensemble(logits, batch.target_size).softmax(dim=1), aux.softmax(dim=1)
    l_adv, l_adv_aux = (
        adversarial_loss(domain_logits(without_gradient(D), p), is_source=True)
        for D, p in zip((levels.main, levels.aux), targets, strict=True)
    )
    loss = loss + hyper.lambda_seg_aux * l_aux
    loss = loss + hyper.lambda_adv * l_adv + hyper.lambda_adv_aux * l_adv_aux
    terms |= {"seg_aux": l_aux.detach(), "adv": l_adv.detach(), "adv_aux": l_adv_aux.detach()}
    both = (
        Predictions(s.detach(), t.detach(), None) for s, t in zip(sources, targets, strict=True)
    )
    return loss, terms, TwoPredictions(*both)


def multi_d_step(levels: Levels, predictions: TwoPredictions) -> tuple[Tensor, Terms]:
    """The losses of both D, added: Adam treats each parameter by itself."""
    loss, terms = clan.d_step(levels.main, predictions.main)
    loss_aux, terms_aux = clan.d_step(levels.aux, predictions.aux)
    return loss + loss_aux, terms | {"d_aux": terms_aux["d"]}
