"""Prints the table of an evaluation, for `cerl eval`."""

from collections.abc import Mapping
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from cerl.config.options import INDIVIDUAL


def show(results: Mapping[str, Any]) -> None:
    """Prints the mean return of each policy and member over all seeds and episodes.

    Args: results, the `cerl.evaluate.Result` of each policy by its name; their fields `returns` (in
          the environment's units) and `lengths` (agent steps) are [S, members, episodes].
    """
    table = Table("policy", "member", "mean return", "std of episodes", "episodes", "mean length")
    table.columns[0].no_wrap = True
    table.columns[0].min_width = max(map(len, results), default=0)  # never cut
    for policy, result in results.items():
        for member in range(result.returns.shape[1]):
            # Episodes that were not played have the length NaN. A return alone does not tell, since
            # it is NaN too where a simulator diverged.
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
