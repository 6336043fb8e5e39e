"""A replay sampler of one's own: half of every batch comes from the newest tenth of the replay.

A sampler has the methods of `cerl.sampler.Sampler`; this one inherits all but one of `Uniform`.
Random numbers are a hash of seed and step (`cerl.draw`), so a resumed run draws the same rows.

    cerl train catch/ddqn --replay.sampler.name own --replay.sampler.by newest:Newest
"""

import torch
from torch import Tensor

from cerl import draw
from cerl.kernels.sampling import first_valid
from cerl.sampler import Drawn, Sampling, Uniform


class Newest(Uniform):
    """Uniform over all rows in one half of the batch, over the newest rows in the other."""

    def pick(self, sampling: Sampling, *, step: Tensor) -> Drawn:
        everywhere = super().pick(sampling, step=step)  # [S, M, B] each
        keys, total, real, _ = self.ring
        (seeds, rows, envs), device = real.shape, keys.device
        shape = (sampling.members, sampling.batch, sampling.candidates)
        age = draw.randint(keys, draw.OWN, step, shape, high=max(rows // 10, 1))
        env = draw.randint(keys, draw.OWN + 1, step, shape, high=envs)
        row = total - 1 - sampling.ahead - age  # [S, M, B, candidates]
        held = row - sampling.context >= (total - rows).clamp(min=0)
        seed = torch.arange(seeds, device=device).view(-1, 1, 1, 1)
        (picked,) = first_valid(held & real[seed, row % rows, env], row, env)
        newest = Drawn(*picked, weight=picked.hit.float())
        half = torch.arange(sampling.batch, device=device) < sampling.batch // 2
        return Drawn(*(torch.where(half, a, b) for a, b in zip(newest, everywhere, strict=True)))
