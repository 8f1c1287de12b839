"""The command line: `python -m app.cluster prepare`, with the settings of `app prepare`."""

from __future__ import annotations

import os
from argparse import ArgumentTypeError
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING

from app.cli.process import raise_on_signals, run_and_report, run_as_process

if TYPE_CHECKING:
    from collections.abc import Sequence

    from app.cli.parser import Parser

_DESCRIPTION = """\
Turn text into checked token shards on many machines. PREPARE_WORKERS are tasks at the same time
(auto: one per core). DATA_DIR, and local text, must be on a disk that all machines share.
"""


def main(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code; an unexpected exception passes through."""
    return run_and_report(lambda: _prepare(arguments))


def _prepare(arguments: Sequence[str]) -> None:
    from app.errors import UserError

    if not find_spec("datatrove"):
        raise UserError(
            "this environment does not hold what `app.cluster` needs",
            "`make test-cluster` makes one that does: . .venv-cluster/bin/activate",
        )
    from app.cluster.executors import engine
    from app.cluster.prepare import prepare
    from app.dataset_names import STDLIB, is_hub_id, local_path
    from app.settings.sources import load_settings
    from app.tools.prepare import dataset_spec, print_next

    flags, options = _parser().parse(arguments)
    settings = load_settings(flags, "prepare")
    cfg, spec = settings.prepare, dataset_spec(settings)
    if cfg.dataset != STDLIB and not is_hub_id(cfg.dataset):
        # Another machine, or process, may start in another folder.
        path = local_path(cfg.dataset).absolute()
        spec = replace(spec, source=replace(spec.source, dataset=str(path)))
    if settings.general.hf_token:
        os.environ["HF_TOKEN"] = settings.general.hf_token.get_secret_value()
    workers = None if cfg.workers == "auto" else cfg.workers
    raise_on_signals()
    with engine(options["executor"], workers, dict(options["sbatch"])) as (run, count):
        folder = settings.prepare_dir.absolute()
        if prepare(spec, folder, run, workers=count, task_bytes=options["task_bytes"]):
            print_next(settings)


def _parser() -> Parser:
    from app.cli.parser import Parser

    usage = "python -m app.cluster prepare [--executor local|ray|slurm] [--SETTING VALUE ...]"
    parser = Parser(prog="python -m app.cluster", description=_DESCRIPTION, usage=usage)
    parser.add_argument("command", choices=("prepare",), metavar="prepare")
    parser.add_argument(
        "--executor",
        choices=("local", "ray", "slurm"),
        default="local",
        help="processes of this machine [default]; the Ray cluster of RAY_ADDRESS, or one that is "
        "started here; jobs of Slurm",
    )
    parser.add_argument(
        "--task-bytes",
        type=_bytes,
        metavar="N",
        help="text that a task has at least; by default a shard's, or less for many workers",
    )
    parser.add_argument(
        "--sbatch",
        type=_option,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of sbatch, such as partition=cpu (needed) or time=02:00:00; several times",
    )
    parser.add_settings(("prepare", "general"))
    return parser


def _bytes(text: str) -> int:
    from app.settings.types import parse_count

    try:
        count = int(str(parse_count(text)))
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from None
    if count < 1:
        raise ArgumentTypeError("must be at least 1")
    return count


def _option(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise ArgumentTypeError(f"{text!r} is not of the form NAME=VALUE")
    return name, value


if __name__ == "__main__":
    run_as_process(main)
