"""Which kind of device a config's `device` names."""

from typing import Literal

Kind = Literal["cpu", "cuda"]

# Environment variable in which a sweep tells a run the number of its GPU, where
# CUDA_VISIBLE_DEVICES has the GPU's UUID instead.
NUMBER = "CERL_GPU_NUMBER"


def kind_of(device: str) -> Kind:
    """The kind that auto, cpu, cuda or cuda:N stands for on this machine; auto prefers a GPU."""
    if device == "auto":
        import torch  # imported here, since it takes seconds and only `auto` needs it

        return "cuda" if torch.cuda.is_available() else "cpu"
    return "cpu" if device == "cpu" else "cuda"
