"""How settings are chosen: on tuning seeds and the dev split, the same way for each method.

    python study.py sweep --jobs 2                  # TAN and CLAN, and what all methods share
    python study.py tune --methods all --jobs 2     # two numbers of each method

No result is taken from these seeds or from dev. Every method has two numbers with four values each
(MinEnt one with eight), and an edge is followed by two more where it allows them.
"""

from dataclasses import dataclass, field, replace

import numpy as np

import data
import eval as evaluation
import train
from checkpoints import newest_checkpoint
from devices import find_device
from methods import METHODS
from runs import Study, mean_and_deviation, miou, read_by, run_groups, spread, write
from settings import Flags, configure
from weights import load_generator

TUNING_SEEDS = (10, 11, 12)  # settings are chosen on these and reported on others
MOST_RUNS = 120  # a sweep that needs more is stopped, and says so
# One after the other: the field, and the factor from value to value, or the values.
AXES: tuple[tuple[str, float | tuple[int, ...]], ...] = (
    ("lambda_adv", 2.0),
    ("lr_d", 3.0),
    ("length", (250, 500, 750)),
    ("lambda_adv", 2.0),
)
LONGEST = 1000  # steps of adaptation: the first command should take minutes
NO_CURVES: Flags = {"eval_every": 0}  # of trials
Values = dict[str, float]  # of a trial, by field; length: steps of adaptation


@dataclass
class Trials:
    """The trials of a sweep, by method: their values and the results of all seeds."""

    study: Study
    fixed: Flags  # what has been chosen before, for all methods
    most: int = MOST_RUNS
    cells: dict[tuple, list[Flags]] = field(default_factory=dict)
    found: dict[tuple, list[dict]] = field(default_factory=dict)

    def flags(self, method: str, values: Values) -> Flags:
        _, hyper = self.study.shared
        unused = METHODS[method].unused
        change = {k: v for k, v in (self.fixed | values).items() if k not in unused}
        if "length" in change:
            change["steps"] = hyper.adv_start + int(change.pop("length"))
        return change | {"method": method} | NO_CURVES

    def run(self, wanted: list[tuple[str, Values]]) -> None:
        """Make the trials that are missing. Raises ValueError if they would be too many."""
        keys = {trial_of(method, values): (method, values) for method, values in wanted}
        new = {key: trial for key, trial in keys.items() if key not in self.found}
        total = (len(self.found) + len(new)) * len(self.study.seeds)
        if total > self.most:
            raise ValueError(f"the sweep would take {total} runs, more than {self.most}: stop it")
        self.cells |= {k: self.study.cells(**self.flags(*trial)) for k, trial in new.items()}
        self.found = run_groups(self.study, self.cells)  # all: warm-ups of earlier ones are shared

    def score(self, method: str, values: Values) -> float:
        return spread(map(miou, self.found[trial_of(method, values)]))[0]


def trial_of(method: str, values: Values) -> tuple:
    return (method, *sorted(values.items()))


def sweep(study: Study) -> None:
    """How settings are chosen: heads, lambda_local, then lambda_adv, D's rate and length by method.

    First one loss or two for the heads, by source only on the source's dev split; then the
    lambda_local with which CLAN's mean weight is 1 when adaptation starts. Then TAN and CLAN, one
    number after the other, over the same values; a best value at an edge is followed outwards.
    --numbers 1 chooses lambda_adv alone.
    """
    settings, _ = study.shared
    study = replace(on_dev(study), unpaired=True)
    fixed: Flags = {}
    notes = []
    if settings.src == "streets" and "seg_heads" not in study.flags:
        fixed["seg_heads"], scores = chosen_heads(study)
        notes.append(f"seg_heads by source only on the source's dev split: {scores}.")
    if "lambda_local" not in study.flags:
        fixed["lambda_local"], m = slope_of_mean_1(study, fixed)
        notes.append(f"lambda_local: mean M is {m:.4f} when adaptation starts, so (1 - eps) / M.")
    trials = Trials(study, fixed)
    best = {method: first_values(study) for method in ("tan", "clan")}
    for name, grid in AXES[: study.numbers]:
        best = descend(trials, best, name, grid)
    notes.insert(0, "Target mIoU in %, last checkpoint, tuning seeds: for choosing, not reporting.")
    write_trials(study, f"sweep-{study.task}", trials, best, " ".join(notes))


