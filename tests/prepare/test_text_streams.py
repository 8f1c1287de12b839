"""Texts are what a person sees in a file, whatever its bytes are; what cannot be read is named."""

import bz2
import codecs
import gzip
import io
import json
import lzma
import re
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import tiktoken
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from app.data.dataset import open_dataset
from app.data.manifest import Manifest
from app.data.tokenizer import END_OF_TEXT
from app.errors import UserError
from app.prepare import text_streams
from app.prepare.encoder import DocumentEncoder
from app.prepare.local_files import FileDocuments
from app.prepare.pipeline import prepare, write_documents
from app.prepare.shard_writer import ShardWriter
from app.prepare.sources import check_heads, open_documents
from app.prepare.spec import DatasetSpec, TextSource
from app.prepare.text_streams import MARK, split_documents
from tests.prepare.conftest import COMPRESS, START, read

# A disk takes milliseconds for each of the many fsyncs.
IN_MEMORY = Path("/dev/shm")
MARK_TEXT = MARK.decode()
BLANKS = " \t\n\r\v\f"
DECOMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.decompress,
    ".bz2": bz2.decompress,
    ".xz": lzma.decompress,
    ".zst": lambda content: zstandard.decompress(content) if content else b"",
}
# How a text is written -> what the settings say.
ENCODINGS = {
    "utf-8": "",
    "utf-8-sig": "",
    "utf-16": "",
    "utf-32": "",
    "latin-1": "latin-1",
    "utf-16-le": "utf-16-le",
}
MARKS = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_LE)
# Every latin-1 character; a text that begins with a mark's bytes, or with zeros, is another text.
latin_text = st.text(st.characters(codec="latin-1", exclude_characters="\0"), max_size=40).filter(
    lambda text: not text.encode("latin-1").startswith(MARKS)
)


def visible(content: bytes, kind: str, compression: str, encoding: str) -> list[str] | None:
    """Return the documents that a person sees in a file; None if it cannot be read."""
    try:
        if compression and not content:
            return None
        text = DECOMPRESS[compression](content).decode(encoding)
    except (ValueError, EOFError, OSError, lzma.LZMAError, zstandard.ZstdError):
        return None
    if kind == ".txt":
        return re.split(re.escape(MARK_TEXT) + r"(?:\r\n|\n)?", text)
    rows = []
    for line in text.split("\n"):
        try:
            row = json.loads(line) if line.strip() else {}
        except ValueError:
            return None
        rows.append(row.get("text") or "")
    return rows


@pytest.fixture(scope="module")
def encoder() -> DocumentEncoder:
    return DocumentEncoder()


@settings(max_examples=200)
@given(
    texts=st.lists(latin_text, min_size=1, max_size=5),
    kind=st.sampled_from((".txt", ".jsonl")),
    compression=st.sampled_from(tuple(COMPRESS)),
    encoding=st.sampled_from(tuple(ENCODINGS)),
    separator=st.sampled_from(("", "\n", "\r\n", " ")),
    cut=st.none() | st.floats(0, 1),
)
def test_every_document_has_the_tokens_of_the_text_that_a_person_sees(
    gpt2: tiktoken.Encoding,
    encoder: DocumentEncoder,
    texts: list[str],
    kind: str,
    compression: str,
    encoding: str,
    separator: str,
    cut: float | None,
) -> None:
    if kind == ".txt":
        text = (MARK_TEXT + separator).join(texts)
    else:
        text = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    content = COMPRESS[compression](text.encode(encoding))
    content = content[: int(len(content) * cut)] if cut is not None else content
    documents = visible(content, kind, compression, encoding)
    if documents is not None and kind == ".txt" and len(documents) > 1:
        documents = [document for document in documents if document.strip(BLANKS)]
    with TemporaryDirectory() as name:
        path = Path(name, f"a{kind}{compression}")
        path.write_bytes(content)
        source = TextSource(str(path), encoding=ENCODINGS[encoding])
        if documents is None:
            with pytest.raises(UserError, match=re.escape(str(path))):
                tokens_of(source, encoder)
            return
        tokens = tokens_of(source, encoder)
    expected = [[END_OF_TEXT, *gpt2.encode_ordinary(text)] for text in documents if text]
    assert tokens == [token for document in expected for token in document]


def tokens_of(source: TextSource, encoder: DocumentEncoder) -> list[int]:
    """Write a dataset as prepare does, and return its tokens."""
    spec = DatasetSpec(source, "text")
    documents = open_documents(source)
    with TemporaryDirectory(dir=IN_MEMORY if IN_MEMORY.is_dir() else None) as folder:
        manifest = Manifest(source={}, tokenizer={}, settings=spec.settings)
        with ShardWriter(Path(folder), spec, manifest) as writer:
            write_documents(documents.chunks(START), encoder, writer, workers=1)
            writer.finish()
        shards = open_dataset(Path(folder)).train
        return [token for shard in shards for token in shard[:].tolist()]


@pytest.mark.parametrize("encoding", ("utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"))
@pytest.mark.parametrize("compression", ("", ".gz"))
def test_western_text_in_wide_characters_needs_no_mark(
    tmp_path: Path, encoding: str, compression: str
) -> None:
    text = "It rained on the hill: naïve café, 3 €.\r\n" * 5000
    path = tmp_path / f"a.txt{compression}"
    path.write_bytes(COMPRESS[compression](text.encode(encoding)))
    assert read(open_documents(TextSource(str(path)))) == [text]


