"""One table of the methods: the label of each, what it reads, and its steps.

    method = METHODS[hyper.method]
    loss, terms, predictions = method.g_step(G, D, batch, phase, hyper)

To add a method, write its steps (pure functions, like those of clan.py) and a row here. Numbers
that only this method has are the fields of a subclass of clan.Hyper. Each becomes a flag that only
this method accepts. CONTRIBUTING.md lists all places to change.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

from torch import Tensor

import alignment
import baselines
import clan
import selftrain
from baselines import Axes, State
from clan import Hyper, Phase, Terms

# Fields of Hyper that only CLAN reads, and those that every adversarial method reads.
CLAN_ONLY = {"lambda_weight", "cos_offset", "cos_biases", "lambda_local", "eps"}
CLAN_ONLY |= {"adaptive_start", "detach_m", "m_control", "m_mean1"}
D_SHAPE = {"d_channels", "d_strides"}  # also of the D that a source-only checkpoint holds
D_ONLY = D_SHAPE | {"lr_d", "d_schedule", "beta1_d", "beta2_d", "weight_decay_d"}
ADVERSARIAL = D_ONLY | {"lambda_adv", "damping", "minimax"}
NOT_OF_BASELINES = CLAN_ONLY | {"damping", "minimax"}  # of those that have a D


@dataclass(frozen=True)
class Method:
    """A row of the table. The steps of a method with a state take the state as last argument."""

    label: str  # its name in tables and figures; the paper's name if the paper has it
    unused: set[str]  # fields of Hyper that its steps never read; their flags are refused
    numbers: type[Hyper] = Hyper  # a subclass where the method has numbers of its own
    reads_target: bool = True  # from adv_start on
    has_d: bool = True  # `source` has one too, because it shares its warm-up with TAN
    warm_up: str = "source"  # methods with the same word take the same steps before adv_start
    g_step: Callable[..., tuple[Tensor, Terms, Any]] = clan.g_step
    # Further steps of G from adv_start on. Each maps (G, batch, phase, hyper) to (loss, terms).
    later_steps: Callable[[Any], tuple[Callable[..., tuple[Tensor, Terms]], ...]] = lambda hyper: ()
    d_step: Callable[..., tuple[Tensor, Terms]] = clan.d_step
    # What has D's place, from (G, hyper); None: models.Discriminator. Its part `of_g`, if it has
    # one, learns with the heads of G.
    build_d: Callable[[Any, Any], Any] | None = None
    # The state is made from (G, hyper). Parts of it are made anew before each step, from (step, G,
    # images, hyper), and after it, from (state, G, terms, hyper).
    first_state: Callable[[Any, Any], State] | None = None
    before_step: Callable[[int, Any, baselines.Images, Any], State] | None = None
    next_state: Callable[[State, Any, Terms, Any], State] | None = None
    moves_g: Callable[[State, Phase, Any], bool] = lambda state, phase, hyper: True  # in this step
    # The weights that are scored, from the state; None: those of G. A method with others is a
    # second stage: it goes on with a network that has learnt.
    result: Callable[[State], State] | None = None
    # The two numbers that matter most, and four values of each; (): it has those of another row.
    tuned: Axes | tuple[()] = ()


def self_training(label: str, balanced: bool) -> Method:
    """The row of ST or CBST: they differ in how thresholds are chosen."""
    return Method(
        label,
        CLAN_ONLY | ADVERSARIAL,
        baselines.SelfTrainingHyper,
        has_d=False,
        g_step=baselines.self_training_step,
        first_state=baselines.first_labeller,
        before_step=partial(baselines.new_round, balanced=balanced),
        tuned=baselines.SELF_TRAINING_TUNED,
    )


METHODS = {
    "source": Method("source only", CLAN_ONLY | ADVERSARIAL, reads_target=False),
    "tan": Method("TAN", CLAN_ONLY, tuned=baselines.TUNED),
    "clan": Method("CLAN", set(), warm_up="clan", tuned=baselines.TUNED),
    "clan_late": Method("CLAN, Eq. 4 late", set(), g_step=baselines.late_clan_step),
    "minent": Method(
        "MinEnt",
        CLAN_ONLY | ADVERSARIAL,
        baselines.MinEntHyper,
        has_d=False,
        g_step=baselines.minent_step,
        tuned=baselines.MINENT_TUNED,
    ),
    "advent": Method(
        "AdvEnt", NOT_OF_BASELINES, g_step=baselines.advent_step, tuned=baselines.ADVENT_TUNED
    ),
    "mcd": Method(
        "MCD",
        CLAN_ONLY | ADVERSARIAL,
        baselines.McdHyper,
        has_d=False,
        g_step=baselines.mcd_step,
        later_steps=baselines.mcd_later_steps,
        tuned=baselines.MCD_TUNED,
    ),
    "st": self_training("ST", balanced=False),
    "cbst": self_training("CBST", balanced=True),
    "multi": Method(
        "TAN, two levels",
        NOT_OF_BASELINES,
        baselines.MultiHyper,
        g_step=baselines.multi_step,
        d_step=baselines.multi_d_step,
        build_d=baselines.Levels,
        tuned=baselines.MULTI_TUNED,
    ),
    "cycada": Method(
        "CyCADA (feature)",
        NOT_OF_BASELINES | D_SHAPE,
        alignment.CycadaHyper,
        g_step=alignment.cycada_step,
        d_step=alignment.pixel_d_step,
        build_d=alignment.cycada_d,
        first_state=alignment.first_accuracies,
        next_state=alignment.next_accuracies,
        moves_g=alignment.gate_is_open,
        tuned=alignment.CYCADA_TUNED,
    ),
    "fcns_wild": Method(
        "FCNs in the wild",
        NOT_OF_BASELINES | D_SHAPE,
        alignment.FcnsWildHyper,
        g_step=alignment.fcns_wild_step,
        d_step=alignment.pixel_d_step,
        build_d=alignment.fcns_wild_d,
        first_state=alignment.first_sizes,
        before_step=alignment.sizes_of_source,
        tuned=alignment.FCNS_WILD_TUNED,
    ),
    "cross_city": Method(
        "Cross-city",
        NOT_OF_BASELINES | D_SHAPE,
        alignment.CrossCityHyper,
        g_step=alignment.cross_city_step,
        d_step=alignment.cross_city_d_step,
        build_d=alignment.cross_city_d,
        first_state=alignment.not_begun,
        before_step=partial(alignment.begins, share="class_start"),
        tuned=alignment.CROSS_CITY_TUNED,
    ),
    "cda": Method(
        "CDA",
        NOT_OF_BASELINES | D_SHAPE | {"lambda_adv"},
        alignment.CdaHyper,
        g_step=alignment.cda_step,
        d_step=alignment.easy_d_step,
        build_d=alignment.easy_tasks,
        first_state=alignment.before_the_easy_tasks,
        before_step=alignment.easy_tasks_begin,
        tuned=alignment.CDA_TUNED,
    ),
    "selftrain": Method(
        "second stage",
        CLAN_ONLY | ADVERSARIAL,
        selftrain.SelftrainHyper,
        has_d=False,
        g_step=selftrain.selftrain_step,
        first_state=selftrain.first_teacher,
        before_step=selftrain.teacher_begins,
        next_state=selftrain.next_teacher,
        result=selftrain.teacher_of,
        tuned=(),  # by `study.py trials`
    ),
}


def first_stage() -> tuple[str, ...]:
    """The methods that a table of systems compares: all but the second stage."""
    return tuple(name for name, method in METHODS.items() if not method.result)


def state_of(method: Method, G: Any, hyper: Any) -> State:
    """The state that a run of this method begins with: {} if it has none."""
    return method.first_state(G, hyper) if method.first_state else {}


def uses_target(step: int, hyper: Hyper) -> bool:
    """Whether this step reads images of the target."""
    return METHODS[hyper.method].reads_target and step >= hyper.adv_start


def own_fields(name: str) -> set[str]:
    """The numbers that this method adds to those of Hyper."""
    return {f.name for f in fields(METHODS[name].numbers)} - {f.name for f in fields(Hyper)}


def unused_fields(name: str) -> set[str]:
    """Fields that this method never reads: of Hyper, and those that other methods add."""
    others = set().union(*map(own_fields, METHODS))
    return METHODS[name].unused | (others - own_fields(name))
