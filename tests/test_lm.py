"""Language models of `cerl bench lm`: corpus, measurements against loops, a run of a tiny model."""

import math

import pyarrow.parquet as pq
import pytest
import torch

from cerl import bench
from cerl.bench import lm, lm_corpus, lm_probes, lm_recall
from cerl.bench.lm_model import LanguageModel, Size, half_lives, watched, without_attention

CPU = torch.device("cpu")


@pytest.fixture
def texts(tmp_path):
    """A folder of five packages, with a file that is no text and one that occurs twice."""
    for number in range(5):
        package = tmp_path / f"package{number}"
        package.mkdir()
        for part in range(3):
            lines = [f"value_{number}_{part}_{line} = {line * number}\n" for line in range(40)]
            (package / f"part{part}.py").write_text("".join(lines))
        (package / "same.py").write_text("# the same in every package\n")
        (package / "picture.py").write_bytes(b"\xff\xfe\0\1")
    return tmp_path


def test_a_corpus_is_the_same_every_time_and_holds_out_whole_packages(texts):
    first, second = lm_corpus.load(texts), lm_corpus.load(texts)
    assert first.digest == second.digest and torch.equal(first.train, second.train)
    assert first.packages and {d.package for d in first.held_out} == set(first.packages)
    content = bytes(first.train.tolist())
    for document in first.held_out:
        assert document.content not in content or document.name.endswith("same.py")
    assert first.documents == content.count(lm_corpus.SEPARATOR)
    names = {d.name.partition("/")[2] for d in first.held_out}
    assert "picture.py" not in names and {"part0.py", "part1.py", "part2.py"} <= names
    (texts / "package0" / "part0.py").write_text("another text\n")
    assert lm_corpus.load(texts).digest != first.digest


def test_too_few_texts_are_refused(tmp_path):
    with pytest.raises(ValueError, match="expected a folder with texts, got .*nowhere"):
        lm_corpus.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="at least two packages.* got 0"):
        lm_corpus.load(tmp_path)
    stream = torch.zeros(10, dtype=torch.uint8)
    with pytest.raises(ValueError, match="--length: expected less than the 10 bytes"):
        lm_corpus.Batches(stream, length=16, rows=1, device=CPU)


def test_rows_of_a_batch_are_consecutive_bytes_and_depend_on_the_number_alone():
    stream = (torch.arange(1000) % 251).to(torch.uint8)
    batches = lm_corpus.Batches(stream, length=20, rows=6, device=CPU, seed=3)
    rows = batches.batch(7)
    assert rows.shape == (6, 21) and torch.equal(rows, batches.batch(7))
    assert ((rows[:, 1:] - rows[:, :-1]) % 251 == 1).all()
    assert not torch.equal(rows, batches.batch(8))


def test_half_lives_equal_a_loop():
    torch.manual_seed(0)
    log_f = -torch.rand(2, 30, 3) * torch.tensor([0.01, 0.2, 3.0])
    found = half_lives(log_f)
    for b in range(2):
        for t in range(30):
            for h in range(3):
                decay, steps = 0.0, 0
                while decay > -math.log(2.0) and steps < t:
                    decay += float(log_f[b, t - steps, h])
                    steps += 1
                expected = steps if decay <= -math.log(2.0) else math.inf
                assert float(found[b, t, h]) == expected, (b, t, h)


def test_a_hidden_number_stands_at_its_depth_and_at_the_end():
    content = b"one line of text\n" * 40
    for depth in lm_probes.DEPTHS:
        text = lm_probes.with_pass_key(content, b"12345", length=400, depth=depth)
        assert len(text) == 400 and text.endswith(b"assert PASS_KEY == 12345")
        assert text.count(b"12345") == 2
        before = text.index(b"\nPASS_KEY = ")  # of the other 357 bytes, cut at the end of a line
        assert depth * 357 - 17 <= before <= depth * 357


