"""Numbers as people write them: read in files and on the command line, written in names."""

import itertools
import math
import random
from typing import Annotated, Literal

import pytest

from cerl import arguments, bench
from cerl.config import ConfigError, load, numbers
from cerl.config.form import overridden
from cerl.config.numbers import Numeric, human, number, numeric, values, whole


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("25k", 25_000), ("25K", 25_000), ("1.5M", 1_500_000), ("2G", 2_000_000_000)),
        *(("1.005k", 1005), ("0.29k", 290), ("-3k", -3000), ("1_000k", 1_000_000), (".5k", 500)),
        *(("25_000", 25_000), ("-2", -2), ("1e6", 1_000_000), ("2.0", 2), ("1e-4", 1e-4)),
        *(("0.0005k", 0.5), ("0.25", 0.25), ("1.", 1)),
    ],
)
def test_numbers_are_exact_and_whole_ones_are_ints(text, value):
    assert number(text) == value and type(number(text)) is type(value)


@pytest.mark.parametrize(
    "text", ["", "k", "x", "25q", "25 k", "25m", "1__0", "1e3k", "0..4", "inf", "0x1F", "1e99999"]
)
def test_other_texts_are_no_numbers(text):
    assert number(text) is None


def test_whole_numbers_have_no_exponent_and_a_point_only_before_a_unit():
    assert [whole(text) for text in ("400k", "400_000", "1.5M", "-2")] == [
        *(400_000, 400_000, 1_500_000, -2)
    ]
    assert [whole(text) for text in ("1e6", "2.0", "0.0005k", "x", "")] == [None] * 5


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2,5,10", [2, 5, 10]),
        ("25k, 100k", [25_000, 100_000]),
        ("0..4", [0, 1, 2, 3, 4]),
        ("-1..1,9", [-1, 0, 1, 9]),
        ("7..7", [7]),
        ("gru,fox", ["gru", "fox"]),
        ("true,false,null,None", [True, False, None, None]),
        ("[256,256],[512,512]", [(256, 256), (512, 512)]),
        ("[0..2],[],[[1,2],[3]]", [(0, 1, 2), (), ((1, 2), (3,))]),
        ("../mine.yaml", ["../mine.yaml"]),
        ("0.1,1e-4", [0.1, 1e-4]),
        ("none", ["none"]),
    ],
)
def test_lists_of_values(text, expected):
    assert values(text) == expected
    assert list(map(type, values(text))) == list(map(type, expected))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected values separated by commas, e.g. 2,5,10, got ''"),
        (" , ", "expected values separated by commas"),
        ("2,,5", "expected a value before and after every comma, got '2,,5'"),
        ("2,5,", "expected a value before and after every comma"),
        ("4..0", "expected a range that runs upwards, e.g. 0..4, got '4..0'"),
        ("0..10k", "expected a range of at most 10,000 numbers, got '0..10k'"),
        ("0..1.5", "expected a range of whole numbers"),
        ("[1,2", "expected brackets that open and close"),
        ("1,2]", "expected brackets that open and close"),
        ("[1][2]", "expected one list of brackets between commas, got '[1][2]'"),
        ("[" * 5_000 + "]" * 5_000, "expected brackets that open and close"),
        ("[1]2", "expected one list of brackets between commas"),
    ],
)
def test_lists_that_cannot_be_read_are_refused(text, message):
    with pytest.raises(ConfigError) as caught:
        values(text)
    assert message in str(caught.value)


def test_the_longest_range_is_allowed():
    assert values("1..10k") == list(range(1, 10_001))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((100_000, "100k"), (1_000_000, "1M"), (1_500_000, "1.5M"), (2 * 10**9, "2G")),
        *((1234, "1,234"), (12_345, "12,345"), (12_500, "12.5k"), (999, "999"), (0, "0")),
        *((-25_000, "-25k"), (1_001_000, "1,001,000"), (1_250_000, "1.25M")),
        *((0.25, "0.25"), (1e-4, "1e-4"), (2.5e-4, "2.5e-4"), (0.001, "0.001"), (1e6, "1M")),
        *((1.2e-7, "1.2e-7"), (math.inf, "inf"), (1e22, "1e+22"), (0.99, "0.99")),
        *((True, "on"), (False, "off"), (None, "none"), ("gru", "gru"), ("25k", "25k")),
        *(((256, 256), "256 x 256"), ([25_000], "25k"), ((), "none"), (((1, 2), 3), "(1 x 2) x 3")),
        *((("vote", "mean"), "vote + mean"), ({"slippery": False}, "slippery=off")),
    ],
)
def test_values_are_written_as_people_do(value, text):
    assert human(value) == text


