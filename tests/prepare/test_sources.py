import gzip
import json
import os
import random
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from app.dataset_names import is_hub_id
from app.errors import UserError
from app.prepare.documents import Position, RowChunk, batches
from app.prepare.local_files import FileDocuments
from app.prepare.sources import open_documents
from app.prepare.spec import TextSource
from tests.prepare.conftest import COMPRESS, START, read


def pieces_of(dataset: Path | str, start: Position = START, **options: Any) -> list[RowChunk]:
    return list(open_documents(TextSource(str(dataset), **options)).chunks(start))


def texts_of(dataset: Path | str, **options: Any) -> list[str]:
    return read(open_documents(TextSource(str(dataset), **options)))


def write_json_lines(path: Path, *rows: object) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def write_parquet(path: Path, texts: list[str | None], *, rows_per_group: int = 2) -> Path:
    table = pa.table({"id": list(range(len(texts))), "text": texts})
    pq.write_table(table, path, row_group_size=rows_per_group)
    return path


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("kind", (".txt", ".md", ".py", ".TXT"))
def test_text_file_is_one_document(tmp_path: Path, kind: str, compression: str) -> None:
    path = tmp_path / f"a{kind}{compression}"
    path.write_bytes(COMPRESS[compression]("né\nzwei 😀\n\n".encode()))
    assert texts_of(path) == ["né\nzwei 😀\n\n"]


@pytest.mark.parametrize("compression", COMPRESS)
def test_json_lines_are_documents_in_order(tmp_path: Path, compression: str) -> None:
    texts = [f"document {number}, é 😀\n" for number in range(3000)]
    lines = "".join(json.dumps({"n": 1, "text": text}) + "\n" for text in texts)
    path = tmp_path / f"a.jsonl{compression}"
    path.write_bytes(COMPRESS[compression](lines.encode()))
    assert texts_of(path) == texts


@pytest.mark.parametrize("compression", COMPRESS)
def test_concatenated_compressed_files_are_one_file(tmp_path: Path, compression: str) -> None:
    path = tmp_path / f"a.txt{compression}"
    path.write_bytes(COMPRESS[compression](b"one ") + COMPRESS[compression](b"two"))
    assert texts_of(path) == ["one two"]


def test_parquet_rows_are_documents_in_order(tmp_path: Path) -> None:
    texts: list[str | None] = [f"document {number} 😀" for number in range(7)]
    assert texts_of(write_parquet(tmp_path / "a.parquet", texts)) == texts


@pytest.mark.parametrize("name", ("a.jsonl", "a.parquet"))
def test_text_comes_from_the_chosen_column(tmp_path: Path, name: str) -> None:
    if name.endswith("l"):
        write_json_lines(tmp_path / name, {"text": "no", "body": "yes"})
    else:
        pq.write_table(pa.table({"text": ["no"], "body": ["yes"]}), tmp_path / name)
    assert texts_of(tmp_path / name, text_column="body") == ["yes"]


def test_files_of_every_kind_are_found_at_every_depth(tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "a.txt").write_text("txt")
    (tmp_path / "deep" / "b.md.gz").write_bytes(gzip.compress(b"md"))
    write_json_lines(tmp_path / "c.jsonl", {"text": "json"})
    write_parquet(tmp_path / "d.parquet", ["parquet"])
    assert sorted(texts_of(tmp_path)) == ["json", "md", "parquet", "txt"]


def test_hidden_and_other_files_are_not_read(tmp_path: Path) -> None:
    (tmp_path / ".git").mkdir()
    for name in (".git/a.txt", ".hidden.txt", "a.pdf", "b.bin", "c.gz", "d", "e.parquet.gz"):
        (tmp_path / name).write_text("no")
    (tmp_path / "f.txt").write_text("yes")
    assert texts_of(tmp_path) == ["yes"]


@pytest.mark.parametrize(
    ("pattern", "texts"),
    (
        ("*.txt", ["top"]),
        ("books/*/*.txt", ["one", "two"]),
        ("books/*/a.txt", ["one"]),
        ("**/[ab].txt", ["one", "top", "two"]),
        ("books/one", ["one"]),
    ),
)
def test_glob_and_folder_find_files(tmp_path: Path, pattern: str, texts: list[str]) -> None:
    for name, text in {"a.txt": "top", "books/one/a.txt": "one", "books/2/b.txt": "two"}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert sorted(texts_of(tmp_path / pattern)) == texts


