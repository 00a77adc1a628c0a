"""`selftrain.py`: labels and their trust, what the student sees, the teacher, whole runs."""

import inspect
import json
import math
import types
from dataclasses import replace
from functools import partial
from typing import get_args

import numpy as np
import pytest
import torch
from helpers import (
    SMALL,
    assert_equal,
    before_step,
    last_tensors,
    make_folder,
    metrics,
    part,
    power_cut,
    run,
    run_error,
    seeded,
    some_labels,
    steps_logged,
)
from torch.autograd import gradcheck

import clan
import data
import eval as evaluation
import selftrain
import train
from checkpoints import BEFORE, KEYS, name_of, newest_checkpoint, save
from clan import Batch
from methods import METHODS
from models import Generator, residual_blocks
from runs import start_of, warm_up
from settings import configure
from weights import load_generator


def probabilities(*shape: int, seed: int = 0) -> torch.Tensor:
    return (2 * torch.randn(*shape, dtype=torch.float64, generator=seeded(seed))).softmax(dim=1)


# Labels and their trust.


def test_selftrain_the_weighted_loss_is_that_of_a_loop_over_pixels():
    logits = torch.randn(2, 4, 3, 5, dtype=torch.float64, generator=seeded()).requires_grad_()
    labels = some_labels(2, 4, 3, 5)
    weight = torch.rand(2, 3, 5, dtype=torch.float64, generator=seeded(1))
    above = below = 0.0
    for b, i, j in np.ndindex(2, 3, 5):
        if labels[b, i, j] != 255:
            p = logits[b, :, i, j].softmax(0)[labels[b, i, j]].item()
            above -= weight[b, i, j].item() * math.log(p)
            below += weight[b, i, j].item()
    found = selftrain.weighted_loss(logits, labels, weight)
    assert found.item() == pytest.approx(above / below, rel=1e-12)
    assert gradcheck(lambda z: selftrain.weighted_loss(z, labels, weight), logits)


@pytest.mark.parametrize("constant", (1e-6, 0.25, 3.0))
def test_selftrain_any_constant_weight_gives_the_gradient_of_1(constant):
    labels, gradients = some_labels(2, 4, 3, 5), []
    for value in (1.0, constant):
        logits = torch.randn(2, 4, 3, 5, dtype=torch.float64, generator=seeded()).requires_grad_()
        weight = torch.full((2, 3, 5), value, dtype=torch.float64)
        selftrain.weighted_loss(logits, labels, weight).backward()
        gradients.append(logits.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-12, atol=0)


def test_selftrain_without_any_weight_the_loss_and_its_gradient_are_zero():
    logits = torch.randn(1, 4, 3, 5, generator=seeded()).requires_grad_()
    loss = selftrain.weighted_loss(logits, torch.zeros(1, 3, 5), torch.zeros(1, 3, 5))
    loss.backward()
    assert loss.item() == 0 and not logits.grad.any()


def test_selftrain_trust_by_confidence_keeps_the_surest_share_of_each_class():
    p = probabilities(2, 4, 20, 30)
    m = torch.zeros(2, 1, 20, 30)
    weight = selftrain.trust_in(p, m, "confidence", 0.3, 0.0, 1.0)
    confidence, labels = p.max(dim=1)
    for c in range(4):
        of_class = labels == c
        assert abs(weight[of_class].mean().item() - 0.3) < 0.03
        kept, left = confidence[of_class & (weight > 0)], confidence[of_class & (weight == 0)]
        assert kept.min() > left.max() - 0.02, "a bin is 2.4 % of the doubt wide"


def test_selftrain_trust_by_m_is_an_exponential_and_both_is_the_product():
    p, m = probabilities(2, 4, 5, 6), torch.rand(2, 1, 5, 6, generator=seeded(3))
    of_m = selftrain.trust_in(p, m, "m", 0.4, 0.0, 0.2)
    for b, i, j in np.ndindex(2, 5, 6):
        assert of_m[b, i, j].item() == pytest.approx(math.exp(-m[b, 0, i, j].item() / 0.2))
    both = selftrain.trust_in(p, m, "both", 0.4, 0.0, 0.2)
    sure = selftrain.trust_in(p, m, "confidence", 0.4, 0.0, 0.2)
    torch.testing.assert_close(both, of_m * sure)
    assert (selftrain.trust_in(p, m, "constant", 0.4, 0.0, 0.2) == 1).all()


