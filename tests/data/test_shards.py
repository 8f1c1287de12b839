import errno
import hashlib
import json
import os
import struct
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.data.dataset import open_dataset
from app.data.manifest import Manifest, ShardInfo
from app.data.shards import ShardFile, open_shard, shard_name
from app.errors import UserError
from tests.lacking import lacking
from tests.prepare.conftest import CHECKOUT, Start, write_shard

HEADER = struct.pack("<3i", 20240520, 1, 5) + bytes(1024 - 12)
TOKENS = np.array([50256, 0, 1, 255, 256], dtype=np.uint16)
MANIFEST = Manifest(
    source={"dataset": "HuggingFaceFW/fineweb", "config": "sample-10BT", "revision": "f00"},
    tokenizer={"name": "gpt2", "vocab_bpe_sha256": "1ce"},
    settings={"total_tokens": "all", "val_tokens": 3},
    shards=(
        ShardInfo("text_val_000000.bin", "val", 4, 1, "aa"),
        ShardInfo("text_000000.bin", "train", 5, 2, "bb"),
        ShardInfo("text_000001.bin", "train", 2, 0, "cc"),
    ),
    counts={"documents": 3, "skipped": 1},
    complete=True,
)


def llm_c_write(path: Path, tokens: list[int]) -> None:
    """As llm.c's dev/data/data_common.py writes GPT-2 tokens."""
    header = array("i", [20240520, 1, len(tokens)] + [0] * 253)
    path.write_bytes(header.tobytes() + array("H", tokens).tobytes())


def written(folder: Path, *, complete: bool = True) -> Path:
    """A folder with a held-out shard, two for training and their manifest."""
    parts = {"text_val_000000.bin": [9, 8], "text_000000.bin": [1, 2, 3], "text_000001.bin": [4]}
    shards = []
    for name, tokens in parts.items():
        sha256 = write_shard(folder / name, np.array(tokens, dtype=np.uint16))
        split: Any = "val" if "val" in name else "train"
        shards.append(ShardInfo(name, split, len(tokens), 1, sha256))
    Manifest({}, {}, {}, shards=tuple(shards), complete=complete).save(folder)
    return folder


def test_shard_is_1024_bytes_of_header_and_little_endian_tokens(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.bin", TOKENS)
    assert (tmp_path / "a.bin").read_bytes() == HEADER + bytes.fromhex("50c4 0000 0100 ff00 0001")


def test_shard_is_the_same_from_any_array(tmp_path: Path) -> None:
    strided = np.repeat(TOKENS, 2)[::2]
    assert not strided.flags.c_contiguous
    write_shard(tmp_path / "a.bin", TOKENS)
    write_shard(tmp_path / "b.bin", strided)
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "b.bin").read_bytes()


def test_write_returns_the_files_hash(tmp_path: Path) -> None:
    sha256 = write_shard(tmp_path / "a.bin", TOKENS)
    assert sha256 == hashlib.sha256((tmp_path / "a.bin").read_bytes()).hexdigest()


