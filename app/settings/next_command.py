"""The command to type next, as the user has typed this one."""

import shlex
from collections.abc import Callable, Collection, Mapping
from itertools import combinations

from app.containers import in_container, program
from app.settings.settings import Settings
from app.settings.sources import flag_name, resolve


def next_command(
    settings: Settings,
    command: str,
    flags: Mapping[str, object],
    found: Callable[[Settings], object],
    wanted: object,
) -> str | None:
    """Return the shortest command by whose settings `found` is what is wanted.

    It is, in a new shell and in this one; in a container the environment may come from .env.

    Args:
        flags: what it may have besides the data folder and the recipe, by variable.

    Returns:
        None if that takes further settings.
    """
    data_dir, recipe = (
        None if in_container() else settings.general.data_dir,
        settings.general.recipe,
    )
    texts = {"DATA_DIR": data_dir, "RECIPE": recipe, **flags}
    given = {name: str(value) for name, value in texts.items() if value}
    for size in range(len(given) + 1):
        for names in combinations(given, size):
            typed = {name: given[name] for name in names}
            if all(
                found(resolve(typed, command, with_environment=here)) == wanted
                for here in (False, True)
            ):
                words = [f"{flag_name(name)} {shlex.quote(given[name])}" for name in names]
                return " ".join([program(), command, *words])
    return None


def command_for_run(settings: Settings, command: str) -> str:
    """Return the shortest command that takes the run; without a name it takes the latest."""
    name, run_dir, data_dir = "TRAIN_RUN_NAME", settings.run_dir, settings.general.data_dir
    return (
        next_command(settings, command, {name: run_dir.name}, lambda it: it.run_dir, run_dir)
        or next_command(settings, command, {}, lambda it: it.general.data_dir, data_dir)
        or f"{program()} {command}"
    )


def command_with_settings(
    settings: Settings, command: str, but: Collection[str] = frozenset()
) -> str:
    """Return the shortest `prepare` or `train` with these settings, or that there are others.

    Args:
        but: variables that may have other values.
    """
    train, prepare = settings.train, settings.prepare
    to_prepare = command == "prepare"
    flags = {
        "TRAIN_RUN_NAME": train.run_name,
        "TRAIN_DATASET_DIR": train.dataset_dir or prepare.dataset_dir,
        "TRAIN_INIT_FROM": train.init_from,
    }
    flags = {"PREPARE_OUT_DIR": prepare.out_dir} if to_prepare else flags

    def all_settings(it: Settings) -> object:
        if to_prepare:
            return it.prepare, it.model, it.train
        values = {f"MODEL_{name}".upper(): value for name, value in it.model}
        values |= {f"TRAIN_{name}".upper(): value for name, value in it.train}
        # Its text is in the dataset's folder.
        named = {"TRAIN_RUN_NAME", "TRAIN_DATASET_DIR", *but}
        return place(it), {name: value for name, value in values.items() if name not in named}

    def place(it: Settings) -> object:
        folders = [it.prepare_dir] if to_prepare else [it.train_dataset_dir, it.run_dir]
        return it.general.recipe, it.train.init_from, folders

    whole = next_command(settings, command, flags, all_settings, all_settings(settings))
    part = next_command(settings, command, flags, place, place(settings))
    return whole or f"{part or f'{program()} {command}'} with the same settings"