@pytest.mark.parametrize("share", (0.3, 1.0))
def test_selftrain_trust_by_least_m_keeps_the_share_of_each_class_on_which_the_heads_agree(share):
    p, m = probabilities(2, 4, 20, 30), torch.rand(2, 1, 20, 30, generator=seeded(3))
    weight = selftrain.trust_in(p, m, "least_m", share, 0.0, 1.0)
    labels = p.argmax(dim=1)
    for c in range(4):
        of_class = sorted(
            zip(m[:, 0][labels == c].tolist(), weight[labels == c].tolist(), strict=True)
        )
        count = math.ceil(share * len(of_class))
        assert [w for _, w in of_class] == [1.0] * count + [0.0] * (len(of_class) - count)
    equal = selftrain.trust_in(p, torch.zeros_like(m), "least_m", share, 0.0, 1.0)
    assert (equal == 1).all(), "equal ones count alike"


@pytest.mark.parametrize("trust", get_args(selftrain.Trust))
def test_selftrain_no_label_is_trusted_below_the_threshold(trust):
    p, m = probabilities(2, 4, 5, 6), torch.zeros(2, 1, 5, 6)
    weight = selftrain.trust_in(p, m, trust, 1.0, 0.6, 0.1)
    assert torch.equal(weight > 0, p.amax(dim=1) > 0.6)
    assert not selftrain.trust_in(p, m, trust, 1.0, 1.01, 0.1).any()


def test_selftrain_shuffled_weights_are_the_same_at_other_places():
    weight = torch.rand(2, 5, 6, generator=seeded())
    moved = selftrain.shuffled(weight, seeded(1))
    for one, other in zip(weight, moved, strict=True):
        assert torch.equal(one.flatten().sort().values, other.flatten().sort().values)
        assert not torch.equal(one, other)


# What the student sees.


def images_of(seed: int, b=2, h=16, w=24) -> torch.Tensor:
    return torch.randint(0, 256, (b, 3, h, w), dtype=torch.uint8, generator=seeded(seed))


def test_selftrain_a_mix_of_an_image_with_itself_changes_nothing():
    """Neither images nor labels, nor weights where all are equal: what is pasted has their mean."""
    images, labels = images_of(0), some_labels(2, 5, 16, 24, ignored=0)
    ones = torch.ones(2, 16, 24)
    mixed = selftrain.mix_classes(images, labels, ones, images, labels, seeded())
    for found, wanted in zip(mixed, (images, labels, ones), strict=True):
        assert torch.equal(found, wanted)


def test_selftrain_a_mix_pastes_half_of_the_classes_whole_and_nothing_else():
    images, source = images_of(0), images_of(1)
    labels, ids = torch.full((2, 16, 24), 9), some_labels(2, 5, 16, 24).byte()
    weight = torch.rand(2, 16, 24, generator=seeded(5))
    mixed, of_mix, trust = selftrain.mix_classes(images, labels, weight, source, ids, seeded())
    for b in range(2):
        pasted = of_mix[b] != 9
        chosen = set(ids[b][pasted].tolist())
        assert len(chosen) == 3 and 255 not in chosen, "three of five"
        assert torch.equal(pasted, torch.isin(ids[b], torch.tensor(sorted(chosen)).byte()))
        assert torch.equal(of_mix[b][pasted], ids[b][pasted].long())
        assert torch.equal(mixed[b][:, pasted], source[b][:, pasted])
        assert torch.equal(mixed[b][:, ~pasted], images[b][:, ~pasted])
        assert (trust[b][pasted] == weight[b].mean()).all() and (
            trust[b][~pasted] == weight[b][~pasted]
        ).all()


