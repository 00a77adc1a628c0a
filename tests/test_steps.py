"""Each step of the other systems against its equations, written out anew in plain torch."""

import pytest
import torch
import torch.nn.functional as F
from helpers import adaptation_of
from torch import Tensor, nn

import alignment
import baselines
import train
from methods import METHODS
from models import normalize

SIZE = (32, 64)


def up(x: Tensor) -> Tensor:
    return F.interpolate(x, size=SIZE, mode="bilinear", align_corners=True)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, ignore_index=255)


def says_source(d: Tensor) -> Tensor:
    """-log P(source), each."""
    return -F.logsigmoid(d)


def says_target(d: Tensor) -> Tensor:
    return -F.logsigmoid(-d)


class Case:
    """A method in adaptation, its D without dropout, and what all the equations need."""

    def __init__(self, name: str, **numbers: float):
        self.G, self.D, self.batch, self.phase, self.hyper, self.state = adaptation_of(
            name, **numbers
        )
        train.set_mode(self.G, self.phase, self.hyper)
        if self.D is not None:
            self.D.eval()
        self.labels = self.batch.labels
        self.source = [up(x) for x in self.G(self.batch.source)]
        self.target = [up(x) for x in self.G(self.batch.target)]
        self.of_source = sum(cross_entropy(x, self.labels) for x in self.source)  # each head's loss
        assert self.hyper.seg_heads == "each"

    def step(self):
        method = METHODS[self.hyper.method]
        more = (self.state,) if method.first_state else ()
        return method.g_step(self.G, self.D, self.batch, self.phase, self.hyper, *more)

    def d_step(self, predictions) -> Tensor:
        return METHODS[self.hyper.method].d_step(self.D, predictions)[0]

    def p(self, logits: list[Tensor]) -> Tensor:
        return (logits[0] + logits[1]).softmax(dim=1)