def test_every_question_of_recall_has_its_answer_among_the_pairs():
    tokens, asked = lm_recall.sequences(20, 6, 64, seed=1, device=CPU)
    assert tokens.shape == asked.shape == (20, 65) and (asked.sum(1) == 6).all()
    for row, marks in zip(tokens.tolist(), asked.tolist(), strict=True):
        pairs = dict(zip(row[:12:2], row[1:12:2], strict=True))
        assert len(pairs) == 6 and all(key < lm_recall.KEYS for key in pairs)
        places = [place for place, mark in enumerate(marks) if mark]
        assert {row[place - 1] for place in places} == set(pairs)
        assert all(row[place] == pairs[row[place - 1]] for place in places)
        assert min(places) > 12
    with pytest.raises(ValueError, match="--pairs: expected 1 to 128"):
        lm_recall.lm_recall(pairs=(100,), length=64)


def test_the_learning_rate_rises_and_falls():
    rates = [lm.schedule(share / 100) for share in range(101)]
    top = rates.index(max(rates))
    assert rates[0] == 0.0 and max(rates) == 1.0 and rates[-1] == pytest.approx(lm.FLOOR)
    assert rates == sorted(rates[:top]) + sorted(rates[top:], reverse=True)


@pytest.mark.parametrize(
    "kind", ["fox-pro", "fox-llama", "transformer", "transformer-pro", "fixed"]
)
def test_a_byte_does_not_see_later_ones(kind):
    model = LanguageModel(kind, Size(2, 32, 2), length=24, precision="fp32")
    tokens = torch.randint(256, (2, 24), generator=torch.Generator().manual_seed(0))
    other = tokens.clone()
    other[:, 12:] = (other[:, 12:] + 1) % 256
    with torch.no_grad():
        a, b = model(tokens), model(other)
    assert torch.equal(a[:, :12], b[:, :12]) and not torch.equal(a[:, 12:], b[:, 12:])


def test_attention_is_watched_and_replaced_only_within_its_context():
    model = LanguageModel("fox-pro", Size(2, 32, 2), length=24, precision="fp32")
    tokens = torch.randint(256, (1, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(tokens)
        with watched() as seen:
            assert torch.equal(model(tokens), before)
        with without_attention():
            assert not torch.equal(model(tokens), before)
        assert torch.equal(model(tokens), before)
    assert [part.log_f.shape for part in seen] == [(1, 24, 2)] * 2


@pytest.mark.slow
def test_a_tiny_model_learns_and_writes_rows_and_a_figure(texts, tmp_path, capsys):
    folder = tmp_path / "out"
    words = (
        "--kinds fox-pro transformer --pruning off static --size tiny --length 64 --tokens 40000"
    )
    words += " --update-tokens 1024 --micro-tokens 512 --precision fp32 --device cpu --points 2"
    words += f" --repeats 1 --tries 2 --texts {texts} --folder {folder}"
    bench.run("lm", words.split())
    rows = pq.read_table(folder / "rows.parquet").to_pylist()
    models = {(row["kind"], row["pruning"]) for row in rows}
    assert models == {("fox-pro", "off"), ("fox-pro", "static"), ("transformer", "off")}
    for kind, pruning in models:
        losses = [
            row["value"]
            for row in rows
            if (row["kind"], row["pruning"], row["what"]) == (kind, pruning, "held-out")
        ]
        assert losses[-1] < losses[0] - 1.0
    assert {row["what"] for row in rows} <= set(lm.WHATS)
    assert (folder / "lm-tiny-64.png").is_file()
    assert "held-out documents have at least 4 x 64 bytes" in capsys.readouterr().out
    # A second command keeps what is there.
    bench.run("lm", [*words.replace("fox-pro transformer", "fox-llama").split()])
    again = {row["kind"] for row in pq.read_table(folder / "rows.parquet").to_pylist()}
    assert again == {"fox-pro", "transformer", "fox-llama"}
