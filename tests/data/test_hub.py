import json
import random
import shutil
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
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


def write_parquet(path: Path, texts: list[str], *, scan_bytes: int = 8192) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    ids = [f"<urn:uuid:{number}>" for number in range(len(texts))]
    scans = [random.Random(number).randbytes(scan_bytes) for number in range(len(texts))]
    columns = {"text": texts, "id": ids, "scan": scans, "token_count": list(range(len(texts)))}
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


def texts_of(dataset: Path, config: str | None = None, **options: Any) -> list[str]:
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
    assert texts_of(repository, text_column="id") == ["<urn:uuid:0>"]


def test_source_names_configuration_and_files(repository: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(repository, tmp_path / "elsewhere" / "fineweb")
    one, other = (
        open_documents(str(at), config="sample-10BT").source for at in (repository, moved)
    )
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
    assert raised.value.fix.endswith("one of: text, id, scan, token_count")


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


LEAVE_EARLY = """
import sys
from pathlib import Path
from app.data.prepare import prepare
for kind in ("parquet", "jsonl"):
    prepare(str(Path(sys.argv[1]) / kind), Path(sys.argv[2]) / kind, name=kind, total_tokens=1000)
"""


def test_leaving_a_stream_early_ends_the_process_with_0(tmp_path: Path, start: Start) -> None:
    """A token limit stops in the first of many files and row groups, three times over."""
    texts = [f"{number} " * 50 for number in range(4000)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    for file in range(4):
        write_parquet(tmp_path / "parquet" / f"{file}.parquet", texts, scan_bytes=40)
        (tmp_path / "jsonl").mkdir(exist_ok=True)
        (tmp_path / "jsonl" / f"{file}.jsonl").write_text(lines)
    for kind in ("parquet", "jsonl"):
        configs = "configs:\n- config_name: own\n  data_files: '*'\n"
        (tmp_path / kind / "README.md").write_text(f"---\n{configs}---\n")
    for process in [start("-c", LEAVE_EARLY, tmp_path, tmp_path / str(run)) for run in range(3)]:
        output, error = process.communicate(timeout=120)
        assert process.returncode == 0, error
        assert output.count("1,000 training") == 2


class Hub(ThreadingHTTPServer):
    """The few endpoints of the hub that matter here, over a folder of repositories."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.folder = folder
        self.failures = 0
        self.bytes_sent = 0

    @property
    def variables(self) -> dict[str, str]:
        """What makes a process take this for the hub."""
        return {"HF_ENDPOINT": f"http://127.0.0.1:{self.server_port}", "no_proxy": "127.0.0.1"}


class HubHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        if self.server.failures and path.startswith("api/datasets"):
            self.server.failures -= 1
            return self._answer(503)
        match path.split("/"):
            case ["api", "datasets", "own", name, "revision", revision]:
                return self._revision(name, revision)
            case ["api", "datasets", "own", name, "tree", revision, *below]:
                return self._tree(self.server.folder / name, "/".join(below))
            case ["datasets", "own", name, "resolve", revision, *below]:
                return self._file(self.server.folder / name / "/".join(below))
        return self._answer(404)

    def _revision(self, name: str, revision: str) -> None:
        if not (self.server.folder / name).is_dir():
            return self._answer(404, error="RepoNotFound")
        if revision not in ("main", COMMIT):
            return self._answer(404, error="RevisionNotFound")
        return self._answer(200, json.dumps({"id": f"own/{name}", "sha": COMMIT}).encode())

    def _tree(self, repository: Path, below: str) -> None:
        folder = repository / below
        recursive = "recursive=True" in self.path or "recursive=true" in self.path
        entries = [
            {
                "type": "file" if path.is_file() else "directory",
                "path": path.relative_to(repository).as_posix(),
                "size": path.stat().st_size if path.is_file() else 0,
                "oid": "0" * 40,
            }
            for path in sorted(folder.rglob("*") if recursive else folder.iterdir())
        ]
        self._answer(200, json.dumps(entries).encode())

    def _file(self, path: Path) -> None:
        if not path.is_file():
            return self._answer(404, error="EntryNotFound")
        content = path.read_bytes()
        wanted = self.headers.get("Range")
        if wanted is None:
            return self._answer(200, content)
        first, last = map(int, wanted.removeprefix("bytes=").split("-"))
        return self._answer(206, content[first : last + 1])

    def _answer(self, status: int, content: bytes = b"", error: str | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hash(content):x}"')
        self.send_header("X-Repo-Commit", COMMIT)
        if error:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)
            self.server.bytes_sent += len(content)

    def log_request(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def hub(repository: Path) -> Iterator[Hub]:
    with Hub(repository.parent) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


FINEWEB = {
    "PREPARE_DATASET": "own/fineweb",
    "PREPARE_DATASET_CONFIG": "sample-10BT",
    "PREPARE_TOTAL_TOKENS": "10000",
    "PREPARE_VAL_TOKENS": "1000",
    "PREPARE_OUT_DIR": "out",
}


def test_hub_gives_the_same_as_the_folder_and_records_the_commit(
    hub: Hub, repository: Path, tmp_path: Path, start: Start
) -> None:
    hub.failures = 1
    process = start("-m", "app", "prepare", **FINEWEB, **hub.variables)
    output, error = process.communicate(timeout=60)
    assert process.returncode == 0, error
    assert "the hub does not answer" in output
    assert "trying again in 1 s" in output
    hub_manifest = Manifest.load(tmp_path / "out")
    assert hub_manifest is not None
    assert hub_manifest.source == {
        "dataset": "own/fineweb",
        "config": "sample-10BT",
        "split": "train",
        "revision": COMMIT,
    }
    settings: dict[str, Any] = {"total_tokens": 10_000, "val_tokens": 1000}
    folder = tmp_path / "folder"
    prepare(str(repository), folder, name="fineweb", config="sample-10BT", **settings)
    folder_manifest = Manifest.load(folder)
    assert folder_manifest is not None
    assert hub_manifest.shards == folder_manifest.shards
    size = (repository / "sample" / "10BT" / "000_00000.parquet").stat().st_size
    assert hub.bytes_sent < size, "only the text column of the three files travels"


@pytest.mark.parametrize(
    ("change", "message"),
    (
        ({"PREPARE_DATASET": "own/finewep"}, "there is no dataset own/finewep on the hub"),
        ({"PREPARE_DATASET_REVISION": "v9"}, "own/fineweb has no revision 'v9'"),
    ),
)
def test_wrong_hub_dataset_is_one_readable_error(
    hub: Hub, start: Start, change: dict[str, str], message: str
) -> None:
    process = start("-m", "app", "prepare", **{**FINEWEB, **hub.variables, **change})
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2
    assert message in error
    assert len(error.splitlines()) == 2


def test_without_a_network_a_hub_dataset_fails_soon(start: Start) -> None:
    begun = time.monotonic()
    process = start("-m", "app", "prepare", **FINEWEB)
    output, error = process.communicate(timeout=60)
    assert process.returncode == 5
    assert time.monotonic() - begun < 20
    assert len(output.splitlines()) == 2
    assert error.startswith("error: the hub does not answer: ")
    assert len(error.splitlines()) == 2
