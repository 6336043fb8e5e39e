"""Frame stacks of windows and of acting against a loop that zeroes what lies before a start."""

from typing import Any

import pytest
import torch

from cerl import draw
from cerl.config import NetConfig
from cerl.data import EnvSpec
from cerl.nets import layers as nn
from cerl.nets.frames import Encoder, convolutions, see
from cerl.nets.layers import initialise


def spec(*observation, dtype=torch.uint8):
    return EnvSpec("scripted", observation, dtype, 3, 2, 1, True, True)


def encoder(shape, *, stack, scale=1.0, dtype=torch.uint8, **net: Any):
    config = NetConfig(scale=scale, **net)
    return Encoder(config, spec(*shape, dtype=dtype), frames=stack)


def layers(shape, *, frames=1, **net: Any):
    config, members = NetConfig(**net), [1] * len(net.get("channels", ()))
    return convolutions(config, spec(*shape), seeds=2, layer_members=members, frames=frames)


CONVS: Any = dict(channels=(3,), kernels=(2,), strides=(1,))


def stream(shape, *, seeds=2, envs=2, rows=30, seed=0):
    """obs [S, E, rows, ...], real [S, E, rows] of episodes of random length."""
    generator = torch.Generator().manual_seed(seed)
    obs = torch.randint(1, 256, (seeds, envs, rows, *shape), generator=generator, dtype=torch.uint8)
    real = torch.rand(seeds, envs, rows, generator=generator) > 0.25
    return obs, real


def slow_stack(obs, real, row, stack):
    """Frames oldest first of one row of one environment; obs [rows, ...], real [rows]."""
    frames, same_episode = [], True
    for at in range(row, row - stack, -1):
        if at < 0 or not same_episode:
            frames.append(torch.zeros_like(obs[0]))
            continue
        frames.append(obs[at])
        if at > 0 and not real[at - 1]:
            same_episode = False
    return torch.stack(frames[::-1])


def slow_pixels(frames, *, convs, scale):
    """The first layer's input of one stack: frames as channels last, or everything in a row."""
    frames = frames.float() / scale
    if not convs:
        return frames.flatten()
    if frames.dim() == 4:  # [stack, C, h, w]
        frames = frames.flatten(0, 1)
    return frames.permute(1, 2, 0)


@pytest.mark.parametrize("shape", [(4, 5), (2, 4, 5)])
@pytest.mark.parametrize("stack", [1, 2, 4])
@pytest.mark.parametrize("net", [CONVS, {}], ids=["conv", "flat"])
def test_a_window_gives_the_stack_of_each_wanted_row(shape, stack, net):
    enc = encoder(shape, stack=stack, scale=255.0, **net)
    assert enc.context == stack - 1
    obs, real = stream(shape)
    width, learnt = stack - 1 + 6, 3
    # windows of the stream as the batch axis: [S, 1, B, W, ...]
    begin = [0, 5, 11, 20]
    window = torch.stack([obs[:, 0, b : b + width] for b in begin], 1).unsqueeze(1)
    flags = torch.stack([real[:, 0, b : b + width] for b in begin], 1).unsqueeze(1)
    start = torch.cat([torch.ones_like(flags[..., :1]), ~flags[..., :-1]], -1)
    generator = torch.Generator().manual_seed(3)
    rows = torch.randint(stack - 1, width, (2, 1, len(begin), learnt), generator=generator)
    got = enc(window, start, rows).unflatten(2, (len(begin), learnt))
    for s in range(2):
        for b, first in enumerate(begin):
            for t in range(learnt):
                row = first + int(rows[s, 0, b, t])
                frames = slow_stack(obs[s, 0], real[s, 0], row, stack)
                want = slow_pixels(frames, convs=bool(net), scale=255.0)
                torch.testing.assert_close(got[s, 0, b, t], want, atol=1e-6, rtol=0)