@pytest.mark.parametrize("encoding", ("utf-8-sig", "utf-16", "utf-32"))
@pytest.mark.parametrize("kind", (".txt", ".md", ".py", ".jsonl", ".ndjson"))
def test_byte_order_mark_is_not_text(tmp_path: Path, kind: str, encoding: str) -> None:
    text = '{"text": "日本"}' if "js" in kind else "日本"
    path = tmp_path / f"a{kind}"
    path.write_bytes(text.encode(encoding))
    # It counts more than the setting.
    assert read(open_documents(TextSource(str(path), encoding="latin-1"))) == ["日本"]


@pytest.mark.parametrize(("encoding", "content"), (("utf-7", b"+2AA-"), ("idna", b"\xff")))
def test_what_cannot_be_decoded_is_named(tmp_path: Path, encoding: str, content: bytes) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.txt cannot be decoded: "):
        read(open_documents(TextSource(str(path), encoding=encoding)))


def test_files_in_another_encoding_are_named_before_the_work(tmp_path: Path) -> None:
    for name in "abcd":
        (tmp_path / f"{name}.txt").write_text("plain")
    (tmp_path / "b.txt").write_bytes(b"x" * 50_000 + "naïve".encode("latin-1"))
    (tmp_path / "d.txt").write_bytes("é".encode("cp1252"))
    (tmp_path / "e.jsonl").write_bytes('{"text": "é"}'.encode("latin-1"))
    with pytest.raises(UserError, match=r"^3 of 5 files cannot be read as text") as raised:
        prepare(DatasetSpec(TextSource(str(tmp_path)), "text"), tmp_path / "out")
    assert f"{tmp_path}/b.txt is not UTF-8: byte 50,002 is 0xef" in raised.value.problem
    assert f"{tmp_path}/d.txt is not UTF-8: byte 0 is 0xe9" in raised.value.problem
    assert f"{tmp_path}/e.jsonl is not UTF-8: byte 10 is 0xe9" in raised.value.problem
    assert "PREPARE_ENCODING" in raised.value.fix
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_character_that_is_cut_by_the_look_at_the_beginning_is_no_fault(tmp_path: Path) -> None:
    for shift in range(4):
        (tmp_path / f"{shift}.txt").write_text("x" * shift + "😀" * 20_000, "utf-8")
    documents = open_documents(TextSource(str(tmp_path)))
    assert isinstance(documents, FileDocuments)
    check_heads(documents)


@pytest.mark.parametrize("name", ("a.txt", "a.jsonl", "a.parquet", "a.txt.gz", "a.jsonl.zst"))
def test_git_lfs_pointer_is_not_text(tmp_path: Path, name: str) -> None:
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{7:064d}\nsize 1924281556\n"
    (tmp_path / name).write_text(pointer)
    with pytest.raises(UserError, match=rf"{name} is a git-lfs pointer") as raised:
        prepare(DatasetSpec(TextSource(str(tmp_path)), "text"), tmp_path / "out")
    assert "git lfs pull" in raised.value.fix


def test_binary_file_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\x7fELF\2\1\1" + bytes(100) + b"\1" * 100)
    with pytest.raises(UserError, match=r"a\.txt is a binary file: byte 7 is zero"):
        read(open_documents(TextSource(str(tmp_path))))


def test_zstd_frames_of_any_window_follow_each_other(tmp_path: Path) -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=True)
    long = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    frames = [zstandard.compress(b"one\n"), long.compress(b"two\n") + long.flush()]
    path = tmp_path / "a.txt.zst"
    path.write_bytes(b"".join(frames))
    assert read(open_documents(TextSource(str(path)))) == ["one\ntwo\n"]
    path.write_bytes(b"".join(frames)[:-3])
    with pytest.raises(UserError, match=r"a\.txt\.zst is damaged: the end of the compressed data"):
        read(open_documents(TextSource(str(path))))


@pytest.mark.parametrize("size", (1, 2, 5, 13, 14, 15, 16, 40, 1000))
def test_documents_are_the_same_for_every_size_of_blocks(
    monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    text = MARK + b"\r\none\n" + MARK + MARK + b"\n \n" + MARK + b"\n\ntwo<|endoftext" + MARK
    monkeypatch.setattr(text_streams, "_BLOCK_BYTES", size)
    stream = io.BufferedReader(io.BytesIO(text))
    assert list(split_documents(stream)) == [b"one\n", b"\ntwo<|endoftext"]


@pytest.mark.parametrize("text", (b"", b" \n", b"one <|endoftext| > two"))
def test_text_without_a_mark_is_one_document(text: bytes) -> None:
    assert list(split_documents(io.BytesIO(text))) == [text]


@pytest.mark.parametrize("kind", (".md", ".py", ".jsonl"))
def test_mark_is_ordinary_text_in_other_kinds(tmp_path: Path, kind: str) -> None:
    text = f"one{MARK_TEXT}two"
    path = tmp_path / f"a{kind}"
    path.write_text(json.dumps({"text": text}) if kind == ".jsonl" else text)
    assert read(open_documents(TextSource(str(path)))) == [text]
