"""The options of agents: one model for each kind of agent, chosen by `agent.name`."""

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from cerl.config.model import Model


class ValueOptions(Model):
    """Options of agents for discrete actions, which learn the value of every action."""

    policy_every: ClassVar[int] = 1
    """1: every update is complete. Only SAC has updates without a policy step."""

    name: Any  # every kind narrows it to a Literal of one word
    """kind of the agent"""
    double: bool = True
    """Double DQN: the online network chooses the next action, the target network values it"""
    mico_weight: float = Field(default=0.0, ge=0, le=1)
    """loss = (1 - w) TD + w MICo metric loss"""
    mico_beta: float = Field(default=0.1, ge=0, le=1e6)
    """weight of the angle in the MICo distance"""
    feature_norm: bool = False
    """divides the penultimate features by their L2 norm + 1e-6"""
    shared_bias: bool = False
    """one scalar output bias for all actions, as in the code of the CERL paper"""
    gradient_scale: bool = True
    """scales gradients by 1/N in shared layers and by 1/J in the layers below the value heads"""
    huber_delta: float = Field(default=1.0, gt=0, le=1e9)
    """absolute error above which the Huber loss is linear (kappa in the QR-DQN paper)"""


class DqnConfig(ValueOptions):
    """Double DQN and its ensembles: a value is the expected return of an action."""

    name: Literal["dqn"] = "dqn"
    """values are expected returns"""
    loss: Literal["huber", "mse"] = "huber"
    """huber: Huber loss; mse: squared error, without the factor 1/2"""


class QuantileConfig(ValueOptions):
    """QR-DQN and its ensembles: a value is a distribution of returns."""

    name: Literal["quantile"] = "quantile"
    """values are distributions, represented by quantiles"""
    quantiles: int = Field(default=200, ge=2)
    """number of quantiles of a value distribution, at least 2"""


class SacConfig(Model):
    """Soft actor-critic and its ensembles, for continuous actions."""

    name: Literal["sac"] = "sac"
    """policies and critics of continuous actions"""
    loss: Literal["mse", "mse_huber"] = "mse"
    """loss of the critics. mse: squared error, without the factor 1/2; mse_huber: squared error for
    a member's own head, and twice the Huber loss for its other heads"""
    huber_delta: float = Field(default=1.0, gt=0, le=1e9)
    """absolute error above which the Huber loss is linear"""
    critics: int = Field(default=2, ge=1)
    """C, critics of a member"""
    critic_norm: Literal["none", "layer", "layer_plain"] = "none"
    """layer norm before every ReLU of the critics. layer: with trained scale and offset;
    layer_plain: without"""
    log_std: Literal["tanh", "clip"] = "tanh"
    """how the policy's log standard deviation is kept between its bounds"""
    log_std_min: float = Field(default=-10.0, ge=-50, le=50)
    """lower bound of the log standard deviation"""
    log_std_max: float = Field(default=2.0, ge=-50, le=50)
    """upper bound of the log standard deviation"""
    target_critics: int = Field(default=0, ge=0)
    """the target is the smallest value of this many target critics, chosen at random for each
    update (REDQ); 0: of all C critics"""
    actor_value: Literal["min", "mean"] = "min"
    """value that a policy maximises: the smallest or the mean of its member's critics"""
    backup_entropy: bool = True
    """the target includes the entropy of the next action"""
    target_entropy: float = Field(default=-1.0, ge=-1000, le=1000)
    """entropy that the temperature is tuned to, nats for each action component"""
    temperature: float = Field(default=1.0, gt=0, le=1e6)
    """temperature (entropy weight) of every policy at the start"""
    spread_temperature: float = Field(default=0.0, ge=0, le=1e6)
    """T in the weight sigmoid(-T std) + 1/2 of a row, where std is the standard deviation over
    members of their target values of the next action (SUNRISE); 0: all rows weigh the same"""
    actor_lr: float = Field(default=0.0, ge=0, le=1000)
    """learning rate of the policies; 0: optim.lr"""
    temperature_lr: float = Field(default=0.0, ge=0, le=1000)
    """learning rate of the logarithms of the temperatures; 0: optim.lr"""
    policy_every: int = Field(default=1, ge=1)
    """number of critic updates for each update of policies and temperatures"""

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
