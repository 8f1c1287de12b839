"""What was read may not change; what comes after it may be mended, replaced and removed."""

import gzip
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from app.data.manifest import MANIFEST, Manifest
from app.errors import UserError
from app.prepare.pipeline import prepare
from app.prepare.read_files import SOURCES
from app.prepare.spec import DatasetSpec, TextSource
from tests.prepare.conftest import shards_in

LINES = [json.dumps({"text": f"Line {number}. It rained on the hill."}) for number in range(400)]
CUT = '{"text": "cut o'


def spec_of(source: Path, *, skip_bad: float = 0, **options: Any) -> DatasetSpec:
    text = TextSource(str(source), shuffle_files=False)
    return DatasetSpec(text, "text", shard_size=200, skip_bad=skip_bad, **options)


def refused(spec: DatasetSpec, out: Path) -> str:
    """Return the error of preparing; the shards that exist stay."""
    before = shards_in(out)
    with pytest.raises(UserError) as raised:
        prepare(spec, out)
    assert before.items() <= shards_in(out).items()
    return str(raised.value)


def assert_same(out: Path, source: Path, folder: Path, **options: Any) -> None:
    """The dataset is the one that is made of the source as it is now."""
    prepare(spec_of(source, **options), folder)
    assert shards_in(out) == shards_in(folder)
    assert (out / MANIFEST).read_bytes() == (folder / MANIFEST).read_bytes()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(4):
        lines = LINES[100 * number : 100 * (number + 1)]
        (folder / f"{number}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def break_off(source: Path, out: Path) -> Path:
    """Prepare until a cut line in the third file; returns the file."""
    broken = source / "2.jsonl"
    whole = broken.read_text().splitlines(keepends=True)
    broken.write_text("".join([*whole[:80], CUT + "\n", *whole[80:]]))
    problem = refused(spec_of(source), out)
    assert problem.startswith(f"{broken}, line 81 is not JSON: Invalid control character")
    manifest = Manifest.load(out)
    assert manifest
    assert manifest.position
    assert (manifest.position["file"], len(manifest.shards)) == (2, 15)
    return broken


@pytest.mark.parametrize("mended", ("removed line", "corrected line", "blank line"))
def test_a_mended_line_lets_the_finished_shards_stand(
    source: Path, out: Path, tmp_path: Path, mended: str
) -> None:
    broken = break_off(source, out)
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.bin")}
    lines = broken.read_text().splitlines(keepends=True)
    lines[80:81] = {"removed line": [], "corrected line": [LINES[0] + "\n"]}.get(mended, ["\n"])
    broken.write_text("".join(lines))
    prepare(spec_of(source), out)
    assert before.items() <= {path: path.stat().st_mtime_ns for path in out.glob("*.bin")}.items()
    assert_same(out, source, tmp_path / "new")


def test_later_files_may_come_and_go(source: Path, out: Path, tmp_path: Path) -> None:
    broken = break_off(source, out)
    broken.write_text(broken.read_text().replace(CUT, ""))
    (source / "3.jsonl").unlink()
    (source / "4.jsonl").write_text(LINES[0] + "\n")
    prepare(spec_of(source), out)
    assert_same(out, source, tmp_path / "new")


def test_a_removed_file_lets_the_finished_shards_stand(
    source: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    break_off(source, out).unlink()
    before = shards_in(out)
    manifest = prepare(spec_of(source), out)
    assert before.items() <= shards_in(out).items()
    begun = sum(shard.documents for shard in manifest.shards[: len(before)])
    # The last one that was begun ends where its shard does.
    assert begun > 200
    assert manifest.counts["documents"] == begun + 100
    assert list(manifest.source["removed"]) == ["2.jsonl"]
    assert "2.jsonl has been removed; " in capsys.readouterr().out
    assert prepare(spec_of(source), out) == manifest


def edit_a_read_line(source: Path) -> str:
    path = source / "0.jsonl"
    path.write_text(path.read_text().replace("Line 5.", "Line 6."))
    return "0.jsonl has been edited"


def edit_a_read_line_of_the_current_file(source: Path) -> str:
    path = source / "2.jsonl"
    path.write_text(path.read_text().replace("Line 205.", "Line 206."))
    return "2.jsonl has been edited"


def remove_a_read_file(source: Path) -> str:
    (source / "1.jsonl").unlink()
    return "1.jsonl is gone"


def add_a_file_before_the_current_one(source: Path) -> str:
    (source / "10.jsonl").write_text(LINES[0])
    return "10.jsonl has been added before 2.jsonl"


def append_to_a_read_file(source: Path) -> str:
    with (source / "1.jsonl").open("a") as file:
        file.write(LINES[0])
    return "1.jsonl has been edited"


CHANGES = (
    edit_a_read_line,
    edit_a_read_line_of_the_current_file,
    remove_a_read_file,
    add_a_file_before_the_current_one,
    append_to_a_read_file,
)


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_what_was_read_is_refused_by_name(source: Path, out: Path, change: Any) -> None:
    break_off(source, out)
    problem = change(source)
    assert problem in refused(spec_of(source), out)


@pytest.mark.parametrize("is_complete", (True, False))
def test_a_copy_of_the_source_is_the_same_source(
    source: Path, out: Path, tmp_path: Path, is_complete: bool
) -> None:
    if is_complete:
        prepare(spec_of(source), out)
    else:
        broken = break_off(source, out)
        broken.write_text(broken.read_text().replace(CUT, ""))
    shutil.copytree(source, tmp_path / "copy", copy_function=shutil.copyfile)
    for path in (tmp_path / "copy").iterdir():
        os.utime(path, (1, 1))
    prepare(spec_of(tmp_path / "copy"), out)
    assert_same(out, source, tmp_path / "new")


@pytest.mark.parametrize("change", (*CHANGES[:3], CHANGES[4]))
def test_a_complete_dataset_of_changed_files_is_not_taken_for_theirs(
    source: Path, out: Path, change: Any
) -> None:
    prepare(spec_of(source), out)
    assert change(source) in refused(spec_of(source), out)


@pytest.mark.parametrize("is_all", (True, False))
def test_text_after_the_requested_tokens_may_change(
    source: Path, out: Path, capsys: pytest.CaptureFixture[str], is_all: bool
) -> None:
    spec = spec_of(source, total_tokens=None if is_all else 500)
    manifest = prepare(spec, out)
    (source / "9.jsonl").write_text(LINES[0])
    if is_all:
        assert "9.jsonl has been added" in refused(spec, out)
        return
    (source / "2.jsonl").unlink()
    assert prepare(spec, out) == manifest
    assert "complete already" in capsys.readouterr().out


def test_parquet_that_was_written_again_is_noticed(tmp_path: Path, out: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["one", "two"]}), path)
    size = path.stat().st_size
    prepare(spec_of(path), out)
    os.utime(path, (1, 1))
    prepare(spec_of(path), out)
    pq.write_table(pa.table({"text": ["one", "six"]}), path)
    assert path.stat().st_size == size
    assert "a.parquet has been edited" in refused(spec_of(path), out)


