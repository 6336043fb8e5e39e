"""An exploration rule of one's own: members explore more or less than each other.

Member i of N acts randomly with probability epsilon ** (1 + 7 i / (N - 1)), as the actors of Ape-X
do (Horgan et al. 2018, arXiv:1803.00933): member 0 explores most, the last one hardly at all.

    cerl train catch/bootdqn --explore.rules ladder:ladder
"""

from cerl import draw
from cerl.explore import Moment, Noise


def ladder(noise: Noise, moment: Moment) -> Noise:
    """The random choices of a step, with an epsilon for each member on duty."""
    power = 1 + 7 * moment.member / max(moment.members - 1, 1)  # [S, E]
    u = draw.uniform(moment.keys, draw.OWN + 2, moment.step, (noise.explore.shape[1],))  # [S, E]
    return noise._replace(explore=u < moment.epsilon**power)