def test_selftrain_a_mix_resizes_the_source_to_the_target():
    """Halves of two colours at another size: a pasted class comes with its colour."""
    ids = torch.arange(2).repeat_interleave(12).expand(2, 8, 24)
    source = (ids * 200 + 20).byte()[:, None].expand(2, 3, 8, 24)
    images, labels = torch.full((2, 3, 16, 48), 99, dtype=torch.uint8), torch.full((2, 16, 48), 9)
    mix = images, labels, torch.ones(2, 16, 48), source, ids.byte()
    mixed, of_mix, _ = selftrain.mix_classes(*mix, seeded())
    for b in range(2):
        (pasted,) = {*of_mix[b].unique().tolist()} - {9}
        assert (of_mix[b] == pasted).sum() == 16 * 24
        away = (torch.arange(48) - 23.5).abs() > 2  # from the border, where colours blend
        assert (mixed[b][:, (of_mix[b] == pasted) & away] == 200 * pasted + 20).all()
        assert (mixed[b][:, of_mix[b] == 9] == 99).all()


def test_selftrain_a_mix_of_scaled_images_is_refused():
    small, labels = images_of(0, h=8), torch.zeros(2, 16, 24)
    with pytest.raises(ValueError, match=r"one size: give --scales 1 --scale-probs 1, or"):
        selftrain.mix_classes(small, labels, labels, images_of(1), labels)


def test_selftrain_hidden_patches_have_the_mean_colour_and_the_rest_is_as_it_was():
    images = images_of(0, h=32, w=64)
    hidden = selftrain.hide_patches(images, 0.5, 4, seeded())
    changed = (hidden != images).any(dim=1)
    for b in range(2):
        mean = images[b].float().mean(dim=(1, 2)).round().byte()
        for y, x in np.ndindex(4, 8):  # patches of 8x8
            box = (slice(8 * y, 8 * y + 8), slice(8 * x, 8 * x + 8))
            if changed[b][box].any():
                assert (hidden[b][:, *box] == mean[:, None, None]).all()
    assert 0.3 < changed.float().mean() < 0.7
    assert torch.equal(selftrain.hide_patches(images, 0.0, 4, seeded()), images)
    mean = images.float().mean(dim=(2, 3), keepdim=True).round().byte()
    assert torch.equal(selftrain.hide_patches(images, 1.0, 4), mean.expand_as(images))


def test_selftrain_other_colours_move_a_channel_as_a_whole():
    images = images_of(0).clamp(100, 150)
    assert torch.equal(selftrain.change_colours(images, 0.0), images)
    found = selftrain.change_colours(images, 0.1, seeded())
    assert found.dtype == torch.uint8 and not torch.equal(found, images)
    grey = images[:, :1].expand(-1, 3, -1, -1).contiguous()
    found = selftrain.change_colours(grey, 0.1, seeded())
    for b, c in np.ndindex(2, 3):  # of grey, saturation changes nothing: a line remains
        x, y = grey[b, c].flatten().double(), found[b, c].flatten().double()
        slope, offset = np.polyfit(x, y, 1)
        assert (y - slope * x - offset).abs().max() <= 1 and 0.85 < slope < 1.15


def test_selftrain_what_the_student_sees_depends_on_the_seed_alone():
    """Masks and mixes of step n are the same whatever was drawn before."""
    images, labels = images_of(0), some_labels(2, 5, 16, 24)
    weight = torch.ones(2, 16, 24)

    def seen(seed: int) -> torch.Tensor:
        torch.manual_seed(train.seed_of(0, seed, 0))
        mixed, _, _ = selftrain.mix_classes(images, labels, weight, images_of(1), labels)
        return selftrain.hide_patches(selftrain.change_colours(mixed, 0.2), 0.5, 4)

    first = seen(7)
    seen(6)
    assert torch.equal(seen(7), first) and not torch.equal(seen(8), first)


# The step and the teacher.


def ready(**numbers):
    """(G, batch, phase, hyper, state) in the second stage."""
    _, hyper = configure({"method": "selftrain", "init": "x", "class_mix": False} | numbers)
    torch.manual_seed(0)
    G = Generator("tiny", head_std=0.1)
    images = images_of(0, h=32, w=64)
    batch = Batch(images, some_labels(2, 19, 32, 64), images.flip(3), (32, 64))
    state = selftrain.teacher_begins(hyper.adv_start, G, None, hyper)
    return G, batch, clan.phase_at(hyper.adv_start, hyper), hyper, state


