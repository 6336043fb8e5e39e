"""The cells of a study: a checked config for each environment, preset and point of the grid.

Options come in layers, each over those before it: a preset's, the study's, the preset's own in the
study, the values of the point, and the words of the command line.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from cerl.config import Config, ConfigError, errors, lists, preset
from cerl.config.effects import section_of
from cerl.config.form import key_of, stated
from cerl.config.load import options, settled, validated
from cerl.record.results import config_hash
from cerl.sweep.grid import (
    Axes,
    Axis,
    check_option,
    holders,
    in_words,
    is_text,
    points,
    refuse_repeated,
    takes_several,
)
from cerl.sweep.study import Part, Study
from cerl.sweep.study import stray as stray

Note = Callable[[str], None]  # is called with a sentence for the user


class Cell(NamedTuple):
    """A cell of a study; its runs differ in their seeds only."""

    config: Config  # with all seeds of the study
    varied: dict[str, Any]  # the values of the axes that apply to this cell, by dotted key


def cells(
    studies: Study | Sequence[Study],
    *,
    words: Sequence[str] = (),
    envs: Sequence[str] = (),
    grid: Sequence[Axes] = (),
    note: Note | None = None,
) -> list[Cell]:
    """The cells of one study or several: environments outermost, then presets, then grid points.

    Cells that train alike are one cell. Axes over `ensemble` leave presets with one member alone,
    unless they are given for that preset.

    Args:   words, options of the command line for every run; envs, environments or names of lists
            of them, in place of the studies'; grid, groups of the command line, in addition to the
            studies' and in place of those over the same option; note is called with sentences.
    Raises: ConfigError that lists all contradictory cells, unless their study skips these;
            SystemExit if tyro cannot read an option.
    """
    studies = [studies] if isinstance(studies, Study) else list(studies)
    notes = _Notes()
    refuse_repeated(grid, where="--grid and --zip")
    _refuse_words(words, grid, envs)
    rows = [
        _Row(study, part, words, envs, grid, notes) for study in studies for part in study.presets
    ]
    _refuse_prefixes(grid, rows)
    _refuse_unused(grid, rows)
    found: dict[str, Cell] = {}
    refused = _Refused()
    count = 0
    for env in dict.fromkeys(env for row in rows for env in row.envs):
        for row in (row for row in rows if env in row.envs):
            for point in row.points:
                count += 1
                try:
                    cell = row.cell(env, point)
                except ConfigError as error:
                    refused.add(row, env, point, str(error))
                    continue
                _add(found, cell, notes)
    refused.settle(notes, left=len(found))
    if note is not None:
        for sentence in notes.sentences(count):
            note(sentence)
    return list(found.values())


def _add(found: dict[str, Cell], cell: Cell, notes: "_Notes") -> None:
    """Adds a cell. One that trains like an earlier one is joined with it: the cell then has the
    seeds of both, and the larger number of steps."""
    key = config_hash(cell.config)
    other = found.get(key)
    if other is None:
        found[key] = cell
        return
    notes.alike.append(
        f"{_title(cell.config, cell.varied)} trains like {_title(other.config, other.varied)}"
    )
    schedule = max(cell.config.schedule, other.config.schedule, key=lambda part: part.steps)
    seeds = tuple(dict.fromkeys([*other.config.seeds, *cell.config.seeds]))
    changes = {"schedule": schedule, "seeds": seeds}
    found[key] = other._replace(config=other.config.model_copy(update=changes))


class _Notes:
    """Sentences for the user, each with the number of cells that it is about."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}  # of sentences about cells
        self.once: dict[str, None] = {}  # sentences about the whole sweep, in order
        self.alike: list[str] = []

    def sentences(self, cells: int) -> Iterator[str]:
        """All sentences. Args: cells, how many there are in all."""
        yield from self.once
        for text, count in self.counts.items():
            yield text if count == cells else f"{text} (in {count} of {cells} cells)"
        if len(self.alike) == 1:
            yield f"{self.alike[0]}, so the two are one cell"
        elif self.alike:
            count = len(self.alike)
            yield f"{count} cells train like others and are left out, e.g. {self.alike[0]}"


