"""Shards are cut at the right tokens, and a run that was stopped writes the same bytes."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event, Thread

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.data.dataset import open_dataset
from app.data.manifest import MANIFEST, Manifest
from app.data.tokenizer import END_OF_TEXT
from app.errors import UserError
from app.prepare.documents import Batch, Fault, Place, Position, RowChunk
from app.prepare.encoded_batch import EncodedBatch
from app.prepare.shard_writer import ShardWriter
from app.prepare.spec import DatasetSpec, TextSource
from app.prepare.texts import as_texts
from tests.prepare.conftest import shards_in

# A disk takes milliseconds for each of the many fsyncs.
IN_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class EncodedSource:
    """Files of rows, each row a number of tokens; a row of 0 tokens is no document.

    In the files of `bad` such a row is a fault, and in those of `replaced` every row was changed.
    """

    files: Sequence[Sequence[int]]
    bad: frozenset[int] = frozenset()
    replaced: frozenset[int] = frozenset()

    def documents(self) -> list[list[int]]:
        """Return the tokens of each document: all are different, so that none can be swapped."""
        numbers = itertools.count()
        lengths = [length for rows in self.files for length in rows if length]
        return [[END_OF_TEXT, *itertools.islice(numbers, length - 1)] for length in lengths]

    def batches(self, start: Position, size: int) -> Iterator[EncodedBatch]:
        """Yield batches of `size` rows from `start` on, which span files."""
        documents, rows = iter(self.documents()), []
        no_texts = as_texts([])
        for file, row_lengths in enumerate(self.files):
            for row, length in enumerate(row_lengths):
                document = next(documents) if length else []
                if (file, row) >= start:
                    rows.append((Position(file, row), document))
        for first in range(0, len(rows), size):
            batch = rows[first : first + size]
            chunks = [
                RowChunk(position, 1, 1, lambda: no_texts, None, Place("", f"{position.file}.txt"))
                for position, _ in batch
            ]
            fault = Fault("is bad", "mend it")
            faults = {
                number: fault
                for number, (position, row) in enumerate(batch)
                if not row and position.file in self.bad
            }
            replaced = [
                number
                for number, (position, _) in enumerate(batch)
                if position.file in self.replaced
            ]
            tokens = np.array([token for _, row in batch for token in row], np.uint16)
            lengths = np.array([len(row) for _, row in batch], np.int64)
            texts = no_texts._replace(faults=faults, replaced=replaced)
            yield EncodedBatch(Batch(chunks), tokens, lengths, texts)


def new_manifest(spec: DatasetSpec) -> Manifest:
    return Manifest(source={}, tokenizer={}, settings=spec.settings)


def write(
    source: EncodedSource, spec: DatasetSpec, folder: Path, *, size: int, commits: int | None = None
) -> bool:
    """Write or continue a dataset; stop after `commits` shards. Returns True at its end."""
    manifest = Manifest.load(folder) or new_manifest(spec)
    with ShardWriter(folder, spec, manifest) as writer:
        for batch in source.batches(writer.cursor.position, size):
            if writer.full:
                break
            for task in writer.cut(batch):
                writer.run(task)
                if len(writer.manifest.shards) - len(manifest.shards) == commits:
                    return False
        writer.finish()
    return True


def expected_splits(documents: list[list[int]], spec: DatasetSpec) -> tuple[list[int], list[int]]:
    """Define the splits on lists: hold out, leave out the rest of that document, train."""
    remaining, held_out = list(documents), list[int]()
    while remaining and len(held_out) < spec.held_out_tokens:
        held_out += remaining.pop(0)
    train = [token for document in remaining for token in document]
    return held_out[: spec.held_out_tokens], train[: spec.total_tokens]


def spec_of(total: int | None, val: int, shard_size: int, skip_bad: float = 100) -> DatasetSpec:
    return DatasetSpec(TextSource("texts"), "text", total, val, shard_size, skip_bad)


sources = st.builds(
    EncodedSource,
    st.lists(st.lists(st.integers(0, 9), max_size=5), min_size=1, max_size=4),
    st.frozensets(st.integers(0, 3)),
    st.frozensets(st.integers(0, 3)),
)
specs = st.builds(spec_of, st.none() | st.integers(1, 40), st.integers(0, 20), st.integers(4, 15))


@settings(max_examples=60)
@given(source=sources, spec=specs, size=st.integers(1, 7), other_size=st.integers(1, 7))
def test_stopped_at_every_commit_and_continued_writes_the_same_bytes(
    source: EncodedSource, spec: DatasetSpec, size: int, other_size: int
) -> None:
    with TemporaryDirectory(dir=IN_MEMORY if IN_MEMORY.is_dir() else None) as name:
        unbroken, stopped = Path(name, "unbroken"), Path(name, "stopped")
        unbroken.mkdir()
        stopped.mkdir()
        write(source, spec, unbroken, size=size)
        while not write(source, spec, stopped, size=other_size, commits=1):
            pass
        assert shards_in(stopped) == shards_in(unbroken)
        assert (stopped / MANIFEST).read_bytes() == (unbroken / MANIFEST).read_bytes()

        documents = source.documents()
        val, train = expected_splits(documents, spec)
        dataset, manifest = open_dataset(unbroken), Manifest.load(unbroken)
        assert manifest
        assert [token for shard in dataset.val for token in shard[:]] == val
        assert [token for shard in dataset.train for token in shard[:]] == train
        assert all(0 < shard.tokens <= spec.shard_size for shard in manifest.shards)
        begun = (val + train).count(END_OF_TEXT)
        assert manifest.counts["documents"] == begun
        if spec.total_tokens is None:
            rows = [length for file in source.files for length in file]
            bad = sum(
                source.files[file].count(0) for file in source.bad if file < len(source.files)
            )
            assert manifest.counts.get("bad", 0) == bad == len(manifest.left_out)
            assert manifest.counts.get("skipped", 0) == rows.count(0) - bad
            replaced = sum(
                len(rows) for file, rows in enumerate(source.files) if file in source.replaced
            )
            assert manifest.counts.get("not_utf8", 0) == replaced
            between = sum(map(len, documents)) - len(val) - len(train)
            assert manifest.counts.get("between", 0) == between


def test_document_that_has_become_shorter_is_refused(tmp_path: Path) -> None:
    spec = spec_of(None, 0, 5)
    assert not write(EncodedSource([[8, 8]]), spec, tmp_path, size=2, commits=1)
    with pytest.raises(UserError, match="is shorter than before"):
        write(EncodedSource([[4, 8]]), spec, tmp_path, size=2)
    assert len(shards_in(tmp_path)) == 1


def fail() -> None:
    raise OSError(28, "No space left on device")


def test_nothing_is_written_after_a_task_that_failed(tmp_path: Path) -> None:
    source, spec = EncodedSource([[8, 8]]), spec_of(None, 0, 5)
    with ShardWriter(tmp_path, spec, new_manifest(spec)) as writer:
        (batch,) = source.batches(Position(0, 0), 2)
        first, *others = writer.cut(batch)
        writer.run(first)
        with pytest.raises(OSError, match="No space left"):
            writer.run(fail)
        for task in others:
            writer.run(task)
        assert not writer.manifest.shards
    assert list(tmp_path.iterdir()) == []


def test_leaving_waits_for_the_running_task_and_later_ones_write_nothing(tmp_path: Path) -> None:
    source, spec = EncodedSource([[8, 8]]), spec_of(None, 0, 5)
    (batch,) = source.batches(Position(0, 0), 2)
    is_running, may_end = Event(), Event()
    with ShardWriter(tmp_path, spec, new_manifest(spec)) as writer:
        append, commit, *others = writer.cut(batch)

        def slow_commit() -> None:
            is_running.set()
            may_end.wait()
            commit()

        writer.run(append)
        thread = Thread(target=writer.run, args=(slow_commit,))
        thread.start()
        is_running.wait()
        Thread(target=may_end.set).start()
    assert len(writer.manifest.shards) == 1
    thread.join()
    for task in others:
        writer.run(task)
    assert shards_in(tmp_path).keys() == {"text_000000.bin"}
    assert Manifest.load(tmp_path) == writer.manifest


@pytest.mark.parametrize(
    ("total", "val", "held_out", "stored"), ((None, 0, 0, "all"), (7, 0, 0, 7), (7, 5, 6, 7))
)
def test_spec_has_the_settings_that_determine_the_bytes(
    total: int | None, val: int, held_out: int, stored: int | str
) -> None:
    spec = spec_of(total, val, 9)
    assert spec.held_out_tokens == held_out
    sizes = {"total_tokens": stored, "val_tokens": val, "shard_size": 9}
    local = {"text_column": "text", "shuffle_files": True} | sizes
    assert DatasetSpec(TextSource("stdlib"), "text", total, val, 9).settings == local
    hub = {"dataset": "texts", "config": None, "revision": "main", "split": "train"}
    assert spec.settings == local | hub
    assert DatasetSpec(spec.source, "other", total, val, 9).settings == spec.settings


def test_a_share_is_one_of_all_rows_that_are_cut_written_or_not(tmp_path: Path) -> None:
    spec = spec_of(None, 0, 100, skip_bad=0.01)
    source = EncodedSource([[2] * 2000, [0] * 15], bad=frozenset([1]))
    with ShardWriter(tmp_path, spec, new_manifest(spec)) as writer:
        for batch in source.batches(Position(0, 0), 500):
            for _task in writer.cut(batch):
                pass
        assert writer.cursor.bad == 15