def equal(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_steps_minent_adds_the_entropy_of_the_target():
    case = Case("minent", lambda_ent=0.3)
    entropy = torch.distributions.Categorical(logits=sum(case.target).movedim(1, -1)).entropy()
    wanted = case.of_source + 0.3 * (entropy / torch.tensor(19.0).log()).mean()
    equal(case.step()[0], wanted)


def test_steps_advents_d_sees_the_entropies_of_classes():
    case = Case("advent", lambda_adv=0.7)
    source, target = (
        -p * p.log() / torch.tensor(19.0).log() for p in map(case.p, (case.source, case.target))
    )
    loss, _, predictions = case.step()
    equal(loss, case.of_source + 0.7 * says_source(up(case.D(target))).mean())
    answers = up(case.D(source)), up(case.D(target))
    equal(case.d_step(predictions), says_source(answers[0]).mean() + says_target(answers[1]).mean())


def test_steps_mcds_heads_move_apart_on_the_target_and_e_brings_them_together():
    case = Case("mcd", lambda_dis=3.0)
    equal(case.step()[0], case.of_source)
    p1, p2 = (x.softmax(dim=1) for x in case.target)
    apart = (p1 - p2).abs().mean()
    assert apart > 0.01
    method = METHODS["mcd"]
    heads, *features = method.later_steps(case.hyper)
    equal(heads(case.G, case.batch, case.phase, case.hyper)[0], case.of_source - 3 * apart)
    assert len(features) == case.hyper.mcd_steps
    for step in features:
        equal(step(case.G, case.batch, case.phase, case.hyper)[0], 3 * apart)


@pytest.mark.parametrize("lambda_st", (0.0, 0.5, 1.0))
def test_steps_self_training_is_one_mean_over_labels_and_pseudo_labels(lambda_st):
    case = Case("st", lambda_st=lambda_st)
    case.state["thresholds"] = torch.full((19,), 0.12)
    with torch.no_grad(), baselines.evaluating(case.G):
        p = sum(up(x) for x in case.G(case.batch.target)).softmax(dim=1)
    confidence, classes = p.max(dim=1)
    labels = classes.where(confidence > 0.12, 255)
    assert 0.1 < (labels != 255).float().mean() < 0.9
    wanted = torch.zeros(())
    weights = torch.zeros(())
    for logits, ids, weight in ((case.source, case.labels, 1.0), (case.target, labels, lambda_st)):
        losses = sum(F.cross_entropy(x, ids, ignore_index=255, reduction="sum") for x in logits)
        wanted, weights = wanted + weight * losses, weights + weight * (ids != 255).sum()
    equal(case.step()[0], wanted / weights)


def test_steps_two_levels_are_tan_twice():
    case = Case("multi", lambda_adv=0.7, lambda_adv_aux=0.4, lambda_seg_aux=0.2)
    G, levels = case.G, case.D
    first_stages = nn.Sequential(*list(G.E)[:5])

    def aux(images: Tensor) -> Tensor:
        return up(levels.of_g(first_stages(normalize(images, G.lineage, (G.mean, G.std)))))

    source, target = aux(case.batch.source), aux(case.batch.target).softmax(dim=1)
    main = case.p(case.target)
    wanted = case.of_source + 0.2 * cross_entropy(source, case.labels)
    wanted = wanted + 0.7 * says_source(up(levels.main(main))).mean()
    wanted = wanted + 0.4 * says_source(up(levels.aux(target))).mean()
    loss, _, predictions = case.step()
    equal(loss, wanted)
    pairs = ((levels.main, case.p(case.source), main), (levels.aux, source.softmax(dim=1), target))
    of_d = sum(says_source(up(D(s))).mean() + says_target(up(D(t))).mean() for D, s, t in pairs)
    equal(case.d_step(predictions), of_d)


def test_steps_cycadas_d_sees_logits_and_is_judged_by_its_accuracy():
    case = Case("cycada", lambda_adv=0.7)
    d_source, d_target = case.D(sum(case.source)), case.D(sum(case.target))
    loss, _, predictions = case.step()
    equal(loss, case.of_source + 0.7 * says_source(d_target).mean())
    found, terms = alignment.pixel_d_step(case.D, predictions)
    equal(found, says_source(d_source).mean() + says_target(d_target).mean())
    right = torch.cat([(d_source > 0).flatten(), (d_target < 0).flatten()]).float().mean()
    assert 0 < right < 1
    equal(terms["d_acc"], right)


def test_steps_fcns_in_the_wild_confuse_d_on_both_domains_and_keep_to_class_sizes():
    case = Case("fcns_wild", lambda_adv=0.7, lambda_size=0.2)
    d = [case.D(case.G.features(x)) for x in (case.batch.source, case.batch.target)]
    confused = sum((says_source(x) / 2 + says_target(x) / 2).mean() for x in d) / 2
    l_size = alignment.size_loss(sum(case.G(case.batch.target)), case.state["sizes"], case.hyper)
    assert l_size > 0.01
    loss, _, predictions = case.step()
    equal(loss, case.of_source + 0.7 * confused + 0.2 * l_size)
    equal(case.d_step(predictions), says_source(d[0]).mean() + says_target(d[1]).mean())


@pytest.mark.parametrize("begun", (0.0, 1.0))
def test_steps_cross_city_swaps_the_domains_for_g(begun):
    case = Case("cross_city", lambda_adv=0.7, lambda_class=0.2)
    case.state["begun"] = torch.tensor(begun)
    source, target = (case.D(case.G.features(x)) for x in (case.batch.source, case.batch.target))
    one_hot = F.one_hot(case.labels.clamp(max=19), 20)[..., :19].permute(0, 3, 1, 2).float()
    cells = F.avg_pool2d(one_hot, 4), F.avg_pool2d(case.p(case.target), 4)

    def by_class(losses: Tensor, share: Tensor) -> Tensor:
        mean = (share * losses).sum(dim=(2, 3)) / (share.sum(dim=(2, 3)) + 5e-6)
        return mean.mean(dim=0).sum()

    all_cells, classes = slice(0, 1), slice(1, None)
    swapped = says_target(source[:, all_cells]).mean() + says_source(target[:, all_cells]).mean()
    of_classes = by_class(says_target(source[:, classes]), cells[0])
    of_classes = of_classes + by_class(says_source(target[:, classes]), cells[1])
    loss, _, predictions = case.step()
    equal(loss, case.of_source + 0.7 * swapped + 0.2 * begun * of_classes)
    of_d = says_source(source[:, all_cells]).mean() + says_target(target[:, all_cells]).mean()
    of_d = of_d + by_class(says_source(source[:, classes]), cells[0])
    of_d = of_d + by_class(says_target(target[:, classes]), cells[1])
    equal(case.d_step(predictions), of_d)


def test_steps_cda_follows_easy_tasks_that_see_the_network_of_adv_start():
    case = Case("cda", lambda_layout=0.3, lambda_landmark=0.2)
    with torch.no_grad(), baselines.evaluating(case.G):
        source, target = (case.G.features(x) for x in (case.batch.source, case.batch.target))
        for p in case.G.parameters():
            p.mul_(0.9)  # G has learnt since
        moved = [up(x) for x in case.G(case.batch.target)]
    case.source, case.target = ([up(x) for x in case.G(x)] for x in case.batch[:3:2])
    of_source = sum(cross_entropy(x, case.labels) for x in case.source)
    whole, cells = case.D(target)
    p = case.p(case.target)
    sharp = ((p / p.amax(dim=1, keepdim=True)) ** 5).mean(dim=(2, 3))
    sharp = sharp / sharp.sum(dim=1, keepdim=True)
    layout = -(whole.softmax(dim=1).detach() * sharp.log()).sum(dim=1).mean()
    confidence, classes = cells.softmax(dim=1).max(dim=1)
    kept = round(0.6 * confidence[0].numel())
    least = torch.stack([x.flatten().sort(descending=True).values[kept - 1] for x in confidence])
    coarse = classes.where(confidence >= least[:, None, None], 255)
    repeats = SIZE[0] // coarse.shape[1], SIZE[1] // coarse.shape[2]
    labels = coarse.repeat_interleave(repeats[0], 1).repeat_interleave(repeats[1], 2)
    landmark = sum(cross_entropy(x, labels) for x in case.target)
    loss, _, predictions = case.step()
    equal(loss, of_source + 0.3 * layout + 0.2 * landmark)
    assert not torch.allclose(moved[0], up(case.G.C1(target)), atol=1e-3), "G has hardly moved"

    whole, cells = case.D(source)
    one_hot = F.one_hot(case.labels.clamp(max=19), 20)[..., :19].permute(0, 3, 1, 2).float()
    shares = F.avg_pool2d(one_hot, repeats)
    of_image = shares.mean(dim=(2, 3))
    of_image = of_image / of_image.sum(dim=1, keepdim=True)
    commonest = shares.argmax(dim=1).where(shares.sum(dim=1) > 0, 255)
    wanted = -(of_image * whole.log_softmax(dim=1)).sum(dim=1).mean()
    equal(case.d_step(predictions), wanted + cross_entropy(cells, commonest))
