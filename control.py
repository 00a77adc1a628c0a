"""Does it matter where M puts the weight, how much weight there is, or Eq. 4?

    python study.py control --jobs 2        # claims with their power, on streets
    python study.py instrument              # could the set-up tell at all?

The paper compares CLAN with TAN. They differ in Eq. 4, and in the weight of each target pixel in
both G's and D's loss: its mean over time, and its place. The runs here take these apart as far as
they can be taken apart.
"""

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

import clan
import data
import eval as evaluation
from checkpoints import BEFORE, newest_checkpoint
from classes import INFREQUENT
from figures import load, load_d, open_target
from losses import adversarial_loss, discrepancy_map
from models import Discriminator, Generator, cells_of, receptive_field
from runs import (
    INTERVALS,
    Study,
    brackets,
    detectable,
    difference,
    interval,
    mean_and_deviation,
    miou,
    points_apart,
    run_cells,
    run_groups,
    save_figure,
    spread,
    t_interval,
    with_interval,
    write,
)
from settings import Flags, configure
from tuning import TUNING_SEEDS

REGIMES = {"look and layout": (0.5, 0.5), "look alone": (0.5, 0.0)}  # values of --shift
SEEDS = tuple(range(10))  # of the claims; other variants have the first FEW
MORE_SEEDS = tuple(range(13, 23))  # for a claim that ten cannot settle; 10 to 12 are for tuning
FEW = 5
ENOUGH = 1.5  # points: a difference that a study should be able to detect


class Claim(NamedTuple):
    """A comparison of two rows: does `row` differ from `other`?"""

    says: str
    row: str
    other: str


SCALED = "TAN, lambda_adv times CLAN's mean weight"
BATCHNORM = "BatchNorm alone"
TAN_BOTH, CLAN_BOTH = (f"{name}, BatchNorm of both domains" for name in ("TAN", "CLAN"))
PLACED, SHUFFLED, DOUBT = "M, mean 1", "M shuffled, mean 1", "1 - confidence, mean 1"
INVERTED, MOVED = "M inverted, mean 1", "M moved, mean 1"
EVEN = "Eq. 4, every weight 1"
PLACE = Claim("(iii) the place of M's weight", PLACED, SHUFFLED)
CLAIMS = (
    Claim("(i) all of CLAN", "CLAN", "TAN"),
    Claim("(ii) CLAN, or lambda_adv times its mean weight", "CLAN", SCALED),
    PLACE,
    Claim("(iv) M, or 1 - confidence", PLACED, DOUBT),
    Claim("(v) Eq. 4 alone", EVEN, "TAN"),
)
# Between the variants, on the first FEW seeds. Only what the control is built for is a claim.
FURTHER = (
    PLACE,
    Claim("M, or its reverse", PLACED, INVERTED),
    Claim("M, or M at other places", PLACED, MOVED),
    Claim("BatchNorm alone, or an adversary", BATCHNORM, "TAN"),
    Claim("an adversary on top of BatchNorm", TAN_BOTH, BATCHNORM),
    Claim("M on top of both", CLAN_BOTH, TAN_BOTH),
)
# Rows of the control, and what each changes in CLAN. SCALED follows from CLAN's own runs.
MAIN: dict[str, Flags] = {"source only": {"method": "source"}, "TAN": {"method": "tan"}, "CLAN": {}}
PLACES: dict[str, Flags] = {
    PLACED: {"m_mean1": True},
    SHUFFLED: {"m_mean1": True, "m_control": "shuffled"},
    DOUBT: {"m_mean1": True, "m_control": "doubt"},
}
WEIGHTS_1: Flags = {"lambda_local": 0.0, "eps": 1.0}
BOTH_DOMAINS: Flags = {"batchnorm": "batch"}
SHARED: dict[str, Flags] = {  # with the study of photographs
    "M shuffled": {"m_control": "shuffled"},
    BATCHNORM: BOTH_DOMAINS | {"method": "tan", "lambda_adv": 0.0},
}