def test_no_digit_that_tells_two_numbers_apart_is_lost():
    draw = random.Random(0)
    wholes = {*range(3_000), *(draw.randrange(10 ** draw.randrange(1, 14)) for _ in range(3_000))}
    wholes |= {value + step for value in (10**5, 10**6, 12 * 10**8) for step in range(-20, 21)}
    assert len({human(value) for value in wholes}) == len(wholes)
    for value in wholes:
        assert number(human(value).replace(",", "")) == value
    floats = {draw.random() * 10 ** draw.randrange(-9, 9) for _ in range(3_000)}
    for value in floats:
        assert float(number(human(value).replace(",", "")) or 0) == value, human(value)


def test_types_that_are_numbers():
    assert numeric(int) == Numeric(whole=True, many=False)
    assert numeric(float | None) == numeric(Annotated[float, "x"]) == Numeric(False, many=False)
    assert numeric(int | float) == Numeric(whole=False, many=False)
    assert numeric(tuple[int, ...]) == Numeric(whole=True, many=True)
    assert numeric(tuple[int, ...] | None) == Numeric(whole=True, many=True)
    for other in (
        tuple[int, ...] | int,
        str,
        bool,
        int | str,
        float | bool,
        Literal[1, 2],
        tuple[str, ...],
        None,
    ):
        assert numeric(other) is None


def test_files_may_write_numbers_with_units_and_ranges(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "base: minatar/cerl\nseeds: 0..4\nreplay: {capacity: 25k}\nschedule: {steps: 1.5M}\n"
        "net: {hidden: [1k]}\nenv: {observe: {indices: [0..2, 7], noise: 0.0005k}}\n"
        "loss: {gamma: 0.00095k}\n"
    )
    run = load(str(file))
    assert run.seeds == (0, 1, 2, 3, 4)
    assert (run.replay.capacity, run.schedule.steps) == (25_000, 1_500_000)
    assert (run.net.hidden, run.env.observe.indices) == ((1000,), (0, 1, 2, 7))
    assert (run.env.observe.noise, run.loss.gamma) == (0.5, 0.95)
    same = {"seeds": [0, 1, 2, 3, 4], "schedule.steps": 1_500_000, "replay.capacity": 25_000}
    plain = load("minatar/cerl", same)
    assert plain == load(
        "minatar/cerl", {"seeds": "0..4", "schedule.steps": "1.5M", "replay.capacity": "25k"}
    )


def test_options_that_are_texts_keep_them():
    run = load("atari/ddqn", {"env.name": "1M", "out": "25k"})
    assert (run.env.name, run.out) == ("1M", "25k")
    run = overridden("atari/ddqn", ["--env.name", "1M", "--out=25k"], prog="x")
    assert (run.env.name, run.out) == ("1M", "25k")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"schedule.steps": "25"}, "schedule.steps: expected a whole number, got '25'"),
        ({"schedule.steps": "0.0005k"}, "schedule.steps: expected a whole number, got '0.0005k'"),
        ({"schedule.steps": "25q"}, "schedule.steps: expected a whole number, got '25q'"),
        ({"schedule.steps": 25.5}, "schedule.steps: expected a whole number, got 25.5"),
        ({"schedule.steps": "0..4"}, "schedule.steps: expected a whole number, got '0..4'"),
        ({"schedule.steps": "99999999999G"}, "a whole number below 2**63"),
        ({"loss.gamma": "2k"}, "loss.gamma: expected less than or equal to 1, got 2000"),
        ({"seeds": "4..0"}, "seeds: expected a range that runs upwards, e.g. 0..4, got '4..0'"),
        ({"seeds": ["0..1.5"]}, "seeds: expected a range of whole numbers"),
        ({"seeds": "0..10000"}, "seeds: expected a range of at most 10,000 numbers"),
        ({"seeds": "5"}, "seeds: expected a list, e.g. [0, 1, 2], got '5'"),
        ({"env.observe.indices": "3..1"}, "env.observe.indices: expected a range that runs up"),
    ],
)
def test_all_else_is_as_strict_as_without_units(option, message):
    with pytest.raises(ConfigError) as caught:
        load("minatar/ddqn", option)
    assert message in str(caught.value)


