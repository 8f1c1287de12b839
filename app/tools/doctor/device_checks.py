"""The device as the run would use it: which one, in which precision, with how much memory.

These checks, and those of measurements, run in the process of app.tools.doctor.trial.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend
from torch.nn.functional import scaled_dot_product_attention

from app.containers import in_container
from app.distributed.launch import processes_to_launch
from app.hardware.device import Device, select_device
from app.hardware.memory import available_bytes
from app.model.gpt import GPT, GPTConfig
from app.settings.settings import Settings
from app.tools.doctor.case import CHECKPOINT_BYTES, Trial
from app.tools.doctor.finding import Finding, counted, gigabytes
from app.train.micro_batch import choose_micro_batch_size, estimate_memory

# On the CPU's side of a process that trains on a GPU: libraries, pinned batches, shards' pages.
_HOST_BYTES = 4_000_000_000
_SHARED_MEMORY_BYTES = 256 << 20


@dataclass
class Examined:
    """A device under examination, and what was found so far.

    Attributes:
        settings: of the run that is meant
        device: as train would choose it
        model: the configured one, on no device
        trial: what the device has shown
        windows: of a micro-batch
    """

    settings: Settings
    device: Device
    model: GPT
    trial: Trial
    windows: int = 1

    @property
    def all_alike(self) -> list[torch.device]:
        """Every device that would train."""
        if self.trial.device_type == "cpu":
            return [self.device.torch_device]
        return [torch.device("cuda", number) for number in range(torch.cuda.device_count())]


def choose(settings: Settings) -> Examined:
    """Choose the device as train would.

    Raises:
        UserError: there is no such device.
    """
    chosen = settings.train
    processes = processes_to_launch(chosen.processes, chosen.device)
    device = select_device(chosen.device, chosen.precision, chosen.deterministic)
    with torch.device("meta"):
        model = GPT(
            GPTConfig(**settings.model.model_dump()), bf16_residual=chosen.residual == "bf16"
        )
    trial = Trial(device.torch_device.type, processes)
    trial.model_flops_per_token = model.flops_per_token()
    return Examined(settings, device, model, trial)


def check_device(case: Examined) -> Iterator[Finding]:
    """Which device trains, with which torch."""
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU only"
    said = f"{case.device.name}; torch {torch.__version__}, built for {built}"
    if case.trial.device_type == "cuda":
        major, minor = torch.cuda.get_device_capability()
        said = f"{len(case.all_alike)} x {said}; compute capability {major}.{minor}; training in "
        said += counted(case.trial.processes, "process", "processes")
    elif case.settings.train.device == "auto":
        place = " on the machine outside" if in_container() else ""
        fix = f"look at `nvidia-smi`{place}, or set TRAIN_DEVICE=cpu if that is what you want"
        yield Finding("device", "warn", f"no GPU: trains on the CPU. {said}", fix)
        return
    yield Finding("device", "pass", said)


def check_precision(case: Examined) -> Iterator[Finding]:
    """Check that matrix products are in bf16."""
    if case.device.precision == "bf16":
        yield Finding("precision", "pass", "bf16")
    elif case.device.precision == "fp8":
        yield Finding("precision", "pass", "bf16, the output layer in 8-bit floats")
    elif case.settings.train.precision == "float32":
        yield Finding("precision", "pass", "float32, as TRAIN_PRECISION says")
    elif case.trial.device_type == "cpu":
        yield Finding("precision", "pass", "float32: this CPU is no faster in bf16")
    else:
        said = "float32: this GPU has no units for bf16, which is several times as fast on others"
        yield Finding("precision", "warn", said, "use a GPU of the Ampere generation or newer")


def check_memory(case: Examined) -> Iterator[Finding]:
    """Check that a micro-batch fits into the device, and the copies of a save into the machine."""
    device, processes = case.device, case.trial.processes
    here = device.torch_device
    chosen, config = case.settings.train, case.model.config
    need = estimate_memory(chosen, config, device, processes)
    case.windows = choose_micro_batch_size(chosen, config, None, device, processes, processes)
    free = available_bytes(here, processes)
    wanted = need.bytes_for(case.windows)
    windows = counted(case.windows, "window")
    said = f"{gigabytes(free)} free; micro-batches of {windows} need {gigabytes(wanted)} at most"
    if need.fixed_bytes > free:
        yield Finding("memory", "fail", said, "use a smaller model, or a device with more memory")
    elif wanted > free:
        fix = "set TRAIN_MICRO_BATCH_SIZE=auto, or use a smaller model"
        # The estimate is an upper bound.
        yield Finding("memory", "warn" if wanted < 2 * free else "fail", said, fix)
    else:
        yield Finding("memory", "pass", said)
    if here.type == "cuda":
        yield _host_memory(case)


def _host_memory(case: Examined) -> Finding:
    # The first process keeps a copy of weights and moments while a checkpoint is written, in pinned
    # memory, of which torch takes powers of two.
    copy = 2 * CHECKPOINT_BYTES * case.model.num_parameters()
    wanted = case.trial.processes * _HOST_BYTES + copy
    free = available_bytes(torch.device("cpu"))
    said = f"{gigabytes(free)} of the machine's own free; about {gigabytes(wanted)} are needed"
    if free < wanted:
        return Finding("host memory", "warn", said, "use a machine with more memory")
    return Finding("host memory", "pass", said)


def check_shared_memory(case: Examined) -> Iterator[Finding]:
    """/dev/shm, through which NCCL lets the GPUs of a machine talk."""
    if case.trial.processes == 1 or case.trial.device_type == "cpu":
        yield Finding("shared memory", "skip", "not needed: only several GPUs talk through it")
        return
    found = os.statvfs("/dev/shm")
    free, wanted = found.f_bavail * found.f_frsize, case.trial.processes * _SHARED_MEMORY_BYTES
    said = f"{gigabytes(free)} free in /dev/shm; NCCL may take {gigabytes(wanted)}"
    if free < wanted:
        yield Finding("shared memory", "warn", said, "raise shm_size in compose.yaml")
    else:
        yield Finding("shared memory", "pass", said)


def check_attention(case: Examined) -> Iterator[Finding]:
    """Check that the attention kernel that torch chooses works, and is a fast one."""
    config, device = case.model.config, case.device
    shape = (1, config.num_heads, config.context_length, config.embd_size // config.num_heads)
    q = torch.zeros(shape, dtype=device.dtype, device=device.torch_device, requires_grad=True)
    chosen = SDPBackend(torch._fused_sdp_choice(q, q, q, is_causal=True))
    scaled_dot_product_attention(q, q, q, is_causal=True).sum().backward()
    if chosen == SDPBackend.MATH:
        fix = "compare torch's build with the GPU: is it made for its compute capability?"
        yield Finding("attention", "warn", "no fast kernel works here", fix)
    else:
        yield Finding("attention", "pass", chosen.name.lower().replace("_", " "))