def variants(study: Study) -> dict[str, Flags]:
    """The further rows, on the first FEW seeds, beside MAIN, PLACED and SHUFFLED of these seeds."""
    settings, hyper = study.shared
    recipe = "released" if settings.recipe == "paper" else "paper"
    return SHARED | {
        INVERTED: {"m_mean1": True, "m_control": "inverted"},
        MOVED: {"m_mean1": True, "m_control": "moved"},
        "Eq. 5, no Eq. 4": {"lambda_weight": 0.0},
        GRADIENT[not hyper.detach_m]: {"detach_m": not hyper.detach_m},
        f"recipe {recipe}": {"recipe": recipe},
        TAN_BOTH: BOTH_DOMAINS | {"method": "tan"},
        CLAN_BOTH: BOTH_DOMAINS,
    }


GRADIENT = {True: "no gradient through M", False: "gradient through M"}  # by detach_m


def control(study: Study) -> None:
    """Claims about CLAN with their power: the place and the size of the weight, Eq. 4, BatchNorm.

    On streets in two regimes. Only a shift of layout and class frequency can show negative
    transfer. A claim on the place of the weight that ten seeds cannot settle gets ten more.
    """
    few = replace(study, seeds=study.seeds[:FEW])
    shifts: dict[str, Flags] = {"": {}}
    if on_streets(study):
        shifts = {name: {"shift": shift} for name, shift in REGIMES.items()}
    (regime, shift), *others = shifts.items()
    results = claimed_runs(study, shift)
    write_claims(study, regime, [compared(study, claim, results, shift) for claim in CLAIMS])
    write_rows(study, regime, results)
    changes = {name: (MAIN | PLACES)[name] for name in (*MAIN, PLACED, SHUFFLED)}
    changes |= variants(study)
    further = run_groups(few, {k: few.cells(**shift, **v) for k, v in changes.items()})
    write_rows(few, regime, further, "further-control")
    write_claims(few, regime, of_rows(further, FURTHER), "further")
    if study.shared[0].tgt == "streets":  # other targets have no dev split
        negative_transfer(study, {name: results[name] for name in WATCHED})

    for regime, shift in others:
        cells = {name: few.cells(**shift, **change) for name, change in (MAIN | PLACES).items()}
        results = run_groups(few, cells)
        write_claims(study, regime, of_rows(results))
        write_rows(study, regime, results)
    if on_streets(study):
        cells = {name: few.cells(scenes=1, **PLACES[name]) for name in PLACE[1:]}
        write_claims(study, "scenes drawn anew", of_rows(run_groups(few, cells)))


def on_streets(study: Study) -> bool:
    """Whether the target is streets at its default shift: a study may then add other shifts."""
    settings, _ = study.shared
    return settings.tgt == "streets" and "shift" not in study.flags


def claimed_runs(study: Study, shift: Flags) -> dict[str, list[dict]]:
    """The runs of all claims, on all seeds."""
    _, hyper = study.shared
    changes = MAIN | PLACES | {EVEN: WEIGHTS_1}
    groups = {k: study.cells(**shift, **v) for k, v in changes.items()}
    results = run_groups(study, groups)
    rates = [hyper.lambda_adv * known_mean_weight(r) for r in results["CLAN"]]
    scaled = [
        study.cell(seed, **shift, method="tan", lambda_adv=rate)
        for seed, rate in zip(study.seeds, rates, strict=True)
    ]
    return run_groups(study, groups | {SCALED: scaled})  # together, so all from one machine


def known_mean_weight(result: dict) -> float:
    """The mean weight of a CLAN run. Raises ValueError if it logged no M."""
    if "mean_weight" not in result:
        run = result["checkpoint"]
        raise ValueError(f"{run} logged no M: --log-every is larger than its adaptation")
    return result["mean_weight"]


Compared = tuple[Claim, list[dict], list[dict]]  # and the runs of its two rows


