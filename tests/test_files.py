import hashlib
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from app.errors import UserError
from app.files import (
    PARTIAL,
    REPLACED,
    AppendOnlyFile,
    atomic_file,
    atomic_folder,
    json_value,
    read_json,
    sha256_of,
    write_json,
)


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Let this process's writes beyond `size` bytes of a file fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def write_and_fail(path: Path) -> None:
    with atomic_file(path) as file:
        file.write(b"after")
        raise KeyError


def fill(folder: Path, content: str, *, fail: bool = False) -> None:
    with atomic_folder(folder) as partial:
        (partial / "file").write_text(content)
        if fail:
            raise KeyError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_file_appears_with_all_its_content(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"before")
    with atomic_file(path) as file:
        file.write(b"after")
        assert path.read_bytes() == b"before"
    assert path.read_bytes() == b"after"
    assert names(tmp_path) == ["file"]


def test_file_stays_as_it_is_if_the_block_fails(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"before")
    with pytest.raises(KeyError):
        write_and_fail(path)
    assert path.read_bytes() == b"before"
    assert names(tmp_path) == ["file"]


def test_failed_write_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with (
        file_size_limit(10),
        pytest.raises(OSError, match="File too large") as raised,
        atomic_file(path) as file,
    ):
        file.write(bytes(20))
    assert raised.value.filename == str(path)
    assert names(tmp_path) == []


def test_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    fill(folder, "before")
    (folder / "other").touch()
    fill(folder, "after")
    assert names(tmp_path) == ["folder"]
    assert names(folder) == ["file"]
    assert (folder / "file").read_text() == "after"


def test_folder_stays_as_it_is_if_the_block_fails(tmp_path: Path) -> None:
    fill(tmp_path / "folder", "before")
    with pytest.raises(KeyError):
        fill(tmp_path / "folder", "after", fail=True)
    assert (tmp_path / "folder" / "file").read_text() == "before"
    assert names(tmp_path) == ["folder"]


def test_folder_whose_replacement_was_killed_halfway_is_restored(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    fill(folder, "before")
    folder.rename(folder.with_name(f"folder{REPLACED}"))
    folder.with_name(f"folder{PARTIAL}").mkdir()
    with pytest.raises(KeyError):
        fill(folder, "after", fail=True)
    assert (folder / "file").read_text() == "before"
    assert names(tmp_path) == ["folder"]


def test_failed_append_leaves_no_part_and_is_repeated(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = AppendOnlyFile(path)
    log.append(b"one\n")
    with file_size_limit(6):
        for record in (b"two\n", b"three\n"):
            with pytest.raises(OSError, match="File too large") as raised:
                log.append(record)
            assert raised.value.filename == str(path)
            assert path.read_bytes() == b"one\n"
    assert log.sync() == len(b"one\ntwo\nthree\n")
    assert path.read_bytes() == b"one\ntwo\nthree\n"


@pytest.mark.parametrize(("size", "kept"), ((None, b"12345"), (9, b"12345"), (3, b"123"), (0, b"")))
def test_opening_truncates_to_the_size(tmp_path: Path, size: int | None, kept: bytes) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"12345")
    AppendOnlyFile(path, size).append(b"end")
    assert path.read_bytes() == kept + b"end"


def test_json_is_read_as_it_was_written(tmp_path: Path) -> None:
    value = {"run": "Läufe", "steps": [1, None]}
    write_json(tmp_path / "file.json", value)
    assert read_json(tmp_path / "file.json", "fix") == value


@pytest.mark.parametrize(
    ("content", "problem"),
    (
        (b"{", "is not valid JSON"),
        (b"\xff{}", "is not valid JSON"),
        (b"[1]", "does not hold a JSON object"),
    ),
)
def test_file_without_a_json_object_is_refused(
    tmp_path: Path, content: bytes, problem: str
) -> None:
    path = tmp_path / "file.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=problem) as raised:
        read_json(path, "write it again")
    assert raised.value.fix == "write it again"
    assert str(path) in raised.value.problem


def test_sha256_of_a_file_larger_than_the_buffer(tmp_path: Path) -> None:
    content = bytes(range(256)) * (17 << 12)
    (tmp_path / "file").write_bytes(content)
    assert sha256_of(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_a_value_of_a_json_file_or_none(tmp_path: Path) -> None:
    path = tmp_path / "it.json"
    assert json_value(path, "a") is None
    path.write_text('{"a": {"b": 0}, "c": "text"}')
    assert json_value(path, "a", "b") == 0
    assert [json_value(path, *keys) for keys in (("b",), ("c", "b"), ("a", "b", "c"))] == [None] * 3
    path.write_text('{"a": ')
    assert json_value(path, "a") is None
