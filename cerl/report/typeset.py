"""Tables in LaTeX for a paper: final scores, and the hyper-parameters of every setting.

They use the packages booktabs and longtable. Every text is escaped, whatever names hold.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from cerl.config import Config, errors
from cerl.config.labels import exists, ordered, ranked, value_of
from cerl.config.numbers import human
from cerl.report import roles
from cerl.report.curves import SCORES, Cell
from cerl.report.estimate import number
from cerl.report.summary import NAMES
from cerl.text import few, visible

RESULTS, PARAMETERS = "results.tex", "hyperparameters.tex"

# Sections of the config that are no hyper-parameters of a method.
ASIDE = ("env.family", "env.name", "eval", "replay.placement", "env.threads")

_SPECIAL = {
    **{letter: f"\\{letter}" for letter in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
    # After the end of a line LaTeX takes these for an option of it.
    **{"[": "{[}", "*": "{*}"},
    **{"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"},
}
LAST = 0x17F  # the last letter of Latin Extended-A, which pdfLaTeX knows
LINES = 40  # most lines of settings in a table on one page
COLUMNS = 6  # most settings of a table of hyper-parameters; more of them are further tables


def tables(found: Sequence[Cell], summary: pa.Table) -> dict[str, str]:
    """The content of the files of LaTeX, by name.

    Args: found, all cells of the report; summary of them, from `summary.summarise`.
    """
    return {RESULTS: results(summary), PARAMETERS: parameters(found)}


def escaped(text: str) -> str:
    """A text as LaTeX prints it; letters that pdfLaTeX does not know are told by their number."""
    return "".join(
        _SPECIAL.get(x, x if ord(x) <= LAST else f"U+{ord(x):04X}") for x in visible(text)
    )


def results(summary: pa.Table) -> str:
    """Final scores with their intervals: a line for each setting, a block for each environment.

    Scores over tasks have a block for each normalisation and statistic. A table with more lines
    than `LINES` runs over several pages.
    """
    rows = summary.to_pylist()
    used = [score for score in SCORES if any(row["score"] == score for row in rows)]
    blocks: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        env = row["env"]
        if row["unit"] != "return":
            env = f"{env}, {row['unit']}, {NAMES[row['statistic']]}"
        line = blocks.setdefault(env, {}).setdefault(row["label"], {"row": row})
        line[row["score"]] = _estimate(row)
    long = sum(map(len, blocks.values())) > LINES
    kind = "longtable" if long else "tabular"
    lines = [
        f"\\begin{{{kind}}}{{l{'r' * (2 + len(used))}}}",
        "\\toprule",
        _line(["method", "$N$", "seeds", *(escaped(SCORES[score]) for score in used)]),
        *(["\\midrule", "\\endhead"] if long else []),
    ]
    for k, (env, own) in enumerate(blocks.items()):
        if k or not long:
            lines.append("\\midrule")
        lines.append(f"\\multicolumn{{{3 + len(used)}}}{{l}}{{\\textit{{{escaped(env)}}}}} \\\\")
        for name, line in own.items():
            facts = [escaped(name), str(line["row"]["members"]), str(line["row"]["seeds"])]
            lines.append(_line([*facts, *(line.get(score, "") for score in used)]))
    lines += ["\\bottomrule", f"\\end{{{kind}}}"]
    confidence = 100 * rows[0]["confidence"] if rows else 95
    head = (
        f"% Needs \\usepackage{{booktabs{',longtable' if long else ''}}}. Mean return over "
        "seeds at the end of training (over tasks "
        f"the statistic that is named), with {confidence:g}% intervals in brackets, or the least "
        "and the greatest seed in parentheses where seeds are too few. Individual: mean over all "
        "members."
    )
    return "\n".join([head, *lines, ""])


def _estimate(row: Mapping[str, Any]) -> str:
    """A score with its interval in small type, or without one with the least and the greatest seed;
    a dash where there is none."""
    sure = row["low"] is not None
    names = ("value", "low", "high") if sure else ("value", "least", "greatest")
    found = [row[name] for name in names]
    if found[0] is None:
        return "--"
    size = max(abs(value) for value in found if value is not None)
    value, low, high = (number(end, size=size).replace(",", "{,}") for end in found)
    if sure:
        return f"${value}$ {{\\scriptsize $[{low}, {high}]$}}"
    return f"${value}$" + ("" if found[1] is None else f" {{\\scriptsize (${low}$ to ${high}$)}}")


def _line(parts: Sequence[str]) -> str:
    return " & ".join(parts) + " \\\\"


def parameters(found: Sequence[Cell]) -> str:
    """All options of every setting, a column for each; options that differ between settings are
    bold. A dash says that a setting has no such option.

    An option that follows from the environment, such as the length of context, has all of its
    values. Settings whose options are unknown, and are no preset's, are named in a comment.
    """
    known: dict[str, list[Mapping[str, Any]]] = {}
    lost, assumed = [], []
    names = ranked([cell.label for cell in found])
    for cell in found:
        own = roles.known(cell)
        if own is None:
            lost.append(cell.name)
            continue
        known.setdefault(cell.name, []).append(own.options)
        if own.assumed:
            assumed.append(cell.name)
    names = [name for name in names if name in known]
    every = [*errors.keys(Config)]
    groups = {key.rpartition(".")[0] for key in every}  # sections, which are no options
    keys = ordered(
        key
        for key in every
        if key not in groups
        and not any(key == name or key.startswith(f"{name}.") for name in ASIDE)
        and key.partition(".")[0] in {"agent", *_SECTIONS}
        and any(exists(options, key) for own in known.values() for options in own)
    )
    told = {key: [_values(known[name], key) for name in names] for key in keys}
    lines = ["% Needs \\usepackage{booktabs,longtable}. Options that differ are bold."]
    for names_, what in ((lost, "unknown"), (assumed, "taken from the presets of that name")):
        if names_:
            which = few([*dict.fromkeys(names_)], between=" / ")
            lines.append(f"% Options of some settings are {what}: {which}".replace("\n", " "))
    for first in range(0, len(names), COLUMNS):
        part = slice(first, first + COLUMNS)
        own = names[part]
        head = _line(["option", *(_narrow(escaped(name)) for name in own)])
        lines += [f"\\begin{{longtable}}{{l{'r' * len(own)}}}", "\\toprule", head]
        lines += ["\\midrule", "\\endhead"]
        for key, values in told.items():
            cells = [escaped(value) for value in values[part]]
            name = f"\\texttt{{{escaped(key)}}}"
            if len(set(values)) > 1:
                name = f"\\textbf{{{name}}}"
                cells = [f"\\textbf{{{value}}}" for value in cells]
            lines.append(_line([name, *cells]))
        lines += ["\\bottomrule", "\\end{longtable}"]
    return "\n".join([*lines, ""])


_SECTIONS = ("ensemble", "encoder", "net", "loss", "optim", "replay", "explore", "env")


def _narrow(name: str) -> str:
    """A heading whose parts stand below each other."""
    return "\\shortstack{" + name.replace(", ", r" \\ ") + "}"


def _values(own: Sequence[Mapping[str, Any]], key: str) -> str:
    """The values of an option of one setting on all of its environments, as text."""
    values = {_word(value_of(options, key)): None for options in own if exists(options, key)}
    return ", ".join(values) if values else "--"


def _word(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "(" + ", ".join(map(_word, value)) + ")" if value else "none"
    return human(value)