def compared(study: Study, claim: Claim, results: dict, shift: Flags) -> Compared:
    """A claim with its runs. The place of the weight gets MORE_SEEDS if it could not be found."""
    row, other = results[claim.row], results[claim.other]
    ten = study.seeds == SEEDS
    if claim == PLACE and ten and detectable(points_apart(row, other)) > ENOUGH:
        more = replace(study, seeds=MORE_SEEDS)
        groups = {name: more.cells(**shift, **PLACES[name]) for name in claim[1:]}
        found = run_groups(more, groups)
        row, other = row + found[claim.row], other + found[claim.other]
    return claim, row, other


def of_rows(results: dict, claims: tuple[Claim, ...] = CLAIMS) -> list[Compared]:
    """The claims for which both rows were run."""
    known = [claim for claim in claims if {claim.row, claim.other} <= results.keys()]
    return [(claim, results[claim.row], results[claim.other]) for claim in known]


def write_claims(study: Study, regime: str, found: list[Compared], name: str = "claims") -> None:
    """Each claim: the difference in points, two intervals, and what could have been found."""
    rows: list[list] = []
    groups: dict = {}
    for claim, row, other in found:
        pairs = points_apart(row, other)
        ahead = f"{sum(x > 0 for x in pairs)} of {len(pairs)}"
        mean = f"{np.mean(pairs):+.1f}"
        limits = (brackets(f(pairs)).strip() for f in (interval, t_interval))
        power = detectable(pairs)
        least = "" if np.isnan(power) else f"{power:.1f}"
        rows.append([claim.says, f"{claim.row} - {claim.other}", mean, *limits, least, ahead])
        groups |= {(claim.says, claim.row): row, (claim.says, claim.other): other}
    header = ["claim", "difference", "points", "bootstrap", "Student's t", "detectable", "ahead on"]
    note = (
        f"{of_regime(regime)}Target mIoU, last checkpoint, differences paired by seed. Both "
        "intervals are of 95 %; the bootstrap's is too narrow with few seeds. Detectable: the "
        "difference that so many seeds find in 80 % of all cases at the 5 % level. Seeds differ in "
        "the first weights and the order of samples; the scenes are the same. Each claim stands by "
        "itself: nothing is corrected for there being several. The settings are those that were "
        "chosen for look and layout."
    )
    if any(claim == PLACE for claim, _, _ in found):
        note += " A shuffled weight is nearly even for D, whose cells see many pixels."
    write(study, "-".join([name, study.task, *regime.split()]), header, rows, note, groups)


def of_regime(regime: str) -> str:
    if not regime:
        return ""
    return f"Streets, {regime}. " if "scenes" in regime else f"Streets, shift of {regime}. "


def lost_classes(result: dict, baseline: dict) -> int:
    """How many classes have an IoU more than 2 points below another."""
    pairs = [(v, baseline["iou"][name]) for name, v in result["iou"].items()]
    return sum(a < b - 0.02 for a, b in pairs if a is not None and b is not None)


def answers_of(group: list[dict]) -> str:
    means = [spread(r.get(key) for r in group)[0] for key in ("d_source", "d_target")]
    return "" if np.isnan(means[0]) else f"{means[0]:.2f}, {means[1]:.2f}"


def starts_of(name: str, results: dict[str, list[dict]]) -> list[dict]:
    """The runs that say where each run of a row stood at adv_start.

    Source only has no score there, but the warm-up of TAN.
    """
    return results["TAN" if name == "source only" else name]


