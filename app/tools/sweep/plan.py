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
from app.settings.settings import GROUPS, VARIABLES, Settings
from app.settings.sources import load_each, resolve, suggestion

SEED = "train.seed"
_GROUPS = ("train", "model")
_SWEPT_BY_NAME = [name for group in _GROUPS for name in GROUPS[group].variables()]
# Runs that differ only in these can be compared.
_OF_THE_MACHINE = {
    *("run_name", "resume", "device", "compile", "recompute", "micro_batch_size", "processes"),
    *("shard_optimizer", "max_restarts", "rank_timeout_seconds", "price_per_hour"),
    *("sample_every", "checkpoint_every", "keep_checkpoints", "hellaswag_every", "hellaswag_file"),
}


@dataclass(frozen=True)
class PlannedRun:
    """A run of a sweep.

    Attributes:
        texts: text of each swept setting, as it was typed, by `group.field`
        flags: the texts of its command line, by variable
    """

    texts: dict[str, str]
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

    @property
    def values(self) -> dict[str, Any]:
        """Return the value of each swept setting, by `group.field`."""
        dumped = self.settings.public()
        return {name: dumped[name.split(".")[0]][name.split(".")[1]] for name in self.texts}


def label(values: Mapping[str, Any]) -> str:
    """Return "learning_rate 0.0018, num_layers 12", for example."""
    return ", ".join(f"{name.partition('.')[2]} {value}" for name, value in values.items())


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
    names = [*sorted(swept, key=lambda name: name == SEED)]
    combinations = [
        dict(zip(names, texts, strict=True)) for texts in product(*(swept[name] for name in names))
    ]
    lines = [
        {**flags, **{_variable(name): text for name, text in texts.items()}}
        for texts in combinations
    ]
    variables = [_variable(name) for name in names]
    load_each(lines, "sweep", swept=variables, faults=faults)
    common = resolve(flags, "sweep", with_environment=True)
    sweep_name = common.run_dir.name
    for line, texts in zip(lines, combinations, strict=True):
        line["TRAIN_RUN_NAME"] = "-".join([sweep_name, *map(_name_part, texts, texts.values())])
    loaded = load_each(lines, "sweep", swept=variables)
    runs = [PlannedRun(*it) for it in zip(combinations, lines, loaded, strict=True)]
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
    """Return the texts of each setting's values by `group.field`, and the faults."""
    swept: dict[str, list[str]] = {}
    faults = [] if sets else ["--set is missing: give values, as in --set train.seed=0,1,2"]
    for typed in sets:
        name, equals, values = typed.partition("=")
        variable = name.strip().replace(".", "_", 1).upper()
        if not equals:
            faults.append(f"--set {typed}: must have values, as in train.seed=0,1,2")
        elif variable not in _SWEPT_BY_NAME:
            meant = suggestion(variable, _SWEPT_BY_NAME)
            faults.append(f"--set {name}: there is no such setting of train or model{meant}")
        elif variable == "TRAIN_RUN_NAME":
            faults.append(f"--set {name}: the runs are named after the sweep and their values")
        else:
            group = VARIABLES[variable]
            field = f"{group.prefix().rstrip('_').lower()}.{group.variables()[variable]}"
            if field in swept:
                faults.append(f"--set {name}: is given twice")
            swept[field] = values.split(";" if ";" in values else ",")
    return swept, faults


def _variable(name: str) -> str:
    return name.replace(".", "_", 1).upper()


def _name_part(name: str, text: str) -> str:
    return name.partition(".")[2] + re.sub(r"[^A-Za-z0-9._-]+", "_", text)


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
