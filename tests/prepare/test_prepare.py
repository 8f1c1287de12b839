import json
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiktoken

from app.data.dataset import open_dataset
from app.data.manifest import Manifest
from app.errors import UserError
from app.prepare.pipeline import prepare
from app.prepare.spec import DatasetSpec, TextSource
from app.progress import TokenProgress, progress_line
from tests.prepare.conftest import Start, shards_in, write_shard

END_OF_TEXT = 50256
STORY = "the cat sat on a mat and it rained in Spain: 3 times 7 é 😀"
WORDS = STORY.split(" ")
TEXTS = [
    *(" ".join(WORDS[n % 7 :: n % 3 + 1] * (n % 5 + 1)) for n in range(30)),
    "one long document " * 120,
    *(f"# {n}\n" + " ".join(WORDS[: n % 11 + 1]) for n in range(40)),
]


def write_texts(path: Path, texts: Iterable[str] = TEXTS) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def prepared(
    source: Path | str,
    folder: Path,
    *,
    workers: int = 1,
    text_column: str = "text",
    shuffle_files: bool = True,
    **sizes: Any,
) -> Manifest:
    text = TextSource(str(source), text_column=text_column, shuffle_files=shuffle_files)
    return prepare(DatasetSpec(text, "text", **sizes), folder, workers=workers)


def shard(tokens: list[int]) -> bytes:
    header = struct.pack("<3i", 20240520, 1, len(tokens)) + bytes(1012)
    return header + struct.pack(f"<{len(tokens)}H", *tokens)


