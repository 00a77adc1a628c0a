"""`baselines.py` and `alignment.py`: losses against slow loops, who learns in each step, runs.

The slow tests train each method a few steps at 32x64.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import (
    CELLS,
    adaptation_of,
    assert_equal,
    before_step,
    last_tensors,
    metrics,
    power_cut,
    run_error,
    seeded,
    steps_logged,
    studied,
    torchrun,
)
from torch.autograd import gradcheck

import alignment
import baselines
import clan
import data
import selftrain
import train
from checkpoints import newest_checkpoint
from losses import adversarial_loss
from methods import METHODS, first_stage
from models import Generator
from settings import configure
from weights import load_generator

OTHERS = tuple(name for name in METHODS if name not in ("source", "tan", "clan"))
SIZES = "--src-size 32 64 --tgt-size 32 64 --batch 2 --d-channels 4 --log-every 1 --device cpu"


def probabilities(*shape: int, seed: int = 0) -> torch.Tensor:
    logits = torch.randn(*shape, dtype=torch.float64, generator=seeded(seed))
    return (2 * logits).softmax(dim=1)


def test_baselines_the_share_of_pseudo_labels_grows_up_to_its_largest_or_stays():
    growing = baselines.SelfTrainingHyper(portion=0.4, portion_step=0.08, portion_max=0.5)
    assert [baselines.portion_of(k, growing) for k in range(3)] == pytest.approx([0.4, 0.48, 0.5])
    large = replace(growing, portion=0.7)
    assert [baselines.portion_of(k, large) for k in range(3)] == [0.7] * 3
    with pytest.raises(ValueError, match="the share grows"):
        replace(growing, portion_step=-0.1)


# Losses against slow loops.


def test_baselines_entropy_is_the_sum_of_its_parts_and_1_where_all_are_even():
    p = probabilities(2, 5, 3, 4)
    wanted = 0.0
    for b in range(2):
        for i in range(3):
            for j in range(4):
                wanted -= sum(x * math.log(x) for x in p[b, :, i, j].tolist()) / math.log(5)
    assert baselines.entropy_loss(p).item() == pytest.approx(wanted / 24, rel=1e-12)
    even, sure = torch.full((1, 5, 1, 1), 0.2), torch.eye(5)[:, :, None, None]
    assert baselines.entropy_loss(even).item() == pytest.approx(1)
    assert baselines.entropy_loss(sure).item() == 0
    assert gradcheck(lambda z: baselines.entropy_loss(z.softmax(dim=1)), p.log().requires_grad_())
    z = torch.tensor([110.0, 0.0, 0.0]).view(1, 3, 1, 1).requires_grad_()  # p is 0 twice
    (grad,) = torch.autograd.grad(baselines.entropy_loss(z.softmax(dim=1)), z)
    assert grad.isfinite().all()


def test_baselines_classifier_discrepancy_is_the_mean_of_absolute_differences():
    p1, p2 = probabilities(2, 5, 3, 4), probabilities(2, 5, 3, 4, seed=1)
    wanted = np.mean([abs(a - b) for a, b in zip(p1.flatten(), p2.flatten(), strict=True)])
    found = baselines.classifier_discrepancy(p1, p2)
    assert found.item() == pytest.approx(wanted) == baselines.classifier_discrepancy(p2, p1).item()
    one, other = torch.eye(5)[None, :, :1, None], torch.eye(5)[None, :, 1:2, None]
    assert baselines.classifier_discrepancy(one, other).item() == pytest.approx(2 / 5)
    assert baselines.classifier_discrepancy(one, one).item() == 0
    soft = (x.log().requires_grad_() for x in (p1, p2))
    assert gradcheck(
        lambda a, b: baselines.classifier_discrepancy(a.softmax(1), b.softmax(1)), tuple(soft)
    )


@pytest.mark.parametrize("portion", (0.1, 0.2, 0.5, 1.0))
@pytest.mark.parametrize("balanced", (True, False))
def test_baselines_thresholds_are_those_of_sorting_all_confidences(portion, balanced):
    p = probabilities(3, 4, 20, 30)
    p[:, 3] = 0  # a class that is never predicted
    p = p / p.sum(dim=1, keepdim=True)
    found = baselines.class_thresholds(baselines.confidence_counts(p), portion, balanced)
    confidence, classes = p.max(dim=1)
    for c in range(3):
        values = confidence[classes == c] if balanced else confidence.flatten()
        ranked = values.sort(descending=True).values[math.ceil(portion * len(values)) - 1]
        assert found[c] <= ranked + 1e-7, "the bin of the last pixel that is kept"
        assert ranked.logit() - found[c].double().logit() < 0.03 or portion == 1
    assert found[3] == 1 or not balanced
    labels = baselines.pseudo_labels(p.float(), found)
    if balanced and portion < 1:
        for c in range(3):
            share = ((labels == c) & (classes == c)).sum() / (classes == c).sum()
            assert abs(share - portion) < 0.02


@pytest.mark.parametrize("balanced", (True, False))
def test_baselines_thresholds_tell_confidences_apart_that_are_all_close_to_1(balanced):
    """A trained network's: all above .999, and still a fifth of them is the surest."""
    logits = torch.randn(2, 3, 40, 50, generator=seeded())
    p = (logits + 10 * torch.eye(3)[torch.randint(0, 3, (2, 40, 50), generator=seeded(1))]
         .permute(0, 3, 1, 2)).softmax(dim=1)  # fmt: skip
    assert p.amax(dim=1).quantile(0.5) > 0.999
    thresholds = baselines.class_thresholds(baselines.confidence_counts(p), 0.2, balanced)
    kept = (baselines.pseudo_labels(p, thresholds) != 255).float().mean().item()
    assert kept == pytest.approx(0.2, abs=0.02)


