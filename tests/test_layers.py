"""Layers against einsum and torch's convolution, initialisation, gradient scaling of variants."""

import math
from typing import Any

import pytest
import torch
from rounding import assert_agree
from torch.nn import functional as F

from cerl import draw
from cerl.agents.dqn import QNet
from cerl.config import Config, DqnConfig, EnsembleConfig, FramesConfig, LossConfig, NetConfig
from cerl.data import EnvSpec
from cerl.heads import head_table
from cerl.nets import layers


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def filled(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for leaf in module.parameters():
            leaf.copy_(torch.randn(leaf.shape, generator=generator))
    return module


def assert_same_with_gradients(ours, theirs, leaves):
    assert_agree(ours, theirs)
    weight = random(*ours.shape, seed=99).detach()
    mine = torch.autograd.grad((ours * weight).sum(), leaves)
    reference = torch.autograd.grad((theirs * weight).sum(), leaves)
    for a, b in zip(mine, reference, strict=True):
        assert_agree(a, b)


@pytest.mark.parametrize("inputs, members", [(1, 1), (1, 3), (3, 1), (3, 3)])
@pytest.mark.parametrize("rows, out", [(2, 5), (8, 5), (5, 5), (1, 1)])
def test_matmul_equals_einsum_for_every_way_of_sharing(inputs, members, rows, out):
    x, weight = random(2, inputs, rows, 4), random(2, members, 4, out, seed=1)
    full = max(inputs, members)
    theirs = torch.einsum(
        "smrd,smdo->smro", x.expand(2, full, rows, 4), weight.expand(2, full, 4, out)
    )
    ours = layers.matmul(x, weight)
    assert ours.shape == (2, full, rows, out)
    assert_same_with_gradients(ours, theirs, [x, weight])


@pytest.mark.parametrize("inputs, members", [(1, 1), (1, 3), (3, 1), (3, 3)])
def test_linear_equals_one_linear_for_each_member(inputs, members):
    layer, x = filled(layers.Linear(2, members, 4, 5)), random(2, inputs, 6, 4, seed=7)
    y = layer(x)
    for s in range(2):
        for m in range(max(inputs, members)):
            i, k = m % inputs, m % members
            want = F.linear(x[s, i], layer.weight[s, k].T, layer.bias[s, k])
            assert_agree(y[s, m], want)


def torch_same(x, kernel, stride):
    """TensorFlow's and JAX's SAME: the odd cell of padding goes to the right and to the bottom."""
    pads = []
    for size in (x.shape[-1], x.shape[-2]):
        total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads)


