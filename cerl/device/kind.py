"""Which kind of device a config's `device` names."""

from typing import Literal

Kind = Literal["cpu", "cuda"]


def kind_of(device: str) -> Kind:
    """The kind that auto, cpu, cuda or cuda:N stands for on this machine; auto prefers a GPU."""
    if device == "auto":
        import torch  # imported here, since it takes seconds and only `auto` needs it

        return "cuda" if torch.cuda.is_available() else "cpu"
    return "cpu" if device == "cpu" else "cuda"
