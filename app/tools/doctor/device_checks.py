"""The device as the run would use it: which one, in which precision, with how much memory.

These checks, and those of rates and steps, run in the process of app.tools.doctor.trial.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from app.containers import in_container
from app.model.gpt import GPT, GPTConfig
from app.settings import Settings
from app.tools.doctor.case import Trial
from app.tools.doctor.finding import Finding, gigabytes
from app.train.attention import choose_attention
from app.train.compilation import missing_for_compiling
from app.train.device import Device, choose_device
from app.train.job import micro_batch_size
from app.train.launch import processes_to_launch
from app.train.micro_batch import available_bytes, memory_need
from app.train.ranks import Ranks

# On the CPU's side of a process that trains on a GPU: libraries, pinned batches, shards' pages.
_HOST_BYTES = 4_000_000_000
_COPY_OF_A_PARAMETER = 12
_SHARED_MEMORY_BYTES = 256 << 20


@dataclass
class Examined:
    """A device under examination, and what was found so far.

    Attributes:
        settings: of the run that is meant
        device: as train would choose it
        trial: what it has shown
        windows: of a micro-batch
    """

    settings: Settings
    device: Device
    trial: Trial
    windows: int = 1

    @property
    def config(self) -> GPTConfig:
        """The configured model's shape."""
        return GPTConfig(**self.settings.model.model_dump())

    @property
    def type(self) -> str:
        """Its type, cpu or cuda."""
        return self.device.torch_device.type

    @property
    def all_alike(self) -> list[torch.device]:
        """Every device that would train."""
        if self.type == "cpu":
            return [self.device.torch_device]
        return [torch.device("cuda", number) for number in range(torch.cuda.device_count())]


def choose(settings: Settings) -> Examined:
    """Choose the device as train would.

    Raises:
        UserError: there is no such device.
    """
    chosen = settings.train
    processes = processes_to_launch(chosen)
    device = choose_device(chosen.device, chosen.precision, chosen.deterministic)
    with torch.device("meta"):
        flops = GPT(GPTConfig(**settings.model.model_dump())).flops_per_token()
    trial = Trial(device.torch_device.type, processes, model_flops_per_token=flops)
    return Examined(settings, device, trial)


def check_device(case: Examined) -> Iterator[Finding]:
    """Which device trains, with which torch."""
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU only"
    said = f"{case.device.name}; torch {torch.__version__}, built for {built}"
    if case.type == "cuda":
        major, minor = torch.cuda.get_device_capability()
        yield Finding(
            "device",
            "pass",
            f"{len(case.all_alike)} x {said}; compute capability {major}.{minor}; "
            f"{case.trial.processes} processes train",
        )
    elif case.settings.train.device == "cpu":
        yield Finding("device", "pass", said)
    else:
        place = " on the machine outside" if in_container() else ""
        yield Finding(
            "device",
            "warn",
            f"no GPU: trains on the CPU. {said}",
            f"look at `nvidia-smi`{place}, or set TRAIN_DEVICE=cpu if that is what you want",
        )


def check_precision(case: Examined) -> Iterator[Finding]:
    """Whether matrix products are in bf16."""
    if case.device.precision == "bf16":
        yield Finding("precision", "pass", "bf16")
    elif case.settings.train.precision == "float32":
        yield Finding("precision", "pass", "float32, as TRAIN_PRECISION says")
    elif case.type == "cpu":
        yield Finding("precision", "pass", "float32: this CPU has no units for bf16 (AMX)")
    else:
        yield Finding(
            "precision",
            "warn",
            "float32: this GPU has no units for bf16, with which others are several times as fast",
            "use a GPU of the Ampere generation or newer",
        )


def check_memory(case: Examined) -> Iterator[Finding]:
    """Whether a micro-batch fits into the device, and the copies of a save into the machine."""
    here, processes = case.device.torch_device, case.trial.processes
    compiled = case.settings.train.compile != "false" and not missing_for_compiling(case.type)
    shards = processes if case.settings.train.shard_optimizer else 1
    need = memory_need(
        case.config, case.device.precision, case.type, compiled=compiled, state_shards=shards
    )
    ranks = Ranks(0, processes, processes)
    case.windows = micro_batch_size(case.settings, None, case.device, ranks)
    free = available_bytes(here) // (processes if case.type == "cpu" else 1)
    wanted = need.of(case.windows)
    windows = f"{case.windows} window{'s' if case.windows > 1 else ''}"
    said = f"{gigabytes(free)} free; micro-batches of {windows} need {gigabytes(wanted)} at most"
    if need.fixed > free:
        yield Finding("memory", "fail", said, "use a smaller model, or a device with more memory")
    elif wanted > free:
        yield Finding(
            "memory",
            # What is counted is an upper bound.
            "warn" if wanted < 2 * free else "fail",
            said,
            "set TRAIN_MICRO_BATCH_SIZE=auto, or use a smaller model",
        )
    else:
        yield Finding("memory", "pass", said)
    if case.type == "cuda":
        yield _host_memory(case)


def _host_memory(case: Examined) -> Finding:
    with torch.device("meta"):
        parameters = GPT(case.config).num_parameters()
    # The first process keeps a copy of weights and moments while a checkpoint is written.
    wanted = case.trial.processes * _HOST_BYTES + _COPY_OF_A_PARAMETER * parameters
    free = available_bytes(torch.device("cpu"))
    said = f"{gigabytes(free)} of the machine's own free; about {gigabytes(wanted)} are needed"
    if free < wanted:
        return Finding("host memory", "warn", said, "use a machine with more memory")
    return Finding("host memory", "pass", said)


def check_shared_memory(case: Examined) -> Iterator[Finding]:
    """/dev/shm, through which NCCL lets the GPUs of a machine talk."""
    if case.trial.processes == 1 or case.type == "cpu":
        yield Finding("shared memory", "skip", "not needed: only several GPUs talk through it")
        return
    place = Path("/dev/shm")
    found = os.statvfs(place)
    free, wanted = found.f_bavail * found.f_frsize, case.trial.processes * _SHARED_MEMORY_BYTES
    said = f"{gigabytes(free)} free in {place}; NCCL may take {gigabytes(wanted)}"
    if free < wanted:
        yield Finding("shared memory", "warn", said, "raise shm_size in compose.yaml")
    else:
        yield Finding("shared memory", "pass", said)


def check_attention(case: Examined) -> Iterator[Finding]:
    """Which attention kernel is fastest."""
    case.device, said = choose_attention(case.device, case.config, 8)
    if "no fast kernel" in said:
        fix = "compare torch's build with the GPU: is it made for its compute capability?"
        yield Finding("attention", "warn", said, fix)
    else:
        yield Finding("attention", "pass", said.removeprefix("attention: "))
