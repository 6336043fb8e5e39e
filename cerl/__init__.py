"""cerl: ensemble exploration with shared experience, whole populations on one GPU.

Dims, the only legend. Tensors keep this order: [S, N, C, B or E, T or W, J, rest].

    S  seeds, trained side by side in one process; they never touch each other
    N  ensemble members of a seed (size 1 on a parameter: shared by all members)
    C  critics of a member
    J  value heads of a member; head 0 is its own
    E  environments per seed
    B  batch
    T  learnt steps of a window
    W  rows of a window = context + T + n
    A  actions (their count, or the components of a continuous one)
    D  features
    H  attention heads
"""

__version__ = "0.1.0"
