"""A second stage after adaptation: a slow copy of G labels the target's images, and G learns them.

    python train.py --method selftrain --init runs/RUN           # from any run, D is not read
    python train.py --method tan --selftrain-start 1600          # both, one after the other
    python train.py --fourier 0.08                               # FDA, with any method

    state = first_teacher(G, hyper)                              # in your own code
    loss, terms, _ = selftrain_step(G, None, batch, phase, hyper, state)
    loss.backward(); opt_g.step(); opt_g.zero_grad()
    state |= next_teacher(state, G, terms, hyper)                # the result: teacher_of(state)

This is not in the paper. The teacher is the exponential moving average of G, the student. It sees
the target's image as the other methods do; the student sees it with other colours, with objects of
the source pasted in, or with parts hidden. Each label counts as much as it is trusted: by the
teacher's confidence, or by the agreement of its two heads, M (Section 3.2). The teacher at the last
step is the result. The flags that say what the run was are given again (--backbone, --src, --tgt,
--fourier and others). train.py names those of the data that differ.

Sources: mean teacher (Tarvainen and Valpola, 2017), class mix (Olsson et al., 2021), masked patches
(MIC, Hoyer et al., 2023). All draws are from `generator`, or from torch's own, which train.py seeds
for each step: they depend on (seed, step) and the process. Class mix draws first, and masks have a
generator of their own, so neither is changed by the other's flag. `generator` is one of the CPU.

Shapes: B images, C classes, H W label grid.
"""

from dataclasses import dataclass
from functools import partial
from math import ceil
from typing import Literal

import torch
from torch import Tensor

from baselines import (
    Images,
    Logits,
    State,
    class_thresholds,
    confidence_counts,
    ensemble,
    evaluating,
    over_heads,
    source_loss,
    target_images,
)
from clan import Batch, Hyper, Phase, Terms, upsample
from losses import discrepancy_map
from models import Generator

Trust = Literal["confidence", "m", "both", "constant", "least_m"]
# The weights that read a number; the others refuse it.
READ_BY: dict[str, tuple[Trust, ...]] = {
    "trusted": ("confidence", "both", "least_m"),
    "tau": ("m", "both"),
}


@dataclass(frozen=True)
class SelftrainHyper(Hyper):
    """Of the second stage."""

    teacher_momentum: float = 0.999  # share of the teacher that a step keeps; 0: it is the student
    lambda_target: float = 1.0  # weight of the loss on the teacher's labels
    trust: Trust = "confidence"  # a label's weight is by this; least_m: the least M of each class
    trusted: float = 0.5  # least share of each class's labels in a batch that count
    threshold: float = 0.0  # labels of lower confidence do not count; above 1 none does
    tau: float = 0.01  # the weight by M is exp(-M / tau); tiny: 1.6e-5 (a larger one is constant)
    trust_shuffled: bool = False  # for studies: the weights of each image, at random places
    source_free: bool = False  # learn the teacher's labels alone; the source's files are still read
    class_mix: bool = False  # paste half of the source's classes into the target's images
    masked: float = 0.0  # share of the target's image that is hidden, in square patches
    patches: int = 8  # patches from top to bottom
    colours: float = 0.2  # largest change of the student's colours: gain, offset, saturation

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("teacher_momentum", "trusted", "masked", "colours"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1]")
        if self.tau <= 0 or self.patches < 1 or min(self.threshold, self.lambda_target) < 0:
            raise ValueError(
                "tau must be above 0, patches at least 1, threshold and lambda_target not negative"
            )
        if self.source_free and self.class_mix:
            raise ValueError("class_mix pastes the source in, and source_free has none: drop one")
        for name, needed, remedy in (
            ("tau", self.trust in READ_BY["tau"], "trust m or both"),
            ("trusted", self.trust in READ_BY["trusted"], "trust confidence, both or least_m"),
            ("patches", self.masked > 0, "masked above 0"),
        ):
            if not needed and getattr(self, name) != getattr(SelftrainHyper, name):
                raise ValueError(f"{name} has no effect here: it needs {remedy}")


# Labels and their weights.


def trust_in(
    p: Tensor, m: Tensor, trust: Trust, trusted: float, threshold: float, tau: float
) -> Tensor:
    """The weight of each pixel's label, B H W in [0, 1].

    p: B C H W, the teacher's probabilities; the labels are their arg-max. m: B 1 H W, the
    discrepancy of its heads.
    confidence: 1 for the surest pixels of each class, at least the share `trusted` of them, else 0.
        Equal ones count alike. m: exp(-M / tau). both: the product of the two. constant: 1.
        least_m: as confidence, but the pixels with the least M are the surest.
    Below `threshold` of confidence all weights are 0. Shares are of the images given here.
    """
    confidence, labels = p.max(dim=1)
    weight = (confidence > threshold).to(p)
    if trust in ("confidence", "both"):
        of_class = class_thresholds(confidence_counts(p), trusted, balanced=True).to(p)
        weight = weight * (confidence >= of_class[labels])
    if trust in ("m", "both"):
        weight = weight * (-m[:, 0] / tau).exp()
    if trust == "least_m":
        weight = weight * least_of_class(m[:, 0], labels, trusted)
    return weight


