"""FoX for programs of one's own: plain modules for one network, without seeds and members.

    from cerl.fox import FoxBlock, forgetting_attention

needs torch, and triton on a GPU, and no other package. The modules run the code of the sequence
networks (`cerl/nets/fox.py`, `cerl/nets/trunk.py`), whose parameters lead with the axes of seeds
and members; here parameters have no such axes. docs/from-forgetting-transformer.md compares them
with the authors' modules. Lin et al. 2025 (arXiv:2503.02130 and arXiv:2504.06949).

    modules.py   FoxAttention and FoxBlock
    rows.py      the rows of one call, and the cache that they go to
    single.py    a module of a population as one network
    weights.py   parameters from those of the authors' modules
"""

from cerl.fox.modules import FoxAttention, FoxBlock
from cerl.fox.rows import FoxCache
from cerl.kernels.attention.official import forgetting_attention

__all__ = ["FoxAttention", "FoxBlock", "FoxCache", "forgetting_attention"]
