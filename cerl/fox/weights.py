"""Parameters of the plain modules from those of the authors' modules, by their names.

The authors' weights are [outputs, inputs] and lie in one matrix each; ours are [inputs, outputs],
side by side in one matrix.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def of_attention(
    state: Mapping[str, Tensor], prefix: str, *, heads: int, pro: bool
) -> dict[str, Tensor]:
    """The parameters of an attention from those of the authors' `ForgettingAttentionLayer`.

    Args:   state, names and weights; prefix of the names that belong to the layer; heads of the
            attention; pro, it is of the variant `pro`.
    Raises: ValueError where names are missing, or left over.
    """
    take = lambda name: _taken(state, prefix + name)  # noqa: E731
    linear = ".linear" if pro else ""
    parts = ["q_proj", f"k_proj{linear}", f"v_proj{linear}"]
    parts += ["ogate_proj"] if pro else []
    parts += ["fgate_proj"]
    parts += ["k_proj.shift_proj", "v_proj.shift_proj"] if pro else []
    leaves = {
        "wide.weight": torch.cat([take(f"{part}.weight").T for part in parts], 1),
        "bias": take("fgate_proj.bias"),
        "output.weight": take("o_proj.weight").T,
    }
    used = {f"{part}.weight" for part in (*parts, "o_proj")} | {"fgate_proj.bias"}
    if pro:
        width = len(leaves["output.weight"]) // heads
        for ours, theirs in (("q", "q_norm"), ("k", "k_norm"), ("o", "output_norm")):
            scale = take(f"{theirs}.weight")
            # A norm that all heads share has one scale for each feature of a head.
            if scale.numel() in (width, heads * width):
                scale = scale.view(-1, width).expand(heads, -1)
            leaves[f"{ours}_scale"] = scale
            used.add(f"{theirs}.weight")
    there = {name.removeprefix(prefix) for name in state if name.startswith(prefix)}
    if left := sorted(there - used):
        raise ValueError(
            f"load_official: a layer of the variant {'pro' if pro else 'llama'} has no "
            f"{', '.join(left)} below {prefix!r}; expected {', '.join(sorted(used))}"
        )
    return leaves


def of_block(
    state: Mapping[str, Tensor], prefix: str, *, heads: int, pro: bool
) -> dict[str, Tensor]:
    """The parameters of a block from those of the authors' `ForgettingTransformerBlock`.

    Args and errors as of `of_attention`.
    """
    leaves = of_attention(state, f"{prefix}attn.", heads=heads, pro=pro)
    leaves = {f"mix.{name}": leaf for name, leaf in leaves.items()}
    for ours, theirs in (
        ("mix_scale", "attn_norm.weight"),
        ("mlp_scale", "mlp_norm.weight"),
        ("up.weight", "mlp.gate_proj.weight"),
        ("down.weight", "mlp.down_proj.weight"),
    ):
        leaves[ours] = _taken(state, prefix + theirs).t()
    return leaves


def _taken(state: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in state:
        raise ValueError(
            f"load_official: no {name} among {len(state)} weights, such as "
            f"{', '.join(list(state)[:3])}; `prefix` has to lead to one layer of the same variant"
        )
    return state[name]


def load(net: nn.Module, leaves: dict[str, Tensor], prefix: str) -> None:
    """Copies weights into the parameters of the same names.

    Args:   prefix of the authors' names, for the message. Raises: ValueError for other sizes.
    """
    own = dict(net.named_parameters())
    assert own.keys() == leaves.keys(), (own.keys(), leaves.keys())
    wrong = [
        f"{name} {list(own[name].shape)}, got {list(leaf.shape)}"
        for name, leaf in leaves.items()
        if own[name].shape != leaf.shape
    ]
    if wrong:
        raise ValueError(
            f"load_official: the weights below {prefix!r} are of other sizes; expected "
            + "; ".join(wrong)
        )
    with torch.no_grad():
        for name, leaf in leaves.items():
            own[name].copy_(leaf)