def write_rows(
    study: Study, regime: str, results: dict[str, list[dict]], name: str = "control"
) -> None:
    """The rows of the control in one regime of streets."""
    rows = []
    for row, group in results.items():
        rare = [spread(r["iou"].get(c) for c in INFREQUENT)[0] for r in group]
        source = results["source only"]
        lost = [lost_classes(*both) for both in zip(group, source, strict=True)]
        pairs = zip(group, starts_of(row, results), strict=True)
        fallen = [lost_classes(r, start["before"]) for r, start in pairs if "before" in start]
        weight, _ = spread(r.get("mean_weight") for r in group)
        rows.append([
            row,
            str(len(group)),
            mean_and_deviation(r.get("miou_before") for r in group),
            mean_and_deviation(map(miou, group)),
            mean_and_deviation(rare),
            f"{np.mean(lost):.1f}",
            f"{np.mean(fallen):.1f}" if fallen else "-",
            difference(group, results["TAN"]),
            difference(group, results["CLAN"]),
            "" if np.isnan(weight) else f"{weight:.2f}",
            answers_of(group),
        ])  # fmt: skip
    header = ["variant", "seeds", "before", "mIoU", "infrequent", "classes lost", "fallen"]
    header += ["minus TAN", "minus CLAN", "mean weight", "D's answers"]
    note = (
        f"{of_regime(regime)}mIoU before adaptation and after it, and mean IoU of "
        f"{', '.join(INFREQUENT)} in %, last checkpoint, mean ± deviation. Classes lost: how many "
        f"end more than 2 points below source only; fallen: below where they were when adaptation "
        f"began. {INTERVALS} Mean weight: lambda_local M + eps over the adversarial steps. D's "
        "answers: its mean probability of source on the source and on the target, at the end."
    )
    write(study, "-".join([name, study.task, *regime.split()]), header, rows, note, results)


# Negative transfer, as the paper means it: classes that were aligned before adaptation get worse.

WATCHED = ("source only", "TAN", "CLAN", PLACED, SHUFFLED)