def test_whether_a_windows_first_row_begins_an_episode_does_not_matter():
    enc = encoder((3,), stack=3)
    obs = torch.randint(1, 256, (1, 1, 1, 4, 3), dtype=torch.uint8)
    start, rows = torch.zeros(1, 1, 1, 4, dtype=torch.bool), torch.tensor([[[[2, 3]]]])
    other = start.clone()
    other[..., 0] = True
    assert torch.equal(enc(obs, start, rows), enc(obs, other, rows))


@pytest.mark.parametrize("shape, net", [((4, 5), CONVS), ((2, 4, 5), CONVS), ((7,), {})])
@pytest.mark.parametrize("stack", [1, 3])
def test_acting_sees_what_learning_sees(shape, net, stack):
    enc = encoder(shape, stack=stack, scale=2.0, **net)
    obs, real = stream(shape, rows=40, seed=9)
    carry = enc.carry(2, 2, dtype=torch.uint8, device=torch.device("cpu"))
    (past,) = carry
    assert past.dtype == torch.uint8 and int(past.sum()) == 0
    start = torch.ones(2, 2, dtype=torch.bool)
    steps = []
    for t in range(40):
        x = enc.step(obs[:, :, t], start, carry)
        assert x.shape[:3] == (2, 1, 2) and x.dtype == torch.float32
        steps.append(x[:, 0])
        start = ~real[:, :, t]
    for t in range(stack - 1, 40):
        at = t - stack + 1
        window, flags = obs[:, :, at : t + 1].unsqueeze(1), real[:, :, at : t + 1].unsqueeze(1)
        begins = torch.cat([torch.ones_like(flags[..., :1]), ~flags[..., :-1]], -1)
        rows = torch.full((2, 1, 2, 1), stack - 1)
        assert torch.equal(enc(window, begins, rows)[:, 0], steps[t])
        for s in range(2):
            for e in range(2):
                frames = slow_stack(obs[s, e], real[s, e], t, stack)
                want = slow_pixels(frames, convs=bool(net), scale=2.0)
                assert torch.equal(steps[t][s, e], want)


def test_boolean_observations_become_zeros_and_ones():
    enc = encoder((2, 3, 3), stack=2, dtype=torch.bool, **CONVS)
    obs = torch.ones(2, 2, 2, 3, 3, dtype=torch.bool)
    carry = enc.carry(2, 2, dtype=torch.bool, device=torch.device("cpu"))
    x = enc.step(obs, torch.ones(2, 2, dtype=torch.bool), carry)
    assert float(x[..., :2].sum()) == 0 and float(x[..., 2:].mean()) == 1
    x = enc.step(obs, torch.zeros(2, 2, dtype=torch.bool), carry)
    assert float(x.mean()) == 1


def test_layers_are_convolutions_with_relu_and_width_their_flat_size():
    convs, width = layers((9, 8), frames=2, channels=(3, 5), kernels=(3, 2), strides=(2, 1))
    initialise(convs, keys=draw.seed_keys([0, 1]), scheme="fan_in")
    x = torch.randn(2, 1, 4, 9, 8, 2, generator=torch.Generator().manual_seed(0))
    first = convs[0](x, relu=True)
    assert torch.equal(first, convs[0](x).relu())
    second = convs[1](first, relu=True)
    assert second.flatten(3).shape == (2, 1, 4, width) and width == 3 * 2 * 5
    assert torch.equal(see(convs, x), second.flatten(3))
    assert isinstance(convs[0], nn.Conv)


def test_flat_observations_are_seen_as_they_are():
    convs, width = layers((9, 8), frames=2)
    x = torch.randn(2, 1, 4, width)
    assert width == 144 and torch.equal(see(convs, x), x)


def test_observations_that_do_not_fit_the_convolutions_are_refused():
    with pytest.raises(ValueError, match=r"got \[7\] from scripted; set net.channels to an empty"):
        layers((7,), **CONVS)
    with pytest.raises(ValueError, match=r"net.kernels: \[5\] do not fit the observation \[4, 4\]"):
        layers((4, 4), channels=(2,), kernels=(5,), strides=(1,))
    with pytest.raises(ValueError, match=r"looks like \[height, width, channels\]; move the last"):
        layers((96, 96, 3), **CONVS)
