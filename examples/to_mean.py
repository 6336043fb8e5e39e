"""A kind of CERL heads of one's own: head j of member i regresses to the mean of all members.

In CERL, head j of member i learns the target of member (i + j) mod N. Here head 0, by which a
member acts, stays its own, and every other head learns the mean over members of next values.

    cerl train catch/cerl --ensemble.heads to_mean:TO_MEAN
"""

import torch
from torch import Tensor

from cerl.head_kinds import HeadKind, NextValues, own


def to_mean(values: NextValues) -> Tensor:
    """What every head regresses to beside its reward, [S, N, ..., J]."""
    each = own(values)  # every member's own next value, once for each of its J heads
    mean = each.mean(1, keepdim=True).expand_as(each)
    head = torch.arange(values.heads, device=each.device)
    return torch.where(head == 0, each, mean)


TO_MEAN = HeadKind("head 0 to the member's own next value, others to the mean of all", to_mean)