def test_the_record_of_files_survives_damage_as_an_error(source: Path, out: Path) -> None:
    prepare(spec_of(source), out)
    (out / SOURCES).write_text("{")
    assert f"{out / SOURCES} is damaged" in refused(spec_of(source), out)


def test_bad_lines_and_files_may_be_left_out_and_are_listed(
    source: Path, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = break_off(source, out)
    packed = gzip.compress("\n".join(LINES * 20).encode())
    (source / "21.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    (source / "22.txt").write_bytes(b"\xff")
    assert "22.txt is not UTF-8" in refused(spec_of(source), out)
    assert "is damaged" in refused(spec_of(source, skip_bad=1), out)
    assert "3 are bad, more than PREPARE_SKIP_BAD allows" in refused(
        spec_of(source, skip_bad=2), out
    )
    manifest = prepare(spec_of(source, skip_bad=3), out)
    assert manifest.counts["bad"] == 3
    assert [text.partition(":")[0] for text in manifest.left_out] == [
        "2.jsonl, line 81 is not JSON",
        "21.jsonl.gz is damaged",
        "22.txt is not UTF-8",
    ]
    assert "3 bad lines and files left out" in capsys.readouterr().out
    assert broken.exists()
    for workers in (1, 3):
        new = tmp_path / str(workers)
        prepare(spec_of(source, skip_bad=0.5), new, workers=workers)
        assert shards_in(new) == shards_in(out)
        assert (new / MANIFEST).read_bytes() == (out / MANIFEST).read_bytes()


def test_a_share_of_bad_lines_is_one_of_all_lines(tmp_path: Path, out: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([*LINES[:8], "bad", "bad"]))
    problem = refused(spec_of(path, skip_bad=0.19), out)
    assert problem.startswith("2 of 10 lines and files are bad, more than PREPARE_SKIP_BAD allows")
    assert "the first one: a.jsonl, line 9 is not JSON" in problem
    assert prepare(spec_of(path, skip_bad=0.2), out).counts["bad"] == 2


def test_mostly_bad_lines_end_the_work_early(tmp_path: Path, out: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([*LINES, *["bad"] * 5000]))
    assert ", line 501 is not JSON" in refused(spec_of(path, skip_bad=0.1), out)


def test_a_bad_line_after_the_requested_tokens_does_not_matter(tmp_path: Path, out: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([*LINES[:100], "bad"]))
    assert prepare(spec_of(path, total_tokens=600), out).tokens("train") == 600


def test_no_text_because_of_bad_lines_is_said_so(tmp_path: Path, out: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("bad\nbad\n")
    problem = refused(spec_of(path, skip_bad=5), out)
    assert "no text to train on; 2 bad lines and files were left out" in problem
    assert "2 of 2 lines and files are bad" in refused(spec_of(path, skip_bad=0.5), out)


@pytest.mark.parametrize("name", ("0a.jsonl", "9.jsonl", "9.parquet"))
def test_a_file_without_rows_may_be_copied_but_not_filled(
    source: Path, out: Path, name: str
) -> None:
    schema = pa.schema({"text": pa.string()})
    path = source / name
    if is_parquet := path.suffix == ".parquet":
        pq.write_table(schema.empty_table(), path)
    else:
        path.touch()
    manifest = prepare(spec_of(source), out)
    os.utime(path, (1, 1))
    assert prepare(spec_of(source), out) == manifest
    if is_parquet:
        pq.write_table(pa.table({"text": ["one"]}), path)
    else:
        path.write_text(LINES[0])
    assert f"{name} has been edited" in refused(spec_of(source), out)


def test_a_missing_record_of_files_is_written_again(source: Path, out: Path) -> None:
    break_off(source, out)
    # As versions without such a record leave it.
    (out / SOURCES).unlink()
    manifest = json.loads((out / MANIFEST).read_bytes())
    del manifest["position"]["current"]
    (out / MANIFEST).write_text(json.dumps(manifest))
    spec = spec_of(source, skip_bad=1)
    complete = prepare(spec, out)
    assert prepare(spec, out) == complete
    edit_a_read_line(source)
    assert "0.jsonl has been edited" in refused(spec, out)


def test_an_edit_that_keeps_size_and_time_is_noticed(source: Path, out: Path) -> None:
    prepare(spec_of(source), out)
    path = source / "0.jsonl"
    status = path.stat()
    edit_a_read_line(source)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size
    assert "0.jsonl has been edited" in refused(spec_of(source), out)


def test_the_added_file_is_named_in_any_order(source: Path, out: Path) -> None:
    spec = spec_of(source)
    spec = replace(spec, source=replace(spec.source, shuffle_files=True))
    prepare(spec, out)
    for name in ("a", "b", "c"):
        shutil.copy(source / "0.jsonl", source / f"{name}.jsonl")
        assert f"{name}.jsonl has been added" in refused(spec, out)
        (source / f"{name}.jsonl").unlink()
