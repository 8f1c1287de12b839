"""Compiled code: its cache, whether the compiler works, the compiled loss."""

import os
import shutil
import signal
import sysconfig
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from contextvars import copy_context
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from app.distributed.data_parallel import LossFunction
from app.errors import UserError
from app.failures import compiler_failure, is_one_word
from app.hardware.device import Device
from app.hardware.proc import child_processes
from app.locks import has_flock
from app.model import cross_entropy
from app.model.language_model import LanguageModel

# A trivial function takes 13 s on two slow cores where nothing is cached yet.
_TRIAL_SECONDS = 170.0


def set_compile_cache_dir(cache_dir: Path) -> None:
    """Keep compiled code in `cache_dir`, unless the environment names another folder.

    Call it before torch's compiler is imported. torch's own folder in /tmp is used if the path has
    spaces or quotes, if another user owns it, or if its disk forbids execution or has no flock.
    """
    folder = (cache_dir / "inductor").absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    # Linux alone has ST_NOEXEC.
    forbids_execution = os.statvfs(existing).f_flag & getattr(os, "ST_NOEXEC", 0)
    if forbids_execution or not os.access(existing, os.W_OK):
        return
    if is_one_word(str(folder)) and has_flock(existing):
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))
    os.environ.setdefault("TRITON_CACHE_DIR", str((cache_dir / "triton").absolute()))


def missing_build_tools(device_type: str) -> list[str]:
    """Return what torch.compile lacks on this machine, each with the command to install it.

    It generates C++ for a CPU, Triton and C for a GPU, all of which need Python's headers.
    """
    compilers = [os.environ.get("CXX"), "g++", "clang++"]
    if device_type == "cuda":
        compilers += [os.environ.get("CC"), "gcc", "clang"]
    missing = []
    if device_type == "cuda" and find_spec("triton") is None:
        missing.append("Triton (pip install triton)")
    if not any(compiler and shutil.which(compiler) for compiler in compilers):
        missing.append("a C++ compiler (apt-get install g++)")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        missing.append("Python's headers (apt-get install python3-dev)")
    return missing


def compile_problem(device: Device) -> UserError | None:
    """Compile a trivial function, and return why that fails; None if torch.compile works here.

    What it has compiled comes from the cache at the next start. A compiler that hangs is killed.
    """
    if device.torch_device.type == "mps":
        return UserError(
            "torch.compile is a prototype for Apple's GPU", "TRAIN_COMPILE=false hides this line"
        )
    if missing := missing_build_tools(device.torch_device.type):
        return UserError(f"torch.compile does not find {' and '.join(missing)}", "install it")
    from torch._inductor import config

    if not (shutil.which("openssl") and is_one_word(tempfile.gettempdir())):
        # Precompiling hashes headers with openssl, in a shell that splits the folder's name.
        config.cpp_cache_precompile_headers = False

    def compile_little() -> None:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(64, device=device.torch_device))

    # The settings of torch's compiler are context variables.
    trial = ThreadPoolExecutor(1).submit(copy_context().run, compile_little)
    if not wait([trial], _TRIAL_SECONDS).done:
        _kill_compilers(trial)
        problem = f"torch.compile does not work: it has not ended after {_TRIAL_SECONDS:g} s"
        return UserError(problem, "see whether `g++` (or what CXX names) and the disks answer")
    error = trial.exception()
    from torch._dynamo.utils import counters

    # compile_cache_summary counts the model only.
    counters["aot_autograd"].clear()
    if error is None and not counters["frames"]["ok"]:
        switches = "TORCH_COMPILE_DISABLE, TORCHDYNAMO_DISABLE and TORCHDYNAMO_SUPPRESS_ERRORS"
        return UserError("torch.compile compiles nothing", f"unset {switches}")
    return compiler_failure(error) if error else None


def _kill_compilers(trial: Future[None]) -> None:
    """Kill the compilers of a trial until it ends: torch may start another after a failed one."""
    for _ in range(100):
        for child in child_processes(os.getpid()):
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        if wait([trial], 0.1).done:
            return


def compile_note(
    device: Device, compiles: bool, problem: UserError | None = None, before: bool | None = None
) -> str:
    """Return a line on whether the run is compiled and, if not, why and how to mend it.

    Args:
        compiles: whether the run is compiled from now on.
        problem: why it is not, although that was requested.
        before: whether it was compiled up to its checkpoint; None for a new run.

    Raises:
        UserError: it is not, and fp8 requires it.
    """
    if problem and device.precision == "fp8":
        raise UserError(
            f"TRAIN_PRECISION=fp8 needs compiled code, and {problem.problem}",
            f"{problem.fix}, or set TRAIN_PRECISION=auto",
        )
    if problem:
        note = f"not compiled, and slower: {problem.problem}; {problem.fix}"
    elif compiles:
        note = "the first step waits for the compiler"
    else:
        note = "not compiled: TRAIN_COMPILE=false"
    if before in (None, compiles):
        return note
    was = "compiled" if before else "not compiled"
    return (
        f"{note}\n{was} up to here: losses now differ in their last digits from an unbroken run's"
    )


def compiled_loss(model: LanguageModel, device: Device) -> LossFunction:
    """Compile the model's loss in three pieces: embedding, block, output layer.

    Compiling the whole model at once takes 12 to 18 s longer and makes steps no faster
    (benchmarks/results). The model itself stays uncompiled for evaluation and sampling.

    Args:
        device: the loss is to be computed in its forward_pass.

    Returns:
        (inputs, targets), int64 [B, T] each, to the mean loss.
    """
    from torch._inductor import config

    config.deterministic = device.deterministic
    # The cache key does not include the backward pass of our operator.
    torch.compiler.config.cache_key_tag = cross_entropy.VERSION
    embed, loss = torch.compile(model.embed), torch.compile(model.loss)
    # Blocks differ only in their weights, so all share the code of the first.
    blocks = [torch.compile(block) for block in model.blocks]

    def compiled_forward(inputs: Tensor, targets: Tensor) -> Tensor:
        x = model.run_blocks(embed(inputs), blocks)
        return loss(x, targets, fp8=device.precision == "fp8")

    return compiled_forward


def compile_cache_summary() -> str:
    """Return a line on how much compiled code came from the cache."""
    # Importing it earlier would lock in the cache folder.
    from torch._dynamo.utils import counters

    misses, hits = (counters["aot_autograd"][f"autograd_cache_{kind}"] for kind in ("miss", "hit"))
    return f"{misses} pieces of the model were compiled, {hits} came from the cache"