def test_the_command_line_takes_numbers_with_units_and_ranges():
    line = "--seeds 0..2 9 --replay.capacity=25k --schedule.steps 1M --optim.lr 0.0001k"
    run = overridden("minatar/cerl", [*line.split(), "--log.no-save-replay"], prog="x")
    assert (run.seeds, run.replay.capacity) == ((0, 1, 2, 9), 25_000)
    assert (run.schedule.steps, run.optim.lr, run.log.save_replay) == (1_000_000, 0.1, False)
    assert overridden("minatar/cerl", ["--seeds=3..5"], prog="x").seeds == (3, 4, 5)
    off = overridden(
        "gym/cartpole", ["--env.observe.indices=0..1", "--explore.decay", "2k"], prog=""
    )
    assert (off.env.observe.indices, off.explore.decay) == ((0, 1), 2000)


@pytest.mark.parametrize("option", ["--seeds 4..0", "--seeds=4..0", "--seeds 1 4..0"])
def test_ranges_of_the_command_line_name_their_option(option):
    with pytest.raises(ConfigError) as caught:
        overridden("minatar/cerl", option.split(), prog="x")
    assert str(caught.value) == (
        "--seeds: expected a range that runs upwards, e.g. 0..4, got '4..0'"
    )


@pytest.mark.parametrize("value", ["0.0005k", "0..4", "25q", "1e6"])
def test_a_word_that_is_no_whole_number_is_shown_as_it_is_written(value, capsys):
    with pytest.raises(SystemExit):
        overridden("minatar/cerl", ["--schedule.steps", value], prog="x")
    out, err = capsys.readouterr()
    assert value in out + err and "--schedule.steps" in out + err


def test_resumed_runs_and_evaluations_take_them_too(tmp_path):
    run = load("minatar/cerl")
    found = arguments.changes(run, ["--schedule.steps", "20M"], folder=tmp_path)
    assert found == {"schedule.steps": 20_000_000}
    assert arguments.of_evaluation(run, ["--episodes", "1k"], prog="x") == {"episodes": 1000}


def test_counts_of_a_command_take_them_too():
    read = arguments.count("--until", "a number of agent steps").instance_from_str
    assert [read([text]) for text in ("400k", "20_000", "7")] == [400_000, 20_000, 7]
    for words in (["0"], ["0.5k0"], ["1e6"], ["-2k"], ["1", "2"], ["9" * 30], ["two"]):
        with pytest.raises(arguments.Unread, match="--until: expected a number of agent steps"):
            read(words)


def test_benchmarks_take_them_too(monkeypatch):
    seen = []

    def measure(*, games: int = 8, sizes: tuple[int, ...] = (), name: str = "") -> None:
        seen.append((games, sizes, name))

    monkeypatch.setattr("cerl.bench.runs.env", measure)
    bench.run("env", ["--games", "2k", "--sizes", "0..2", "--name", "1k"])
    assert seen == [(2000, (0, 1, 2), "1k")]


def test_numbers_of_a_list_may_have_commas_between_them():
    kinds = {"seeds": numbers.Numeric(whole=True, many=True)}

    def read(*words: str) -> list[str]:
        return numbers.words(words, kinds, keys=["seeds", *[""] * (len(words) - 1)])

    assert read("--seeds", "0,1,5..6") == read("--seeds=0,1,5..6") == read("--seeds", "0,", "1,5,6")
    assert read("--seeds", "0,1") == ["--seeds", "0", "1"]
    with pytest.raises(ConfigError, match="--seeds: expected a value before and after every comma"):
        read("--seeds", "0,,1")


def test_words_of_other_options_are_left_alone():
    kinds = {"a": numeric(int)}
    words = ["x", "1k", "--a", "1k", "--b", "1k", "--b=1k", "--a=2k", "--", "3k"]
    keys = ["", "", "a", "", "b", "", "b", "a", "", ""]
    found = numbers.words(words, {key: kind for key, kind in kinds.items() if kind}, keys=keys)
    assert found[:8] == ["x", "1k", "--a", "1000", "--b", "1k", "--b=1k", "--a=2000"]
    assert all(type(word) is str for word in itertools.chain(found))
