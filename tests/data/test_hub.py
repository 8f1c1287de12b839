import json
import shutil
import socketserver
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from app.data.documents import open_documents
from app.data.prepare import prepare
from app.data.shards import Manifest
from app.errors import UserError
from tests.data.conftest import Start

README = """---
license: odc-by
configs:
- config_name: default
  data_files:
  - split: train
    path: data/*/*
  - split: test
    path: held/*
- config_name: sample-10BT
  data_files:
  - split: train
    path: sample/10BT/*
---
# A dataset
"""
COMMIT = "9bb295ddab0e05d785b879661af7260fed5140fc"
SAMPLE = [[f"file {file}, row {row} " * 20 for row in range(50)] for file in range(3)]


def write_parquet(path: Path, texts: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    ids = [f"<urn:uuid:{number}>" for number in range(len(texts))]
    columns = {"text": texts, "id": ids, "url": ids, "token_count": list(range(len(texts)))}
    pq.write_table(pa.table(columns), path, row_group_size=16)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that is laid out as FineWeb is on the hub."""
    folder = tmp_path_factory.mktemp("hub") / "fineweb"
    folder.mkdir()
    (folder / "README.md").write_text(README)
    write_parquet(folder / "data" / "CC-MAIN-2024-10" / "000_00000.parquet", ["default"])
    write_parquet(folder / "held" / "000.parquet", ["test"])
    for file in (2, 0, 1):
        write_parquet(folder / "sample" / "10BT" / f"{file:03d}_00000.parquet", SAMPLE[file])
    return folder


def repository_of(folder: Path, **files: str) -> Path:
    """A repository with one configuration `own` of the files given, part_0=… is part_0."""
    folder.mkdir()
    kind = next(iter(files)).rpartition("_")[2]
    (folder / "README.md").write_text(
        f"---\nconfigs:\n- config_name: own\n  data_files: '*.{kind}'\n---\n"
    )
    for name, content in files.items():
        (folder / name.replace(f"_{kind}", f".{kind}")).write_text(content)
    return folder


def texts_of(dataset: Path, config: str | None = None, **options: str) -> list[str]:
    batches = open_documents(str(dataset), config=config, **options).batches()
    return [text for batch in batches for text in batch.texts]


def test_configuration_is_read_in_the_order_of_files_and_rows(repository: Path) -> None:
    assert texts_of(repository, "sample-10BT") == [text for file in SAMPLE for text in file]


def test_without_a_configuration_the_default_is_read(repository: Path) -> None:
    assert texts_of(repository) == ["default"]


def test_split_is_read(repository: Path) -> None:
    assert texts_of(repository, split="test") == ["test"]


def test_relative_folder_is_read(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository.parent)
    assert texts_of(Path("fineweb"), "sample-10BT")[0] == SAMPLE[0][0]


def test_another_column_is_read(repository: Path) -> None:
    assert texts_of(repository, text_column="url") == ["<urn:uuid:0>"]


def test_source_names_configuration_and_files(repository: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(repository, tmp_path / "elsewhere" / "fineweb")
    one, other = (open_documents(str(at), config="sample-10BT").source for at in (repository, moved))
    assert one == other
    assert one["dataset"] == "fineweb"
    assert one["config"] == "sample-10BT"
    assert one["split"] == "train"
    write_parquet(moved / "sample" / "10BT" / "001_00000.parquet", ["other"])
    assert open_documents(str(moved), config="sample-10BT").source != one


def test_unknown_configuration_is_refused_with_those_there_are(repository: Path) -> None:
    with pytest.raises(UserError, match="has no configuration 'sample-10TB'") as raised:
        open_documents(str(repository), config="sample-10TB")
    assert raised.value.fix.endswith("one of: default, sample-10BT")


def test_missing_configuration_is_refused_with_those_there_are(tmp_path: Path) -> None:
    folder = repository_of(tmp_path / "two", a_jsonl='{"text": "a"}\n')
    names = "- config_name: one\n  data_files: a.jsonl\n- config_name: two\n  data_files: a.jsonl\n"
    (folder / "README.md").write_text(f"---\nconfigs:\n{names}---\n")
    with pytest.raises(UserError, match="has several configurations") as raised:
        open_documents(str(folder))
    assert raised.value.fix.endswith("one of: one, two")


def test_unknown_split_is_refused_with_those_there_are(repository: Path) -> None:
    with pytest.raises(UserError, match="has no split 'validation'") as raised:
        open_documents(str(repository), split="validation")
    assert raised.value.fix.endswith("one of: train, test")


def test_unknown_column_is_refused_with_those_there_are(repository: Path) -> None:
    with pytest.raises(UserError, match="has no column 'body'") as raised:
        texts_of(repository, text_column="body")
    assert raised.value.fix.endswith("one of: text, id, url, token_count")


def test_configuration_without_files_is_refused(tmp_path: Path) -> None:
    folder = repository_of(tmp_path / "r", a_jsonl='{"text": "a"}\n')
    (folder / "a.jsonl").unlink()
    with pytest.raises(UserError, match="cannot be read") as raised:
        open_documents(str(folder), config="own")
    assert len(str(raised.value)) < 600


def test_json_lines_are_streamed_in_order(tmp_path: Path) -> None:
    rows = [[json.dumps({"n": n, "text": f"{file} {n}"}) for n in range(300)] for file in "ab"]
    folder = repository_of(tmp_path / "r", b_jsonl="\n".join(rows[1]), a_jsonl="\n".join(rows[0]))
    assert texts_of(folder, "own") == [f"{file} {n}" for file in "ab" for n in range(300)]


def test_csv_is_streamed(tmp_path: Path) -> None:
    folder = repository_of(tmp_path / "r", a_csv='id,text\n1,"one, ""1"""\n2,\n3,"three\n3"\n')
    documents = open_documents(str(folder))
    assert [batch.texts for batch in documents.batches()] == [['one, "1"', "three\n3"]]
    assert documents.counts == {"skipped": 1}


def test_streamed_source_changes_with_its_files(tmp_path: Path) -> None:
    folder = repository_of(tmp_path / "r", a_csv="text\none\n")
    before = open_documents(str(folder)).source
    (folder / "a.csv").write_text("text\none\ntwo\n")
    assert open_documents(str(folder)).source != before


def test_unknown_column_of_a_stream_is_refused_with_those_there_are(tmp_path: Path) -> None:
    folder = repository_of(tmp_path / "r", a_csv="id,body\n1,one\n")
    with pytest.raises(UserError, match="has no column 'text'") as raised:
        texts_of(folder)
    assert raised.value.fix.endswith("one of: id, body")


def test_broken_file_of_a_stream_is_refused(tmp_path: Path) -> None:
    folder = repository_of(tmp_path / "r", a_jsonl='{"text": "fine"}\n{"text": broken}\n')
    with pytest.raises(UserError, match="r cannot be read: ") as raised:
        texts_of(folder)
    assert len(str(raised.value)) < 600


@pytest.mark.parametrize("kind", ("parquet", "jsonl", "csv"))
def test_leaving_a_stream_early_ends_the_process_with_0(
    tmp_path: Path, start: Start, kind: str
) -> None:
    """A token limit stops in the first of many files and row groups, three times over."""
    texts = [f"{number} " * 500 for number in range(2000)]
    folder = repository_of(tmp_path / "r", **{f"none_{kind}": ""})
    for file in range(4):
        path = folder / f"{file}.{kind}"
        match kind:
            case "parquet":
                (folder / "none.parquet").unlink(missing_ok=True)
                write_parquet(path, texts)
            case "jsonl":
                path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
            case _:
                path.write_text("text\n" + "\n".join(texts))
    settings = {"PREPARE_DATASET": str(folder), "PREPARE_TOTAL_TOKENS": "1000"}
    runs = [
        start("-m", "app", "prepare", **settings, PREPARE_VAL_TOKENS="0", PREPARE_OUT_DIR=str(run))
        for run in range(3)
    ]
    for run, process in enumerate(runs):
        _, error = process.communicate(timeout=120)
        assert process.returncode == 0, error
        assert len((tmp_path / str(run) / "r_000000.bin").read_bytes()) == 1024 + 2 * 1000
