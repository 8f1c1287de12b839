"""Held-out text of local files: little text and large documents are cut, all else is as ever."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import tiktoken

from app.data.dataset import open_dataset
from app.data.manifest import Manifest
from app.errors import UserError
from app.prepare.pipeline import prepare
from app.prepare.spec import DatasetSpec, TextSource
from tests.prepare.conftest import shards_in
from tests.prepare.test_prepare import TEXTS, expected_shards, write_texts

SEQUENCE = 33
VERSES = "".join(f"Verse {n}\nof {n % 7} lines\nand words: {n * n}\n\n" for n in range(400))


def prepared(
    source: Path | str,
    folder: Path,
    *,
    val_tokens: int = 1_048_576,
    sequence_tokens: int = SEQUENCE,
    shard_size: int = 100_000_000,
    total_tokens: int | None = None,
    workers: int = 1,
) -> Manifest:
    text = TextSource(str(source), shuffle_files=False)
    sizes = DatasetSpec(text, "text", total_tokens, val_tokens, shard_size, 0, sequence_tokens)
    return prepare(sizes, folder, workers=workers)


def texts_in(folder: Path, gpt2: tiktoken.Encoding) -> tuple[list[str], list[str]]:
    """Return the documents that are held out, and those that are trained on."""
    dataset = open_dataset(folder)
    val, train = (
        gpt2.decode([token for shard in shards for token in shard[:].tolist()])
        for shards in (dataset.val, dataset.train)
    )
    return val.split("<|endoftext|>")[1:], train.split("<|endoftext|>")[1:]


def test_a_single_file_is_cut_at_a_paragraph_and_nothing_is_lost(
    gpt2: tiktoken.Encoding, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "verses.txt").write_text(VERSES)
    manifest = prepared(tmp_path / "verses.txt", tmp_path / "out")
    (val,), (train,) = texts_in(tmp_path / "out", gpt2)
    assert val + train == VERSES
    assert val.endswith("\n\n")
    assert train.startswith("Verse ")
    assert 0.04 < len(val) / len(VERSES) <= 0.05
    assert manifest.settings["val_tokens"] == 1_048_576
    assert manifest.counts == {"documents": 2}
    tokens = len(gpt2.encode_ordinary(val)) + 1
    assert manifest.tokens("val") == tokens
    assert capsys.readouterr().out.startswith(
        f"held out: the first 5 % of the text, up to a blank line in verses.txt; {tokens} tokens\n"
    )


@pytest.mark.parametrize(
    ("text", "end"),
    (
        (VERSES.replace("\n\n", "\r\n \r\n"), r"\r\n \r\n$"),
        (VERSES.replace("\n\n", "\n"), r"\d\n$"),
        (VERSES.replace("\n", " "), r" $"),
        ("".join(chr(0x4E00 + n * 7 % 9000) for n in range(9000)), r".$"),
    ),
    ids=("blank line", "line end", "space", "character"),
)
def test_without_a_blank_line_it_is_cut_at_a_line_a_space_or_a_character(
    text: str, end: str, gpt2: tiktoken.Encoding, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text(text, newline="")
    prepared(tmp_path / "a.txt", tmp_path / "out")
    (val,), (train,) = texts_in(tmp_path / "out", gpt2)
    assert val + train == text
    assert re.search(end, val)
    assert 0.02 < len(val) / len(text) <= 0.05


@pytest.mark.parametrize("encoding", ("utf-16", "utf-32", "utf-8-sig"))
def test_the_share_is_of_the_text_not_of_its_encoding(
    encoding: str, gpt2: tiktoken.Encoding, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text(VERSES, encoding=encoding)
    prepared(tmp_path / "a.txt", tmp_path / "out")
    (val,), (train,) = texts_in(tmp_path / "out", gpt2)
    assert val + train == VERSES
    assert 0.04 < len(val) / len(VERSES) <= 0.05


def test_a_heading_alone_is_not_all_that_is_held_out(
    gpt2: tiktoken.Encoding, tmp_path: Path
) -> None:
    """The only blank line is the one below the title."""
    text = "Title\n\n" + "one line of this long text\n" * 1000
    (tmp_path / "a.md").write_text(text)
    prepared(tmp_path / "a.md", tmp_path / "out")
    (val,), (train,) = texts_in(tmp_path / "out", gpt2)
    assert val + train == text
    assert len(val) > 0.045 * len(text)


def test_of_few_files_the_second_is_cut_and_small_ones_stay_whole(
    gpt2: tiktoken.Encoding, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    for name, text in (("a.txt", VERSES[:200]), ("b.txt", VERSES[200:])):
        (tmp_path / "in" / name).write_text(text)
    prepared(tmp_path / "in", tmp_path / "out")
    val, train = texts_in(tmp_path / "out", gpt2)
    assert "".join(val + train) == VERSES
    assert (len(val), len(train)) == (2, 1)
    (tmp_path / "in" / "a.txt").write_text(VERSES[:600])
    (tmp_path / "in" / "b.txt").write_text(VERSES[600:])
    prepared(tmp_path / "in", tmp_path / "whole")
    assert texts_in(tmp_path / "whole", gpt2) == ([VERSES[:600]], [VERSES[600:]])
    assert "up to the beginning of b.txt; " in capsys.readouterr().out


@pytest.mark.parametrize("val_tokens", (100, 500))
def test_set_tokens_are_held_out_and_only_a_large_text_file_is_cut(
    val_tokens: int, gpt2: tiktoken.Encoding, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text(VERSES)
    manifest = prepared(
        tmp_path / "a.txt", tmp_path / "out", val_tokens=val_tokens, sequence_tokens=0
    )
    (val,), (train,) = texts_in(tmp_path / "out", gpt2)
    assert val + train == VERSES
    assert val.endswith("\n\n")
    assert val_tokens * 0.9 < manifest.tokens("val") <= val_tokens + 1


@pytest.mark.parametrize("sequence_tokens", (0, SEQUENCE))
def test_much_text_of_many_documents_is_divided_as_without_cutting(
    sequence_tokens: int, gpt2: tiktoken.Encoding, tmp_path: Path
) -> None:
    texts = [f"{number} {TEXTS[number % 30]}" for number in range(1500)]
    documents = [[50256, *gpt2.encode_ordinary(text)] for text in texts]
    source = write_texts(tmp_path / "a.jsonl", texts)
    prepared(source, tmp_path / "out", val_tokens=300, sequence_tokens=sequence_tokens)
    assert shards_in(tmp_path / "out") == expected_shards(documents, None, 300, 100_000_000)


def test_workers_and_shards_change_no_token(gpt2: tiktoken.Encoding, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(VERSES)
    prepared(tmp_path / "a.txt", tmp_path / "whole")
    for workers, size in ((2, 100), (1, 257), (3, 4000)):
        prepared(tmp_path / "a.txt", tmp_path / str(size), workers=workers, shard_size=size)
        assert texts_in(tmp_path / str(size), gpt2) == texts_in(tmp_path / "whole", gpt2)


@pytest.mark.parametrize("shard_size", (150, 1000, 5000))
def test_a_stopped_dataset_keeps_its_cut_although_later_files_have_grown(
    shard_size: int, gpt2: tiktoken.Encoding, tmp_path: Path
) -> None:
    """The first file is cut; the second stops prepare, in the middle of the first one's shards."""
    source, mended = tmp_path / "in", '{"text": "mended"}\n'
    source.mkdir()
    (source / "a.txt").write_text(VERSES)
    (source / "b.jsonl").write_text(mended)
    unbroken = prepared(source, tmp_path / "unbroken", shard_size=shard_size)
    (source / "b.jsonl").write_text(mended.replace('"}', '" '))
    with pytest.raises(UserError, match="is not JSON"):
        prepared(source, tmp_path / "out", shard_size=shard_size)
    stopped = Manifest.load(tmp_path / "out")
    assert stopped is not None
    assert stopped.position is not None
    assert stopped.position["token"] > 0
    (source / "b.jsonl").write_text(mended)
    resumed = prepared(source, tmp_path / "out", shard_size=shard_size)
    assert shards_in(tmp_path / "out") == shards_in(tmp_path / "unbroken")
    assert resumed == unbroken

    (source / "b.jsonl").write_text("{broken}\n" * 9000)
    with pytest.raises(UserError, match="is not JSON"):
        prepared(source, tmp_path / "grown", shard_size=shard_size)
    begun = Manifest.load(tmp_path / "grown")
    assert begun is not None
    (source / "b.jsonl").write_text(mended)
    resumed = prepared(source, tmp_path / "grown", shard_size=shard_size)
    assert resumed.tokens("val") == begun.tokens("val") > unbroken.tokens("val")
    val, train = texts_in(tmp_path / "grown", gpt2)
    assert "".join(val + train) == VERSES + "mended"


