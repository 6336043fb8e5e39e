"""What the figures of files and of the page share: colours and markers of roles, scores shown.

Colours are those of Okabe and Ito (Color Universal Design, 2008), which colour-blind readers can
tell apart; markers tell the roles apart in grey.
"""

from typing import NamedTuple

from cerl.report.curves import Cell, Curve


class Style(NamedTuple):
    """How the first setting of a role is drawn."""

    paper: str  # colour on white, #rrggbb
    screen: str  # colour that can be read on white and on black
    marker: str  # of matplotlib
    symbol: str  # the same marker, as plotly calls it


ROLES = {
    "single": Style("#222222", "#8a8a8a", "o", "circle"),
    "ensemble": Style("#D55E00", "#D55E00", "s", "square"),
    "cerl": Style("#0072B2", "#0072B2", "^", "triangle-up"),
    "tandem": Style("#009E73", "#009E73", "D", "diamond"),
}
# Variants, and further methods of a role.
VARIANTS = (
    Style("#CC79A7", "#CC79A7", "v", "triangle-down"),
    Style("#E69F00", "#E69F00", "P", "cross"),
    Style("#56B4E9", "#56B4E9", "X", "x"),
    Style("#8C6D31", "#8C6D31", "*", "star"),
)
# Colours of the outcomes of verdicts, on the page.
OUTCOMES = {"more": "#009E73", "less": "#D55E00", "undecided": "#8a8a8a", "none": "#8a8a8a"}
AGGREGATES = ("vote", "mean", "mean_mode")  # scores of all members together
# Scores that are told apart by another line style from those of members that act.
BROKEN = (*AGGREGATES, "passive", "passive_mode")


def shown(cell: Cell) -> dict[str, Curve]:
    """The curves of a cell that are drawn, by score.

    Left out are aggregates where there is a single member (they repeat its score) and in a tandem,
    whose two members are compared with each other; and the drawn member where all members are
    averaged anyway.
    """
    plain = cell.members > 1 and "active" not in cell.curves
    hidden = set() if plain else {*AGGREGATES}
    if "individual" in cell.curves:
        hidden.add("random")
    return {score: curve for score, curve in cell.curves.items() if score not in hidden}