def test_relative_and_home_paths_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("here")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for dataset in ("a.txt", "./a.txt", "*.txt", "~/a.txt", "~/*.txt", ".", "~"):
        assert texts_of(dataset) == ["here"]


def test_existing_file_with_a_name_like_a_pattern_is_read(tmp_path: Path) -> None:
    (tmp_path / "[a].txt").write_text("brackets")
    (tmp_path / "a.txt").write_text("no")
    assert texts_of(tmp_path / "[a].txt") == ["brackets"]


@pytest.mark.parametrize("shuffle", (True, False))
def test_order_does_not_depend_on_the_order_of_creation(tmp_path: Path, shuffle: bool) -> None:
    names = [f"{topic}/{number}.txt" for topic in "abc" for number in range(20)]
    orders = []
    for seed in range(3):
        folder = tmp_path / str(seed)
        for name in random.Random(seed).sample(names, len(names)):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(name)
        orders.append(texts_of(folder, shuffle_files=shuffle))
    assert orders[0] == orders[1] == orders[2]
    assert sorted(orders[0]) == sorted(names)
    assert (orders[0] == sorted(names)) is not shuffle


def test_shuffled_order_is_pinned(tmp_path: Path) -> None:
    for name in "abcdefgh":
        (tmp_path / f"{name}.txt").write_text(name)
    assert "".join(texts_of(tmp_path)) == "achefgdb"