def first_values(study: Study) -> Values:
    """Those of the first trial: the defaults."""
    _, hyper = study.shared
    length = float(hyper.steps - hyper.adv_start)
    return {"lambda_adv": hyper.lambda_adv, "lr_d": hyper.lr_d, "length": length}


def on_dev(study: Study) -> Study:
    """The study, scored on streets' dev split. Raises ValueError for another target."""
    tgt = study.shared[0].tgt
    if tgt != "streets":
        raise ValueError(
            f"{tgt} has no dev split, and its val is for results: choose settings on streets, or "
            "by scores that need no label"
        )
    return replace(study, flags=study.flags | {"split": "dev"})


def descend(
    trials: Trials, best: dict[str, Values], name: str, grid: float | tuple[int, ...]
) -> dict[str, Values]:
    """The best values after a search along one axis, by method.

    All methods try the same values. While the best of one lies at an edge, all try the next one
    beyond it.
    """
    if isinstance(grid, tuple):
        values = {float(x) for x in grid}
    else:
        centres = {best[method][name] for method in best}
        values = {rounded(c * k) for c in centres for k in (1 / grid, 1.0, grid)}
    while True:
        trials.run([(m, best[m] | {name: value}) for m in best for value in sorted(values)])
        tops = {m: top(trials, m, best[m], name, values) for m in best}
        beyond = next_values(values, set(tops.values()), grid)
        if not beyond:
            return {m: best[m] | {name: tops[m]} for m in best}
        values |= beyond


def top(trials: Trials, method: str, best: Values, name: str, values: set[float]) -> float:
    """The value of one axis with the best score of a method."""
    return max(sorted(values), key=lambda value: trials.score(method, best | {name: value}))


def next_values(values: set[float], tops: set[float], grid: float | tuple[int, ...]) -> set[float]:
    """The values beyond those edges at which a best value lies; none beyond LONGEST."""
    found = set()
    low, high = min(values), max(values)
    if isinstance(grid, tuple):
        width = float(grid[1] - grid[0])
        found = {low - width} if low in tops else set()
        found |= {high + width} if high in tops else set()
        return {x for x in found if 0 < x <= LONGEST}
    found = {rounded(low / grid)} if low in tops else set()
    return found | ({rounded(high * grid)} if high in tops else set())


def rounded(value: float) -> float:
    """To three digits: the names of runs hold these values."""
    return float(f"{value:.3g}")


# The same few trials for every method.


def tune(study: Study) -> None:
    """Two numbers of each method, four values each, one after the other, on the dev split.

    The section of each method names them. While the first is chosen, the second has the value that
    it had before any tuning. A best value at an edge is followed with two more. Rows that have the
    numbers of another are left out: source only, CLAN with a late Eq. 4. --numbers 1 chooses the
    first number alone.
    """
    study = replace(on_dev(study), unpaired=True)
    axes = {m: found for m in study.methods if (found := METHODS[m].tuned)}
    if not axes:
        raise ValueError(f"{', '.join(study.methods)}: not tuned; name others with --methods")
    methods = [*axes]
    best: dict[str, Values] = {}
    for method in methods:
        study.cells(method=method)  # a flag that it refuses ends the study, not the grid
        (first, _), (second, _) = axes[method]
        flags = read_by(method, study.flags) | {"method": method}
        start = getattr(configure(flags, tuned=False)[1], second)
        best[method] = {} if first == second else {second: start}
    trials = Trials(study, {}, most=100 * len(methods) * len(study.seeds))
    tried: dict[tuple[str, str], set[float]] = {}  # values by method and number
    for place in range(min(study.numbers, 2)):
        names = {m: axes[m][place][0] for m in methods}
        for m, name in names.items():
            before, values = tried.get((m, name), set()), {*axes[m][place][1]}
            wanted = values or before | between(before, best[m][name])
            tried[m, name] = allowed(trials, m, best[m], name, wanted)
        tops = best_values(trials, best, names, tried)
        for m, name in names.items():
            further = two_beyond(tried[m, name], tops[m])
            tried[m, name] |= allowed(trials, m, best[m], name, further)
        tops = best_values(trials, best, names, tried)
        best = {m: best[m] | {names[m]: tops[m]} for m in methods}
    note = (
        "Target mIoU in %, last checkpoint, tuning seeds: for choosing, not reporting. Each method "
        "has two numbers with four values each, MinEnt one number with eight; an edge is followed "
        "by two more where it allows them. The second number starts at its default, which is one "
        "of its four values, so seven trials differ. A run that diverged counts as 0."
    )
    write_trials(study, f"tune-{study.task}", trials, best, note)


