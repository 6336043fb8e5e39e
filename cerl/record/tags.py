"""The tags of all numbers of a run, for TensorBoard and the other trackers.

Numbers have the names that they have in `metrics.parquet` and `rows.parquet`. Only names that
CleanRL has established are used instead of ours (`CLEANRL`, and the tags under charts/). A tag is

- charts/NAME: returns of training, speed and schedules
- losses/NAME: metrics of losses and gradients, means over the members
- Diagnostics/NAME: all other metrics, means over the members; those of single heads of attention,
  whose names hold a layer and a head, only with log.members `each`
- Train/NAME: values that the acting members predicted in training, means over its episodes
- Eval/POLICY/NAME: scores, with policies called as in `rows.parquet`; `individual` is the mean over
  the members. A tandem has Eval/active and Eval/passive in its place.
- Members/NAME_i and Eval/POLICY/NAME_i: the numbers of member i, with log.members `each`
"""

import math
from collections.abc import Mapping

import numpy as np

Scalars = dict[str, float]

# Metrics that stand under losses/, also all those whose names hold one of the words of STEMS.
LOSSES = ("loss", "q_data", "q_pi", "actor_loss", "temperature_loss", "entropy", "alpha")
LOSSES += ("mico_loss", "auxiliary_loss", "target_value")
STEMS = ("td_error", "gradient_norm")
# Names of metrics here, and their names in CleanRL.
CLEANRL = {"loss": "td_loss", "q_data": "q_values", "temperature_loss": "alpha_loss"}
# Scores of episodes that are shown, and values that the members predict for them.
SCORES = ("return", "length", "episodes")
PREDICTED = ("value", "mc", "value_error")
# Names that CleanRL's scripts give to numbers of ours; `with_usual` adds them.
EVALUATED = {"return": "eval/episodic_return", "length": "eval/episodic_length"}
OF_SAC = {"losses/td_loss": "losses/qf_loss", "losses/q_values": "losses/qf_values"}


def mean(values: np.ndarray) -> float:
    """Mean of the finite values; NaN if there are none."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if finite.size else math.nan


def weighted(values: np.ndarray, weights: np.ndarray) -> float:
    """Weighted mean of the values whose weight is above 0; NaN if there are none."""
    used = weights > 0
    total = weights[used].sum()
    return float((values[used] * weights[used]).sum() / total) if used.any() else math.nan


def training_scalars(metrics: Mapping[str, np.ndarray], seed: int, *, each: bool) -> Scalars:
    """The metrics of one seed by tag.

    Args: metrics {name: [S, N] or [S]}; seed, its index; each, also those of every member.
    """
    out: Scalars = {}
    for name, values in metrics.items():
        if "/" in name and not each:
            continue  # a number of one head of attention
        called = CLEANRL.get(name, name)
        lost = name in LOSSES or any(stem in name for stem in STEMS)
        out[f"{'losses' if lost else 'Diagnostics'}/{called}"] = mean(values[seed])
        if each and values[seed].ndim:
            out |= _members(f"Members/{called}", values[seed])
    return out


def episode_scalars(finished: Mapping[str, np.ndarray], seed: int, *, each: bool) -> Scalars:
    """The training episodes of one seed by tag.

    Args: finished {episodes, return, length, value, mc, value_error: [S, N]}; seed, its index;
          each, also those of every member that finished an episode.
    """
    count = finished["episodes"][seed]
    out = {"Train/episodes": float(count.sum())}
    if count.sum() > 0:
        out["charts/episodic_return"] = weighted(finished["return"][seed], count)
        out["charts/episodic_length"] = weighted(finished["length"][seed], count)
        out |= {f"Train/{name}": weighted(finished[name][seed], count) for name in PREDICTED}
    for name in (*SCORES, *PREDICTED) if each else ():
        out |= _members(f"Members/train_{name}", finished[name][seed], count > 0)
    return out


def evaluation_scalars(
    policy: str, scores: Mapping[str, np.ndarray], seed: int, *, tandem: bool, each: bool
) -> Scalars:
    """The scores of one seed and policy by tag.

    Args: scores {name: [S, K]}, by their names in the tables, K is N where every member plays and
          else 1; seed, its index; tandem, whether member 0 is the active and member 1 the passive
          one; each, also the scores of every member.
    """
    own = {name: values[seed] for name, values in scores.items()}
    base, mode, _ = policy.partition("_mode")
    out: Scalars = {}
    for name, values in own.items():
        if tandem and base == "individual":
            roles = zip(("active", "passive"), values, strict=True)
            out |= {f"Eval/{role}{mode}/{name}": float(value) for role, value in roles}
            continue
        tag = f"Eval/{policy}/{name}"
        out[tag] = float(values.sum() if name == "episodes" else values.mean())
        if each and base == "individual":
            out |= _members(tag, values)
    return out


def _members(tag: str, values: np.ndarray, shown: np.ndarray | None = None) -> Scalars:
    """The values of every member by tag. Args: values [N]; shown [N] bool, None: all are."""
    return {
        f"{tag}_{i}": float(value) for i, value in enumerate(values) if shown is None or shown[i]
    }


def with_usual(scalars: Mapping[str, float], *, step: int) -> Scalars:
    """Scalars by tag, and once more under the tags that CleanRL's scripts use.

    Dashboards that were made for CleanRL plot these against `global_step`. The members' mean score
    is `eval/episodic_return`; in a tandem it is the score of the active member.

    Args: scalars {tag: value}, of one seed; step, agent steps of one seed.
    """
    out: Scalars = {**scalars, "global_step": float(step)}
    for name, tag in EVALUATED.items():
        for policy in ("individual", "active"):
            if (ours := f"Eval/{policy}/{name}") in scalars:
                out[tag] = scalars[ours]
    if "losses/actor_loss" in scalars:
        out |= {tag: scalars[ours] for ours, tag in OF_SAC.items() if ours in scalars}
    return out
