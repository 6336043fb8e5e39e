"""A module of a population as one network, whose parameters lack the axes of seeds and members."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

STD = 0.02  # of the weights before training, as the authors' `initializer_range`


class Single:
    """Runs a module with parameters [1, 1, ...] on parameters that lack these two axes.

    Not itself a module, so that its owner has the module's parameters under their own names.

    Args: net, a module for one seed and one member, which the owner registers. Its parameters are
          replaced by ones without the axes; weights become random, as the authors have them.
    """

    def __init__(self, net: nn.Module) -> None:
        for part in net.modules():
            for name, leaf in list(part.named_parameters(recurse=False)):
                setattr(part, name, nn.Parameter(leaf.detach()[0, 0].clone()))
        with torch.no_grad():
            for name, leaf in net.named_parameters():
                if name.endswith("weight"):
                    leaf.normal_(0.0, STD)
        self.call = _Call(net)

    def run(self, function: Callable[..., Tensor], *args: Any, dtype: torch.dtype) -> Tensor:
        """Returns function(net, *args), while the parameters of net have the axes [S, N] = [1, 1].

        Args: dtype of the products. Scales and biases are then at least float32.
        """
        wide = torch.promote_types(dtype, torch.float32)
        leaves = {
            name: (leaf if name.endswith("weight") else leaf.to(wide))[None, None]
            for name, leaf in self.call.named_parameters()
        }
        return functional_call(self.call, leaves, (function, args))


class _Call(nn.Module):
    """Leads a call of `functional_call`, which calls modules, to any function of a module."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, function: Callable[..., Tensor], args: tuple[Any, ...]) -> Tensor:
        return function(self.net, *args)
