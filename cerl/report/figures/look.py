"""How a setting looks in every figure: the colour of its method, a shade, a marker, a line style.

The colour follows from the role of a setting (`cerl/report/roles.py`), so CERL is blue in the
figures of every study (`cerl/report/palette.py`). Line styles tell the scores of one setting apart.
"""

import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.colors import to_hex, to_rgb
from matplotlib.lines import Line2D

from cerl.config.labels import exists, ordered, rank_of, ranked, value_of
from cerl.report import palette, roles
from cerl.report.curves import Cell
from cerl.report.palette import AGGREGATES, shown

# Colour and marker of each role; those of variants, and of further methods of a role.
ROLES = {role: (style.paper, style.marker) for role, style in palette.ROLES.items()}
VARIANTS = tuple((style.paper, style.marker) for style in palette.VARIANTS)
# Last words of presets that always have the same place in VARIANTS.
NAMED = {"fox": 0, "gru": 1, "mlp": 2, "transformer": 3, "batches": 0, "horizon": 1, "l1": 2}
MARKERS = ("o", "s", "^", "D")
SHADES = 8  # shades of a colour that a reader can just tell apart
LOOKS = SHADES * len(MARKERS)  # settings of one method that a figure can tell apart
SETTINGS = 8  # most settings of a panel that has lines for aggregates too
FEW = 12  # most settings of a legend with a line for each
GREY = "#555555"

# Line style and legend text of each score.
STYLES: dict[str, tuple[Any, str]] = {
    "individual": ("-", "individual (mean over members)"),
    "random": ((0, (8, 2)), "individual (drawn member)"),
    "vote": ("--", "aggregate (vote)"),
    "mean": ("-.", "aggregate (mean)"),
    "active": ("-", "active"),
    "passive": (":", "passive"),
    "individual_mode": ((0, (1, 1)), "individual, modes"),
    "mean_mode": ((0, (3, 1, 1, 1)), "aggregate (mean), modes"),
    "active_mode": ((0, (1, 1)), "active, modes"),
    "passive_mode": ((0, (1, 3)), "passive, modes"),
}


class Look(NamedTuple):
    """How a setting is drawn."""

    colour: str  # #rrggbb
    marker: str  # of matplotlib
    shade: int  # 0: the colour of the method itself, or the lightest of several shades

    def line(self, score: str = "individual") -> dict[str, Any]:
        """Arguments of matplotlib's `plot`. Markers of aggregates are hollow."""
        look = {"color": self.colour, "marker": self.marker, "markersize": 3.5, "linewidth": 1.3}
        hollow = {"markerfacecolor": "white"} if score in AGGREGATES else {}
        return look | {"linestyle": STYLES[score][0]} | hollow


def styles_of(used: Iterable[str]) -> list[Line2D]:
    """Lines of a legend: a style for each score; scores with one style share a line.

    Args: used, keys of STYLES.
    """
    texts: dict[Any, list[str]] = {}
    for score in (score for score in STYLES if score in {*used}):
        hollow = score in AGGREGATES
        texts.setdefault((STYLES[score][0], hollow), []).append(STYLES[score][1])
    out = []
    for (style, hollow), said in texts.items():
        face: dict[str, Any] = {}
        if hollow:
            face = {"markerfacecolor": "white", "marker": "o", "markersize": 3.5}
        look: dict[str, Any] = {"color": GREY, "linewidth": 1.3, "linestyle": style}
        out.append(Line2D([], [], label=", ".join(said), **look, **face))
    return out


def reduced(cells: Sequence[Cell]) -> list[Cell]:
    """The cells; without the scores of aggregates if there are more settings than one panel can
    hold with them."""
    if len({cell.name for cell in cells}) <= SETTINGS:
        return [*cells]
    kept = [
        {k: v for k, v in cell.curves.items() if k not in AGGREGATES or k not in shown(cell)}
        for cell in cells
    ]
    return [
        cell._replace(curves=own) if len(own) < len(cell.curves) else cell
        for cell, own in zip(cells, kept, strict=True)
    ]


def bare_of(cells: Sequence[Cell]) -> str:
    """What `reduced` leaves out, as a clause; "" if nothing."""
    if reduced(cells) == [*cells]:
        return ""
    return f"scores of aggregates are left out, since there are more than {SETTINGS} settings"