def best_values(
    trials: Trials,
    best: dict[str, Values],
    names: dict[str, str],
    tried: dict[tuple[str, str], set[float]],
) -> dict[str, float]:
    """The value of each method's number with the best score, of all that are to be tried."""
    trials.run([(m, best[m] | {n: v}) for m, n in names.items() for v in sorted(tried[m, n])])
    return {m: top(trials, m, best[m], n, tried[m, n]) for m, n in names.items()}


def between(values: set[float], best: float) -> set[float]:
    """Four values around the best, between its neighbours on a grid of equal factors."""
    low, second, *_ = sorted(values)
    return {rounded(best * (second / low) ** (k / 3)) for k in (-2, -1, 1, 2)}


def two_beyond(values: set[float], best: float) -> set[float]:
    """The next two values beyond the edge of a grid at which the best lies; none if inside.

    Raises ValueError for a grid of fewer than four.
    """
    if len(values) < 4:
        raise ValueError(
            f"a grid needs four values, not {sorted(values)}: drop flags that limit it"
        )
    low, second, *_, last, high = sorted(values)
    if best not in (low, high):
        return set()
    factor = low / second if best == low else high / last
    found = {rounded(best * factor), rounded(best * factor**2)}
    return {int(v) for v in found} if isinstance(best, int) else found


def allowed(trials: Trials, method: str, best: Values, name: str, values: set[float]) -> set[float]:
    """Those values that the method accepts: a share ends at 1, and a count at 1."""
    found = set()
    for value in values:
        try:
            trials.study.cells(**trials.flags(method, best | {name: value}))
        except ValueError:
            continue  # the grid ends here
        found.add(value)
    return found


def write_trials(
    study: Study, name: str, trials: Trials, best: dict[str, Values], note: str
) -> None:
    rows = []
    for (method, *values), group in trials.found.items():
        shown = ", ".join(f"{number} {value:g}" for number, value in values)
        chosen = "chosen" if dict(values) == best[method] else ""
        chosen += " diverged" * any("diverged" in result for result in group)
        scores = mean_and_deviation(map(miou, group))
        rows.append([METHODS[method].label, shown, scores, chosen])
    header = ["method", "numbers", f"mIoU on {study.shared[0].split}", ""]
    write(study, name, header, rows, note, trials.found)


def chosen_heads(study: Study) -> tuple[str, str]:
    """ensemble or each: which source-only network is better on the source's dev split."""
    groups = {
        heads: study.cells(method="source", seg_heads=heads, **NO_CURVES)
        for heads in ("ensemble", "each")
    }
    run_groups(study, groups, checkpoints=True)
    scores = {heads: [source_score(flags) for flags in cells] for heads, cells in groups.items()}
    words = ", ".join(f"{heads} {mean_and_deviation(values)}" for heads, values in scores.items())
    return max(scores, key=lambda heads: np.mean(scores[heads])), words


def source_score(flags: Flags) -> float:
    """mIoU of a finished run on the dev split of its source."""
    settings, _ = configure(flags)
    source, _, _ = train.open_all(settings)
    place = ("streets", "source", "dev", None, source.size)
    mixed = settings.looks == "mixed"
    dev = data.open_dataset(*place, scenes=settings.scenes, mixed=mixed)
    G, _ = load_generator(newest_checkpoint(flags["out"]), say=lambda _: None)
    to_source_ids, _, _ = data.shared_classes(dev, dev)
    device = find_device(settings.device)
    confusion = evaluation.evaluate(G.to(device), dev, to_source_ids, device=device)
    return evaluation.report(confusion, dev, dev)["miou"]


def slope_of_mean_1(study: Study, fixed: Flags) -> tuple[float, float]:
    """(lambda_local, mean M): with it, CLAN's mean weight is 1 when adaptation starts."""
    cells = study.cells(method="clan", **fixed, **NO_CURVES)
    results = run_groups(study, {"clan": cells})["clan"]
    lost = [result["diverged"] for result in results if "diverged" in result]
    if lost:
        raise ValueError(f"CLAN diverges before lambda_local is chosen: {lost[0]}")
    m = float(np.mean([result["before"]["m"] for result in results]))
    _, hyper = study.shared
    return rounded((1 - hyper.eps) / m), m