def test_baselines_a_network_that_has_diverged_gives_no_labels():
    p = probabilities(1, 3, 4, 5).index_fill(3, torch.tensor([2]), math.nan)
    with pytest.raises(FloatingPointError, match="confidence of the target's labels is not finite"):
        baselines.confidence_counts(p)


def test_baselines_pseudo_labels_are_the_best_ratio_above_1():
    p, thresholds = probabilities(2, 4, 5, 6).float(), torch.tensor([0.3, 0.5, 0.9, 1.0])
    labels = baselines.pseudo_labels(p, thresholds)
    for b, i, j in np.ndindex(2, 5, 6):
        ratios = [x / t for x, t in zip(p[b, :, i, j].tolist(), thresholds.tolist(), strict=True)]
        best = max(range(4), key=lambda c: ratios[c])
        assert labels[b, i, j] == (best if ratios[best] > 1 else 255)
    equal = baselines.pseudo_labels(p, torch.full((4,), 0.6))
    assert (equal == p.argmax(dim=1).where(p.amax(dim=1) > 0.6, 255)).all()


def test_baselines_rounds_begin_at_adv_start_and_have_equal_lengths():
    _, hyper = configure({"method": "cbst", "steps": 100, "adv_start": 40, "rounds": 3})
    starts = {s: baselines.round_at(s, hyper) for s in range(100)}
    assert {s: r for s, r in starts.items() if r is not None} == {40: 0, 60: 1, 80: 2}


def test_alignment_sizes_are_of_the_images_that_contain_a_class():
    labels = torch.full((4, 10, 10), 255, dtype=torch.uint8)
    labels[:, :5] = 0
    labels[0, 5:, 0] = 1  # 5 of 55 pixels
    labels[1, 5:] = 1  # half
    lower, mean, upper = alignment.class_sizes([labels[:2], labels[2:]], 3)
    shares_0, shares_1 = [50 / 55, 0.5, 1.0, 1.0], [5 / 55, 0.5]
    for c, shares in ((0, shares_0), (1, shares_1)):
        assert mean[c].item() == pytest.approx(np.mean(shares), rel=1e-6)
        assert lower[c].item() == pytest.approx(np.quantile(shares, 0.1), rel=1e-6)
        assert upper[c].item() == pytest.approx(max(np.quantile(shares, 0.9), np.mean(shares)))
    assert lower[2] == mean[2] == upper[2] == 0


