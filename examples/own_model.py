"""Forgetting attention in a model of one's own: a byte model that is trained on a line of text.

`forgetting_attention` is a function of queries, keys, values and log forget gates;
`cerl.fox.FoxBlock` is a whole layer. Both need torch, and triton on a GPU.

    python own_model.py
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from cerl.fox import forgetting_attention


class Forgetting(nn.Module):
    """Causal attention whose weights decay by a gate that the row computes."""

    def __init__(self, width: int, *, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.rows, self.gate = nn.Linear(width, 3 * width), nn.Linear(width, heads)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, width]
        q, k, v = self.rows(x).unflatten(-1, (3, self.heads, -1)).unbind(2)  # [B, T, H, D] each
        gate = functional.logsigmoid(self.gate(x).float())  # [B, T, H], log of the forget gate
        return self.out(forgetting_attention(q, k, v, gate).flatten(2))


def train(steps: int = 60) -> list[float]:
    """Trains to predict the next byte. Returns: the cross-entropy of every step, nats."""
    torch.manual_seed(0)
    text = b"an ensemble is two leading axes of every parameter; " * 4
    line = torch.tensor(list(text)).unsqueeze(0)  # [1, T]
    model = nn.Sequential(nn.Embedding(256, 32), Forgetting(32, heads=2), nn.Linear(32, 256))
    optim = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = functional.cross_entropy(model(line[:, :-1])[0], line[0, 1:])
        optim.zero_grad()
        loss.backward()
        optim.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    losses = train()
    print(f"nats per byte: {losses[0]:.2f} at first, {losses[-1]:.2f} after {len(losses)} steps")
