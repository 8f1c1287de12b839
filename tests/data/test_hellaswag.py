"""HellaSwag's file: its form, and its download from a server on loopback."""

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from app.data import hellaswag
from app.data.hellaswag import SHA256, URL, provide_questions, read_questions
from app.errors import NetworkError, UserError
from tests.inference.hellaswag_questions import FILE, own_questions

CONTENT = FILE.read_bytes()
HASH = hashlib.sha256(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves CONTENT, and what goes wrong in its place."""

    daemon_threads = True
    requests: list[str]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/file")
            self.end_headers()
            return
        self.send_response({"/404": 404, "/503": 503}.get(self.path, 200))
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        if self.path == "/cut":
            self.wfile.write(CONTENT[:1000])
        elif self.path == "/slow":
            with suppress(OSError):
                for byte in CONTENT[:100]:
                    self.wfile.write(bytes([byte]))
                    time.sleep(0.05)
        else:
            self.wfile.write(CONTENT if self.path != "/other" else b"x" * len(CONTENT))

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as server:
        server.requests = []
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.mark.parametrize("place", ("file", "moved"))
def test_an_absent_file_is_downloaded_once(tmp_path: Path, server: Server, place: str) -> None:
    path = tmp_path / "cache" / "hellaswag_val.jsonl"
    server.requests.clear()
    for _ in range(2):
        provide_questions(path, f"{server.url}/{place}", HASH)
        assert path.read_bytes() == CONTENT
    assert server.requests.count("/file") == 1
    assert {file.name for file in path.parent.iterdir()} == {path.name, f".{path.name}.lock"}


def test_processes_that_download_at_the_same_time_take_turns(
    tmp_path: Path, server: Server
) -> None:
    path = tmp_path / "questions.jsonl"
    server.requests.clear()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: provide_questions(path, f"{server.url}/file", HASH), range(8)))
    assert path.read_bytes() == CONTENT
    assert server.requests == ["/file"]


@pytest.mark.parametrize(
    ("place", "reason"),
    (
        ("404", "404 Not Found"),
        ("503", "503 Service Unavailable"),
        ("other", "what answers is another file, perhaps a log-in page"),
        ("cut", "without sending complete message body"),
        ("slow", "it has not ended after 1 s"),
    ),
)
def test_a_failed_download_leaves_nothing(
    tmp_path: Path,
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    reason: str,
) -> None:
    monkeypatch.setattr(hellaswag, "_DOWNLOAD_SECONDS", 1.0)
    path = tmp_path / "questions.jsonl"
    with pytest.raises(NetworkError) as caught:
        provide_questions(path, f"{server.url}/{place}", HASH)
    assert "HellaSwag's questions could not be downloaded: " in caught.value.problem
    assert reason in caught.value.problem
    assert "\n" not in caught.value.problem
    assert f"as {path}, or set TRAIN_HELLASWAG_EVERY=0" in caught.value.fix
    assert [file.name for file in tmp_path.iterdir()] == [f".{path.name}.lock"]


@pytest.mark.parametrize(
    ("variables", "reason"),
    (
        ({}, "Connection refused"),
        ({"https_proxy": "http://127.0.0.1:9"}, "Connection refused"),
        ({"https_proxy": "nonsense://"}, "nonsense"),
        ({"SSL_CERT_FILE": "/nowhere"}, ""),
    ),
)
def test_a_server_that_cannot_be_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], reason: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    url = URL if "https_proxy" in variables else "https://127.0.0.1:9/file"
    with pytest.raises(NetworkError, match=f"could not be downloaded: .*{reason}.* \\({url}"):
        provide_questions(tmp_path / "questions.jsonl", url, HASH)


def test_another_file_in_the_place_of_the_published_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "hellaswag_val.jsonl"
    path.write_bytes(CONTENT)
    with pytest.raises(UserError, match="is not HellaSwag's published file") as caught:
        provide_questions(path)
    assert "delete it" in caught.value.fix
    assert path.read_bytes() == CONTENT
    assert len(SHA256) == 64


def test_a_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "spaced.jsonl"
    path.write_bytes(CONTENT.replace(b"\n", b"\r\n\r\n"))
    assert read_questions(path) == read_questions(FILE)
    assert [question.label for question in read_questions(path)] == [1, 0, 3, 2, 0, 2, 1, 3]


def test_texts_are_cleaned_as_lm_eval_does() -> None:
    baking, parser, cafe, *_ = read_questions(FILE)
    assert baking.beginning == "Baking bread: A woman kneads dough on a table. She"
    assert baking.choices[1] == "puts it into a warm oven."
    assert parser.beginning == (
        "Computers and Electronics: How to write a parser. Read the grammar. "
        "Every rule becomes a function of its own."
    )
    assert parser.choices[2] == " Ask the grammar for its name. It has none."
    assert cafe.beginning.endswith('orders a crème brûlée — "très bon" 😀. Anna and bo')


LINE = own_questions()[0]


@pytest.mark.parametrize(
    ("changed", "fault"),
    (
        ({"endings": ["a", "b", "c"]}, "endings List should have at least 4 items"),
        ({"endings": ["a", "b", "c", "d", "e"]}, "endings List should have at most 4 items"),
        ({"endings": ["a", "b", "c", 4]}, "endings 3 Input should be a valid string"),
        ({"label": 4}, "label Input should be less than 4"),
        ({"label": ""}, "label Input should be a valid integer"),
        ({"ctx_a": None}, "ctx_a Input should be a valid string"),
    ),
)
def test_a_line_of_another_form_is_named(
    tmp_path: Path, changed: dict[str, object], fault: str
) -> None:
    path = tmp_path / "wrong.jsonl"
    path.write_bytes(CONTENT + json.dumps(LINE | changed).encode() + b"\n")
    with pytest.raises(UserError) as caught:
        read_questions(path)
    assert caught.value.problem.startswith(
        f"{path}, line 9 is not a question of HellaSwag: {fault}"
    )
    assert "TRAIN_HELLASWAG_FILE" in caught.value.fix


@pytest.mark.parametrize(
    ("content", "problem"),
    (
        (b"", "has no questions of HellaSwag"),
        (b"\n\n", "has no questions of HellaSwag"),
        (b"\xff\xfe", "line 1 is not a question of HellaSwag: Invalid JSON"),
        (b"[]", "line 1 is not a question of HellaSwag"),
        (CONTENT[:-20], "line 8 is not a question of HellaSwag: Invalid JSON"),
        (b'{"activity_label": "x"}', "line 1 is not a question of HellaSwag: ctx_a Field required"),
    ),
)
def test_a_file_of_another_form_is_refused(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "wrong.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=problem):
        read_questions(path)


def test_a_folder_or_nothing_is_no_file(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent.jsonl"):
        with pytest.raises(UserError, match=f"{path} is not a file"):
            read_questions(path)