@pytest.mark.parametrize("slack", (0.3, 2.0))
@pytest.mark.parametrize("seed", range(2))
def test_alignment_the_dual_with_a_largest_price_is_that_of_a_general_solver(seed, slack):
    optimize = pytest.importorskip("scipy.optimize")
    z = 2 * torch.randn(3, 30, dtype=torch.float64, generator=seeded(seed))
    least = torch.tensor([0.9, 0.02, 0.0], dtype=torch.float64)
    most = torch.tensor([0.95, 0.9, 0.1], dtype=torch.float64)

    def dual(mu):
        low, up = torch.from_numpy(mu[:3]), torch.from_numpy(mu[3:])
        free = ((z + (low - up)[:, None]).logsumexp(dim=0) - z.logsumexp(dim=0)).mean()
        return (free - (low * least).sum() + (up * most).sum()).item()

    prices = [(0, slack)] * 3 + [(0, 50)] * 3
    best = optimize.minimize(dual, np.zeros(6), bounds=prices, method="L-BFGS-B").x
    assert best[0] == pytest.approx(slack), "the largest price should matter"
    wanted = (z + torch.from_numpy(best[:3] - best[3:])[:, None]).softmax(dim=0)
    found = alignment.within_sizes(z, least, most, torch.ones(3) > 0, slack=slack, steps=400)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_alignment_the_dual_meets_the_bounds_and_is_no_worse_than_a_general_solver(seed):
    optimize = pytest.importorskip("scipy.optimize")
    z = 2 * torch.randn(4, 30, dtype=torch.float64, generator=seeded(seed))
    least = torch.tensor([0.3, 0.1, 0.05, 0.0])
    most = torch.tensor([0.5, 0.2, 0.3, 0.02])
    present = torch.tensor([True, True, True, True])
    found = alignment.within_sizes(z, least, most, present, slack=50.0, steps=400)
    means = found.mean(dim=1)
    assert (means >= least - 1e-4).all() and (means <= most + 1e-4).all()
    assert found.sum(dim=0) == pytest.approx(1)

    def dual(mu):  # to be maximised: the prices of both bounds
        low, up = torch.from_numpy(mu[:4]), torch.from_numpy(mu[4:])
        free = -((z + (low - up)[:, None]).logsumexp(dim=0) - z.logsumexp(dim=0)).mean()
        return -(free + (low * least).sum() - (up * most).sum()).item()

    best = optimize.minimize(dual, np.zeros(8), bounds=[(0, 50)] * 8, method="L-BFGS-B")
    ours = (found * (found.log() - z.log_softmax(dim=0))).sum(dim=0).mean().item()
    assert ours <= -best.fun + 1e-3


def test_alignment_absent_classes_get_nothing_and_free_bounds_change_nothing():
    z = torch.randn(3, 20, dtype=torch.float64, generator=seeded())
    everything = alignment.within_sizes(
        z, torch.zeros(3), torch.ones(3), torch.ones(3) > 0, 2.0, 50
    )
    torch.testing.assert_close(everything, z.softmax(dim=0))
    present = torch.tensor([True, False, True])
    found = alignment.within_sizes(z, torch.zeros(3), torch.ones(3), present, 2.0, 50)
    assert (found[1] == 0).all() and found.sum(dim=0) == pytest.approx(1)


def test_alignment_the_gradient_of_the_size_loss_is_q_minus_p_star_and_damped_for_large_classes():
    _, hyper = configure({"method": "fcns_wild"})
    z = torch.randn(1, 3, 4, 5, generator=seeded()).requires_grad_()
    sizes = torch.tensor([[0.2, 0.05, 0.0], [0.5, 0.2, 0.1], [0.6, 0.3, 0.2]])
    alignment.size_loss(z, sizes, hyper).backward()
    image = z.detach()[0].flatten(1)
    present = alignment.present_classes(image.softmax(dim=0), sizes[0])
    wanted = alignment.within_sizes(image, sizes[1], sizes[2], present, hyper.slack, 50)
    gradient = (image.softmax(dim=0) - wanted.float()) / 20
    gradient[0] *= 0.1
    torch.testing.assert_close(z.grad[0].flatten(1), gradient, rtol=1e-3, atol=1e-5)


def test_alignment_confusion_is_cross_entropy_against_a_half():
    d = torch.randn(2, 1, 3, 3, dtype=torch.float64, generator=seeded())
    source = [1 / (1 + math.exp(-x)) for x in d.flatten().tolist()]  # D's probabilities
    wanted = np.mean([-(math.log(q) + math.log(1 - q)) / 2 for q in source])
    assert alignment.confusion_loss(d).item() == pytest.approx(wanted)
    assert alignment.confusion_loss(torch.zeros(1)).item() == pytest.approx(math.log(2))
    assert gradcheck(alignment.confusion_loss, d.requires_grad_())