class _Refused:
    """Contradictory cells. Cells that differ only in their environment share a line."""

    def __init__(self) -> None:
        self.envs: dict[tuple[str, bool], list[str]] = {}

    def add(self, row: "_Row", env: str, point: Mapping[str, Any], text: str) -> None:
        told = f"{row.name}{_with(point)}"
        plain = "; ".join(line.removeprefix(f"{row.name}: ") for line in text.split("\n"))
        self.envs.setdefault((f"{told}: {plain}", row.skips), []).append(env)

    def settle(self, notes: _Notes, *, left: int) -> None:
        """Notes the cells that are left out. Raises: ConfigError if others are refused, or if no
        cell is left."""
        lines = [(self._line(text, envs), skip) for (text, skip), envs in self.envs.items()]
        refused = [line for line, skip in lines if not skip or not left]
        if refused:
            count = sum(len(envs) for (_, skip), envs in self.envs.items() if not skip or not left)
            if count == 1:
                raise ConfigError(refused[0])
            advice = ["A study leaves such cells out with `skip: contradictions`."] if left else []
            head = f"{count} cells cannot be trained:"
            raise ConfigError("\n".join([head, *refused, *advice]))
        for line, _ in lines:
            notes.once[f"left out: {line}"] = None

    @staticmethod
    def _line(text: str, envs: Sequence[str]) -> str:
        names = [env for env in envs if env]
        if not names:
            return text
        where = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} other tasks"
        return f"{text} (env.name {where})"


class _Row:
    """A preset of a study with all that is the same in its cells."""

    def __init__(
        self,
        study: Study,
        part: Part,
        words: Sequence[str],
        envs: Sequence[str],
        grid: Sequence[Axes],
        notes: _Notes,
    ) -> None:
        self.name, self.words, self.notes = part.preset, list(words), notes
        self.names = {self.name, preset.title(self.name)}  # what the command line may call it
        self.skips = study.skip == "contradictions"
        own = preset.nested(part.options)
        changes = preset.merged(preset.nested(study.options), own)
        if study.seeds:
            changes = preset.merged({"seeds": list(study.seeds)}, changes)
        self.base, _ = settled(options(self.name), changes, name=self.name)
        self.given: dict[tuple[str, ...], dict[str, Any]] = {}
        self.keys = {key for word in words if (key := key_of(word))}
        self.envs = self._environments(envs or self._stated_envs(study, part))
        fixed = dict(preset.leaves(own)).keys()
        groups = self._groups(study, part, grid, fixed=fixed)
        self.single = self._members() == 1
        self.left_alone: set[str] = set()  # options of axes that do not apply to one member
        self.points = points(self._fitting(groups))

    def _stated_envs(self, study: Study, part: Part) -> Sequence[str]:
        """The environments of the study, unless the command line names one."""
        return () if "env.name" in self.keys else part.envs or study.envs

    def _environments(self, envs: Sequence[str]) -> list[str]:
        """Names of environments; "" stands for the preset's own."""
        family = preset.at(self.base, "env.family")
        others = {*preset.studies(), *preset.presets()}
        if wrong := [word for word in envs if word in others]:
            raise ConfigError(
                f"--envs: expected environments or lists of them, got {wrong[0]!r}, a preset or "
                f"study; these come first: cerl sweep {wrong[0]} ..."
            )
        return lists.expanded(envs, family=str(family)) if envs else [""]

    def _groups(self, study: Study, part: Part, grid: Sequence[Axes], *, fixed: Any) -> list[Axes]:
        """The groups of this preset: those of the study, of the preset in it, and of the command
        line, each without the options that a later one of these gives."""
        own = [group._replace(preset=self.name) for group in part.groups()]
        special = [group for group in grid if group.preset in self.names]
        common = [group for group in grid if not group.preset]
        shared = _without(study.groups(), {*fixed, *_options([*own, *special, *common])})
        own = _without(own, _options([*special, *common]))
        common = _without(common, _options(special))
        for axis in (axis for group in [*shared, *own] for axis in group.axes):
            if axis.option in self.keys:
                text = f"--{axis.option}: one value for every run, in place of {in_words(axis)}"
                self.notes.once[text] = None
        shared, own = _without(shared, self.keys), _without(own, self.keys)
        return [*shared, *own, *common, *special]

    def _members(self) -> int:
        """Members of the ensemble, without the values of axes."""
        try:
            found = preset.merged(self.base, preset.nested(self._stated({})))
        except ConfigError:  # e.g. an option that only exists for values of an axis
            found = self.base
        members = preset.at(found, "ensemble.members")
        return 1 if members is None else members

    def _fitting(self, groups: Sequence[Axes]) -> list[Axes]:
        """The groups without axes over `ensemble` where these do not apply to a single agent."""
        if not self.single:
            return list(groups)
        named = _options([group for group in groups if group.preset])
        self.left_alone = {
            option
            for option in _options([group for group in groups if not group.preset])
            if option.startswith("ensemble.") and option not in named
        }
        for option in sorted(self.left_alone):
            text = (
                f"{self.name} has one member, so the axis {option} leaves it as it is "
                f"(--grid {self.name}:{option}=VALUES would vary it)"
            )
            self.notes.once[text] = None
        return _without(groups, self.left_alone)

    def _stated(self, point: Mapping[str, Any]) -> dict[str, Any]:
        """The values that the command line gives, read once for all points of the same kinds."""
        if not self.words:
            return {}
        kinds = {
            key: value
            for section, union in preset.UNIONS.items()
            if (key := f"{section}.{union.key}") in point
            for value in [point[key]]
        }
        known = tuple(f"{key}={value}" for key, value in kinds.items())
        if known not in self.given:
            tree = preset.merged(self.base, preset.nested(kinds))
            prog = f"cerl sweep {self.name}"
            self.given[known] = stated(tree, self.words, name=self.name, prog=prog)
        return self.given[known]

    def cell(self, env: str, point: Mapping[str, Any]) -> Cell:
        """One cell. Raises: ConfigError if it is contradictory."""
        values = {key: list(x) if isinstance(x, tuple) else x for key, x in point.items()}
        top = {**values, **self._stated(point), **({"env.name": env} if env else {})}
        found, sentences = settled(self.base, preset.nested(top), name=self.name)
        config = validated(found, where=self.name)
        for sentence in sentences:
            self.notes.counts[sentence] = self.notes.counts.get(sentence, 0) + 1
        return Cell(config, {key: _value(config, key) for key in point})