def least_of_class(values: Tensor, labels: Tensor, share: float) -> Tensor:
    """1 for the smallest values of each label, at least this share of them, else 0. All B H W."""
    kept = torch.zeros_like(values)
    for label in labels.unique():
        here = labels == label
        of_class = values[here]
        count = max(1, ceil(share * len(of_class)))
        kept[here] = (of_class <= of_class.kthvalue(count).values).to(kept)
    return kept


def trust_of(hyper: SelftrainHyper, p: Tensor, m: Tensor) -> Tensor:
    """`trust_in` with the numbers of a run."""
    return trust_in(p, m, hyper.trust, hyper.trusted, hyper.threshold, hyper.tau)


def shuffled(weight: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Each image's weights, B H W, at random places."""
    values = weight.flatten(1)
    order = torch.rand(values.shape, generator=generator).argsort(dim=1).to(weight.device)
    return values.gather(1, order).view_as(weight)


def weighted_loss(logits: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    """sum w CE / sum w over the labelled pixels. Any constant weight above 0 gives the same loss.

    logits: B C H W. labels: B H W integers, 255 = none. weight: B H W, not negative.
    Returns a scalar in nats; 0, with a zero gradient, if no labelled pixel has a weight.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    each = torch.nn.functional.cross_entropy(
        logits.to(dtype), labels.long(), ignore_index=255, reduction="none"
    )
    weight = weight.to(dtype) * (labels != 255)
    total = weight.sum()
    return (weight * each).sum() / total.where(total > 0, 1)


# What the student sees. Each is a function of its arguments and of the draws.


def mix_classes(
    images: Tensor,
    labels: Tensor,
    weight: Tensor,
    source: Tensor,
    source_labels: Tensor,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Images, labels and weights with half of the classes of a source image pasted in.

    images: B 3 H W of the target, 0 to 255. labels, weight: B H W, the teacher's. source: B 3 h w,
    resized to H W. source_labels: B h w; these pixels count as much as the image's labels do on
    average. Unlabelled ones stay out.
    """
    size = images.shape[-2:]
    if labels.shape[-2:] != size or source_labels.shape[-2:] != source.shape[-2:]:
        raise ValueError(
            "class mix needs images and labels of one size: give --scales 1 --scale-probs 1, or "
            "--no-class-mix"
        )
    if source.shape[-2:] != size:
        resize = torch.nn.functional.interpolate
        source = resize(source.float(), size, mode="bilinear", antialias=True).round().to(images)
        nearest = resize(source_labels[:, None].float(), size, mode="nearest-exact")
        source_labels = nearest[:, 0].to(source_labels)
    pasted = torch.zeros_like(labels, dtype=torch.bool)
    for i, ids in enumerate(source_labels):
        classes = ids[ids != 255].unique()
        order = torch.randperm(len(classes), generator=generator).to(classes.device)
        chosen = classes[order[: (len(classes) + 1) // 2]]
        pasted[i] = torch.isin(ids, chosen)
    return (
        source.where(pasted[:, None], images),
        source_labels.to(labels).where(pasted, labels),
        weight.mean(dim=(1, 2), keepdim=True).where(pasted, weight),
    )


def hide_patches(
    images: Tensor, share: float, patches: int, generator: torch.Generator | None = None
) -> Tensor:
    """Images B 3 H W, 0 to 255, in which about `share` of the square patches have the image's mean
    colour."""
    height, width = images.shape[-2:]
    side = max(1, round(height / patches))
    rows, columns = -(-height // side), -(-width // side)
    hidden = torch.rand(len(images), 1, rows, columns, generator=generator) < share
    hidden = hidden.repeat_interleave(side, 2).repeat_interleave(side, 3)[..., :height, :width]
    mean = images.float().mean(dim=(2, 3), keepdim=True).round().to(images)
    return mean.where(hidden.to(images.device), images)


def change_colours(
    images: Tensor, strength: float, generator: torch.Generator | None = None
) -> Tensor:
    """uint8 images B 3 H W with other colours.

    Each channel of an image gets a gain and an offset of up to `strength` of the range. Its
    saturation changes by up to twice as much.
    """
    if strength == 0:
        return images

    def draw(*shape: int) -> Tensor:  # in [-strength, strength]
        x = torch.rand(len(images), *shape, 1, 1, generator=generator)
        return strength * (2 * x - 1).to(images.device)

    x = images.float()
    grey = x.mean(dim=1, keepdim=True)
    x = grey + (x - grey) * (1 + 2 * draw(1))
    x = x * (1 + draw(3)) + 255 * draw(3)
    return x.round().clamp(0, 255).to(torch.uint8)


# FDA (Yang and Soatto, CVPR 2020): the style of a target's image for one of the source, before
# anything is learnt. --fourier.


def fourier_style(source: torch.Tensor, target: torch.Tensor, beta: float) -> torch.Tensor:
    """The source's image with the target's amplitudes at all frequencies below beta.

    source, target: ... H W of one size, float32 or float64 in any range. beta: in cycles a pixel,
    compared with the vertical and with the horizontal frequency; 0 changes nothing, above 0.5 all
    amplitudes are the target's. Phases stay the source's. Returns the shape of `source`; its values
    may leave the range. (The authors' code has a square band, floor(beta * min(H, W)) wide on each
    side.)
    Raises ValueError if the two differ in shape.
    """
    if source.shape != target.shape:
        raise ValueError(
            f"the images differ in shape: {tuple(source.shape)}, {tuple(target.shape)}"
        )
    height, width = source.shape[-2:]
    rows, columns = (torch.fft.fftfreq(n, device=source.device).abs() for n in (height, width))
    low = (rows[:, None] < beta) & (columns < beta)  # H W
    of_source, of_target = torch.fft.fft2(source), torch.fft.fft2(target)
    amplitude = of_target.abs().where(low, of_source.abs())
    return torch.fft.ifft2(torch.polar(amplitude, of_source.angle())).real


# The teacher.

TEACHER = "teacher."  # before the name of each of its tensors in the state


def first_teacher(G: Generator, hyper: Hyper) -> State:
    """A copy of G. It is made anew when the stage begins."""
    return {TEACHER + name: value.detach().clone() for name, value in G.state_dict().items()}


def teacher_begins(step: int, G: Generator, images: Images, hyper: SelftrainHyper) -> State:
    return first_teacher(G, hyper) if step == hyper.adv_start else {}


@torch.no_grad()
def next_teacher(state: State, G: Generator, terms: Terms, hyper: SelftrainHyper) -> State:
    """momentum * teacher + (1 - momentum) * student, of weights and BatchNorm's statistics.

    It moves only in steps with labels of the target.
    """
    if "st" not in terms:
        return {}
    found, keep = {}, hyper.teacher_momentum
    for name, value in G.state_dict().items():
        before = state[TEACHER + name]
        mean = keep * before + (1 - keep) * value if value.is_floating_point() else value.clone()
        found[TEACHER + name] = mean
    return found


def teacher_of(state: State) -> State:
    """The teacher's weights, by the names of G's."""
    return {k.removeprefix(TEACHER): v for k, v in state.items() if k.startswith(TEACHER)}


# The step.


def selftrain_step(
    G: Generator, D: None, batch: Batch, phase: Phase, hyper: SelftrainHyper, state: State
) -> tuple[Tensor, Terms, None]:
    """Source only + lambda_target * weighted loss of the teacher's labels.

    Both are cross entropies, of the ensemble or of each head, as seg_heads says. gamma acts on the
    source's alone.
    """
    loss, terms = torch.zeros((), device=batch.labels.device), Terms()
    if not (phase.adversarial and hyper.source_free):
        loss, terms = source_loss(G(batch.source), batch, phase, hyper)
    if not phase.adversarial:
        return loss, terms, None
    images, size = target_images(batch), batch.target_size
    assert size, "a batch with the target's images has their size"
    with torch.no_grad(), evaluating(G):
        logits = torch.func.functional_call(G, teacher_of(state), (images,))
        p = ensemble(logits, size).softmax(dim=1)
        m = discrepancy_map(*(upsample(x, size).softmax(dim=1) for x in logits))
        labels = p.argmax(dim=1)
        weight = trust_of(hyper, p, m)
        terms |= {"kept": weight.mean(), "m": m.mean()}
        if hyper.trust_shuffled:
            weight = shuffled(weight, draws_of_its_own(1))
        if hyper.class_mix:
            mixed = images, labels, weight, batch.source, batch.labels
            images, labels, weight = mix_classes(*mixed)
        images = change_colours(images, hyper.colours)
        if hyper.masked:
            images = hide_patches(images, hyper.masked, hyper.patches, draws_of_its_own(2))
    l_target = target_loss(G(images), labels, weight, hyper)
    terms["st"] = l_target.detach()
    return loss + hyper.lambda_target * l_target, terms, None


def draws_of_its_own(which: int) -> torch.Generator:
    """A generator of this step, so that the other draws are those of a run without this flag."""
    return torch.Generator().manual_seed(torch.initial_seed() + which)


def target_loss(logits: Logits, labels: Tensor, weight: Tensor, hyper: Hyper) -> Tensor:
    """`weighted_loss` of the ensemble or of each head, B C h w."""
    loss = partial(weighted_loss, labels=labels, weight=weight)
    return over_heads(loss, logits, labels.shape[-2:], hyper)