def expected_shards(
    documents: list[list[int]], total: int | None, val: int, shard_size: int
) -> dict[str, bytes]:
    """The whole definition, on lists: hold out, drop the rest of that document, cut."""
    remaining, held_out = list(documents), list[int]()
    while val and len(held_out) < val + 1:
        held_out += remaining.pop(0)
    streams = {
        "text_val": held_out[: val + 1],
        "text": [token for document in remaining for token in document][:total],
    }
    return {
        f"{name}_{index:06d}.bin": shard(tokens[index * shard_size : (index + 1) * shard_size])
        for name, tokens in streams.items()
        for index in range(-(-len(tokens) // shard_size))
    }


@pytest.fixture(scope="module")
def documents(gpt2: tiktoken.Encoding) -> list[list[int]]:
    """The tokens of each of TEXTS."""
    return [[END_OF_TEXT, *gpt2.encode_ordinary(text)] for text in TEXTS]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_texts(tmp_path / "source.jsonl")


def total_of(documents: list[list[int]]) -> int:
    return sum(map(len, documents))


@pytest.mark.parametrize("shard_size", (100, 256, 1000, 100_000))
@pytest.mark.parametrize("total", (1, 100, 1024, 1100, None))
def test_training_shards_equal_the_definition(
    source: Path, documents: list[list[int]], tmp_path: Path, total: int | None, shard_size: int
) -> None:
    prepared(source, tmp_path / "out", total_tokens=total, shard_size=shard_size)
    assert shards_in(tmp_path / "out") == expected_shards(documents, total, 0, shard_size)


@pytest.mark.parametrize("workers", (1, 2, 4))
@pytest.mark.parametrize(
    ("val", "total", "shard_size"),
    ((1, 50, 60), (99, 300, 100), (100, 300, 100), (500, None, 128), (1100, 700, 10_000)),
)
def test_held_out_tokens_come_first_and_training_begins_with_the_next_document(
    source: Path,
    documents: list[list[int]],
    tmp_path: Path,
    val: int,
    total: int | None,
    shard_size: int,
    workers: int,
) -> None:
    manifest = prepared(
        source,
        tmp_path / "out",
        total_tokens=total,
        val_tokens=val,
        shard_size=shard_size,
        workers=workers,
    )
    assert manifest.tokens("val") == val + 1
    assert shards_in(tmp_path / "out") == expected_shards(documents, total, val, shard_size)


def test_a_document_spans_shards_and_limits(
    documents: list[list[int]],
) -> None:
    begin = total_of(documents[:30])
    assert begin < 1100 < begin + len(documents[30])
    assert len(documents[30]) > 256
    assert total_of(documents) % 100


def test_held_out_tokens_that_end_with_a_document_drop_nothing(
    source: Path, documents: list[list[int]], tmp_path: Path
) -> None:
    val = total_of(documents[:3]) - 1
    prepared(source, tmp_path / "out", val_tokens=val)
    train = open_dataset(tmp_path / "out").train[0][:].tolist()
    assert train[: len(documents[3])] == documents[3]


def test_held_out_tokens_across_batches_equal_the_definition(
    gpt2: tiktoken.Encoding, tmp_path: Path
) -> None:
    """Text is encoded a thousand documents at a time; the split may end in any of them."""
    texts = [f"{number} {TEXTS[number % 30]}" for number in range(3000)]
    documents = [[END_OF_TEXT, *gpt2.encode_ordinary(text)] for text in texts]
    source = write_texts(tmp_path / "long.jsonl", texts)
    for val in (total_of(documents[:1024]) - 1, total_of(documents[:1100]) + 3):
        folder = tmp_path / str(val)
        prepared(source, folder, val_tokens=val, total_tokens=20_000, shard_size=7_000)
        assert shards_in(folder) == expected_shards(documents, 20_000, val, 7_000)


@pytest.mark.parametrize("shards", (1, 2))
def test_total_at_a_shards_end_leaves_no_empty_shard(
    source: Path, tmp_path: Path, shards: int
) -> None:
    manifest = prepared(source, tmp_path / "out", total_tokens=shards * 200, shard_size=200)
    assert [one.tokens for one in manifest.shards] == [200] * shards


def test_manifest_describes_the_dataset(
    source: Path, documents: list[list[int]], tmp_path: Path
) -> None:
    returned = prepared(source, tmp_path / "out", val_tokens=300, total_tokens=900, shard_size=400)
    manifest = Manifest.load(tmp_path / "out")
    assert manifest == returned
    assert manifest.complete
    assert manifest.tokens("val") == 301
    assert manifest.tokens("train") == 900
    assert manifest.tokenizer["name"] == "gpt2"
    dataset = open_dataset(tmp_path / "out")
    begun = [int((tokens[:] == END_OF_TEXT).sum()) for tokens in dataset.val + dataset.train]
    assert [one.documents for one in manifest.shards] == begun
    assert manifest.counts["documents"] == sum(begun)


def test_manifest_is_the_same_for_every_number_of_workers(source: Path, tmp_path: Path) -> None:
    manifests = [prepared(source, tmp_path / str(n), val_tokens=99, workers=n) for n in (1, 2, 4)]
    assert manifests[0] == manifests[1] == manifests[2]


def test_rows_without_text_are_counted(tmp_path: Path) -> None:
    source = write_texts(tmp_path / "a.jsonl", ["one", "", "two", ""])
    assert prepared(source, tmp_path / "out").counts == {"documents": 2, "skipped": 2}


def test_too_little_text_to_hold_out_is_refused_and_can_be_corrected(
    source: Path, documents: list[list[int]], tmp_path: Path
) -> None:
    tokens = total_of(documents)
    with pytest.raises(UserError, match=f"only {tokens:,} tokens, {tokens:,} were to be held out"):
        prepared(source, tmp_path / "out", val_tokens=tokens, shard_size=500)
    assert shards_in(tmp_path / "out") == {}
    prepared(source, tmp_path / "out", val_tokens=100)


def test_nothing_left_to_train_on_is_refused_and_can_be_corrected(
    source: Path, documents: list[list[int]], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="no text to train on after"):
        prepared(source, tmp_path / "out", val_tokens=total_of(documents) - 1, shard_size=500)
    assert shards_in(tmp_path / "out") == {}
    prepared(source, tmp_path / "out", val_tokens=100)


def test_a_single_row_cannot_be_both_held_out_and_trained_on(tmp_path: Path) -> None:
    source = write_texts(tmp_path / "input.jsonl", ["one two three " * 100])
    with pytest.raises(UserError, match="no text to train on after") as raised:
        prepared(source, tmp_path / "out", val_tokens=100)
    assert "lower PREPARE_VAL_TOKENS, or set it to 0" in raised.value.fix


def test_tokens_between_held_out_and_training_text_are_counted(
    source: Path, documents: list[list[int]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    within = len(documents[0]) + len(documents[1]) // 2
    manifest = prepared(source, tmp_path / "out", val_tokens=within - 1)
    between = len(documents[0]) + len(documents[1]) - within
    assert between > 0
    assert manifest.counts["between"] == between
    reported = f"; {between} tokens between held-out and training text left out"
    assert reported in capsys.readouterr().out
    everything = manifest.tokens("val") + manifest.tokens("train") + between
    assert everything == total_of(documents)


def test_source_without_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no text to train on") as raised:
        prepared(write_texts(tmp_path / "a.jsonl", ["", ""]), tmp_path / "out")
    assert "PREPARE_TEXT_COLUMN" in raised.value.fix


def test_source_that_cannot_be_read_can_be_corrected(tmp_path: Path) -> None:
    source = write_texts(tmp_path / "a.jsonl", [*TEXTS * 40])
    good = source.read_text()
    source.write_text(good + "{broken\n")
    with pytest.raises(UserError, match="is not JSON"):
        prepared(source, tmp_path / "out")
    assert shards_in(tmp_path / "out") == {}
    source.write_text(good)
    prepared(source, tmp_path / "out")


def test_damage_loses_no_shard_that_is_written(tmp_path: Path) -> None:
    source = write_texts(tmp_path / "a.jsonl", [f"{number} words" * 20 for number in range(20000)])
    good = source.read_text()
    unbroken = prepared(source, tmp_path / "unbroken", shard_size=100_000)
    source.write_text(good[:-2] + "?\n")
    with pytest.raises(UserError, match="is not JSON"):
        prepared(source, tmp_path / "out", shard_size=100_000)
    kept = shards_in(tmp_path / "out")
    assert 1 < len(kept) < len(unbroken.shards)
    source.write_text(good)
    assert prepared(source, tmp_path / "out", shard_size=100_000) == unbroken
    assert shards_in(tmp_path / "out") == shards_in(tmp_path / "unbroken")
    assert kept.items() <= shards_in(tmp_path / "out").items()


def test_source_shorter_than_the_limit_is_complete_and_reported(
    source: Path,
    documents: list[list[int]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    manifest = prepared(source, tmp_path / "out", total_tokens=10**6)
    assert manifest.complete
    assert manifest.tokens("train") == total_of(documents)
    assert f"ended after {total_of(documents):,} of 1,000,000 training" in capsys.readouterr().out


def test_complete_dataset_is_left_alone(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = prepared(source, tmp_path / "out", total_tokens=500)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.*n")}
    assert prepared(source, tmp_path / "out", total_tokens=500, workers=2) == first
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.*n")}
    assert "complete already" in capsys.readouterr().out


def test_complete_dataset_with_a_damaged_shard_is_refused(source: Path, tmp_path: Path) -> None:
    prepared(source, tmp_path / "out", total_tokens=500)
    path = tmp_path / "out" / "text_000000.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(UserError, match=r"text_000000\.bin has 2022 bytes"):
        prepared(source, tmp_path / "out", total_tokens=500)


@pytest.mark.parametrize(
    ("change", "difference"),
    (
        ({"total_tokens": 600}, "total_tokens was 500 and is now 600"),
        ({"total_tokens": None}, "total_tokens was 500 and is now 'all'"),
        ({"val_tokens": 50}, "val_tokens was 40 and is now 50"),
        ({"shard_size": 99}, "shard_size was 100 and is now 99"),
        ({"text_column": "body"}, "text_column was 'text' and is now 'body'"),
        ({"shuffle_files": False}, "shuffle_files was True and is now False"),
    ),
)
def test_other_settings_are_refused_with_the_difference(
    source: Path, tmp_path: Path, change: dict[str, Any], difference: str
) -> None:
    settings: dict[str, Any] = {"total_tokens": 500, "val_tokens": 40, "shard_size": 100}
    prepared(source, tmp_path / "out", **settings)
    before = shards_in(tmp_path / "out")
    with pytest.raises(UserError, match="was prepared differently") as raised:
        prepared(source, tmp_path / "out", **{**settings, **change})
    assert difference in raised.value.problem
    assert shards_in(tmp_path / "out") == before


def test_shards_of_another_program_are_refused_and_kept(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write_shard(tmp_path / "out" / "text_000000.bin", np.zeros(3, dtype=np.uint16))
    before = shards_in(tmp_path / "out")
    with pytest.raises(UserError, match="shards that prepare did not write"):
        prepared(source, tmp_path / "out", total_tokens=500)
    assert shards_in(tmp_path / "out") == before


def test_prepare_never_imports_torch(source: Path, tmp_path: Path, start: Start) -> None:
    process = start(
        *("-X", "importtime", "-m", "app", "prepare", "--dataset", source),
        *("--val-tokens", "100", "--out-dir", "out"),
    )
    _, imports = process.communicate(timeout=300)
    assert process.returncode == 0, imports
    modules = {line.rpartition("|")[2].strip() for line in imports.splitlines()}
    assert "app.prepare.pipeline" in modules
    assert not {name for name in modules if name.split(".")[0] == "torch"}
    assert not {name for name in modules if name.split(".")[0] == "datasets"}


def test_speed_of_a_continued_run_counts_this_process_only(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with TokenProgress(None, done=10**9, seconds_between_lines=0.0) as progress:
        progress.show(10**9, None)
    assert capsys.readouterr().out == "1,000,000,000 tokens, 0 tokens/s\n"


@pytest.mark.parametrize(
    ("tokens", "total", "seconds", "line"),
    (
        (0, None, 10.0, "0 tokens, 0 tokens/s"),
        (5000, None, 10.0, "5,000 tokens, 500 tokens/s"),
        (0, 100, 10.0, "0 tokens, 0 tokens/s"),
        (10**6, 4 * 10**6, 2, "1,000,000 of 4,000,000 tokens (25%), 500,000 tokens/s, 00:06 left"),
        (
            10**6,
            10**10,
            1,
            "1,000,000 of 10,000,000,000 tokens (0%), 1,000,000 tokens/s, 2:46:39 left",
        ),
        (101, 100, 1, "101 of 100 tokens (101%), 101 tokens/s, 00:00 left"),
    ),
)
def test_progress_line(tokens: int, total: int | None, seconds: float, line: str) -> None:
    assert progress_line(tokens, total, tokens / seconds) == line
