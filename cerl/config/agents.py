"""The agents of cerl and their options: one model a kind, a union by `name`."""

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from cerl.config.model import Model


class ValueOptions(Model):
    """What agents of discrete actions have, which learn the value of every action."""

    policy_every: ClassVar[int] = 1
    """updates per update of a policy, which follows from the values"""

    name: Any  # one word, a type of its own in every kind
    """kind of the agent"""
    double: bool = True
    """the online network chooses the next action, the target network values it"""
    mico_weight: float = Field(default=0.0, ge=0, le=1)
    """loss = (1 - w) TD + w MICo metric loss"""
    mico_beta: float = Field(default=0.1, ge=0, le=1e6)
    """weight of the angle in the MICo distance"""
    feature_norm: bool = False
    """divides the penultimate features by their L2 norm + 1e-6"""
    shared_bias: bool = False
    """one scalar output bias for all actions (the original's)"""
    gradient_scale: bool = True
    """gradients scaled by 1/N below the last shared layer and 1/J below the fork of the heads"""
    huber_delta: float = Field(default=1.0, gt=0, le=1e9)
    """where Huber turns from square to linear; for quantiles the paper's kappa"""


class DqnConfig(ValueOptions):
    """Double DQN and its ensembles: a value is the expected return of an action."""

    name: Literal["dqn"] = "dqn"
    """values are expected returns"""
    loss: Literal["huber", "mse"] = "huber"
    """huber, or the squared error without the 1/2"""


class QuantileConfig(ValueOptions):
    """QR-DQN and its ensembles: a value is a distribution of returns."""

    name: Literal["quantile"] = "quantile"
    """values are distributions, given by quantiles"""
    quantiles: int = Field(default=200, ge=2)
    """quantiles of a value distribution, at least 2"""


class SacConfig(Model):
    """Soft actor-critic and its ensembles, for continuous actions."""

    name: Literal["sac"] = "sac"
    """policies and critics of continuous actions"""
    loss: Literal["mse", "mse_huber"] = "mse"
    """of the critics: the squared error without the 1/2, or that for a member's own head and twice
    Huber for its others"""
    huber_delta: float = Field(default=1.0, gt=0, le=1e9)
    """where Huber turns from square to linear"""
    critics: int = Field(default=2, ge=1)
    """C, critics of a member"""
    critic_norm: Literal["none", "layer", "layer_plain"] = "none"
    """layer norm before every ReLU of the critics, with learnt scale and offset or without"""
    log_std: Literal["tanh", "clip"] = "tanh"
    """how the policy's log standard deviation is kept between its bounds"""
    log_std_min: float = Field(default=-10.0, ge=-50, le=50)
    """lower bound of the log standard deviation"""
    log_std_max: float = Field(default=2.0, ge=-50, le=50)
    """upper bound of the log standard deviation"""
    target_critics: int = Field(default=0, ge=0)
    """the target is the smallest of this many critics, drawn anew for each update (REDQ); 0: of
    all"""
    actor_value: Literal["min", "mean"] = "min"
    """what the policy climbs, the smallest or the mean of its member's critics"""
    backup_entropy: bool = True
    """the target counts the next action's entropy"""
    target_entropy: float = Field(default=-1.0, ge=-1000, le=1000)
    """entropy that the temperature aims at, nats for each action component"""
    temperature: float = Field(default=1.0, gt=0, le=1e6)
    """of every policy at the start"""
    spread_temperature: float = Field(default=0.0, ge=0, le=1e6)
    """T of the weight sigmoid(-T std) + 1/2 of a row, std being that of the members' target values
    of the next action (SUNRISE); 0: all rows weigh the same"""
    actor_lr: float = Field(default=0.0, ge=0, le=1000)
    """learning rate of the policies; 0: optim.lr"""
    temperature_lr: float = Field(default=0.0, ge=0, le=1000)
    """learning rate of the log temperatures; 0: optim.lr"""
    policy_every: int = Field(default=1, ge=1)
    """updates of the critics per update of policies and temperatures"""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if problems := list(self._problems()):
            raise ValueError("\n".join(problems))
        return self

    def _problems(self) -> Iterator[str]:
        if self.target_critics > self.critics:
            yield (
                f"agent.target_critics: expected at most agent.critics ({self.critics}), "
                f"got {self.target_critics}"
            )
        if self.log_std_min >= self.log_std_max:
            yield (
                f"agent.log_std_min: expected below agent.log_std_max ({self.log_std_max:g}), "
                f"got {self.log_std_min:g}"
            )


AgentConfig = Annotated[DqnConfig | QuantileConfig | SacConfig, Field(discriminator="name")]