def aligned_classes(study: Study) -> tuple[list[str], list[dict]]:
    """The third of the classes that source only knows best on dev, and the runs that say so.

    Tuning seeds and dev: no result is taken from them, so the choice is free of the results.
    """
    dev = replace(study, seeds=TUNING_SEEDS[: len(study.seeds)])
    results = run_cells(dev, dev.cells(method="source", split="dev"))
    names = results[0]["iou"]
    iou = {name: spread(r["iou"][name] for r in results)[0] for name in names}
    best = sorted(names, key=lambda name: -np.nan_to_num(iou[name]))
    return best[: len(names) // 3], results


def negative_transfer(study: Study, results: dict[str, list[dict]]) -> None:
    """IoU of the aligned classes while the methods adapt: at the start, the lowest, at the end."""
    aligned, chosen_by = aligned_classes(study)
    rows, figure = [], Figure(figsize=(6, 3.4), layout="constrained")
    ax = figure.subplots()
    found = {}  # by method: IoU at the start, the lowest, at the end, of each seed
    for name, group in results.items():
        curves = []
        for r, start in zip(group, starts_of(name, results), strict=True):
            if "curve" not in r:
                raise ValueError(f"{r['checkpoint']} has no scores by step: delete it")
            places = [list(r["iou"]).index(name) for name in aligned]
            points = start["curve"][:1] * (name == "source only") + r["curve"]
            curves.append([spread(point["iou"][i] for i in places)[0] for point in points])
        steps, values = [point["step"] for point in points], np.array(curves)
        ax.plot(steps, 100 * values.mean(axis=0), label=name)
        found[name] = values[:, 0], values[:, 1:].min(axis=1), values[:, -1]
    for name, moments in found.items():
        first, lowest, last = map(mean_and_deviation, moments)
        apart = 100 * (moments[1] - found["TAN"][1])
        rows.append([name, first, lowest, with_interval(apart.tolist()), last])
    ax.set(xlabel="step", ylabel="IoU of the aligned classes, %")
    ax.legend(fontsize=8)
    save_figure(study, figure, f"transfer-{study.task}", [r for g in results.values() for r in g])
    step = results["CLAN"][0]["curve"][0]["step"]
    header = ["method", f"at step {step}", "lowest after it", "lowest, minus TAN", "at the end"]
    note = (
        f"Mean IoU in % of the classes that source only knows best on dev: {', '.join(aligned)}. "
        f"Mean ± deviation over seeds. {INTERVALS}"
    )
    groups = results | {"source only, dev, tuning seeds": chosen_by}
    write(study, f"transfer-{study.task}", header, rows, note, groups)


# Would moving the weight change G's gradient?

GRIDS = ((2, 2, 2, 2, 2), (2, 2, 2, 1, 1), (2, 2, 1, 1, 1))  # of D, as --d-strides


def instrument(study: Study) -> None:
    """Could the place of the weight matter? G's adversarial gradient by D's grid.

    Cosines between the gradient with CLAN's weights and that with the same weights shuffled over
    the pixels, or with 1 everywhere. Where they are near 1, no study can tell the three apart.
    """
    groups = {strides: [study.cell(study.seeds[0], d_strides=strides)] for strides in GRIDS}
    results = run_groups(study, groups, checkpoints=True)
    rows = []
    for strides, (flags,) in groups.items():
        _, hyper = configure(flags)
        _, val, _ = open_target(flags)
        cells = "x".join(map(str, cells_of(strides, val.size)))
        field = receptive_field(strides) / val.size[0]
        paths = {"start": flags["out"] / BEFORE, "end": newest_checkpoint(flags["out"])}
        for when, path in paths.items():
            G = load(path, torch.device("cpu"))
            D = load_d(path, hyper, G.num_classes)
            found = gradient_cosines(G, D, val, hyper, study.images)
            rows.append([cells, f"{field:.2f}", when, *(f"{v:.3f}" for v in found.values())])
    header = ["cells of D", "receptive field / height", "adaptation", *found]
    note = (
        "Cosines of G's adversarial gradient on the target with the weights of M, against the same "
        "weights shuffled and against weight 1: at the logits, and of E's filters. Spread: "
        "standard deviation over mean of the weights within an image. First seed of CLAN. At the "
        "start D has its first weights, unless it has learnt before."
    )
    write(study, f"instrument-{study.task}", header, rows, note, results)


def gradient_cosines(
    G: Generator, D: Discriminator, val: data.DataSet, hyper: clan.Hyper, count: int
) -> dict[str, float]:
    """Means over images: of the weight, its spread, and the cosines between gradients."""
    G.eval()
    found: dict[str, list[float]] = {}
    for i, image, _ in evaluation.spread_images(val, count):
        logits = G(image[None])
        m = discrepancy_map(*(clan.upsample(x, val.size).softmax(dim=1) for x in logits))
        m = m.detach() if hyper.detach_m else m
        torch.manual_seed(i)  # of the shuffle
        weight, p = clan.adaptive_weight(m, hyper), ensemble(logits, val.size)
        shuffled = replace(hyper, m_control="shuffled", m_mean1=False)
        weights = {
            "M": weight,
            "shuffled": clan.controlled_weight(weight, p, shuffled),
            "1": torch.ones_like(weight),
        }
        gradients = {k: adversarial_gradient(G, D, logits, w, val.size) for k, w in weights.items()}
        values = {
            "mean weight": weights["M"].mean().item(),
            "spread": (weights["M"].std() / weights["M"].mean()).item(),
        }
        for where, at in (("logits", 0), ("E", 1)):
            for other in ("shuffled", "1"):
                a, b = gradients["M"][at], gradients[other][at]
                cosine = F.cosine_similarity(a, b, dim=0).item()
                values[f"M and {other}, {where}"] = cosine
        for name, value in values.items():
            found.setdefault(name, []).append(value)
    return {name: float(np.mean(values)) for name, values in found.items()}


def ensemble(logits: tuple[torch.Tensor, torch.Tensor], size: tuple[int, int]) -> torch.Tensor:
    """The ensemble p, B C H W."""
    logits_1, logits_2 = (clan.upsample(x, size) for x in logits)
    return (logits_1 + logits_2).softmax(dim=1)


def adversarial_gradient(
    G: Generator,
    D: Discriminator,
    logits: tuple[torch.Tensor, torch.Tensor],
    weight: torch.Tensor,
    size: tuple[int, int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of Eq. 5 in G's loss on a target image: at both heads' logits, and of E."""
    answer = clan.domain_logits(clan.without_gradient(D), ensemble(logits, size))
    loss = adversarial_loss(answer, is_source=True, weight=weight)
    filters = [x for x in G.E.parameters() if x.ndim == 4]
    found = torch.autograd.grad(loss, [*logits, *filters], retain_graph=True)
    return torch.cat([x.flatten() for x in found[:2]]), torch.cat([x.flatten() for x in found[2:]])