def test_alignment_cell_labels_and_class_wise_losses_are_those_of_loops():
    labels = torch.randint(0, 4, (2, 8, 12), generator=seeded())
    labels[labels == 3] = 255
    cells = alignment.cell_labels(labels, 3, (4, 3))
    d = torch.randn(2, 3, 4, 3, generator=seeded(1))
    wanted = 0.0
    for c in range(3):
        for b in range(2):
            top = bottom = 0.0
            for i, j in np.ndindex(4, 3):
                block = labels[b, 2 * i : 2 * i + 2, 4 * j : 4 * j + 4]
                share = (block == c).float().mean().item()
                assert cells[b, c, i, j].item() == pytest.approx(share)
                top += share * math.log1p(math.exp(-d[b, c, i, j].item()))
                bottom += share
            wanted += top / (bottom + 5e-6) / 2
    assert alignment.class_domain_loss(d, cells, True).item() == pytest.approx(wanted, rel=1e-5)
    flipped = alignment.class_domain_loss(-d, cells, False)
    assert flipped.item() == pytest.approx(wanted, rel=1e-5)
    for is_source in (True, False):
        inputs = d.double().requires_grad_(), cells.double(), is_source
        assert gradcheck(alignment.class_domain_loss, inputs)


def test_alignment_each_output_of_the_pixel_d_is_a_d_by_itself():
    torch.manual_seed(0)
    D = alignment.PixelD(6, (4, 4), 0.5, outputs=3).eval()
    x = torch.randn(2, 6, 5, 5)
    before = D(x)
    with torch.no_grad():
        D.layers[3].weight[4:8] += 1  # of the second output
    after = D(x)
    assert torch.equal(before[:, 0], after[:, 0]) and torch.equal(before[:, 2], after[:, 2])
    assert not torch.equal(before[:, 1], after[:, 1])


def test_alignment_the_label_distribution_loss_is_that_of_a_loop():
    p, wanted = probabilities(2, 4, 5, 6), probabilities(2, 4, 1, 1, seed=1)[..., 0, 0]
    total = 0.0
    for b in range(2):
        counts = np.zeros(4)
        for i, j in np.ndindex(5, 6):
            column = p[b, :, i, j].numpy()
            counts += (column / column.max()) ** 3
        total -= (wanted[b].numpy() * np.log(counts / counts.sum())).sum()
    found = alignment.label_distribution_loss(p, wanted, 3.0)
    assert found.item() == pytest.approx(total / 2)
    z = p.log().requires_grad_()
    loss = alignment.label_distribution_loss
    assert gradcheck(lambda z: loss(z.softmax(dim=1), wanted, 3.0), z)
    one_hot = torch.eye(4)[torch.randint(0, 4, (1, 5, 6), generator=seeded())].permute(0, 3, 1, 2)
    histogram = alignment.soft_histogram(one_hot, 5.0)[0]
    torch.testing.assert_close(histogram, one_hot.mean(dim=(0, 2, 3)))


