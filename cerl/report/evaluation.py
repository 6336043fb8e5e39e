"""The table of an evaluation that `cerl eval` prints."""

from collections.abc import Mapping
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from cerl.record.results import INDIVIDUAL


def show(results: Mapping[str, Any]) -> None:
    """Prints the mean return of each policy and member over all seeds and episodes.

    Args: results, a `cerl.evaluate.Result` by policy; returns and lengths [S, members, episodes].
    """
    table = Table("policy", "member", "mean return", "std of episodes", "episodes", "mean length")
    table.columns[0].no_wrap = True
    table.columns[0].min_width = max(map(len, results), default=0)  # never cut
    for policy, result in results.items():
        for member in range(result.returns.shape[1]):
            # A return may be NaN, of a simulator that diverged; an episode without length was not
            # played.
            there = ~torch.isnan(result.lengths[:, member])
            played = result.returns[:, member][there].double()
            lengths = result.lengths[:, member][there].double()
            table.add_row(
                policy,
                str(member) if policy in INDIVIDUAL else "",
                f"{played.mean():.3f}",
                f"{played.std(correction=0):.3f}",
                str(played.numel()),
                f"{lengths.mean():.1f}",
            )
    Console().print(table, markup=False)
