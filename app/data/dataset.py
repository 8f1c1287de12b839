"""A dataset folder: its shards opened, and their hashes compared."""

import concurrent.futures
import hashlib
import os
import re
from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread

from app.containers import program
from app.data import sequences
from app.data.manifest import MANIFEST, Manifest, ShardInfo, open_listed_shard
from app.data.shards import Shard, open_shard
from app.errors import UserError
from app.files import sha256_of
from app.formats import plural

# Words in the names of shards, as other programs write them.
_HELD_OUT = r"val(?:id(?:ation)?)?|test|dev|eval(?:uation)?|h[eo]ld[ _-]?out"
_SPLIT = re.compile(rf"(?<![a-z])(?:({_HELD_OUT})|train(?:ing)?)(?:set)?(?![a-z])", re.I)


@dataclass(frozen=True)
class Dataset:
    """The shards of a folder.

    Attributes:
        folder: the shards' folder
        manifest: None for shards that a different program has written
        train, val: the shards of each split, in order; without a manifest, by is_held_out()
        fingerprint: SHA-256 of the hashes of all shards; without a manifest, of names and counts
    """

    folder: Path
    manifest: Manifest | None
    train: list[Shard]
    val: list[Shard]
    fingerprint: str

    def num_sequences(self, context_length: int) -> int:
        """Return the number of training sequences in an epoch.

        Raises:
            UserError: there are too few training tokens for one sequence.
        """
        count = sequences.num_sequences(sum(map(len, self.train)), context_length)
        if self.manifest is None and not self.train:
            raise UserError(
                f"all shards in {self.folder} are named as held-out text (val, test, dev, …)",
                "rename those to train on, for example to NAME_train_000000.bin",
            )
        if count == 0:
            raise UserError(
                f"{self.folder} has too few training tokens for one sequence: "
                f"{context_length + 1} are needed (MODEL_CONTEXT_LENGTH and one more)",
                "prepare more text, or lower MODEL_CONTEXT_LENGTH",
            )
        return count

    def lack_of_held_out_text(self, context_length: int) -> tuple[str, str] | None:
        """Return why no held-out loss can be measured, and what to do; None if it can be."""
        tokens = sum(map(len, self.val))
        if tokens > context_length:
            return None
        if self.manifest is None and not self.val:
            problem = "has no shard named as held-out text (val, test, dev, …): all are trained on"
            return f"{self.folder} {problem}", "rename one, for example to NAME_val_000000.bin"
        return (
            f"{self.folder} has {tokens:,} held-out tokens, and a sequence needs "
            f"{context_length + 1:,} (MODEL_CONTEXT_LENGTH and one more)",
            f"prepare it again, into another folder, with PREPARE_VAL_TOKENS={context_length} or "
            "more",
        )


def shard_files(folder: Path) -> list[Path]:
    """Return the files in a folder that look like shards, by name."""
    is_shard = re.compile(r"[^.].*\.bin", re.I | re.S).fullmatch
    return sorted(path for path in folder.iterdir() if is_shard(path.name) and path.is_file())


def is_held_out(name: str) -> bool:
    """Return True if a shard's file name says that its text is not for training.

    The last word that names a split counts: `dev-corpus_train_000000.bin` is for training.
    """
    words = _SPLIT.findall(name.rpartition(".")[0])
    return bool(words and words[-1])


def missing_dataset_fix(data_dir: Path) -> str:
    """Return the advice for a dataset that is not there; it names those that are, and tokens."""
    others = []
    for folder in sorted(path for path in data_dir.glob("*/") if path.name != "runs"):
        with suppress(UserError, OSError):
            if manifest := Manifest.load(folder):
                what = plural(manifest.tokens("train"), "token")
                what += "" if manifest.complete else ", not complete"
            elif files := [it for it in shard_files(folder) if not is_held_out(it.name)]:
                what = plural(sum(open_shard(file).size for file in files), "token")
            else:
                continue
            others.append(f"{folder.name} ({what})")
    known = f"set TRAIN_DATASET_DIR to one of: {', '.join(others)}"
    choose = known if others else "correct TRAIN_DATASET_DIR"
    return f"run `{program()} prepare` with the same settings, or {choose}"