def _value(config: Config, option: str) -> Any:
    """The value of an option in a config."""
    section, name = section_of(config, option)
    return getattr(section, name)


def _options(groups: Sequence[Axes]) -> set[str]:
    return {axis.option for group in groups for axis in group.axes}


def _without(groups: Sequence[Axes], options: set[str]) -> list[Axes]:
    """The groups without axes over some options, and without groups that then have no axis."""
    kept = [
        group._replace(axes=tuple(axis for axis in group.axes if axis.option not in options))
        for group in groups
    ]
    return [group for group in kept if group.axes]


def _title(config: Config, point: Mapping[str, Any]) -> str:
    """A cell for messages."""
    return f"{config.preset} on {config.env.name}{_with(point)}"


def _with(point: Mapping[str, Any]) -> str:
    """The values of a point for messages, as words of the command line."""
    words = ", ".join(in_words(Axis(key, (value,))) for key, value in point.items())
    return f" with {words}" if words else ""


def _refuse_words(words: Sequence[str], grid: Sequence[Axes], envs: Sequence[str]) -> None:
    """Raises: ConfigError for options of the command line that were meant as a grid, or that are
    given twice."""
    for place, word in enumerate(words):
        key, equals, text = word.partition("=")
        key = key_of(key)
        if not key or not holders(key) or takes_several(key):
            continue
        values = [text] if equals else []
        for after in words[place + 1 :]:
            if after.startswith("-") and not after[1:2].isdigit():
                break
            values.append(after)
        listed = len(values) > 1 or any("," in x or ".." in x for x in values if not is_text(key))
        listed = listed or (key == "env.name" and any("," in value for value in values))
        if listed and key == "env.name":
            raise ConfigError(
                f"--env.name: expected one environment, got {' '.join(values)}; did you mean "
                f"--envs {' '.join(values).replace(',', ' ')}?"
            )
        if listed:
            check_option(key, where=f"--{key} {' '.join(values)}")
            raise ConfigError(
                f"--{key}: expected one value for every run, got {' '.join(values)}; did you mean "
                f"--grid {key}={','.join(values)}?"
            )
    keys = {key_of(word) for word in words}
    if both := sorted(keys & _options(grid)):
        raise ConfigError(f"{both[0]}: expected --{both[0]} or an axis of --grid, got both")
    if envs and "env.name" in keys:
        raise ConfigError("expected --envs or --env.name, got both")


def _refuse_prefixes(grid: Sequence[Axes], rows: Sequence[_Row]) -> None:
    """Raises: ConfigError if a group of the command line is for a preset that is not trained."""
    names = list(dict.fromkeys(row.name for row in rows))
    for group in grid:
        if group.preset and not any(group.preset in row.names for row in rows):
            raise ConfigError(
                f"--grid {group.preset}:{in_words(group.axes[0])}: {group.preset!r} is none of the "
                f"presets ({', '.join(names)}){errors.nearest(group.preset, names)}"
            )


def _refuse_unused(grid: Sequence[Axes], rows: Sequence[_Row]) -> None:
    """Raises: ConfigError if an axis of the command line leaves every preset as it is."""
    for axis in (axis for group in grid if not group.preset for axis in group.axes):
        if all(axis.option in row.left_alone for row in rows):
            raise ConfigError(
                f"--grid {in_words(axis)}: every preset has one member, and an axis over ensemble "
                "leaves single agents as they are; expected a preset with an ensemble, or the axis "
                f"for one preset: --grid {rows[0].name}:{in_words(axis)}"
            )
