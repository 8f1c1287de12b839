"""Lines of JSON in blocks: what Arrow parses is what Python's `json` says they are."""

import io
import json
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.errors import UserError
from app.prepare import json_lines
from app.prepare.documents import Position
from app.prepare.json_lines import count_lines, line_blocks, texts_of_lines
from app.prepare.pipeline import prepare
from app.prepare.sources import open_documents
from app.prepare.spec import DatasetSpec, TextSource
from tests.prepare.conftest import read, shards_in

ORDINARY = [
    b'{"text": "one"}',
    b'{"id": 7, "text": "two \\n \\"quoted\\" \\\\", "meta": {"a": [1, 2.5, {"b": null}]}}',
    b'{"text": "{[ \\u00e9 \\ud83d\\ude00 NaN"}',
    '{"text": "é 😀", "é": true}'.encode(),
    b'{"text": ""}',
    b'{"text": null}',
    b'{"other": {"text": "no"}}',
    b"{}",
    b'\t{ "text" : "blanks" } ',
    b'{"te\\u0078t": "escaped key"}',
    b'{"text": "\\\\\\"", "url": "http:\\/\\/a"}',
]
ODD = [
    b"",
    b" \t",
    b"\x0b\x0c",
    b"\xef\xbb\xbf" + ORDINARY[0],
    ORDINARY[0] + b"\r",
    b'{"text": "first", "text": "last"}',
    b'{"text": "first", "te\\u0078t": "last"}',
    b'{"text": "half a pair \\ud800"}',
    b'{"text": "\\udc00 \\ud800\\u0041", "other": "\\ud800"}',
    b'{"text": "\xed\xa0\x80"}',
    b'{"text": "not a number", "x": [NaN, Infinity, -Infinity]}',
    b'{"text": "large", "x": 1e999}',
    b'{"text": "long", "x": ' + b"1" * 4000 + b"}",
    b'{"text": "deep", "x": ' + b"[" * 700 + b"]" * 700 + b"}",
    b'{"text": "many ' + b"\\\\" * 200 + b'"}',
    b'{"text": "null \\u0000"}',
    b'{"text\\u0000": "another key"}',
]
REFUSED = [
    b'{"text": "\xff"}',
    b'{"text": "a", "other": "\xff"}',
    b'{"text": "a", "x": Inf}',
    b'{"text": "a", "x": -NaN}',
    b'{"text": "a", "x": ' + b"1" * 5000 + b"}",
    b'{"text": "a", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    b'{"text": "a"} {"text": "b"}',
    b'{"text": "a"}{"text": "b"}',
    b'{"text": "a"} null',
    b'null {"text": "a"}',
    b'{"text": "a"}\0',
    b'{"text": "a", "\0": 1}',
    '{"text": "wide"}'.encode("utf-16-le"),
    b'{"text": "a", "x": 01}',
    b'{"text": "a\tb"}',
    b'{"text": "a",}',
    b'{"text":',
    b'"a"}',
    b"null",
    b"[1]",
    b'{"text": 5}',
    b'{"text": ["a"]}',
]
any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
any_row = st.dictionaries(st.sampled_from(["text", "other", 'a"', "\\"]), any_json, max_size=3)
any_line = st.one_of(
    st.sampled_from(ORDINARY),
    st.sampled_from(ODD + REFUSED),
    st.builds(
        lambda row, ascii_only: json.dumps(row, ensure_ascii=ascii_only).encode(
            "utf-8", "surrogatepass"
        ),
        any_row,
        st.booleans(),
    ),
)


def said_by_json(block: bytes) -> list[str | None]:
    """The text of each line; None where it is refused."""
    texts: list[str | None] = []
    for line in io.BytesIO(block):
        try:
            row = json.loads(line) if line.strip() else {}
        except (ValueError, RecursionError):
            row = None
        text = row.get("text") or "" if isinstance(row, dict) else None
        if isinstance(row, dict) and not isinstance(row.get("text"), str | None):
            text = None
        if text is not None:
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        texts.append(text)
    return texts


def assert_as_json_says(block: bytes) -> None:
    expected = said_by_json(block)
    texts, faults, _ = texts_of_lines(block, "text")
    texts.validate(full=True)
    assert texts.type == pa.large_string()
    assert texts.to_pylist() == [text or "" for text in expected]
    assert list(faults) == [line for line, text in enumerate(expected) if text is None]
    assert count_lines(block) == len(expected)


@pytest.mark.parametrize("end", (b"", b"\n", b"\r\n", b"\n\n", b"\n "))
@pytest.mark.parametrize("line", ORDINARY + ODD + REFUSED)
def test_lines_mean_the_same_as_to_pythons_json(line: bytes, end: bytes) -> None:
    if line + end:
        assert_as_json_says(line + end)
    assert_as_json_says(b"\n".join([*ORDINARY, line, *ORDINARY]) + end)


@settings(max_examples=400)
@given(
    lines=st.lists(any_line, min_size=1, max_size=6),
    at=st.floats(0, 1, exclude_max=True),
    change=st.sampled_from([None, *b'{}[]":,\\\n\r \t\0IN0-\xff']),
)
def test_lines_with_a_changed_byte_mean_the_same_as_to_pythons_json(
    lines: list[bytes], at: float, change: int | None
) -> None:
    block = bytearray(b"\n".join(lines) + b"\n")
    if change is not None:
        block[int(at * len(block))] = change
    assert_as_json_says(bytes(block))