@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize(
    "size, kernel, stride", [((9, 9), 3, 1), ((10, 7), 4, 2), ((11, 8), 3, 2), ((10, 10), 3, 1)]
)
@pytest.mark.parametrize("inputs, members", [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_conv_equals_torchs_for_each_member(padding, size, kernel, stride, inputs, members):
    conv = layers.Conv(
        2, members, channels=3, filters=4, kernel=kernel, stride=stride, padding=padding
    )
    filled(conv)
    x = random(2, inputs, 5, *size, 3, seed=3)
    rows = []
    for s in range(2):
        for m in range(max(inputs, members)):
            image = x[s, m % inputs].movedim(-1, 1)
            if padding == "same":
                image = torch_same(image, kernel, stride)
            weight = conv.weight[s, m % members].view(kernel, kernel, 3, 4).permute(3, 2, 0, 1)
            y = F.conv2d(image, weight, conv.bias[s, m % members], stride=stride)
            rows.append(y.movedim(1, -1))
    theirs = torch.stack(rows).unflatten(0, (2, max(inputs, members)))
    ours = conv(x)
    assert ours.shape[3:5] == (conv.output_size(size[0]), conv.output_size(size[1]))
    assert_same_with_gradients(ours, theirs, [x, conv.weight, conv.bias])


def test_same_padding_of_the_quantile_network_is_the_originals():
    def conv(kernel, stride):
        return layers.Conv(
            1, 1, channels=1, filters=1, kernel=kernel, stride=stride, padding="same"
        )

    sizes, pads, size = [], [], 84
    for layer in (conv(8, 4), conv(4, 2), conv(3, 1)):
        pads.append(layer._pads(size))
        size = layer.output_size(size)
        sizes.append(size)
    assert sizes == [21, 11, 11] and pads == [(2, 2), (1, 2), (1, 1)]


@pytest.mark.parametrize("shared_bias", [False, True])
@pytest.mark.parametrize("inputs", [1, 3])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_heads_equal_a_linear_for_each_member_and_head(shared_bias, inputs, count):
    layer = filled(layers.Heads(2, 3, 5, heads=4, width=6, shared_bias=shared_bias))
    x = random(2, inputs, 7, 5, seed=2)
    y = layer(x, count)
    assert y.shape == (2, 3, 7, count, 6)
    for s in range(2):
        for i in range(3):
            for j in range(count):
                want = x[s, i % inputs] @ layer.weight[s, i, :, j] + layer.bias[s, i, j]
                assert_agree(y[s, i, :, j], want)


@pytest.mark.parametrize("inputs", [1, 3])
@pytest.mark.parametrize("count", [1, 4])
def test_forked_heads_equal_two_layers_for_each_member_and_head(inputs, count):
    layer = filled(layers.ForkedHeads(2, 3, 5, hidden=8, heads=4, width=6, shared_bias=True))
    x = random(2, inputs, 7, 5, seed=2)
    y = layer(x, count)
    assert y.shape == (2, 3, 7, count, 6)
    for s in range(2):
        for i in range(3):
            for j in range(count):
                hidden = x[s, i % inputs] @ layer.hidden[s, i, j] + layer.hidden_bias[s, i, j]
                want = hidden.relu() @ layer.weight[s, i, j] + layer.bias[s, i, j]
                assert_agree(y[s, i, :, j], want)


def test_scale_gradient_is_the_identity_with_a_scaled_gradient():
    x = random(3)
    y = layers.scale_gradient(x, 0.25)
    assert torch.equal(y, x)
    (slope,) = torch.autograd.grad((y * torch.tensor([1.0, 2.0, 4.0])).sum(), x)
    assert slope.tolist() == [0.25, 0.5, 1.0]


IMAGE = EnvSpec("image", (12, 12), torch.uint8, 6, 1, 1, True, True)


def config(*, heads: Any = "own", shared=0, fork: Any = "final", members=3, scale=True, **net: Any):
    shape: dict[str, Any] = dict(
        channels=(5, 6, 7), kernels=(4, 3, 3), strides=(2, 1, 1), hidden=(32,)
    )
    shape |= net
    return Config(
        agent=DqnConfig(
            gradient_scale=scale,
            shared_bias=shape.pop("shared_bias", False),
            feature_norm=shape.pop("feature_norm", False),
        ),
        encoder=FramesConfig(frames=shape.pop("stack", 2)),
        net=NetConfig(**shape),
        ensemble=EnsembleConfig(
            members=members,
            heads=heads,
            shared_layers=shared,
            fork=fork,
            horizons=4,
            duty="first" if heads == "single_actor" else "uniform",
        ),
        loss=LossConfig(),
    )


def build(config, *, seeds=(0,), spec=IMAGE) -> Any:
    heads = head_table(config.ensemble, gamma=config.loss.gamma, device="cpu").heads
    net = QNet(config, spec, seeds=len(seeds), heads=heads, atoms=1)
    layers.initialise(net, keys=draw.seed_keys(seeds), scheme=config.net.init)
    return net


BOUNDS = {  # of weights; of biases
    "fan_in": lambda fan_in, fan_out: (fan_in**-0.5, fan_in**-0.5),
    "xavier": lambda fan_in, fan_out: ((6 / (fan_in + fan_out)) ** 0.5, 0.0),
    "variance": lambda fan_in, fan_out: ((3**0.5 / fan_in) ** 0.5, 0.0),
}
FANS = {
    "convs.0": (2 * 16, 5 * 16),
    "convs.1": (5 * 9, 6 * 9),
    "convs.2": (6 * 9, 7 * 9),
    "hidden.0": (7, 32),
    "final": (32, 6),
}


@pytest.mark.parametrize("scheme", BOUNDS)
@pytest.mark.parametrize("fork", ["final", "both"])
def test_initial_parameters_are_uniform_with_the_bounds_of_the_scheme(scheme, fork):
    net = build(config(heads="cerl", fork=fork, members=8, init=scheme), seeds=(0, 1, 2))
    for name, leaf in net.named_parameters():
        layer, kind = name.rsplit(".", 1)
        first = kind.startswith("hidden")
        fans = FANS["hidden.0" if first else layer]
        weight, bias = BOUNDS[scheme](*fans)
        bound = bias if "bias" in kind else weight
        values = leaf.detach().flatten()
        assert float(values.abs().max()) <= bound, name
        if not bound:
            continue
        scaled = values.double() / bound
        tolerance = 4.5 / math.sqrt(len(values))
        assert float(scaled.mean()) == pytest.approx(0, abs=tolerance * 0.577), name
        assert float(scaled.square().mean()) == pytest.approx(1 / 3, abs=tolerance * 0.3), name


def test_every_seed_member_layer_and_head_has_its_own_initial_numbers():
    net = build(config(heads="cerl"), seeds=(0, 1))
    seen = set()
    for name, leaf in net.named_parameters():
        rows = leaf.detach().flatten(2).flatten(0, 1)  # one row for each seed and member
        assert len(torch.unique(rows, dim=0)) == len(rows), name
        seen.update(leaf.detach().flatten()[:8].tolist())
    assert len(seen) > 8 * len(list(net.parameters())) * 0.9
    weight = net.final.weight.detach()  # [S, N, in, J, A]
    assert len(torch.unique(weight.transpose(2, 3).flatten(3).flatten(0, 2), dim=0)) == 2 * 3 * 3


def test_a_seed_starts_from_the_same_parameters_alone_and_among_others():
    together = dict(build(config(heads="cerl", shared=1), seeds=(5, 3)).named_parameters())
    for name, leaf in build(config(heads="cerl", shared=1), seeds=(3,)).named_parameters():
        assert torch.equal(leaf[0], together[name][1]), name


@pytest.mark.parametrize(("inputs", "members"), [(1, 3), (3, 3), (1, 1)])
@pytest.mark.parametrize("own", [False, True])
def test_critics_equal_one_product_each(inputs, members, own):
    seeds, critics, rows = 2, 4, 5
    layer = layers.Critics(seeds, members, critics, 6, 7)
    layers.initialise(layer, keys=draw.seed_keys([0, 1]), scheme="fan_in")
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(seeds, inputs, critics if own else 1, rows, 6, generator=generator)
    if own and inputs != members:
        return  # critics of their own inputs have members of their own
    for outputs in (None, 2):
        y = layer(x, outputs)
        assert y.shape == (seeds, members, critics, rows, outputs or 7)
        for s in range(seeds):
            for i in range(members):
                for c in range(critics):
                    given = x[s, i if inputs > 1 else 0, c if own else 0]
                    want = given @ layer.weight[s, i, c] + layer.bias[s, i, c]
                    assert_agree(y[s, i, c], want[:, :outputs])


def test_orthogonal_matrices_have_the_layers_gain_and_are_each_seeds_own():
    one = ((9, 1.0),)
    wide, tall = layers.Linear(2, 3, 4, 9, blocks=one), layers.Critics(2, 3, 2, 9, 4)
    image = layers.Conv(2, 3, channels=2, filters=4, kernel=3, stride=1, padding="valid")
    net = torch.nn.Sequential(wide, tall, image)
    layers.initialise(net, keys=draw.seed_keys([5, 3]), scheme="orthogonal")
    weight = wide.weight.detach()
    eye = torch.eye(4)
    torch.testing.assert_close(weight @ weight.mT, eye.expand(2, 3, 4, 4), atol=1e-5, rtol=0)
    columns = tall.weight.detach().mT @ tall.weight.detach()
    torch.testing.assert_close(columns, 2.0 * eye.expand(2, 3, 2, 4, 4), atol=1e-5, rtol=0)
    patches = image.weight.detach().mT @ image.weight.detach()
    torch.testing.assert_close(patches, 2.0 * eye.expand(2, 3, 4, 4), atol=1e-5, rtol=0)
    assert (
        not tall.bias.any()
        and not image.bias.any()
        and len(torch.unique(weight.flatten(2).flatten(0, 1), dim=0)) == 6
    )
    wide = layers.Linear(1, 3, 4, 9, blocks=one)
    image = layers.Conv(1, 3, channels=2, filters=4, kernel=3, stride=1, padding="valid")
    again = torch.nn.Sequential(wide, layers.Critics(1, 3, 2, 9, 4), image)
    layers.initialise(again, keys=draw.seed_keys([3]), scheme="orthogonal")
    for mine, theirs in zip(again.parameters(), net.parameters(), strict=True):
        assert torch.equal(mine[0], theirs[1])
    with pytest.raises(ValueError, match="got a layer Heads"):
        layers.initialise(build(config()), keys=draw.seed_keys([0]), scheme="orthogonal")


def test_orthogonal_signs_are_uniform():
    # Without the sign of R's diagonal, QR prefers one half of the orthogonal matrices.
    layer = layers.Linear(1, 2000, 2, 2)
    layers.initialise(layer, keys=draw.seed_keys([0]), scheme="orthogonal")
    share = (layer.weight[0, :, 0, 0] > 0).float().mean()
    assert float(share) == pytest.approx(0.5, abs=0.04)


def test_an_unknown_scheme_is_refused():
    schemes = "expected fan_in, xavier, variance or orthogonal"
    with pytest.raises(ValueError, match=f"{schemes}, got 'zeros'"):
        layers.initialise(build(config()), keys=draw.seed_keys([0]), scheme="zeros")


def test_parameter_counts_are_the_originals():
    nature = dict(
        channels=(32, 64, 64), kernels=(8, 4, 3), strides=(4, 2, 1), hidden=(512,), stack=4
    )
    atari = EnvSpec("atari", (84, 84), torch.uint8, 18, 1, 4, False, False)

    def count(**options):
        cfg = config(shared_bias=True, **nature, **options)
        heads = head_table(cfg.ensemble, gamma=0.99, device="cpu").heads
        with torch.device("meta"):
            net = QNet(cfg, atari, seeds=1, heads=heads, atoms=1)
        return sum(leaf.numel() for leaf in net.parameters())

    assert count(members=1) == 1_693_345
    assert count(members=10) == 16_933_450
    assert count(members=10, shared=3) == 16_231_594
    assert count(members=10, shared=4) == 1_776_298
    assert count(members=10, heads="cerl") == 17_762_980
    assert count(members=10, heads="cerl", shared=3) == 17_061_124


N = 3
# (heads, L, fork): factor of the gradients of conv 0, 1, 2, hidden, output
SCALING = {
    ("own", 0, "final"): (1, 1, 1, 1, 1),
    ("own", 1, "final"): (1 / N, 1, 1, 1, 1),
    ("own", 2, "final"): (1 / N, 1 / N, 1, 1, 1),
    ("own", 3, "final"): (1 / N, 1 / N, 1 / N, 1, 1),
    ("own", 4, "final"): (1 / N, 1 / N, 1 / N, 1 / N, 1),
    ("cerl", 0, "final"): (1 / N, 1 / N, 1 / N, 1 / N, 1),
    ("cerl", 1, "final"): (1 / N**2, 1 / N, 1 / N, 1 / N, 1),
    ("cerl", 3, "final"): (1 / N**2, 1 / N**2, 1 / N**2, 1 / N, 1),
    ("own_target", 0, "final"): (1 / N, 1 / N, 1 / N, 1 / N, 1),
    ("single_actor", 0, "final"): (1 / N, 1 / N, 1 / N, 1 / N, 1),
    ("cerl", 0, "both"): (1 / N, 1 / N, 1 / N, 1, 1),
    ("multi_horizon", 0, "final"): (1 / 4, 1 / 4, 1 / 4, 1 / 4, 1),
}
LAYERS = ("convs.0", "convs.1", "convs.2", "hidden.0", "final")


@pytest.mark.parametrize("heads, shared, fork", SCALING)
def test_gradients_are_scaled_as_the_originals_table_says(heads, shared, fork):
    grads = []
    x = random(1, 1, 4, 12, 12, 2, seed=5).detach()
    for scale in (True, False):
        net = build(config(heads=heads, shared=shared, fork=fork, scale=scale))
        q = net(x, net.heads)
        weight = random(*q.shape, seed=6).detach()
        names = [name for name, _ in net.named_parameters()]
        leaves = list(net.parameters())
        values = torch.autograd.grad((q * weight).sum(), leaves)
        grads.append(dict(zip(names, values, strict=True)))
    for name in grads[0]:
        layer = name.rsplit(".", 1)[0]
        factor = SCALING[heads, shared, fork][LAYERS.index(layer)]
        assert float(grads[1][name].abs().max()) > 0, name
        assert_agree(grads[0][name], grads[1][name] * factor)


def test_feature_norm_divides_the_penultimate_features_in_both_forks():
    x = random(1, 1, 4, 12, 12, 2, seed=5).detach()
    for fork in ("final", "both"):
        cfg = config(heads="cerl", fork=fork, feature_norm=True)
        net = build(cfg)
        encoded, features = net.features(x)
        for i in range(3):
            for j in range(3):
                if fork == "both":
                    penult = (
                        encoded[0, i] @ net.final.hidden[0, i, j] + net.final.hidden_bias[0, i, j]
                    )
                    penult, weight = penult.relu(), net.final.weight[0, i, j]
                else:
                    penult, weight = features[0, i], net.final.weight[0, i, :, j]
                unit = penult / (penult.norm(dim=-1, keepdim=True) + 1e-6)
                want = unit @ weight + net.final.bias[0, i, j]
                assert_agree(net(x, 3)[0, i, :, j], want)


def test_blocks_of_a_layer_have_equal_widths_that_make_it_up():
    with pytest.raises(ValueError, match=r"equal outputs that sum to 6, got \[2, 3\]"):
        layers.Linear(1, 1, 4, 6, blocks=((2, 1.0), (3, 1.0)))
    both = layers.Linear(1, 1, 4, 6, blocks=((3, 2.0), (3, 1.0)))
    layers.initialise(both, keys=draw.seed_keys([0]), scheme="xavier")
    assert 0.7 < float(both.weight.detach().abs().max()) / (6 / (4 + 3)) ** 0.5 <= 1.0
