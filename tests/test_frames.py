"""Frame stacks of windows and of acting against a loop that zeroes what lies before a start."""

import itertools
from typing import Any

import pytest
import torch

from cerl import draw
from cerl.config import NetConfig
from cerl.data import ActInput, EnvSpec, Previous, Window
from cerl.nets import layers as nn
from cerl.nets.frames import Frames, convolutions, see
from cerl.nets.layers import initialise


def spec(*observation, dtype=torch.uint8):
    return EnvSpec("scripted", observation, dtype, 3, 2, 1, True, True)


def reader(shape, *, stack, scale=1.0, dtype=torch.uint8, seeds=2, **net: Any):
    config = NetConfig(scale=scale, **net)
    return Frames(config, spec(*shape, dtype=dtype), frames=stack, seeds=seeds)


def window_of(obs, real) -> Window:
    """obs [S, 1, B, W, ...], real [S, 1, B, W]."""
    nothing, lead = torch.zeros_like(real, dtype=torch.int64), real.shape[:3]
    return Window(
        obs=obs,
        action=nothing,
        reward=nothing.float(),
        terminated=nothing.bool(),
        real=real,
        member=nothing,
        row=nothing[..., 0],
        weight=torch.ones(lead),
        state=torch.zeros(*lead, 0),
    )


def seen(obs, start) -> ActInput:
    nothing = torch.zeros_like(start, dtype=torch.int64)
    return ActInput(obs, start, Previous(nothing, nothing.float()), nothing)


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
    enc = reader(shape, stack=stack, scale=255.0, **net)
    assert enc.context == stack - 1
    obs, real = stream(shape)
    width, learnt = stack - 1 + 6, 3
    # windows of the stream as the batch axis: [S, 1, B, W, ...]
    begin = [0, 5, 11, 20]
    frames = torch.stack([obs[:, 0, b : b + width] for b in begin], 1).unsqueeze(1)
    window = window_of(
        frames, torch.stack([real[:, 0, b : b + width] for b in begin], 1).unsqueeze(1)
    )
    generator = torch.Generator().manual_seed(3)
    rows = torch.randint(stack - 1, width, (2, 1, len(begin), learnt), generator=generator)
    common = torch.arange(stack - 1, stack - 1 + learnt).expand(2, 1, len(begin), -1)
    both = enc.look(window, rows, common)
    for got, wanted in zip(both, (rows, common), strict=True):
        got = got.unflatten(2, (len(begin), learnt))
        for s, (b, first), t in itertools.product(range(2), enumerate(begin), range(learnt)):
            row = first + int(wanted[s, 0, b, t])
            frames = slow_stack(obs[s, 0], real[s, 0], row, stack)
            want = slow_pixels(frames, convs=bool(net), scale=255.0)
            torch.testing.assert_close(got[s, 0, b, t], want, atol=1e-6, rtol=0)


@pytest.mark.parametrize("shape, net", [((4, 5), CONVS), ((2, 4, 5), CONVS), ((7,), {})])
@pytest.mark.parametrize("stack", [1, 3])
def test_acting_sees_what_learning_sees(shape, net, stack):
    enc = reader(shape, stack=stack, scale=2.0, **net)
    obs, real = stream(shape, rows=40, seed=9)
    carry = enc.carry(envs=2, evaluating=False, device=torch.device("cpu"))
    (past,) = carry
    assert past.dtype == torch.uint8 and int(past.sum()) == 0
    start = torch.ones(2, 2, dtype=torch.bool)
    steps = []
    for t in range(40):
        x = enc.step(seen(obs[:, :, t], start), carry, evaluating=False)
        assert x.shape[:3] == (2, 1, 2) and x.dtype == torch.float32
        steps.append(x[:, 0])
        start = ~real[:, :, t]
        # Rows before the last stack - 1 ones do not matter, nor that there may be none.
        for known in (max(stack - 1, 1), t + 1):
            rows = slice(max(t + 1 - known, 0), t + 1)
            recent = window_of(obs[:, None, :, rows], real[:, None, :, rows])
            again = (torch.full_like(past, 7),)
            enc.refill(recent, again, start.long())
            assert torch.equal(again[0], past)
    for t in range(stack - 1, 40):
        at = t - stack + 1
        window = window_of(obs[:, None, :, at : t + 1], real[:, None, :, at : t + 1])
        (x,) = enc.look(window, torch.full((2, 1, 2, 1), stack - 1))
        assert torch.equal(x[:, 0], steps[t])
        for s in range(2):
            for e in range(2):
                frames = slow_stack(obs[s, e], real[s, e], t, stack)
                want = slow_pixels(frames, convs=bool(net), scale=2.0)
                assert torch.equal(steps[t][s, e], want)


def test_boolean_observations_become_zeros_and_ones():
    enc = reader((2, 3, 3), stack=2, dtype=torch.bool, **CONVS)
    obs = torch.ones(2, 2, 2, 3, 3, dtype=torch.bool)
    carry = enc.carry(envs=2, evaluating=False, device=torch.device("cpu"))
    x = enc.step(seen(obs, torch.ones(2, 2, dtype=torch.bool)), carry, evaluating=False)
    assert float(x[..., :2].sum()) == 0 and float(x[..., 2:].mean()) == 1
    x = enc.step(seen(obs, torch.zeros(2, 2, dtype=torch.bool)), carry, evaluating=False)
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
