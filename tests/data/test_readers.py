"""Shards as other programs read them, with the patterns and commands of docs/readers.md."""

import glob
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from app.data.dataset import open_dataset
from app.data.shards import Tokens, open_shard
from app.data.tokenizer import END_OF_TEXT
from app.prepare.pipeline import prepare
from app.prepare.spec import DatasetSpec, TextSource
from tests.compiled_c import compiled
from tests.pages import REPOSITORY, blocks

PAGE = "docs/readers.md"
TRAIN, HELD_OUT = "data/texts/texts_[0-9]*.bin", "data/texts/texts_val_*.bin"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data/texts: three training shards, the last one shorter, and two held out."""
    folder = tmp_path_factory.mktemp("readers")
    prepare(DatasetSpec(TextSource("stdlib"), "texts", 5000, 2400, 2000), folder / "data" / "texts")
    return folder


@pytest.fixture
def shards(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Tokens]]:
    """Where the page's patterns lead: the tokens of each shard, by the pattern."""
    monkeypatch.chdir(prepared)
    dataset = open_dataset(Path("data/texts"))
    assert dataset.manifest
    assert [shard.tokens for shard in dataset.manifest.shards] == [2000, 401, 2000, 2000, 1000]
    found: dict[str, list[Tokens]] = {TRAIN: [], HELD_OUT: []}
    for shard in dataset.manifest.shards:
        tokens = open_shard(Path("data/texts", shard.file))[:]
        found[TRAIN if shard.split == "train" else HELD_OUT].append(tokens)
    return found


def read_llm_c(pattern: str, batch: int) -> subprocess.CompletedProcess[str]:
    program = compiled(Path(__file__).with_name("llm_c_dataloader.c"))
    command = [str(program), pattern, "1", str(batch)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_llm_c_reads_every_batch_of_the_split_it_is_given(
    shards: dict[str, list[Tokens]],
) -> None:
    (command,) = [block.script for block in blocks(PAGE) if block.where == "in llm.c"]
    patterns = re.findall(r"-[ij] '(.*?)'", command)
    assert patterns == [TRAIN, HELD_OUT]
    for pattern in patterns:
        read = read_llm_c(pattern, batch=300)
        assert read.returncode == 0, read.stderr
        count, *batches = read.stdout.splitlines()
        assert int(count) == sum(tokens.size for tokens in shards[pattern])
        assert [list(map(int, batch.split())) for batch in batches] == [
            tokens[begin : begin + 301].tolist()
            for tokens in shards[pattern]
            for begin in range(0, tokens.size - 300, 300)
        ]


def test_llm_c_needs_a_batch_and_a_token_in_the_last_shard(
    shards: dict[str, list[Tokens]],
) -> None:
    smallest = min(tokens.size for tokens in shards[TRAIN])
    assert read_llm_c(TRAIN, batch=smallest - 1).returncode == 0
    assert "ntok >= " in read_llm_c(TRAIN, batch=smallest).stderr


def load_data_shard(file: Path) -> torch.Tensor:
    """As modded-nanogpt's train_gpt.py, but for memory that is pinned for the GPU."""
    header = torch.from_file(str(file), shared=False, size=256, dtype=torch.int32)
    assert header[0] == 20240520, "magic number mismatch in the data .bin file"
    assert header[1] == 1, "unsupported version"
    num_tokens = int(header[2])
    with file.open("rb", buffering=0) as f:
        tokens = torch.empty(num_tokens, dtype=torch.uint16)
        f.seek(256 * 4)
        nbytes = f.readinto(tokens.numpy().data)
        assert nbytes == 2 * num_tokens, "number of tokens read does not match header"
    return tokens


def held_out_batches(pattern: str, num_tokens: int) -> Iterator[torch.Tensor]:
    """As modded-nanogpt's distributed_data_generator without align_to_bos, on one GPU."""
    file_iter = iter(sorted(glob.glob(pattern)))
    tokens, pos = load_data_shard(Path(next(file_iter))), 0
    while True:
        if pos + num_tokens + 1 >= len(tokens):
            tokens, pos = load_data_shard(Path(next(file_iter))), 0
        yield tokens[pos : pos + num_tokens + 1]
        pos += num_tokens


def test_modded_nanogpt_reads_each_shard_of_the_split_it_is_given(
    shards: dict[str, list[Tokens]],
) -> None:
    page = (REPOSITORY / PAGE).read_text(encoding="utf-8")
    patterns = re.findall(r'^\w+_files: str = "(.*)"$', page, re.MULTILINE)
    assert patterns == [TRAIN, HELD_OUT]
    for pattern in patterns:
        read = [load_data_shard(Path(file)) for file in sorted(glob.glob(pattern))]
        assert [tokens.tolist() for tokens in read] == [part.tolist() for part in shards[pattern]]
    # It looks for the beginnings of documents.
    assert load_data_shard(Path("data/texts/texts_000000.bin"))[0] == END_OF_TEXT


def test_modded_nanogpt_needs_one_more_held_out_token_than_it_reads(
    tmp_path: Path,
) -> None:
    for more in (0, 1):
        folder = tmp_path / str(more)
        prepare(DatasetSpec(TextSource("stdlib"), "texts", 1000, 1200 + more), folder)
        batches = held_out_batches(str(folder / "texts_val_*.bin"), 300)
        assert [len(next(batches)) for _ in range(3)] == [301] * 3
        if more:
            assert len(next(batches)) == 301
        else:
            with pytest.raises(RuntimeError, match="StopIteration"):
                next(batches)


def test_nanogpt_maps_the_files_that_the_page_makes(shards: dict[str, list[Tokens]]) -> None:
    (commands,) = [block.script for block in blocks(PAGE) if "tail" in block.script]
    subprocess.run(["bash", "-euc", commands], check=True)
    for file, pattern in {"train.bin": TRAIN, "val.bin": HELD_OUT}.items():
        data = np.memmap(Path("nanoGPT/data/texts", file), dtype=np.uint16, mode="r")
        assert data.tolist() == np.concatenate(shards[pattern]).tolist()
        assert data.nbytes == 2 * data.size