def open_dataset(folder: Path, data_dir: Path | None = None) -> Dataset:
    """Open a folder that `prepare` or llm.c has written.

    Args:
        data_dir: where an error finds other datasets to name.

    Raises:
        UserError: there is no dataset, it is incomplete, or a shard does not match the manifest.
    """
    if not folder.is_dir():
        fix = missing_dataset_fix(data_dir or folder)
        raise UserError(f"no dataset in {folder}: there is no such folder", fix)
    manifest = Manifest.load(folder)
    if manifest is None:
        names = [path.name for path in shard_files(folder)]
        if not names:
            fix = missing_dataset_fix(data_dir or folder)
            raise UserError(f"no dataset in {folder}: it holds no shard (*.bin)", fix)
        opened = {name: open_shard(folder / name) for name in names}
        held_out = {name for name in names if is_held_out(name)}
        # Earlier versions trained on some of these: such a run must not continue without them.
        marks = {name: "" if re.search(r"_val[_.]", name) else "\tval" for name in held_out}
        listing = "".join(f"{name}\t{opened[name].size}{marks.get(name, '')}\n" for name in names)
    else:
        if not manifest.complete:
            raise UserError(
                f"the dataset in {folder} is not complete: prepare stopped after "
                f"{manifest.tokens('train'):,} training tokens",
                f"run `{program()} prepare` with the same settings to complete it",
            )
        opened = {shard.file: open_listed_shard(folder, shard) for shard in manifest.shards}
        listing = "".join(f"{shard.file}\t{shard.sha256}\n" for shard in manifest.shards)
        held_out = {shard.file for shard in manifest.shards if shard.split == "val"}
    return Dataset(
        folder,
        manifest,
        train=[tokens for name, tokens in opened.items() if name not in held_out],
        val=[tokens for name, tokens in opened.items() if name in held_out],
        fingerprint=hashlib.sha256(listing.encode(errors="surrogateescape")).hexdigest(),
    )


class ShardVerification:
    """Compares the SHA-256 of a dataset's shards with its manifest, in background threads.

    A program that ends does not wait for the threads. Shards without a manifest have no hashes
    to compare.

    Args:
        dataset: the dataset to verify.
        threads: number of hashing threads, capped at the core count.
    """

    def __init__(self, dataset: Dataset, threads: int = 4) -> None:
        shards = dataset.manifest.shards if dataset.manifest else ()
        self._results = {shard: Future[None]() for shard in shards}
        remaining = iter(list(self._results.items()))
        for _ in range(min(threads, os.cpu_count() or 1)):
            Thread(target=_verify, args=(dataset.folder, remaining), daemon=True).start()

    def __iter__(self) -> Iterator[str]:
        """Yield the name of each shard, in order, once its hash is verified.

        Raises:
            UserError: a hash is wrong, or a shard cannot be read.
        """
        for shard, result in self._results.items():
            result.result()
            yield shard.file

    def done(self) -> bool:
        """Return True if all shards are verified or one is found damaged."""
        return self.wait(0)

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until verification ends or the timeout passes; return True if it has ended."""
        ended, running = concurrent.futures.wait(
            self._results.values(), seconds, return_when=FIRST_EXCEPTION
        )
        return not running or any(result.exception() for result in ended)

    def result(self) -> None:
        """Wait for the end of the verification.

        Raises:
            UserError: a hash is wrong, or a shard cannot be read.
        """
        # In order, so that the first of several damaged shards is always the one reported.
        for _ in self:
            pass


def _verify(folder: Path, remaining: Iterator[tuple[ShardInfo, Future[None]]]) -> None:
    for shard, result in remaining:
        try:
            _check_hash(folder / shard.file, shard.sha256)
        except Exception as error:  # noqa: BLE001 (raised again by result())
            result.set_exception(error)
        else:
            result.set_result(None)


def _check_hash(path: Path, expected: str) -> None:
    try:
        actual = sha256_of(path)
    except OSError as error:
        raise UserError(
            f"shard {path} cannot be read: {error.strerror}",
            "put it back, or prepare the dataset again",
        ) from None
    if actual != expected:
        raise UserError(
            f"shard {path} is damaged: its SHA-256 is {actual}, {MANIFEST} says {expected}",
            "delete the folder and prepare the dataset again",
        )