def test_alignment_landmarks_are_the_surest_cells():
    cells = torch.randn(2, 3, 4, 5, generator=seeded())
    labels = alignment.landmark_labels(cells, 0.6, (8, 10))
    for b in range(2):
        confidence, classes = cells[b].softmax(dim=0).max(dim=0)
        ranked = confidence.flatten().sort(descending=True).values[11]
        for i, j in np.ndindex(8, 10):
            sure = confidence[i // 2, j // 2] >= ranked
            assert labels[b, i, j] == (classes[i // 2, j // 2] if sure else 255)


def test_alignment_the_gate_opens_when_the_mean_accuracy_is_above_it():
    _, hyper = configure({"method": "cycada", "gate": 0.6})
    state = alignment.first_accuracies(None, hyper)
    assert len(state["accuracies"]) == 5, "a share of .01 of the 500 steps of adaptation"
    phase = clan.phase_at(hyper.steps - 1, hyper)
    before = clan.phase_at(0, hyper)
    seen = []
    for accuracy in (0.0, 0.0, 0.9, 0.9, 0.9, 0.7, 0.1, 0.1):
        state |= alignment.next_accuracies(state, None, {"d_acc": torch.tensor(accuracy)}, hyper)
        seen.append(alignment.gate_is_open(state, phase, hyper))
    assert seen == [False] * 5 + [True, True, False]  # the last means: .54, .68, .7, .54
    assert (int(state["known"]), int(state["moves"])) == (8, 2)
    assert alignment.gate_is_open(state, before, hyper), "the warm-up is not held"
    assert not alignment.gate_is_open(alignment.first_accuracies(None, hyper), phase, hyper)


def test_baselines_late_clan_is_clan_in_adaptation_and_source_only_before():
    G, D, batch, phase, hyper, _ = adaptation_of("clan_late")
    for method, now in (("clan", phase), ("source", clan.phase_at(0, hyper))):
        loss, terms, predictions = baselines.late_clan_step(G, D, batch, now, hyper)
        wanted, of_method, _ = clan.g_step(G, D, batch, now, replace(hyper, method=method))
        assert torch.equal(loss, wanted) and terms == of_method
        assert (predictions is None) == (method == "source")


# Who learns in each step: None, not zero, where nothing does, or momentum would move a weight.

ALL = {"E", "C1", "C2"}
LEARNS = {  # by method: the parts of G's step, of its later steps, and whether D has one
    "clan_late": [ALL],
    "minent": [ALL],
    "advent": [ALL],
    "mcd": [ALL, {"C1", "C2"}, *[{"E"}] * 4],
    "st": [ALL],
    "cbst": [ALL],
    "multi": [ALL | {"of_g"}],
    "cycada": [ALL],
    "fcns_wild": [ALL],
    "cross_city": [ALL],
    "cda": [ALL],
    "selftrain": [ALL],
}


@pytest.mark.parametrize("heads", ["ensemble", "each"])
def test_baselines_pseudo_labels_are_learnt_as_the_sources_labels_are(heads):
    """By the ensemble or by each head. Of the ensemble alone sure pixels have hardly a gradient."""
    G, D, batch, phase, hyper, state = adaptation_of("st")
    hyper = replace(hyper, seg_heads=heads)
    state["thresholds"] = torch.full((19,), 1e-4)  # all pixels
    with torch.no_grad(), baselines.evaluating(G):
        labels = clan.upsample(sum(G(batch.target)), (32, 64)).argmax(dim=1)
    _, terms, _ = baselines.self_training_step(G, D, batch, phase, hyper, state)
    logits = [clan.upsample(x, (32, 64)) for x in G(batch.target)]
    of_each = sum(torch.nn.functional.cross_entropy(x, labels) for x in logits)
    of_both = torch.nn.functional.cross_entropy(sum(logits), labels)
    assert terms["st"].item() == pytest.approx((of_each if heads == "each" else of_both).item())
    assert terms["kept"] == 1 and abs(of_each - of_both) > 0.1


def learning(G, D) -> set[str]:
    parts = {"E": G.E, "C1": G.C1, "C2": G.C2} | dict(D.named_children() if D is not None else ())
    found = set()
    for name, part in parts.items():
        trained = [p.grad is not None for p in part.parameters() if p.requires_grad]
        if any(trained):
            found.add(name)
        for p in part.parameters():
            p.grad = None
    return found


@pytest.mark.parametrize("name", OTHERS)
def test_baselines_each_step_gives_gradients_to_its_own_parts_alone(name):
    G, D, batch, phase, hyper, state = adaptation_of(name)
    method = METHODS[name]
    more = (state,) if method.first_state else ()
    loss, terms, predictions = method.g_step(G, D, batch, phase, hyper, *more)
    loss.backward()
    found = [learning(G, D)]
    assert all(x.ndim == 0 and not x.requires_grad for x in terms.values())
    for step in method.later_steps(hyper):
        loss, _ = step(G, batch, phase, hyper, *more)
        loss.backward()
        found.append(learning(G, D))
    assert found == LEARNS[name]
    assert (predictions is None) == (D is None)
    if D is not None:
        method.d_step(D, predictions)[0].backward()
        of_d = {child for child, _ in D.named_children()} - {"of_g"}
        assert learning(G, D) == of_d


@pytest.mark.parametrize("seg_heads", ("each", "ensemble"))
@pytest.mark.parametrize("name", OTHERS)
def test_baselines_the_warm_up_is_that_of_source_only(name, seg_heads):
    """Same loss and gradients; the target is not there and no part of the method's own learns."""
    G, D, batch, _, hyper, state = adaptation_of(name)
    hyper = replace(hyper, seg_heads=seg_heads)
    method, phase = METHODS[name], clan.phase_at(0, hyper)
    alone = batch._replace(target=None, target_size=None)
    more = (state,) if method.first_state else ()
    loss, _, predictions = method.g_step(G, D, alone, phase, hyper, *more)
    as_source = replace(hyper, method="source")
    wanted, _, _ = clan.g_step(G, None, alone, phase, as_source)
    assert torch.equal(loss, wanted) and predictions is None
    loss.backward()
    assert learning(G, D) == ALL


# Whole runs at 32x64.

FLAGS = f"{SIZES} --steps 8 --adv-start 4 --save-every 1 --keep 99".split()
OWN = {"cbst": ["--rounds", "2"], "st": ["--rounds", "2"], "cycada": ["--gate", "0"]}


def flags_of(name: str, *more: str) -> list[str]:
    unused = METHODS[name].unused
    flags = list(FLAGS)
    if "d_channels" in unused:
        place = flags.index("--d-channels")
        del flags[place : place + 2]
    return [*flags, "--method", name, *OWN.get(name, []), *more]


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("cut", (6, 7))  # a round of ST and CBST begins with step 6
def test_baselines_killed_and_resumed_it_ends_in_the_same_weights(
    name, cut, few, tmp_path, monkeypatch
):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train.main([*flags_of(name), "--out", str(whole)])
    with monkeypatch.context() as patch:
        before_step(patch, cut, power_cut)
        with pytest.raises(RuntimeError, match="power"):
            train.main([*flags_of(name), "--out", str(parts)])
    train.main(["--resume", str(parts)])
    assert_equal(last_tensors(parts), last_tensors(whole))
    assert metrics(parts) == metrics(whole)
    lines = steps_logged(whole)
    assert all(np.isfinite(v) for line in lines for v in line.values())
    assert name != "cycada" or lines[-1]["moved"] > 0.5, "a G that stays where it is tests nothing"


@pytest.mark.slow
def test_baselines_all_share_the_warm_up_of_source_only_without_changing_a_bit(scenes, tmp_path):
    others = [name for name in first_stage() if name in OTHERS]
    methods = ("--methods", ",".join(("tan", *others)), "--seeds", "3")
    out = studied("table", tmp_path / "all", *methods) / "streets-streets-tiny"
    for name in others:
        log = (out / f"{name}-seed3" / "log.txt").read_text()
        assert "step 1/4" not in log and "step 3/4" in log, "the warm-up was not shared"
        flags = list(CELLS)
        if "d_channels" in METHODS[name].unused:
            place = flags.index("--d-channels")
            del flags[place : place + 2]
        alone = tmp_path / name
        train.main([*flags, "--method", name, "--seed", "3", "--out", str(alone)])
        assert_equal(last_tensors(out / f"{name}-seed3"), last_tensors(alone))


def accuracy_of_d(name: str, rate: float, seen: list[clan.Predictions]) -> float:
    """How often D is right on the last 10 of 40 batches, after 100 steps on the others."""
    _, hyper = configure({"method": name, "lr_d": rate})
    torch.manual_seed(0)
    G = Generator("tiny")
    D = METHODS[name].build_d(G, hyper) if METHODS[name].build_d else train.second_network(G, hyper)
    _, opt_d = train.build_optimizers(G, D, hyper)
    for step in range(100):
        source, target = (D(x)[:, :1] for x in seen[step % 30][:2])
        loss = adversarial_loss(source, is_source=True) + adversarial_loss(target, is_source=False)
        opt_d.zero_grad()
        loss.backward()
        opt_d.step()
    D.eval()
    with torch.no_grad():
        right = [((D(s) > 0)[:, :1], (D(t) < 0)[:, :1]) for s, t, _ in seen[30:]]
    return float(np.mean([x.float().mean() for pair in right for x in pair]))


@pytest.mark.slow
def test_baselines_a_d_of_single_pixels_learns_at_its_rate_nearly_as_fast_as_tans(tmp_path):
    """On fixed features of source only. At TAN's rate they would learn too slowly to be a D."""
    train.main(["--method", "source", "--steps", "300", "--seed", "10", "--out", str(tmp_path)])
    G, _ = load_generator(newest_checkpoint(tmp_path), say=lambda _: None)
    settings, hyper = configure({"method": "tan", "adv_start": 0})
    source, target, _ = train.open_all(settings)
    steps = data.Steps(source, target, hyper, seed=10)
    methods = ("tan", "advent", "cycada", "fcns_wild", "cross_city")
    seen: dict[str, list] = {name: [] for name in methods}
    G.eval()  # as in adaptation: BatchNorm's running statistics
    with torch.no_grad():
        for batch in (steps[i] for i in range(40)):
            features = G.features(batch.source), G.features(batch.target)
            logits = [clan.upsample(G.C1(f) + G.C2(f), (64, 128)) for f in features]
            p = [x.softmax(dim=1) for x in logits]
            seen["tan"].append(clan.Predictions(*p, None))
            seen["advent"].append(clan.Predictions(*map(baselines.entropy_parts, p), None))
            seen["cycada"].append(clan.Predictions(*logits, None))
            seen["fcns_wild"].append(clan.Predictions(*features, None))
    seen["cross_city"] = seen["fcns_wild"]
    of_tan, of_advent = (accuracy_of_d(m, 1e-4, seen[m]) for m in ("tan", "advent"))
    own = {m: accuracy_of_d(m, 1e-3, seen[m]) for m in ("cycada", "fcns_wild", "cross_city")}
    slow = {m: accuracy_of_d(m, 1e-4, seen[m]) for m in own}
    print(f"right: TAN {of_tan:.2f}, AdvEnt {of_advent:.2f}; at 1e-3 {own}; at 1e-4 {slow}")
    assert of_tan > 0.8 and of_advent > 0.8, "entropies are small numbers, but tell as much"
    assert all(own[m] > 0.7 and own[m] > slow[m] + 0.03 for m in own), (own, slow)


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_baselines_two_processes_take_the_step_of_one_with_twice_the_batch(name, tmp_path):
    """Same weights but for the order of sums. All pixels have pseudo-labels, since each process
    takes the mean over its own."""
    flags = flags_of(name, "--batchnorm", "running", "--no-bn-affine", "--lr-g", "0.001")
    flags += ["--portion", "1", "--portion-max", "1"] if name in ("st", "cbst") else []
    flags += ["--trust", "constant", "--colours", "0"] if name == "selftrain" else []
    flags += ["--lr-d", "0.00001"] if METHODS[name].has_d else []
    for weight in LARGE.get(name, ()):
        flags += [f"--{weight}", "0.3"]
    flags += ["--d-dropout", "0"] if "d_dropout" in vars(configure({"method": name})[1]) else []
    place = flags.index("--batch")
    del flags[place : place + 2]
    one, two = tmp_path / "one", tmp_path / "two"
    process = torchrun(*flags, "--batch", "1", "--out", str(two))
    train.main([*flags, "--batch", "2", "--out", str(one)])
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    a, b = last_tensors(one), last_tensors(two)
    assert a.keys() == b.keys()
    far = []
    for key in a:  # Adam divides D's gradients by their size, also those that are next to nothing
        least = 1e-4 if key.startswith("D.") else 1e-5
        same = torch.allclose(a[key].float(), b[key].float(), rtol=1e-3, atol=least)
        far += [] if same or key.startswith("opt_d.") else [key]
    assert not far
    of_d = [key for key in a if key.startswith("opt_d.") and key.endswith(".exp_avg")]
    assert bool(of_d) == METHODS[name].has_d
    if of_d:  # the mean of D's gradients in all steps
        one_d, two_d = (torch.cat([x[key].flatten() for key in of_d]) for x in (a, b))
        assert (one_d - two_d).norm() < 0.01 * one_d.norm()


LARGE = {  # weights of a method's own losses, so that they count in these few steps
    "minent": ["lambda-ent"],
    "advent": ["lambda-adv"],
    "mcd": ["lambda-dis"],
    "multi": ["lambda-adv", "lambda-adv-aux", "lambda-seg-aux"],
    "cycada": ["lambda-adv"],
    "fcns_wild": ["lambda-adv", "lambda-size"],
    "cross_city": ["lambda-adv", "lambda-class"],
    "cda": ["lambda-layout", "lambda-landmark"],
}


@pytest.mark.slow
def test_baselines_two_processes_count_the_confidences_of_both(tmp_path):
    flags = "--portion 0.3 --rounds 1 --steps 5 --method cbst --batchnorm running --no-bn-affine"
    flags = [*flags_of("cbst")[: -len(OWN["cbst"])], *flags.split()]
    one, two = tmp_path / "one", tmp_path / "two"
    place = flags.index("--batch")
    del flags[place : place + 2]
    process = torchrun(*flags, "--batch", "1", "--out", str(two))
    train.main([*flags, "--batch", "2", "--out", str(one)])
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    a, b = (last_tensors(out)["state.thresholds"] for out in (one, two))
    apart = (a.logit() - b.logit()).nan_to_num().abs().max()  # of a class without pixels: 1 and 1
    assert len(set(a.tolist())) > 2 and apart <= 0.05, "two bins"


def error_of_bfloat16(name: str, later: int | None = None) -> float:
    """How far autocast moves E's gradient in G's step, of its size; the losses move by 2 %.

    later: the number of a later step instead; of one that E does not learn in, the heads' gradient.
    """
    G, D, batch, phase, hyper, state = adaptation_of(name)
    if D is not None:
        D.eval()  # no dropout
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            more = (state,) if METHODS[name].first_state else ()
            if later is None:
                loss, terms, _ = METHODS[name].g_step(G, D, batch, phase, hyper, *more)
            else:
                loss, terms = METHODS[name].later_steps(hyper)[later](G, batch, phase, hyper)
        heads = [*G.C1.parameters(), *G.C2.parameters()]
        gradient = torch.autograd.grad(loss, heads if later == 0 else list(G.E.parameters()))
        found.append((terms, torch.cat([x.flatten() for x in gradient])))
    (terms, exact), (rounded, near) = found
    for key in terms:  # a share of pixels: those whose confidence lies at the threshold
        room = 0.03 if key == "kept" else 0.02
        assert rounded[key].item() == pytest.approx(terms[key].item(), rel=room, abs=1e-4), key
    return ((near - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("name", OTHERS)
def test_baselines_bfloat16_moves_a_gradient_hardly_more_than_that_of_clan(name):
    assert error_of_bfloat16(name) < 1.5 * error_of_bfloat16("clan")


@pytest.mark.parametrize("later", [0, 1])
def test_baselines_bfloat16_moves_the_gradients_of_mcds_later_steps_as_little(later):
    assert error_of_bfloat16("mcd", later) < 1.5 * error_of_bfloat16("clan")


OWN_LOSS = {  # by method: where it is called, and the term that it makes
    "clan_late": (clan, "adversarial_loss", "adv"),
    "minent": (baselines, "entropy_loss", "ent"),
    "advent": (baselines, "adversarial_loss", "adv"),
    "mcd": (baselines, "classifier_discrepancy", "dis_heads"),
    "st": (baselines, "labelled_loss", "st"),
    "cbst": (baselines, "labelled_loss", "st"),
    "multi": (baselines, "adversarial_loss", "adv"),
    "cycada": (alignment, "adversarial_loss", "adv"),
    "fcns_wild": (alignment, "size_loss", "size"),
    "cross_city": (alignment, "class_domain_loss", "class"),
    "cda": (alignment, "label_distribution_loss", "layout"),
    "selftrain": (selftrain, "target_loss", "st"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_baselines_a_nan_in_its_own_loss_is_named(name, few, tmp_path, monkeypatch):
    place, loss, term = OWN_LOSS[name]
    right = getattr(place, loss)
    monkeypatch.setattr(place, loss, lambda *args, **named: math.nan * right(*args, **named))
    error = run_error(*flags_of(name, "--out", str(tmp_path)))
    assert f"{term} is not finite at step 5" in error


def test_baselines_numbers_of_one_method_are_refused_for_others():
    assert "does not use --mcd-steps" in run_error("--method", "cbst", "--mcd-steps", "3")
    assert "does not use --lambda-adv" in run_error("--method", "mcd", "--lambda-adv", "3")
    assert "mcd_steps must be at least 1" in run_error("--method", "mcd", "--mcd-steps", "0")


def test_baselines_two_levels_of_vgg16_are_refused():
    with pytest.raises(ValueError, match=r"multi is not defined for vgg16: use r101, tiny, lite0"):
        baselines.Levels(Generator("vgg16"), configure({"method": "multi"})[1])


@pytest.mark.slow
def test_baselines_middle_stages_have_the_channels_of_the_table(tmp_path):
    for backbone, (channels, _) in baselines.MIDDLE.items():
        images = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
        with torch.no_grad():
            middle, logits = baselines.middle_and_logits(Generator(backbone).eval(), images)
        assert middle.shape[1] == channels and len(logits) == 2