def gradients(G, loss) -> dict[str, torch.Tensor]:
    found = torch.autograd.grad(loss, list(G.parameters()))
    return dict(zip((name for name, _ in G.named_parameters()), found, strict=True))


@pytest.mark.parametrize("of_the_batch", (False, True))
@pytest.mark.parametrize("seg_heads", ("each", "ensemble"))
def test_selftrain_without_a_trusted_label_the_step_is_that_of_source_only(seg_heads, of_the_batch):
    """Bit for bit: a threshold above 1. With --batchnorm batch the target moves BatchNorm's running
    statistics all the same, and no weight."""
    G, batch, phase, hyper, state = ready(threshold=1.01, seg_heads=seg_heads)
    G.train(of_the_batch)
    loss, terms, _ = selftrain.selftrain_step(G, None, batch, phase, hyper, state)
    wanted, _, _ = clan.g_step(G, None, batch, phase, replace(hyper, method="source"))
    assert torch.equal(loss, wanted) and terms["st"] == 0 and terms["kept"] == 0
    assert_equal(gradients(G, loss), gradients(G, wanted))


def test_selftrain_the_target_term_is_eq_3_on_the_teachers_labels():
    G, batch, phase, hyper, state = ready(trust="constant", colours=0.0)
    G.eval()
    _, terms, _ = selftrain.selftrain_step(G, None, batch, phase, hyper, state)
    with torch.no_grad():
        labels = sum(clan.upsample(x, (32, 64)) for x in G(batch.target)).argmax(dim=1)
    own = Batch(batch.target, labels, None, None)
    wanted, _, _ = clan.g_step(G, None, own, phase, replace(hyper, method="source"))
    assert terms["st"].item() == pytest.approx(wanted.item(), rel=1e-5)


def test_selftrain_masks_of_a_step_are_the_same_with_and_without_other_changes(monkeypatch):
    hide = selftrain.hide_patches

    def hidden(seed: int, **numbers) -> torch.Tensor:
        seen = []

        def recorded(images, share, patches, generator):
            stripes = torch.zeros_like(images)
            stripes[..., ::2] = 200  # so that the mean is another colour
            seen.append(hide(stripes, share, patches, generator) != stripes)
            return images

        monkeypatch.setattr(selftrain, "hide_patches", recorded)
        G, batch, phase, hyper, state = ready(masked=0.5, **numbers)
        torch.manual_seed(train.seed_of(0, seed, 0))
        selftrain.selftrain_step(G, None, batch, phase, hyper, state)
        return seen[0]

    first = hidden(7)
    assert 0.2 < first.float().mean() < 0.8 and not torch.equal(hidden(8), first)
    for numbers in ({"class_mix": True}, {"colours": 0.0}, {"trust_shuffled": True}):
        assert torch.equal(hidden(7, **numbers), first)


def test_selftrain_the_teacher_labels_the_image_that_the_student_sees_changed():
    """The labels do not depend on colours, mix or masks, and get no gradient."""
    changed = {"colours": 0.3, "masked": 0.9, "class_mix": True}
    found = []
    for numbers in ({"colours": 0.0}, changed):
        G, batch, phase, hyper, state = ready(trust="m", **numbers)
        _, terms, _ = selftrain.selftrain_step(G, None, batch, phase, hyper, state)
        found.append((terms["kept"], terms["m"], terms["st"]))
        assert all(not x.requires_grad for x in state.values())
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    assert not torch.equal(found[0][2], found[1][2])


def test_selftrain_source_free_reads_no_source():
    G, batch, phase, hyper, state = ready(source_free=True, colours=0.0)
    G.eval()
    losses = []
    for source in (batch.source, batch.source.flip(2)):
        loss, terms, _ = selftrain.selftrain_step(
            G, None, batch._replace(source=source), phase, hyper, state
        )
        losses.append(loss)
        assert "seg" not in terms
    assert torch.equal(*losses) and losses[0] > 0
    with pytest.raises(ValueError, match="source_free has none: drop one"):
        ready(source_free=True, class_mix=True)
    flags = {"method": "selftrain", "init": "x", "backbone": "tiny"}
    assert (
        configure(flags)[1].class_mix and not configure(flags | {"source_free": True})[1].class_mix
    )