def test_the_file_in_the_place_of_a_removed_one_is_not_cut(
    gpt2: tiktoken.Encoding, tmp_path: Path
) -> None:
    source, two = tmp_path / "in", f"one<|endoftext|>{VERSES}"
    source.mkdir()
    (source / "a.txt").write_text(two)
    (source / "b.jsonl").write_text("{broken\n")
    with pytest.raises(UserError, match="is not JSON"):
        prepared(source, tmp_path / "out", shard_size=1000)
    for name in ("a.txt", "b.jsonl"):
        (source / name).unlink()
    (source / "c.txt").write_text(two)
    prepared(source, tmp_path / "out", shard_size=1000)
    val, train = texts_in(tmp_path / "out", gpt2)
    assert val[0] == "one"
    assert VERSES.startswith(val[1] + train[0])
    assert train[1:] == ["one", VERSES]


@pytest.mark.parametrize("text", ("", "few words\n" * 30))
def test_too_little_text_is_refused_with_what_would_do(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(UserError) as raised:
        prepared(tmp_path / "a.txt", tmp_path / "out", sequence_tokens=257)
    count = 91 if text else 0
    assert (
        f"has only {count} tokens: to train on some and hold some out, about 1,028 are needed"
        in (raised.value.problem)
    )
    assert ("set MODEL_CONTEXT_LENGTH=16" in raised.value.fix) is bool(text)
    assert "PREPARE_VAL_TOKENS=0" in raised.value.fix
    assert not (tmp_path / "out").exists() or not shards_in(tmp_path / "out")


@pytest.mark.parametrize("verses", (20, 40, 100))
def test_little_text_holds_out_one_sequence_at_least(
    verses: int, gpt2: tiktoken.Encoding, tmp_path: Path
) -> None:
    text = "".join(VERSES.partition(f"Verse {verses}\n")[0])
    (tmp_path / "a.txt").write_text(text)
    manifest = prepared(tmp_path / "a.txt", tmp_path / "out")
    assert SEQUENCE <= manifest.tokens("val") <= max(3 * SEQUENCE, manifest.tokens("train") / 15)
    assert manifest.tokens("train") >= SEQUENCE
    (val,), (train,) = texts_in(tmp_path / "out", gpt2)
    assert val + train == text


def test_the_automatic_share_is_not_that_number_of_tokens(tmp_path: Path) -> None:
    text, folder = tmp_path / "verses.txt", tmp_path / "out"
    text.write_text(VERSES)
    before = prepared(text, folder)
    assert prepared(text, folder) == before
    with pytest.raises(UserError, match="held_out was 'auto' and is now None"):
        prepared(text, folder, sequence_tokens=0)
    # As earlier versions have written it.
    settings = {name: value for name, value in before.settings.items() if name != "held_out"}
    replace(before, settings=settings).save(folder)
    for sequence_tokens in (0, 33):
        assert prepared(text, folder, sequence_tokens=sequence_tokens).shards == before.shards