def test_crlf_is_kept_and_a_byte_order_mark_is_not(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    assert texts_of(tmp_path / "a.txt") == ["one\r\ntwo\r\n"]


def test_json_lines_with_crlf_mark_and_blank_lines(tmp_path: Path) -> None:
    content = b'\xef\xbb\xbf{"text": "one"}\r\n\r\n  \n{"text": "two\\r\\n"}'
    (tmp_path / "a.jsonl").write_bytes(content)
    assert texts_of(tmp_path / "a.jsonl") == ["one", "two\r\n"]


@pytest.mark.parametrize("name", ("a.jsonl", "a.parquet", "folder"))
def test_rows_with_empty_or_missing_text_are_counted(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name.endswith(".jsonl"):
        write_json_lines(path, {"text": ""}, {"text": "one"}, {"text": None}, {"other": 1})
    elif name.endswith(".parquet"):
        write_parquet(path, ["", "one", None, ""])
    else:
        path.mkdir()
        for file, content in {"1": b"", "2": b"one", "3": b"\xef\xbb\xbf", "4": b""}.items():
            (path / f"{file}.txt").write_bytes(content)
    documents = open_documents(TextSource(str(path), shuffle_files=False))
    texts = [text for piece in documents.chunks(START) for text in piece.texts().rows.to_pylist()]
    assert sorted(texts) == ["", "", "", "one"]


@pytest.mark.parametrize("line", ("not json", '{"text": "cut', "\udcff", '{"text": NULL}'))
def test_broken_json_is_refused_with_file_and_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "a.jsonl"
    lines = ['{"text": "fine"}'] * 30_000 + ["", line]
    path.write_text("\n".join(lines), "utf-8", "surrogateescape")
    kind = "UTF-8" if line == "\udcff" else "JSON"
    with pytest.raises(UserError, match=rf"a\.jsonl, line 30002 is not {kind}") as raised:
        texts_of(path)
    assert str(path) in raised.value.problem


@pytest.mark.parametrize("row", (["text"], "text", 1, None))
def test_json_that_is_no_object_is_refused_with_file_and_line(tmp_path: Path, row: object) -> None:
    path = write_json_lines(tmp_path / "a.jsonl", {"text": "fine"}, row)
    with pytest.raises(UserError, match=r"a\.jsonl, line 2 is not a JSON object"):
        texts_of(path)


@pytest.mark.parametrize("name", ("a.jsonl", "a.parquet"))
def test_wrong_column_is_refused_and_the_existing_ones_are_listed(
    tmp_path: Path, name: str
) -> None:
    if name.endswith("l"):
        write_json_lines(tmp_path / name, {"id": 1, "body": "x"})
    else:
        pq.write_table(pa.table({"id": [1], "body": ["x"]}), tmp_path / name)
    with pytest.raises(UserError, match=rf"{name} has no column 'text'") as raised:
        texts_of(tmp_path / name)
    assert raised.value.fix.endswith("one of: id, body")


@pytest.mark.parametrize("value", (5, ["a"], {"a": 1}, True))
def test_column_that_is_not_text_is_refused(tmp_path: Path, value: object) -> None:
    path = write_json_lines(tmp_path / "a.jsonl", {"text": "fine"}, {"text": value})
    with pytest.raises(UserError, match=f"has {type(value).__name__}, not text") as raised:
        texts_of(path)
    assert "PREPARE_TEXT_COLUMN" in raised.value.fix


@pytest.mark.parametrize(
    "name", [f"a{kind}{c}" for kind in (".txt", ".jsonl") for c in COMPRESS if c]
)
@pytest.mark.parametrize("damage", ("cut", "other"))
def test_damaged_compressed_file_is_refused(tmp_path: Path, name: str, damage: str) -> None:
    path = tmp_path / name
    lines = "".join(f'{{"text": "{random.Random(n).random()}"}}\n' for n in range(2000))
    whole = COMPRESS[path.suffix](lines.encode())
    path.write_bytes(whole[:-50] if damage == "cut" else b"no archive at all")
    with pytest.raises(UserError, match=rf"{name} is damaged"):
        texts_of(path)


def test_damaged_parquet_is_refused(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", ["text"])
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"a\.parquet is damaged"):
        texts_of(path)


def test_parquet_with_a_changed_byte_is_read_or_refused(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", ["text"])
    whole = path.read_bytes()
    refusals = set()
    for place in range(len(whole)):
        # Of one in Arrow's own schema it becomes an integer of a width that Arrow does not read.
        for other in (1, 5, 128):
            path.write_bytes(
                whole[:place] + bytes([whole[place] ^ other]) + whole[place + 1 :],
            )
            try:
                texts_of(path)
            except UserError as error:
                refusals.add(error.problem.partition(": ")[0])
    assert {f"{path} is damaged", f"{path} cannot be read"} <= refusals


@pytest.mark.parametrize("name", ("a.pdf", "a.bin", "README", "a.gz", "a.parquet.gz", "a.zip"))
def test_file_of_another_kind_is_refused_and_the_known_kinds_are_listed(
    tmp_path: Path, name: str
) -> None:
    (tmp_path / name).write_text("text")
    with pytest.raises(UserError, match=rf"no text in .*{name}") as raised:
        open_documents(TextSource(str(tmp_path / name)))
    assert ".txt .md .py .jsonl .ndjson .parquet" in raised.value.problem


def test_folder_without_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_text("no")
    with pytest.raises(UserError, match=r"no text in .*: none of 1 files"):
        open_documents(TextSource(str(tmp_path)))


@pytest.mark.parametrize(
    "missing",
    ("{folder}/gone", "{folder}/gone.txt", "{folder}/*.txt", "gone.jsonl", "./gone", "~/go"),
)
def test_missing_path_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"there is no|nothing matches"):
        open_documents(TextSource(missing.format(folder=tmp_path)))


@pytest.mark.parametrize(
    ("dataset", "is_one"),
    (
        ("HuggingFaceFW/fineweb", True),
        ("wikitext", True),
        ("HuggingFaceFW/fineweb-edu_2.0", True),
        ("stdlib", False),
        ("books.jsonl", False),
        ("a/b/c", False),
        ("/a/b", False),
        ("./a", False),
        ("~/a", False),
        ("a/*.txt", False),
        ("my books", False),
        ("tests", False),
    ),
)
def test_hub_id_is_distinguished_from_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dataset: str, is_one: bool
) -> None:
    (tmp_path / "tests").mkdir()
    monkeypatch.chdir(tmp_path)
    assert is_hub_id(dataset) is is_one


def test_stdlib_is_the_source_of_pythons_library() -> None:
    os_source = Path(os.__file__).read_text("utf-8")
    root = Path(sysconfig.get_paths()["stdlib"])
    texts = set(texts_of("stdlib"))
    assert os_source in texts
    assert (root / "json" / "__init__.py").read_text("utf-8") in texts
    assert (root / "json" / "tool.py").read_text("utf-8") in texts
    assert Path(pytest.__file__).read_text("utf-8") not in texts
    for test in root.glob("test/test_[j-k]*.py"):
        assert test.read_text("utf-8") not in texts


def test_source_changes_with_the_files_and_not_with_the_path(tmp_path: Path) -> None:
    def source(folder: str, content: str) -> object:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text(content)
        return open_documents(TextSource(str(tmp_path / folder))).source

    assert source("one", "same") == source("two", "same")
    assert source("three", "same") != source("four", "longer")


@pytest.mark.parametrize("name", ("a.txt", "a.jsonl", "a.jsonl.gz", "a.parquet"))
def test_fraction_rises_to_one(tmp_path: Path, name: str) -> None:
    texts = [f"{number} " * 300 for number in range(8000)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    match name:
        case "a.txt":
            for number in range(2200):
                (tmp_path / f"{number}.txt").write_text("text")
        case "a.parquet":
            write_parquet(tmp_path / name, list(texts), rows_per_group=500)
        case _:
            (tmp_path / name).write_bytes(COMPRESS[Path(name).suffix.replace(".jsonl", "")](lines))
    fractions = [piece.fraction for piece in pieces_of(tmp_path)]
    assert fractions == sorted(fraction for fraction in fractions if fraction is not None)
    assert len(set(fractions)) > 2
    assert fractions[-1] == 1.0


def test_long_documents_make_short_batches(tmp_path: Path) -> None:
    write_json_lines(tmp_path / "a.jsonl", *({"text": "x" * 1_000_000} for _ in range(10)))
    assert [len(batch.texts().rows) for batch in batches(pieces_of(tmp_path))] == [5, 5]


def test_long_rows_of_parquet_make_short_batches(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", ["x" * 1_000_000] * 10, rows_per_group=10)
    assert [len(batch.texts().rows) for batch in batches(pieces_of(tmp_path))] == [8, 2]


@pytest.mark.parametrize("name", ("gone.jsonl", "gone.txt", "gone.parquet"))
def test_deleted_file_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("one")
    documents = open_documents(TextSource(str(tmp_path)))
    (tmp_path / name).unlink()
    with pytest.raises(UserError, match=f"{name} cannot be read: No such file"):
        read(documents)


def test_file_names_that_look_like_urls_are_file_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "~").mkdir()
    (tmp_path / "~" / "a.txt").write_text("one")
    (tmp_path / "file:b.txt").write_text("two")
    monkeypatch.chdir(tmp_path)
    assert sorted(texts_of(".")) == ["one", "two"]


@pytest.mark.parametrize("name", ("a.jsonl", "a.jsonl.gz", "a.parquet"))
def test_reading_from_any_position_gives_the_remaining_rows(tmp_path: Path, name: str) -> None:
    texts = [None if number % 5 == 3 else f"text {number}" for number in range(23)]
    for file in ("1", "2"):
        (tmp_path / file).mkdir()
        path = tmp_path / file / name
        if name == "a.parquet":
            write_parquet(path, texts, rows_per_group=4)
        else:
            lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
            path.write_bytes(COMPRESS[path.suffix.replace(".jsonl", "")](lines))
    documents = open_documents(TextSource(str(tmp_path), shuffle_files=False))
    rows = [(Position(file, row), texts[row] or "") for file in (0, 1) for row in range(23)]
    for number in range(len(rows)):
        assert rows_of(documents.chunks(rows[number][0])) == rows[number:]
    assert rows_of(documents.chunks(Position(1, 23))) == []


def rows_of(pieces: Iterable[RowChunk]) -> list[tuple[Position, str]]:
    return [
        (Position(piece.first.file, piece.first.row + number), text)
        for piece in pieces
        for number, text in enumerate(piece.texts().rows.to_pylist())
    ]


def test_compressed_json_is_lines_and_other_json_must_be_named(tmp_path: Path) -> None:
    line = b'{"text": "one"}\n'
    (tmp_path / "c4.json.gz").write_bytes(COMPRESS[".gz"](line))
    (tmp_path / "a.ndjson").write_bytes(line.replace(b"one", b"two"))
    (tmp_path / "package.json").write_text('{\n  "name": "x"\n}\n')
    assert sorted(texts_of(tmp_path)) == ["one", "two"]
    (tmp_path / "lines.json").write_bytes(line.replace(b"one", b"three"))
    assert sorted(texts_of(tmp_path)) == ["one", "two"]
    assert texts_of(tmp_path / "lines.json") == ["three"]
    assert texts_of(f"{tmp_path}/l*.json") == ["three"]


@pytest.mark.parametrize("kind", (".jsonl", ".json.gz"))
def test_json_array_is_refused_with_how_to_convert_it(tmp_path: Path, kind: str) -> None:
    content = json.dumps([{"text": "one"}, {"text": "two"}], indent=2).encode()
    path = tmp_path / f"a{kind}"
    path.write_bytes(COMPRESS[".gz"](content) if kind.endswith("gz") else content)
    with pytest.raises(UserError, match="is a JSON array, not one JSON object a line") as raised:
        texts_of(path)
    assert "jq -c '.[]'" in raised.value.fix


@pytest.mark.parametrize(
    "kind",
    (pa.binary(), pa.large_binary(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())),
)
def test_parquet_text_of_any_type_is_read(tmp_path: Path, kind: pa.DataType) -> None:
    texts = ["né", None, "zwei 😀", ""]
    values = pa.array(texts, pa.string()).cast(kind)
    pq.write_table(pa.table({"text": values}), tmp_path / "a.parquet")
    assert texts_of(tmp_path) == ["né", "zwei 😀"]


def test_bytes_of_parquet_that_are_not_utf8_are_a_fault_of_their_row(tmp_path: Path) -> None:
    texts = pa.array([b"one", "café".encode("latin-1"), b"three"], pa.binary())
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    (piece,) = pieces_of(tmp_path)
    rows, faults, _ = piece.texts()
    assert rows.to_pylist() == ["one", "", "three"]
    assert list(faults) == [1]
    with pytest.raises(UserError, match=r"a\.parquet, row 1 is not UTF-8: byte 3 is 0xe9"):
        texts_of(tmp_path)


def test_two_parquet_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    table = pa.table([["one"], ["two"]], names=["text", "text"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet has 2 columns 'text'"):
        texts_of(tmp_path)


@pytest.mark.parametrize("value", (["a"], 5, {"a": 1}))
def test_parquet_column_that_is_not_text_is_refused(tmp_path: Path, value: object) -> None:
    pq.write_table(pa.table({"text": [value]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet has .*, not text, in its column 'text'"):
        texts_of(tmp_path)


def test_half_a_surrogate_pair_is_replaced_and_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": "\\ud83d!"}\n')
    rows, faults, replaced = pieces_of(tmp_path)[0].texts()
    assert (rows.to_pylist(), dict(faults), list(replaced)) == (["fine", "\ufffd!"], {}, [1])


def test_what_this_program_has_written_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a text")
    own = {
        "old/runs/r": ("metrics.jsonl", "settings.json", "samples.txt"),
        "old/cache": ("CACHEDIR.TAG", "inductor/x/code.py"),
        "fineweb": ("manifest.json", "sources.jsonl"),
        "exported": ("model.safetensors", "README.md", "merges.txt"),
        "data/runs/new": ("samples.txt",),
        "data/cache/inductor": ("code.py",),
    }
    for folder, names in own.items():
        for name in names:
            (tmp_path / folder / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / folder / name).write_text("{}")
    known = (tmp_path / "data" / "runs", tmp_path / "data" / "cache")
    assert texts_of(tmp_path, own=known) == ["a text"]
    assert texts_of(f"{tmp_path}/**/*.*", own=known) == ["a text"]
    documents = open_documents(TextSource(str(tmp_path), own=known))
    assert isinstance(documents, FileDocuments)
    left_out = {str(Path(name).relative_to(tmp_path)) for name in documents.own}
    assert left_out == {
        *("old/runs/r", "old/cache", "fineweb", "exported", "data/runs", "data/cache")
    }
    with pytest.raises(UserError, match=r"not read: .*/runs.*, which this program has written"):
        open_documents(TextSource(str(tmp_path / "old")))
    # A folder that is named is read.
    assert "{}" in texts_of(tmp_path / "exported")


def test_a_pipe_is_no_source(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(UserError, match=r"a\.txt is neither a file nor a folder"):
        open_documents(TextSource(str(tmp_path / "a.txt")))


@pytest.mark.parametrize(
    ("target", "reason"), (("gone.txt", "No such file"), ("a.txt", "Too many levels"))
)
def test_a_link_that_leads_nowhere_is_named(tmp_path: Path, target: str, reason: str) -> None:
    (tmp_path / "a.txt").symlink_to(tmp_path / target)
    with pytest.raises(UserError, match=rf"a\.txt cannot be read: {reason}"):
        texts_of(tmp_path)


@pytest.mark.parametrize("compression", (".gz", ".bz2", ".xz", ".zst"))
def test_empty_archive_is_damaged(tmp_path: Path, compression: str) -> None:
    (tmp_path / f"a.txt{compression}").write_bytes(b"")
    with pytest.raises(UserError, match="is damaged: it is empty"):
        texts_of(tmp_path)


def test_number_of_many_digits_is_a_fault_in_plain_words(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one", "id": ' + "9" * 5000 + "}\n")
    with pytest.raises(UserError, match="line 1 has a number of too many digits"):
        texts_of(tmp_path)