@pytest.mark.parametrize("momentum", (0.0, 0.9, 1.0))
def test_selftrain_the_teacher_is_the_moving_mean_of_the_student(momentum):
    G, _, _, hyper, state = ready(teacher_momentum=momentum)
    first = {k: v.clone() for k, v in selftrain.teacher_of(state).items()}
    with torch.no_grad():
        for p in G.parameters():
            p += torch.randn(p.shape, generator=seeded())
    next(m for m in G.modules() if hasattr(m, "num_batches_tracked")).num_batches_tracked += 5
    state |= selftrain.next_teacher(state, G, {"st": torch.zeros(())}, hyper)
    for name, value in G.state_dict().items():
        teacher = selftrain.teacher_of(state)[name]
        if not value.is_floating_point():
            assert torch.equal(teacher, value)
            continue
        torch.testing.assert_close(teacher, momentum * first[name] + (1 - momentum) * value)
        if momentum in (0.0, 1.0):
            assert torch.equal(teacher, value if momentum == 0 else first[name])
    before = {name: value.clone() for name, value in state.items()}
    assert selftrain.next_teacher(state, G, {"seg": torch.zeros(())}, hyper) == {}
    assert_equal(state, before)


def test_selftrain_numbers_that_make_no_sense_are_refused():
    for flags, sentence in (
        ("--teacher-momentum 1.5", "teacher_momentum must lie in"),
        ("--tau 0", "tau must be above 0"),
        ("--patches 0", "patches at least 1"),
        ("--masked 2", "masked must lie in"),
        ("--tau 0.1", "tau has no effect here: it needs trust m or both"),
        ("--trust m --trusted 0.2", "trusted has no effect here: it needs trust confidence, "),
        ("--trust constant --trusted 0.2", "trusted has no effect here: it needs trust confidence"),
        ("--patches 4", "patches has no effect here: it needs masked above 0"),
    ):
        assert sentence in run_error("--method", "selftrain", *flags.split())
    assert "does not use --tau" in run_error("--method", "tan", "--tau", "0.1")
    assert "give --init RUN" in run_error("--method", "selftrain", "--adv-start", "0")
    alone = run_error("--method", "selftrain")
    assert "goes on with a network that has learnt: give --init RUN" in alone
    with_m = run_error("--method", "selftrain", "--adv-start", "2", "--trust", "both")
    assert "--trust both needs --tau" in with_m
    both = run_error("--selftrain-start", "1200", "--trust", "m")
    assert "--trust m needs --tau" in both, "before the first part is trained"
    assert "name that" in run_error("--method", "selftrain", "--selftrain-start", "3")
    assert "counts both parts" in run_error("--selftrain-start", "9", "--steps", "9")


# Whole runs.

STAGE = [*SMALL[: SMALL.index("--steps")], "--batch", "2", "--log-every", "1", "--save-every", "1"]
STAGE += ["--keep", "99", "--device", "cpu", "--method", "selftrain", "--steps", "4"]


@pytest.fixture
def first(few, tmp_path):
    return run(tmp_path / "first", "--method", "tan")