@pytest.mark.parametrize("expected", (0, 4, 5, 6, 100_000))
def test_shard_is_the_same_written_in_steps_and_with_any_expected_size(
    tmp_path: Path, expected: int
) -> None:
    path = tmp_path / "a.bin"
    sha256 = write_shard(path, TOKENS[:1], TOKENS[1:1], TOKENS[1:], expected=expected)
    assert path.read_bytes() == HEADER + TOKENS.tobytes()
    assert sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_shard_that_is_not_committed_leaves_no_file(tmp_path: Path) -> None:
    with ShardFile(tmp_path / "a.bin", 5) as shard:
        shard.write(TOKENS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("count", (0, 1, 2, 1000))
def test_written_tokens_are_read(tmp_path: Path, count: int) -> None:
    tokens = np.arange(65536 - count, 65536).astype(np.uint16)
    write_shard(tmp_path / "a.bin", tokens)
    opened = open_shard(tmp_path / "a.bin")
    assert len(opened) == count
    assert opened[:].dtype == np.uint16
    np.testing.assert_array_equal(opened[:], tokens)
    np.testing.assert_array_equal(opened[1:-1], tokens[1:-1])


def test_reads_what_llm_c_writes(tmp_path: Path) -> None:
    llm_c_write(tmp_path / "a.bin", [50256, 7, 65535])
    assert open_shard(tmp_path / "a.bin")[:].tolist() == [50256, 7, 65535]


@pytest.mark.parametrize(
    ("content", "fault"),
    (
        (b"", "cut off: 0 bytes"),
        (HEADER[:11], "cut off: 11 bytes"),
        (b"Once upon a time there was", "not a token shard: it begins with 1701015119"),
        (b"\x51" + HEADER[1:] + TOKENS.tobytes(), "not a token shard: it begins with 20240465"),
        (HEADER[:4] + b"\x07" + HEADER[5:] + TOKENS.tobytes(), "version 7, this program reads 1"),
        (HEADER, "has 1024 bytes; its header says 5 tokens, which take 1034"),
        (HEADER[:12], "has 12 bytes; its header says 5 tokens"),
        (HEADER + TOKENS.tobytes()[:-1], "has 1033 bytes"),
        (HEADER + TOKENS.tobytes() + b"\0", "has 1035 bytes"),
        (HEADER[:8] + b"\xff\xff\xff\xff" + bytes(1012), "its header says -1 tokens"),
    ),
)
def test_wrong_shard_is_refused_with_file_and_fault(
    tmp_path: Path, content: bytes, fault: str
) -> None:
    path = tmp_path / "text_000000.bin"
    path.write_bytes(content)
    with pytest.raises(UserError) as raised:
        open_shard(path)
    assert str(path) in raised.value.problem
    assert fault in raised.value.problem


def test_missing_shard_is_refused_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.bin cannot be read: No such file"):
        open_shard(tmp_path / "gone.bin")


def test_folder_is_no_shard(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        open_shard(tmp_path)


WRITE_TOO_MUCH = """
import resource, sys
from pathlib import Path
import numpy as np
from tests.prepare.conftest import write_shard
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    write_shard(Path(sys.argv[1]), np.zeros(1_000_000, dtype=np.uint16))
except OSError as error:
    print(error.strerror)
"""


def test_write_that_fails_leaves_no_file(tmp_path: Path, start: Start) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    out, err = start("-c", WRITE_TOO_MUCH, folder / "a.bin").communicate(timeout=300)
    assert out == "File too large\n", err
    assert list(folder.iterdir()) == []


def test_write_that_fails_leaves_the_earlier_file(tmp_path: Path, start: Start) -> None:
    write_shard(tmp_path / "a.bin", TOKENS)
    out, err = start("-c", WRITE_TOO_MUCH, tmp_path / "a.bin").communicate(timeout=300)
    assert out == "File too large\n", err
    assert open_shard(tmp_path / "a.bin")[:].tolist() == TOKENS.tolist()


def test_shard_names() -> None:
    assert shard_name("fineweb", "train", 0) == "fineweb_000000.bin"
    assert shard_name("fineweb", "val", 12) == "fineweb_val_000012.bin"


def test_saved_manifest_is_loaded(tmp_path: Path) -> None:
    MANIFEST.save(tmp_path)
    assert Manifest.load(tmp_path) == MANIFEST


def test_manifest_holds_version_and_totals(tmp_path: Path) -> None:
    MANIFEST.save(tmp_path)
    value = json.loads((tmp_path / "manifest.json").read_text())
    assert value["format_version"] == 1
    assert value["totals"] == {"train_tokens": 7, "val_tokens": 4}


def test_folder_without_manifest_has_none(tmp_path: Path) -> None:
    assert Manifest.load(tmp_path) is None


def drop(name: str) -> Callable[[dict[str, Any]], object]:
    return lambda value: value.pop(name)


@pytest.mark.parametrize(
    ("damage", "fault"),
    (
        (drop("shards"), "is damaged: 'shards'"),
        (drop("source"), "is damaged: 'source'"),
        (drop("complete"), "is damaged: 'complete'"),
        (lambda value: value.update(shards=None), "is damaged"),
        (lambda value: value.update(shards=["a.bin"]), "is damaged"),
        (lambda value: value["shards"][0].pop("sha256"), "is damaged"),
        (lambda value: value["shards"][0].update(color="red"), "is damaged"),
        (drop("format_version"), "format version None"),
        (lambda value: value.update(format_version=2), "format version 2, this program reads 1"),
    ),
)
def test_wrong_manifest_is_refused_with_file_and_fault(
    tmp_path: Path, damage: Callable[[dict[str, Any]], object], fault: str
) -> None:
    MANIFEST.save(tmp_path)
    path = tmp_path / "manifest.json"
    value = json.loads(path.read_text())
    damage(value)
    path.write_text(json.dumps(value))
    with pytest.raises(UserError) as raised:
        Manifest.load(tmp_path)
    assert str(path) in raised.value.problem
    assert fault in raised.value.problem


@pytest.mark.parametrize("content", ("", '{"shards": [', "[]", "null", "\x00\x00", "\ud800"))
def test_manifest_that_is_no_json_object_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "manifest.json"
    path.write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(UserError, match=r"manifest\.json (is not valid JSON|does not hold)"):
        Manifest.load(tmp_path)


def test_dataset_has_its_shards_in_order(tmp_path: Path) -> None:
    dataset = open_dataset(written(tmp_path))
    assert [shard[:].tolist() for shard in dataset.train] == [[1, 2, 3], [4]]
    assert [shard[:].tolist() for shard in dataset.val] == [[9, 8]]


@pytest.mark.parametrize(
    "names",
    (
        ("fineweb_val_000000.bin", "fineweb_train_000001.bin", "fineweb_train_000002.bin"),
        ("tiny_shakespeare_val.bin", "tiny_shakespeare_train.bin", "tiny_shakespeare_train2.bin"),
        ("edu_fineweb_val_000000.bin", "edu_fineweb_train_000001.bin", "valley_000000.bin"),
    ),
)
def test_llm_c_folder_opens_with_its_held_out_split(
    tmp_path: Path, names: tuple[str, str, str]
) -> None:
    for number, name in enumerate(names):
        llm_c_write(tmp_path / name, [number])
    dataset = open_dataset(tmp_path)
    assert [shard[:].tolist() for shard in dataset.val] == [[0]]
    assert [shard[:].tolist() for shard in dataset.train] == [[1], [2]]


def test_incomplete_dataset_is_refused_with_the_command_that_completes_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not complete: prepare stopped after 4 ") as raised:
        open_dataset(written(tmp_path, complete=False))
    assert "`python -m app prepare` with the same settings" in raised.value.fix


def test_manifest_that_disagrees_with_a_shard_is_refused(tmp_path: Path) -> None:
    written(tmp_path)
    write_shard(tmp_path / "text_000001.bin", TOKENS)
    with pytest.raises(UserError, match=r"text_000001\.bin has 5 tokens, manifest\.json says 1"):
        open_dataset(tmp_path)


def test_deleted_shard_is_refused(tmp_path: Path) -> None:
    written(tmp_path)
    (tmp_path / "text_000000.bin").unlink()
    with pytest.raises(UserError, match=r"text_000000\.bin cannot be read"):
        open_dataset(tmp_path)


def test_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such folder") as raised:
        open_dataset(tmp_path / "gone")
    assert "app prepare" in raised.value.fix


def test_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no shard"):
        open_dataset(tmp_path)


def test_fingerprint_changes_with_the_tokens(tmp_path: Path) -> None:
    before = open_dataset(written(tmp_path)).fingerprint
    assert open_dataset(tmp_path).fingerprint == before
    manifest = Manifest.load(tmp_path)
    assert manifest is not None
    sha256 = write_shard(tmp_path / "text_000001.bin", np.array([5], dtype=np.uint16))
    last = ShardInfo("text_000001.bin", "train", 1, 1, sha256)
    Manifest({}, {}, {}, shards=(*manifest.shards[:2], last), complete=True).save(tmp_path)
    assert open_dataset(tmp_path).fingerprint != before


READ = """
import resource, sys
from pathlib import Path
from app.data.dataset import open_dataset
from app.data.token_stream import TokenStream
from app.errors import UserError
import numpy as np
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[2]),) * 2)
try:
    stream = TokenStream(open_dataset(Path(sys.argv[1])).train)
    for _ in range(2):
        tokens = np.empty(len(stream), np.uint16)
        stream.read(0, tokens)
    print(tokens.size, int(tokens.sum()))
except UserError as error:
    print(error)
"""


def test_thousands_of_shards_are_read_with_few_open_files(tmp_path: Path, start: Start) -> None:
    for number in range(2000):
        llm_c_write(tmp_path / f"text_{number:06d}.bin", [number])
    out, err = start("-c", READ, tmp_path, "64").communicate(timeout=300)
    assert out == f"2000 {sum(range(2000))}\n", err


def test_shards_need_no_mapped_files(tmp_path: Path, start: Start) -> None:
    written(tmp_path)
    lacks = lacking(tmp_path, map=errno.ENODEV)
    out, err = start("-c", READ, tmp_path, "64", **lacks).communicate(timeout=300)
    assert out == "4 10\n", err


STALE = """
import os, sys
from pathlib import Path
from app.cli.process import run_and_report
from app.data.shards import open_shard
shard = open_shard(Path(sys.argv[1]))
os.environ["LACKS"] = sys.argv[2]
run_and_report(lambda: print(shard[:].tolist()))
"""


@pytest.mark.parametrize(
    ("times", "output"),
    (
        ("1", "[50256, 0, 1, 255, 256]\n"),
        (
            "2",
            "error: cannot read or write {} (Stale file handle)\n"
            "  fix: see that its disk is mounted and answers; then run the same command again\n",
        ),
    ),
)
def test_shard_that_turns_stale_is_opened_once_more(
    tmp_path: Path, start: Start, times: str, output: str
) -> None:
    path = tmp_path / "a.bin"
    write_shard(path, TOKENS)
    environment = lacking(tmp_path) | {"PYTHONPATH": str(CHECKOUT)}
    lacks = f"read={errno.ESTALE}*{times}"
    out, err = start("-c", STALE, path, lacks, **environment).communicate(timeout=300)
    assert out + err == output.format(path)


def test_shard_that_shrinks_or_changes_while_it_is_read_is_reported(tmp_path: Path) -> None:
    shrunk, replaced = tmp_path / "a.bin", tmp_path / "b.bin"
    for path in (shrunk, replaced):
        write_shard(path, TOKENS)
    opened = open_shard(shrunk)
    assert opened[:1].tolist() == [50256]
    os.truncate(shrunk, 1028)
    with pytest.raises(UserError, match=r"a\.bin has been cut off"):
        opened[:]
    opened = open_shard(replaced)
    write_shard(replaced, TOKENS[:2])
    with pytest.raises(UserError, match=r"b\.bin has changed while it was in use"):
        opened[:]
