"""How rows of replay are drawn: one model of options a kind, a union by `name`."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from cerl.config.model import Model


class UniformConfig(Model):
    """Every row that can be learnt from is as likely as any other."""

    wants_errors: ClassVar[bool] = False
    """whether updates report the temporal-difference errors of the rows that they learnt from"""

    name: Literal["uniform"] = "uniform"
    """rows are drawn uniformly"""


class PrioritisedConfig(Model):
    """Proportional prioritisation (Schaul et al. 2016, arXiv:1511.05952)."""

    wants_errors: ClassVar[bool] = True

    name: Literal["prioritised"] = "prioritised"
    """rows are drawn in proportion to (error + eps) ** alpha, error being the absolute
    temporal-difference error when the row was last learnt from; a new row counts as the largest"""
    alpha: float = Field(default=0.6, ge=0, le=10)
    """exponent of the error; 0: all rows are alike"""
    beta: float = Field(default=0.4, ge=0, le=1)
    """exponent of the weights that correct the loss for some rows being drawn more often,
    the same over the whole run; 1: corrected in full, 0: not at all"""
    eps: float = Field(default=1e-6, gt=0, le=1e6)
    """added to the error, so that no row is never drawn, units of the value"""


class OwnSamplerConfig(Model):
    """A sampler of a module of the user's own (`docs/joints.md`)."""

    name: Literal["own"] = "own"
    """rows are drawn by a class of a module of yours"""
    by: str = ""
    """the class, MODULE:NAME, a `cerl.sampler.Sampler` made from the `Ring` of replay"""
    wants_errors: bool = False
    """whether updates report to it the temporal-difference errors of the rows that they learnt
    from"""


SamplerConfig = Annotated[
    UniformConfig | PrioritisedConfig | OwnSamplerConfig, Field(discriminator="name")
]