def test_ordinary_lines_are_parsed_by_arrow() -> None:
    assert json_lines._is_plain(b"\n".join(ORDINARY))
    assert json_lines._is_plain(b"\r\n".join(ORDINARY) + b"\r\n")


@pytest.mark.parametrize("size", (1, 7, 64, 10_000))
@pytest.mark.parametrize("end", (b"", b"\n"))
def test_blocks_are_whole_lines_of_any_length(
    monkeypatch: pytest.MonkeyPatch, size: int, end: bytes
) -> None:
    monkeypatch.setattr(json_lines, "_BLOCK_BYTES", size)
    content = b"\n".join([*ORDINARY, *ODD, b'{"text": "%b"}' % (b"long" * 1000)]) + end
    result = list(line_blocks(io.BytesIO(content)))
    assert b"".join(result) == content
    assert all(block.endswith(b"\n") for block in result[:-1])
    assert sum(map(count_lines, result)) == len(ORDINARY) + len(ODD) + 1


@pytest.fixture
def odd_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Lines of all kinds, in blocks of a few; some are longer than a block."""
    monkeypatch.setattr(json_lines, "_BLOCK_BYTES", 300)
    lines = [*ORDINARY, *ODD[:4], b'{"text": "%b"}' % (b"a long line " * 90), *ODD[4:], *ORDINARY]
    path = tmp_path / "odd.jsonl"
    path.write_bytes(b"\n".join(lines * 3))
    return path


def prepared(
    source: Path, out: Path, *, shard_size: int = 100, workers: int = 1
) -> dict[str, bytes]:
    prepare(
        DatasetSpec(TextSource(str(source)), "text", shard_size=shard_size), out, workers=workers
    )
    return shards_in(out)


def test_every_number_of_workers_gives_the_same_bytes(odd_lines: Path, tmp_path: Path) -> None:
    rows = said_by_json(odd_lines.read_bytes())
    assert None not in rows
    plain = tmp_path / "plain.jsonl"
    plain.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    expected = prepared(plain, tmp_path / "plain")
    assert len(expected) > 5
    for workers in (1, 2, 3, 8):
        out = tmp_path / str(workers)
        assert prepared(odd_lines, out, workers=workers) == expected
    manifests = {(tmp_path / str(n) / "manifest.json").read_bytes() for n in (1, 2, 3, 8)}
    assert len(manifests) == 1


def test_reading_from_any_row_gives_the_remaining_rows(odd_lines: Path) -> None:
    rows = said_by_json(odd_lines.read_bytes())
    assert None not in rows
    documents = open_documents(TextSource(str(odd_lines)))
    for row in range(len(rows) + 1):
        pieces = list(documents.chunks(Position(0, row)))
        assert [text for piece in pieces for text in piece.texts().rows.to_pylist()] == rows[row:]
        assert sum(piece.rows for piece in pieces) == len(rows) - row
        assert not pieces or (pieces[0].first, pieces[-1].end) == ((0, row), (0, len(rows)))


@pytest.mark.parametrize("bad", (b'{"text": "cut', b"[1]", b'{"text": 5}'))
def test_refused_line_is_named_and_shards_before_its_batch_are_kept(
    odd_lines: Path, tmp_path: Path, bad: bytes
) -> None:
    good = odd_lines.read_bytes()
    number = 20 * len(good.split(b"\n")) + 1
    assert number > 2000
    kept = []
    for workers in (1, 2, 8):
        odd_lines.write_bytes(b"\n".join([*[good] * 20, bad, good]))
        with pytest.raises(UserError, match=rf"odd\.jsonl, line {number}\b"):
            prepared(odd_lines, tmp_path / str(workers), workers=workers, shard_size=2000)
        kept.append(shards_in(tmp_path / str(workers)))
    assert len(kept[0]) > 5
    assert kept[0] == kept[1] == kept[2]
    odd_lines.write_bytes(b"\n".join([*[good] * 20, b"", good]))
    whole = prepared(odd_lines, tmp_path / "whole", shard_size=2000)
    assert kept[0].items() <= whole.items()


@pytest.mark.parametrize("workers", (1, 2, 8))
def test_first_of_several_faults_is_reported(tmp_path: Path, workers: int) -> None:
    (tmp_path / "1.jsonl").write_bytes(b"\n".join([*ORDINARY * 500, b"{", *ORDINARY, b"["]))
    (tmp_path / "2.jsonl.gz").write_bytes(b"no archive")
    source = TextSource(str(tmp_path), shuffle_files=False)
    with pytest.raises(UserError, match=rf"1\.jsonl, line {500 * len(ORDINARY) + 1} is not JSON"):
        prepare(DatasetSpec(source, "text"), tmp_path / "out", workers=workers)


@pytest.mark.parametrize("key", (b'"text"', b'"te\\u0078t"'))
def test_a_column_may_come_after_many_rows_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: bytes
) -> None:
    monkeypatch.setattr(json_lines, "_BLOCK_BYTES", 100)
    path = tmp_path / "a.jsonl"
    without = b"\n" * 500 + b'{"body": 1, "id": 2}\n' * 10
    path.write_bytes(without + b"{" + key + b': "late"}\n')
    assert read(open_documents(TextSource(str(path)))) == ["late"]


def test_a_column_that_no_row_has_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_lines, "_BLOCK_BYTES", 100)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n" * 500 + b'{"body": "text", "id": "\\u0078"}\n' * 10)
    with pytest.raises(UserError, match=r"a\.jsonl has no column 'text'") as raised:
        prepared(path, tmp_path / "out")
    assert "one of: body, id" in raised.value.fix