def looks(found: Sequence[Cell]) -> dict[str, Look]:
    """The look of every setting, by label.

    Values of the first option in which settings differ are shades of a method's colour, from light
    to dark; combinations of the others are markers. Settings of different methods with the same
    options have the same shade and marker. Where that does not suffice, looks follow in the order
    of legends, and repeat from setting `LOOKS` + 1 on.

    Args: found, all cells of the report.
    """
    cells = {cell.name: cell for cell in found}
    names = ranked([cell.label for cell in found])
    hues = _hues([cells[name] for name in names])
    numbers, count = _numbers([cells[name] for name in names])
    out = {}
    kinds = len({kind for _, kind in numbers.values()})
    for name in names:
        colour, marker = hues[cells[name].label.method]
        shade, kind = numbers[name]
        # Markers that tell options are the same for all methods.
        marker = marker if kinds == 1 else MARKERS[kind % len(MARKERS)]
        shaded = colour if shade is None else shaded_of(colour, shade, count)
        out[name] = Look(shaded, marker, shade or 0)
    return out


class Part(NamedTuple):
    """One line of a legend that explains shades and markers instead of settings."""

    text: str  # such as "members 5"
    colour: str  # a shade of grey
    marker: str  # "" where the line explains a shade


def parts(found: Sequence[Cell]) -> list[Part]:
    """What shades and markers mean, where all settings follow from the two; else nothing."""
    cells = {cell.name: cell for cell in found}
    numbers, count = _numbers([*cells.values()])
    shades: dict[int, str] = {}
    kinds: dict[int, str] = {}
    for name, (shade, kind) in numbers.items():
        options = cells[name].label.options
        keys = ordered(options)
        first = _first([*cells.values()])
        others = [key for key in keys if key != first]
        told = cells[name].label._replace(method="", options={k: options[k] for k in others})
        kinds.setdefault(kind, told.text.removeprefix(", "))
        if shade is not None and first in options:
            told = told._replace(options={first: options[first]})
            if shades.setdefault(shade, told.text.removeprefix(", ")) != told.text[2:]:
                return []
    shaded = {number for number in numbers.values() if number[0] is not None}
    if not shades or len(shades) * len(kinds) < len(shaded):
        return []
    out = [Part(shades[k], shaded_of(GREY, k, count), "") for k in sorted(shades)]
    if len(kinds) > 1:
        out += [Part(kinds[k], GREY, MARKERS[k % len(MARKERS)]) for k in sorted(kinds)]
    return out


def legend_of(
    found: Sequence[Cell], own: Mapping[str, Look], names: Sequence[str], **change: Any
) -> list[Line2D]:
    """Lines of a legend: one for each setting; of many settings, one for each method and then what
    shades and markers mean.

    Args: found, all cells of the report; own, from `looks`; names, labels of the settings that are
          drawn; change, arguments of matplotlib's `Line2D` that differ from those of lines.
    """
    told = parts(found) if len(names) > FEW else []
    if not told:
        return [Line2D([], [], label=name, **own[name].line() | change) for name in names]
    methods = dict.fromkeys(cell.label.method for cell in found if cell.name in {*names})
    hues = _hues([*{cell.name: cell for cell in found}.values()])
    lines = [Line2D([], [], label=m, color=hues[m][0], linewidth=3.0) for m in methods]
    for text, colour, marker in told:
        look = Look(colour, marker, 0).line() | change
        # A line that explains a shade has no marker, so it must be a line.
        look |= {} if marker else {"linestyle": "-"}
        lines.append(Line2D([], [], label=text, **look))
    return lines


def _first(cells: Sequence[Cell]) -> str:
    """The option whose values are shades: the first that has several among some settings."""
    values: dict[str, set[str]] = {}
    for cell in cells:
        for key, value in cell.label.options.items():
            values.setdefault(key, set()).add(str(value))
    return next((key for key in ordered(values) if len(values[key]) > 1), "")


