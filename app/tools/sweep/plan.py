"""The runs of a sweep: one for each combination of the values of its settings."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from app.data.dataset import Dataset, open_dataset
from app.errors import UserError
from app.files import json_value
from app.formats import differences
from app.runs.folder import RunFolder
from app.settings.settings import GROUPS, Settings
from app.settings.sources import load_each, resolve, suggestion, warn_of_unlikely_names

SEED = "seed"
_GROUPS = ("train", "model")
_FIELDS = {name: field for it in _GROUPS for name, field in GROUPS[it].variables().items()}
# Runs that differ only in these can be compared.
_OF_THE_MACHINE = {
    *("run_name", "resume", "device", "compile", "recompute", "micro_batch_size", "processes"),
    *("shard_optimizer", "max_restarts", "rank_timeout_seconds", "price_per_hour", "tracker"),
    *("sample_every", "checkpoint_every", "keep_checkpoints", "hellaswag_every", "hellaswag_file"),
}


@dataclass(frozen=True)
class PlannedRun:
    """A run of a sweep.

    Attributes:
        values: value of each swept setting, by field; the seed is the last
        flags: the texts of its command line, by variable
    """

    values: dict[str, Any]
    flags: dict[str, str]
    settings: Settings

    @property
    def name(self) -> str:
        """Return the name of the run's folder."""
        return self.folder.path.name

    @property
    def folder(self) -> RunFolder:
        """Return the run's folder."""
        return RunFolder(self.settings.run_dir)


def label(values: Mapping[str, Any]) -> str:
    """Return "learning_rate 0.0018, num_layers 12", for example."""
    return ", ".join(f"{field} {value}" for field, value in values.items())


def plan_sweep(flags: Mapping[str, str], sets: Sequence[str]) -> tuple[Path, list[PlannedRun]]:
    """Return the sweep's folder and its runs, of which seeds that differ follow each other.

    Args:
        flags: texts given on the command line, by variable.
        sets: texts `NAME=VALUE,VALUE`.

    Raises:
        UserError: a setting or a value is wrong, or the data cannot be trained on; or a run exists
            that was trained with other settings.
    """
    swept, faults = _parse(sets)
    names = sorted(swept, key=lambda name: _FIELDS[name] == SEED)
    lines = [
        {**flags, **dict(zip(names, texts, strict=True))}
        for texts in product(*(swept[name] for name in names))
    ]
    load_each(lines, "sweep", swept=names, faults=faults)
    warn_of_unlikely_names()
    common = resolve(flags, "sweep", with_environment=True)
    sweep_name = common.run_dir.name
    for line in lines:
        parts = (_FIELDS[name] + re.sub(r"[^A-Za-z0-9._-]+", "_", line[name]) for name in names)
        line["TRAIN_RUN_NAME"] = "-".join([sweep_name, *parts])
    runs = []
    for line, settings in zip(lines, load_each(lines, "sweep", swept=names), strict=True):
        every = {field: it for group in _GROUPS for field, it in settings.public()[group].items()}
        values = {_FIELDS[name]: every[_FIELDS[name]] for name in names}
        # Text that is prepared while the sweep runs is not for its later runs.
        kept = {"RECIPE": settings.general.recipe, "TRAIN_DATASET_DIR": settings.train.dataset_dir}
        line = {name: str(it) for name, it in kept.items() if it is not None} | line
        runs.append(PlannedRun(values, line, settings))
    for of_each in ([label(run.values) for run in runs], [run.name for run in runs]):
        if repeated := {it for it in of_each if of_each.count(it) > 1}:
            raise UserError(
                f"two runs of the sweep would be the same: {min(repeated)}",
                "give each value of a setting once",
            )
    data_dir = common.general.data_dir
    folders = dict.fromkeys(run.settings.train_dataset_dir for run in runs)
    datasets = {folder: open_dataset(folder, data_dir) for folder in folders}
    for run in runs:
        _check_run(run, datasets[run.settings.train_dataset_dir])
    return data_dir / "sweeps" / sweep_name, runs


def _parse(sets: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Return the texts of each setting's values by variable, and the faults."""
    swept: dict[str, list[str]] = {}
    faults = [] if sets else ["--set is missing: give values, as in --set train.seed=0,1,2"]
    for typed in sets:
        name, equals, values = typed.partition("=")
        variable = name.strip().replace(".", "_", 1).upper()
        if not equals:
            faults.append(f"--set {typed}: must have values, as in train.seed=0,1,2")
        elif variable not in _FIELDS:
            meant = suggestion(variable, _FIELDS)
            faults.append(f"--set {name}: there is no such setting of train or model{meant}")
        elif variable == "TRAIN_RUN_NAME":
            faults.append(f"--set {name}: the runs are named after the sweep and their values")
        elif variable in swept:
            faults.append(f"--set {name}: is given twice")
        else:
            separator = ";" if ";" in values else ","
            swept[variable] = [it.strip() for it in values.split(separator)]
    return swept, faults


def _check_run(run: PlannedRun, dataset: Dataset) -> None:
    """Raise UserError if a run has no held-out loss, or exists and was trained otherwise."""
    train, context_length = run.settings.train, run.settings.model.context_length
    dataset.num_sequences(context_length)
    if lack := dataset.lack_of_held_out_text(context_length):
        raise UserError(f"a sweep compares held-out losses: {lack[0]}", lack[1])
    if not train.val_every:
        problem = "a sweep compares held-out losses, and TRAIN_VAL_EVERY=0 measures none"
        raise UserError(problem, "set it to 1 or more: the loss after the last step is compared")
    path = run.folder.settings
    before, now = json_value(path, "settings"), run.settings.public()
    if not isinstance(before, dict):
        return
    # With initial weights, the model's settings come with these.
    groups = ("train",) if train.init_from else _GROUPS
    changes = [
        change
        for group in groups
        for key, change in differences(before.get(group, {}), now[group]).items()
        if key not in _OF_THE_MACHINE and key in before.get(group, {}) and key in now[group]
    ]
    if json_value(path, "dataset", "fingerprint") not in (None, dataset.fingerprint):
        changes.append("the dataset holds different tokens")
    if changes:
        raise UserError(
            f"{run.folder.path} was trained with other settings: {'; '.join(changes)}",
            "name a new sweep with --run-name, or set these back to continue this one",
        )
