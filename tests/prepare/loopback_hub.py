"""The Hugging Face hub on loopback: its endpoints over real sockets, and its faults on demand."""

import hashlib
import json
import re
import socket
import struct
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import quote, unquote, urlsplit

# How the names of files end that are in the storage.
_LARGE = (".parquet", ".safetensors", ".bin")


@dataclass
class Fault:
    """What happens to requests that `where` is found in, a regular expression.

    It searches "METHOD path" and, where there is one, " bytes=first-last".

    Args:
        status, headers: answer this instead.
        body: of an answer, send one half only and then `reset` the connection, `stall` until the
            client leaves, or close the connection (`cut`); or tell and send all but the last
            bytes (`short`).
        down: stop listening, and cut every connection.
        times: how often; None for always.
    """

    where: str
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: Literal["whole", "reset", "stall", "cut", "short"] = "whole"
    down: bool = False
    times: int | None = None


@dataclass(frozen=True)
class Request:
    """A request that came, at a time of time.monotonic()."""

    at: float
    line: str


class Hub:
    """A hub with the repositories that were published on it."""

    def __init__(self) -> None:
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.bytes_sent = 0
        self.gates: dict[str, str] = {}  # repository -> the only token that opens it
        self.revoked: set[str] = set()  # tokens
        self.folders: dict[tuple[str, str], Path] = {}  # repository, commit -> its files
        self.main: dict[str, str] = {}  # repository -> commit
        self.renamed: dict[str, str] = {}  # a model's id without its owner -> its id
        self._lock = threading.Lock()
        self._server: _Server | None = None
        self._port = 0

    def publish(self, repository: str, folder: Path) -> str:
        """Move the repository's branch `main` to a commit with these files; earlier ones stay."""
        commit = hashlib.sha1(str(folder).encode()).hexdigest()
        self.folders[repository, commit] = folder
        self.main[repository] = commit
        return commit

    @property
    def variables(self) -> dict[str, str]:
        """Return the variables that make a process take this for the hub."""
        return {
            "HF_ENDPOINT": f"http://127.0.0.1:{self._port}",
            "no_proxy": "127.0.0.1,localhost",
        }

    @property
    def storage(self) -> str:
        """Where large files are, as on the hub another origin, which takes no token."""
        return f"http://localhost:{self._port}/storage"

    def fault_of(self, line: str) -> Fault | None:
        """Record a request, and find what shall happen to it."""
        with self._lock:
            self.requests.append(Request(time.monotonic(), line))
            for fault in self.faults:
                if fault.times == 0 or not re.search(fault.where, line):
                    continue
                if fault.times:
                    fault.times -= 1
                return fault
        return None

    def up(self) -> None:
        """Listen, always on the same port; nothing happens if it does."""
        if self._server is not None:
            return
        self._server = _Server(self, self._port)
        self._port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def down(self) -> None:
        """Refuse connections and cut those there are."""
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.server_close()
            server.cut()

    def __enter__(self) -> Self:
        self.up()
        return self

    def __exit__(self, *_: object) -> None:
        self.down()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, hub: Hub, port: int) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.hub = hub
        self._connections: set[socket.socket] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        # Without the usual shutdown, which would say goodbye where a reset is wanted.
        self._connections.discard(request)
        request.close()

    def cut(self) -> None:
        for connection in tuple(self._connections):
            _shut(connection)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: clients leave in the middle, and what is wrong here fails their test."""


def _sibling(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    entry = {"rfilename": path.name, "size": len(content), "blobId": blob}
    if path.name.endswith(_LARGE):
        sha256 = hashlib.sha256(content).hexdigest()
        entry["lfs"] = {"sha256": sha256, "size": len(content), "pointerSize": 134}
    return entry


def _shut(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # the client was first


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server
    fault: Fault | None

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        wanted = self.headers.get("Range", "")
        self.fault = self.server.hub.fault_of(f"{self.command} {path} {wanted}".strip())
        if self.fault and self.fault.down:
            self.server.hub.down()
        elif self.fault and self.fault.status:
            self._answer(self.fault.status, headers=self.fault.headers)
        else:
            self._route(path.split("/"))

    def _route(self, path: list[str]) -> None:
        below: list[str]
        match path:
            case ["api", "models", name, "revision" | "auth-check", *_] | [name, "resolve", *_] if (
                name in self.server.hub.renamed
            ):
                place = "/".join(path).replace(name, self.server.hub.renamed[name], 1)
                query = urlsplit(self.path).query
                return self._answer(307, headers={"Location": f"/{place}?{query}"})
            case ["api", "datasets" | "models", owner, name, "auth-check" as what]:
                repository, revision, below = f"{owner}/{name}", "main", []
            case ["api", "datasets" | "models", owner, name, what, revision, *below]:
                repository = f"{owner}/{name}"
            case ["api", "models", repository, "revision" as what, revision]:
                below = []
            case ["datasets", owner, name, "resolve" as what, revision, *below] | [
                owner,
                name,
                "resolve" as what,
                revision,
                *below,
            ]:
                repository = f"{owner}/{name}"
            case ["storage", owner, name, revision, *below]:
                repository, what = f"{owner}/{name}", "storage"
            case _:
                return self._refuse(404, "NoSuchEndpoint")
        hub, token = self.server.hub, self.headers.get("Authorization")
        if token and token.removeprefix("Bearer ") in hub.revoked:
            return self._refuse(401, "", "Invalid credentials in Authorization header")
        if repository not in hub.main:
            # The hub does not tell strangers which private datasets there are.
            return self._refuse(404 if token else 401, "RepoNotFound", "Repository not found")
        commit = hub.main[repository] if revision == "main" else revision
        folder = hub.folders.get((repository, commit))
        if folder is None:
            return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        match what:
            case "revision":
                answer = {"id": repository, "sha": commit, "gated": repository in hub.gates}
                if "blobs=true" in self.path.lower():
                    answer["siblings"] = [_sibling(path) for path in sorted(folder.iterdir())]
                return self._answer(200, json.dumps(answer).encode())
            case "auth-check":
                if self._is_shut(repository):
                    return self._refuse_gated()
                return self._answer(200, b"{}")
            case "tree":
                return self._tree(folder, "/".join(below))
            case "resolve" | "storage":
                return self._file(what, repository, commit, "/".join(below))
        return self._refuse(404, "NoSuchEndpoint")

    def _is_shut(self, repository: str) -> bool:
        gates = self.server.hub.gates
        return repository in gates and self.headers.get("Authorization") != (
            f"Bearer {gates[repository]}"
        )

    def _refuse_gated(self) -> None:
        status = 403 if self.headers.get("Authorization") else 401
        self._refuse(status, "GatedRepo", "Access is restricted")

    def _tree(self, folder: Path, below: str) -> None:
        if not (folder / below).is_dir():
            return self._refuse(404, "EntryNotFound")
        found = sorted(
            (folder / below).glob("**/*" if "recursive=true" in self.path.lower() else "*")
        )
        entries = [
            {
                "type": "file" if path.is_file() else "directory",
                "path": path.relative_to(folder).as_posix(),
                "size": path.stat().st_size if path.is_file() else 0,
                "oid": "0" * 40,
            }
            for path in found
        ]
        return self._answer(200, json.dumps(entries).encode())

    def _file(self, what: str, repository: str, commit: str, name: str) -> None:
        hub, token = self.server.hub, self.headers.get("Authorization")
        path = hub.folders[repository, commit] / name
        large = name.endswith(_LARGE)
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if what == "storage" and token:
            return self._refuse(400, "InvalidArgument", "Only one auth mechanism allowed")
        if what == "resolve" and self._is_shut(repository):
            return self._refuse_gated()
        if not path.is_file():
            return self._refuse(404, "EntryNotFound", headers=headers)
        size = path.stat().st_size
        headers["ETag"] = f'"{hashlib.sha1(f"{commit}/{name}".encode()).hexdigest()}"'
        if what == "resolve" and large:
            headers |= {"X-Linked-Size": str(size), "X-Linked-ETag": headers["ETag"]}
            headers["Location"] = f"{hub.storage}/{repository}/{commit}/{quote(name)}?signed"
            return self._answer(302, headers=headers)
        content = path.read_bytes()
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            return self._answer(200, content, headers)
        first, last = int(wanted[1]), min(int(wanted[2] or size), size - 1)
        if first >= size:
            return self._answer(416, headers={"Content-Range": f"bytes */{size}"})
        headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        return self._answer(206, content[first : last + 1], headers)

    def _refuse(
        self, status: int, code: str, message: str = "", headers: dict[str, str] | None = None
    ) -> None:
        said = {"X-Error-Code": code, "X-Error-Message": message} | (headers or {})
        self._answer(status, json.dumps({"error": message}).encode(), said)

    def _answer(
        self, status: int, content: bytes = b"", headers: dict[str, str] | None = None
    ) -> None:
        body = self.fault.body if self.fault else "whole"
        if body == "short":
            content = content[:-16]
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        if body in ("whole", "short"):
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)
                self.server.hub.bytes_sent += len(content)
            return
        if self.command == "GET":
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
        self.close_connection = True
        if body == "stall":
            self.connection.recv(1)  # a client that waits in vain says nothing until it leaves
        elif body == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def log_request(self, *_: object) -> None:
        """Say nothing."""
