"""Tasks as jobs of Slurm."""

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from datatrove.executor import SlurmPipelineExecutor

from app.cluster.step import ByParts, WritePart
from app.errors import UserError

_ROOT = Path(__file__).parents[2]


class NotSubmittedError(UserError):
    """Slurm has not accepted the jobs; their tasks are planned."""


class SlurmExecutor(ByParts, SlurmPipelineExecutor):
    """Runs tasks as arrays of Slurm jobs, in this environment and checkout on all machines.

    Args:
        workers: largest number of simultaneous jobs; -1 for no limit.
        options: sbatch options, by name.
    """

    def __init__(
        self,
        pipeline: list[WritePart],
        *,
        tasks: int,
        workers: int,
        logging_dir: str,
        options: dict[str, str],
    ) -> None:
        here = f"PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH"
        super().__init__(
            pipeline,
            tasks=tasks,
            workers=workers,
            logging_dir=logging_dir,
            job_name="gpt-compose-prepare",
            time=options.get("time", "04:00:00"),
            partition=options["partition"],
            qos="",
            sbatch_args=options,
            # With a limit, the arrays run one after the other: the limit is each array's own.
            max_array_launch_parallel=workers == -1,
            env_command=f"export {here} PYTHONPATH={shlex.quote(str(_ROOT))}",
        )

    def run(self) -> Iterator[int]:
        """Do the task of the job that calls it, or submit all missing tasks. Yields none."""
        super().run()
        return iter(())

    def launch_job(self) -> None:
        """Submit the missing tasks.

        Raises:
            NotSubmittedError: there is no sbatch, or it fails.
        """
        # sbatch stores the environment with the jobs.
        os.environ.pop("HF_TOKEN", None)
        try:
            super().launch_job()
        except FileNotFoundError:
            script = self.logging_dir.resolve_paths("launch_script.slurm")
            raise NotSubmittedError(
                "there is no sbatch on this machine",
                f"run this where jobs are submitted, or submit {script} there",
            ) from None
        except subprocess.CalledProcessError as error:
            raise NotSubmittedError(
                f"sbatch has refused some or all jobs (exit code {error.returncode})",
                "correct --sbatch; when no job is left in the queue, the same command submits the "
                "missing tasks",
            ) from None

    def launch_merge_stats(self) -> None:
        """Do nothing: the statistics are not used, and their job waits for failed tasks."""
