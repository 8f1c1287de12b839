"""The record of the files that a dataset was read from: `sources.jsonl` beside its shards.

Preparing goes on, and a complete dataset stays valid, as long as the part of the source that was
read is unchanged. What comes after it may change: a broken file can be mended, replaced or removed.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from app.data.manifest import Manifest
from app.errors import UserError
from app.files import AppendOnlyFile
from app.formats import plural
from app.prepare.documents import Position
from app.prepare.listing import SourceFile
from app.prepare.local_files import FileDocuments

SOURCES = "sources.jsonl"
_FIX = "set PREPARE_OUT_DIR to another folder, or delete this one to prepare it anew"


class ReadFiles:
    """Records the files that were read, in the order in which they were read.

    A record has the file's `name`, size in `bytes` and time of its last change (`changed`, ns), and
    the hash (`digest`) of the `rows` that were read; `rows` is null if all were.

    Args:
        folder: the dataset's folder.
        documents: the files.
        position: where reading begins, from the manifest.
    """

    def __init__(self, folder: Path, documents: FileDocuments, position: Mapping[str, Any]) -> None:
        self._documents = documents
        start = position.get("file", 0)
        if position.get("row") and "current" in position:
            # Nothing more is read of a file that ends here.
            documents.digests[start] = position["current"]["digest"]
        path = folder / SOURCES
        recorded = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        self._count = len(recorded[:start])
        self._file = AppendOnlyFile(path, sum(map(len, recorded[:start])))

    def commit(self, end: Position, digest: str) -> dict[str, Any]:
        """Record the files before `end`; returns the record of the file that it is in.

        Args:
            digest: hash of what was read of that file.
        """
        records = [self._complete(index) for index in range(self._count, end.file)]
        self._append(records)
        self._count = end.file
        return _record(self._documents.files[end.file], end.row, digest)

    def finish(self, end: Position | None, digest: str) -> None:
        """Record the files of a complete dataset; `end` is None if all of them were read."""
        if end is None:
            files = range(self._count, len(self._documents.files))
            self._append([self._complete(index) for index in files])
        else:
            self._append([self.commit(end, digest)])

    def _complete(self, index: int) -> dict[str, Any]:
        digest = self._documents.digests.get(index)
        if digest is None:
            # It has no row, or an earlier version of this program has read it.
            digest = self._documents.digest(index, None)
        return _record(self._documents.files[index], None, digest)

    def _append(self, records: list[dict[str, Any]]) -> None:
        if records:
            self._file.append("".join(json.dumps(record) + "\n" for record in records).encode())
            self._file.sync()


def _record(file: SourceFile, rows: int | None, digest: str) -> dict[str, Any]:
    return {
        "name": file.name,
        "bytes": file.bytes,
        "changed": file.changed,
        "rows": rows,
        "digest": digest,
    }


def checked(folder: Path, manifest: Manifest, documents: FileDocuments) -> Manifest:
    """Return a dataset's manifest for its source as it is now, if what was read is unchanged.

    Raises:
        UserError: a file that was read has changed, or others come before it.
    """
    position = dict(manifest.position or {})
    lines = (folder / SOURCES).read_bytes().splitlines()
    # A process that died may have written more than the manifest knows of.
    count = len(lines) if manifest.complete else position.get("file", 0)
    try:
        records = [json.loads(line) for line in lines[:count]]
    except ValueError as error:
        raise UserError(f"{folder / SOURCES} is damaged: {error}", _FIX) from None
    names = {file.name: index for index, file in enumerate(documents.files)}
    removed = dict(manifest.source.get("removed", {}))
    current = position.get("current")
    if current and current["rows"]:
        if current["name"] in names:
            records.append(current)
        else:
            # Its text is in finished shards, which stay; the next file now has its place.
            position |= {"row": 0, "token": 0, "current": {}}
            removed[current["name"]] = current["rows"]
            rows = plural(current["rows"], "row")
            print(f"{current['name']} has been removed; {rows} of it stay in {folder}", flush=True)
    for index, record in enumerate(records):
        name, digest = record["name"], record["digest"]
        if name not in names:
            raise _changed(folder, f"{name} is gone")
        file = documents.files[index]
        if names[name] != index:
            raise _changed(folder, f"{_added(records, documents)} has been added before {name}")
        is_same = (file.bytes, file.changed) == (record["bytes"], record["changed"])
        # A file that was left out has no digest.
        if not is_same and digest and digest != documents.digest(index, record["rows"]):
            raise _changed(folder, f"{name} has been edited")
    is_exhausted = manifest.tokens("train") != manifest.settings["total_tokens"]
    if manifest.complete and is_exhausted and len(records) < len(names):
        raise _changed(folder, f"{_added(records, documents)} has been added")
    source = dict(documents.source) | ({"removed": removed} if removed else {})
    return replace(manifest, source=source, position=position or None)


def _added(records: list[dict[str, Any]], documents: FileDocuments) -> str:
    recorded = {record["name"] for record in records}
    return next(file.name for file in documents.files if file.name not in recorded)


def _changed(folder: Path, change: str) -> UserError:
    return UserError(f"the files that {folder} was prepared from have changed: {change}", _FIX)