def test_selftrain_a_second_stage_starts_from_a_run_and_its_result_is_the_teacher(
    first, tmp_path, capsys
):
    out = tmp_path / "second"
    train.main([*STAGE, "--init", str(first), "--out", str(out), "--class-mix", "--masked", "0.5"])
    start, tensors = part(last_tensors(first), "G."), last_tensors(out)
    before, _ = load_generator(out / BEFORE, say=lambda _: None)
    assert_equal(before.state_dict(), {k.removeprefix("G."): v for k, v in start.items()})
    teacher, _ = load_generator(newest_checkpoint(out), say=lambda _: None)
    wanted = part(tensors, "state.teacher.")
    assert_equal(
        teacher.state_dict(), {k.removeprefix("state.teacher."): v for k, v in wanted.items()}
    )
    result = json.loads((out / "eval.json").read_text())
    assert result["before"]["miou"] == json.loads((first / "eval.json").read_text())["miou"]
    assert {"miou", "iou"} <= result["student"].keys()
    assert "student" in capsys.readouterr().out
    evaluation.main([str(out)])
    again = json.loads((out / "eval.json").read_text())
    assert again["student"] == result["student"] and again["before"] == result["before"]
    (out / "eval.json").write_text("{")
    with pytest.raises(SystemExit, match=r"eval\.json is damaged: delete it"):
        evaluation.main([str(out)])
    (out / "eval.json").write_text(json.dumps(again))
    evaluation.main([str(out), "--tgt-size", "16", "32"])  # the student has no score of this size
    (other,) = out.glob("eval-*-16x32.json")
    assert "student" not in json.loads(other.read_text())
    assert json.loads((out / "eval.json").read_text()) == again
    capsys.readouterr()
    evaluation.main([str(out)])
    rows = [line for line in capsys.readouterr().out.splitlines() if "mIoU" in line]
    assert any(f"{100 * result['miou']:.1f}" in line for line in rows)
    assert {"seg", "st", "kept", "m", "grad"} <= steps_logged(out)[0].keys()
    assert metrics(out)[0]["step"] == 0 and "target_miou" in metrics(out)[0]


