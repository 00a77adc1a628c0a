"""One table of the methods: the label of each, what it reads, and its steps.

    method = METHODS[hyper.method]
    loss, terms, predictions = method.g_step(G, D, batch, phase, hyper)

To add a method, write its steps (pure functions, like those of clan.py) and a row here. Numbers
that only this method has are the fields of a subclass of clan.Hyper. Each becomes a flag that only
this method accepts. CONTRIBUTING.md lists all places to change.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

import clan
from clan import Hyper, Terms

State = dict[str, Tensor]  # what a method carries from step to step, saved in each checkpoint

# Fields of Hyper that only CLAN reads, and those that every adversarial method reads.
CLAN_ONLY = {"lambda_weight", "cos_offset", "cos_biases", "lambda_local", "eps"}
CLAN_ONLY |= {"adaptive_start", "detach_m", "m_control", "m_mean1"}
D_SHAPE = {"d_channels", "d_strides"}  # also of the D that a source-only checkpoint holds
D_ONLY = D_SHAPE | {"lr_d", "d_schedule", "beta1_d", "beta2_d", "weight_decay_d"}
ADVERSARIAL = D_ONLY | {"lambda_adv", "damping", "minimax"}


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
    later_steps: tuple[Callable[..., tuple[Tensor, Terms]], ...] = ()
    d_step: Callable[..., tuple[Tensor, Terms]] = clan.d_step
    # The state is made from (G, hyper) and after each step from (state, G, terms, hyper).
    first_state: Callable[[Any, Hyper], State] | None = None
    next_state: Callable[[State, Any, Terms, Hyper], State] | None = None


METHODS = {
    "source": Method("source only", CLAN_ONLY | ADVERSARIAL, reads_target=False),
    "tan": Method("TAN", CLAN_ONLY),
    "clan": Method("CLAN", set(), warm_up="clan"),
}


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