def _hues(cells: Sequence[Cell]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each method.

    The method with the shortest name of a role has the role's; others of the role are variants.
    Where all methods with a place in `NAMED` have one role, as in a comparison of networks, they
    have their places in `VARIANTS`.
    """
    role: dict[str, str] = {}
    for cell in cells:
        own = roles.known(cell)
        role.setdefault(cell.label.method, "other" if own is None else own.role)
    out: dict[str, tuple[str, str]] = {}
    taken: set[int] = set()
    for name in sorted(role, key=lambda name: (len(name), name)):
        last = name.replace("_", "-").rpartition("-")[2].rpartition("/")[2]
        same = [other for other in role if role[other] == role[name]]
        first = ROLES.get(role[name]) not in out.values() and role[name] in ROLES
        if first and not (last in NAMED and len(same) > 1):
            out[name] = ROLES[role[name]]
            continue
        place = NAMED.get(last, zlib.crc32(name.encode())) % len(VARIANTS)
        free = [(place + k) % len(VARIANTS) for k in range(len(VARIANTS))]
        place = next((k for k in free if k not in taken), place)
        taken.add(place)
        out[name] = VARIANTS[place]
    return out


def _numbers(cells: Sequence[Cell]) -> tuple[dict[str, tuple[int | None, int]], int]:
    """The numbers of each setting's shade and marker, by label, and how many shades there are.

    The shade is None for a setting that does not have the option which shades tell.
    """
    labels = {cell.name: cell.label for cell in cells}
    several = {}
    for key in ordered(key for label in labels.values() for key in label.options):
        values = {str(v.options[key]): v.options[key] for v in labels.values() if key in v.options}
        # Settings of one method may differ in that only some have an option, as a run and its fork.
        having, lacking = (
            {label.method for label in labels.values() if (key in label.options) == there}
            for there in (True, False)
        )
        if len(values) > 1 or having & lacking:
            several[key] = sorted(values, key=lambda code, v=values: rank_of(v[code]))
    if not several:
        return {name: (None, 0) for name in labels}, 0
    first, *others = several
    codes = {cell.name: tuple(_code(cell, key, several[key]) for key in others) for cell in cells}
    order = [*dict.fromkeys(codes.values())]
    if len(several[first]) <= SHADES and len(order) <= len(MARKERS):
        found = {
            name: (
                several[first].index(str(label.options[first])) if first in label.options else None,
                order.index(codes[name]),
            )
            for name, label in labels.items()
        }
        return found, len(several[first])
    texts = [*dict.fromkeys(text_of_options(cell) for cell in cells)]
    places = {cell.name: texts.index(text_of_options(cell)) for cell in cells}
    count = min(len(texts), SHADES)
    return {name: (k % SHADES, k // SHADES) for name, k in places.items()}, count


def _code(cell: Cell, key: str, codes: Sequence[str]) -> str:
    """The value of an option of a setting as text; "" if it has none, or one without a marker.

    Args: codes, the values that have markers.
    """
    if key in cell.label.options:
        return str(cell.label.options[key])
    if cell.options is None or not exists(cell.options, key):
        return ""
    code = str(value_of(cell.options, key))
    return code if code in codes else ""


def text_of_options(cell: Cell) -> str:
    """The label of a setting without its method; the method where there are no options."""
    return cell.name.removeprefix(f"{cell.label.method}, ")


def shaded_of(colour: str, shade: int, count: int) -> str:
    """A shade of a colour, from light (0) to dark (count - 1)."""
    place = 0.6 - 0.95 * shade / max(count - 1, 1) if count > 1 else 0.0
    target = np.ones(3) if place > 0 else np.zeros(3)
    mixed = (1 - abs(place)) * np.array(to_rgb(colour)) + abs(place) * target
    red, green, blue = mixed.tolist()
    return to_hex((red, green, blue))


def title_of(env: str, found: Sequence[Cell]) -> str:
    """The title of a task: its name and, where observations are partial or noisy, how.

    What differs between the settings of the task stands in their labels instead.

    Args: env, family/name; found, cells of which those of the task are read.
    """
    said: list[str] = []
    own = [known for cell in found if cell.env == env and (known := roles.known(cell))]
    for key, word in OBSERVED.items():
        values = {str(known.options.get(key)) for known in own}
        value = own[0].options.get(key) if own else None
        if len(values) == 1 and value not in (None, 0, 0.0, "all", [], ()):
            parts = ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
            said.append(f"{word} {parts}")
    return ", ".join([env, *said])


# Options that change what is seen of a task, and what titles call them.
OBSERVED = {
    "env.observe.keep": "only",
    "env.observe.indices": "only components",
    "env.observe.noise": "noise",
    "env.observe.dropout": "dropout",
    "env.observe.flicker": "flicker",
}