@pytest.mark.parametrize("cut", (0, 2))
def test_selftrain_killed_and_resumed_it_ends_in_the_same_weights(
    first, cut, tmp_path, monkeypatch
):
    flags = [*STAGE, "--init", str(first), "--class-mix", "--masked", "0.5"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train.main([*flags, "--out", str(whole)])
    with monkeypatch.context() as patch:
        before_step(patch, cut, power_cut)
        with pytest.raises(RuntimeError, match="power"):
            train.main([*flags, "--out", str(parts)])
    train.main(["--resume", str(parts)])
    assert_equal(last_tensors(parts), last_tensors(whole))
    assert metrics(parts) == metrics(whole)


@pytest.mark.parametrize("cut", (None, 5, 2))  # in neither, in the first part, in the second
def test_selftrain_both_parts_in_one_run_are_two_runs_one_after_the_other(
    first, cut, tmp_path, monkeypatch
):
    two, one = tmp_path / "two", tmp_path / "one"
    train.main([*STAGE, "--init", str(first), "--out", str(two), "--teacher-momentum", "0.9"])
    both = [*SMALL, "--method", "tan", "--selftrain-start", "8", "--steps", "12"]
    both += ["--teacher-momentum", "0.9"]
    both += ["--log-every", "1", "--save-every", "1", "--keep", "99", "--out", str(one)]
    if cut is not None:
        with monkeypatch.context() as patch:
            counted = iter(range(99))  # steps of both parts
            phase_at = clan.phase_at

            def watched(*arguments):
                if next(counted) == (cut if cut == 5 else 8 + cut):
                    power_cut()
                return phase_at(*arguments)

            patch.setattr(clan, "phase_at", watched)
            with pytest.raises(RuntimeError, match="power"):
                train.main(both)
        both.append("--resume")
    train.main(both)
    assert_equal(last_tensors(one), last_tensors(two))
    assert_equal(last_tensors(one / "first"), last_tensors(first))


def test_selftrain_begins_with_the_source_if_it_has_no_run(few, tmp_path):
    """The teacher begins when adaptation does, and until then it is not what is loaded."""
    flags = [*STAGE, "--adv-start", "2", "--out", str(tmp_path)]
    train.main(flags)
    before, _ = load_generator(tmp_path / BEFORE, say=lambda _: None)
    student = part(last_tensors(tmp_path), "G.")
    assert not torch.equal(
        before.state_dict()["C1.branches.0.weight"], student["G.C1.branches.0.weight"]
    )
    logged = steps_logged(tmp_path)
    assert ["st" in line for line in logged] == [False, False, True, True]


def test_selftrain_another_backbone_and_other_classes_are_refused_by_name(first, tmp_path):
    start = ["--method", "selftrain", "--init", str(first), "--out", str(tmp_path / "x")]
    assert "weights of backbone tiny, but this Generator has backbone lite0" in run_error(
        *start, "--backbone", "lite0", "--tgt-size", "32", "64"
    )
    folder = tmp_path / "masks"
    make_folder(folder, {"names": ["road", "lake"]})
    make_folder(folder, {"names": ["road", "lake"]}, split="val")
    flags = [
        "--src",
        "folder",
        "--src-dir",
        str(folder),
        "--tgt",
        "folder",
        "--tgt-dir",
        str(folder),
    ]
    assert "was trained on other classes (bicycle, b" in run_error(
        *start, *flags, "--backbone", "tiny"
    )
    assert "holds no checkpoint" in run_error(*STAGE, "--init", str(tmp_path / "none"))


def test_selftrain_flags_of_the_data_that_differ_from_the_first_runs_are_named(
    first, tmp_path, capsys
):
    flags = [*STAGE, "--steps", "1", "--init", str(first), "--out"]
    train.main([*flags, str(tmp_path / "same")])
    assert "other flags" not in capsys.readouterr().out
    changed = ["--fourier", "0.1", "--shift", "0", "0.25"]
    train.main([*flags, str(tmp_path / "other"), *changed])
    said = " ".join(capsys.readouterr().out.split())
    assert "was made with other flags: --shift [0.0, 0.25] (was [0.5, 0.5]), --fourier 0.1" in said


def test_selftrain_a_network_whose_heads_have_learnt_nothing_is_refused(few, tmp_path):
    tensors = Generator("tiny", 19).state_dict()
    path = tmp_path / "one_head.pth"
    torch.save({k: v for k, v in tensors.items() if not k.startswith("C2.")}, path)
    start = [*STAGE, "--init", str(path), "--out", str(tmp_path / "x")]
    assert "has no weights for C2." in run_error(*start)
    train.main([*start, "--adv-start", "1"])


# FDA.


def photographs(seed: int, h=12, w=20) -> torch.Tensor:
    return torch.rand(3, h, w, dtype=torch.float64, generator=seeded(seed))


def test_selftrain_fourier_style_of_nothing_and_of_an_equal_image_changes_nothing():
    source, target = photographs(0), photographs(1)
    torch.testing.assert_close(selftrain.fourier_style(source, target, 0.0), source)
    torch.testing.assert_close(selftrain.fourier_style(source, source, 0.2), source)


@pytest.mark.parametrize("beta", (0.01, 0.11, 0.3, 0.6))
def test_selftrain_fourier_style_has_the_targets_amplitudes_below_beta_and_no_other(beta):
    source, target = photographs(0), photographs(1)
    found = torch.fft.fft2(selftrain.fourier_style(source, target, beta))
    for k, j in np.ndindex(12, 20):
        slow = max(min(k, 12 - k) / 12, min(j, 20 - j) / 20) < beta
        wanted = torch.fft.fft2(target if slow else source)[:, k, j].abs()
        torch.testing.assert_close(found[:, k, j].abs(), wanted)
    a, b = found[:, 1:6, 1:10].angle(), torch.fft.fft2(source)[:, 1:6, 1:10].angle()
    torch.testing.assert_close((a - b).cos(), torch.ones_like(a))
    if beta == 0.01:  # the mean alone
        mean = target.mean(dim=(1, 2), keepdim=True)
        wanted = source - source.mean(dim=(1, 2), keepdim=True) + mean
        torch.testing.assert_close(selftrain.fourier_style(source, target, beta), wanted)


def test_selftrain_fourier_style_copies_out_alone():
    module = types.ModuleType("elsewhere")
    exec("import torch\n\n" + inspect.getsource(selftrain.fourier_style), module.__dict__)
    source, target = photographs(0), photographs(1)
    wanted = selftrain.fourier_style(source, target, 0.1)
    assert torch.equal(module.__dict__["fourier_style"](source, target, 0.1), wanted)


def test_selftrain_fourier_style_of_two_sizes_is_refused():
    with pytest.raises(ValueError, match="differ in shape"):
        selftrain.fourier_style(photographs(0), photographs(1, h=10), 0.1)


def test_selftrain_fourier_changes_the_sources_images_by_seed_and_step_alone(scenes):
    source, target = (data.open_dataset("streets", role, "train") for role in ("source", "target"))
    _, hyper = configure({"method": "source", "fourier": 0.03})
    steps = data.Steps(source, target, hyper, seed=0)
    plain = data.Steps(source, target, replace(hyper, fourier=0.0), seed=0)
    assert torch.equal(steps[5].source, steps[5].source) and steps[5].target is None
    assert torch.equal(steps[5].labels, plain[5].labels)
    assert not torch.equal(steps[5].source, plain[5].source)
    assert "fourier must be at most 0.5" in run_error("--fourier", "0.7")


# What a review found.


def test_selftrain_what_is_scored_is_the_teacher_also_with_compiled_blocks():
    """A compiled block is a function of the student's own weights."""
    G, _, _, hyper, state = ready()
    with torch.no_grad():
        for p in G.parameters():
            p += 0.1 * torch.randn(p.shape, generator=seeded())
    for block in residual_blocks(G):
        block.forward = partial(type(block).forward, block)
    found = train.network_of(METHODS["selftrain"], G, state, hyper.steps, hyper).eval()
    teacher = Generator("tiny")
    teacher.load_state_dict(selftrain.teacher_of(state))
    image = images_of(3, 1, 32, 64)
    with torch.no_grad():
        torch.testing.assert_close(found(image)[0], teacher.eval()(image)[0], rtol=0, atol=1e-5)
        assert (G.eval()(image)[0] - found(image)[0]).abs().max() > 0.1


def test_selftrain_the_lineage_is_that_of_the_run(tmp_path):
    save(tmp_path / name_of(3), {"G.x": torch.zeros(1)}, dict.fromkeys(KEYS, 3) | {
        "settings": {"lineage": "torchvision", "backbone": "r101"}})  # fmt: skip
    flags = {"method": "selftrain", "src": "gta5", "backbone": "r101", "init": str(tmp_path)}
    assert configure(flags)[0].lineage == "torchvision"
    assert configure(flags | {"lineage": "caffe"})[0].lineage == "caffe"


def test_selftrain_a_mix_of_scaled_images_is_refused_before_the_first_step(first, tmp_path):
    start = [*STAGE, "--init", str(first), "--class-mix", "--out", str(tmp_path / "x")]
    error = run_error(*start, "--scales", "0.8", "1.2", "--scale-probs", "0.5", "0.5")
    remedy = "give --scales 1 --scale-probs 1, or --no-class-mix"
    assert f"--class-mix needs images of one scale: {remedy}" in error
    assert not (tmp_path / "x").exists()


def test_selftrain_a_mix_takes_a_source_of_another_size(first, tmp_path):
    run_flags = ["--init", str(first), "--class-mix", "--src-size", "64", "96"]
    train.main([*STAGE, *run_flags, "--out", str(tmp_path / "x")])
    assert json.loads((tmp_path / "x" / "eval.json").read_text())["miou"] > 0


def test_selftrain_other_flags_than_those_of_a_finished_first_part_are_refused(few, tmp_path):
    both = [*SMALL, "--selftrain-start", "8", "--steps", "12", "--out", str(tmp_path / "run")]
    train.main([*both, "--method", "tan"])
    sentence = run_error(*both, "--method", "clan", "--resume")
    assert "made with other settings: drop --method clan (was tan)" in sentence


def test_selftrain_without_a_trusted_label_nothing_that_is_pasted_counts_either():
    G, batch, phase, hyper, state = ready(threshold=1.01, class_mix=True, masked=0.5)
    _, terms, _ = selftrain.selftrain_step(G, None, batch, phase, hyper, state)
    assert terms["st"] == 0


def test_study_a_warm_up_in_the_targets_style_is_not_shared_with_another_target():
    flags = {"method": "tan", "fourier": 0.02, "out": None}
    one, other = (warm_up(flags | {"shift": (0.5, x)}) for x in (0.5, 0.0))
    plain = {warm_up({"method": "tan", "out": None, "shift": (0.5, x)}) for x in (0.5, 0.0)}
    assert one != other and len(plain) == 1


def test_study_a_stage_after_another_run_is_another_run(first, few, tmp_path):
    """Also where its folder is gone: the start's settings are part of what is recorded."""
    again = run(tmp_path / "again" / "first", "--method", "tan", "--lambda-adv", "0.5")
    one, other = (start_of(str(x)) for x in (first, again))
    assert one != other and one.startswith("first-") and start_of(one) == one
