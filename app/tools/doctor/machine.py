"""The machine around the device: its cores, the disk below DATA_DIR, NVIDIA's driver and GPUs."""

import os
import re
import runpy
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

from app.containers import in_container
from app.errors import UserError
from app.files import NO_FOLDER_FSYNC, fsync_folder
from app.formats import format_bytes, plural
from app.hardware.proc import cpu_quota, usable_cores
from app.locks import NO_FLOCK, has_flock
from app.tools.doctor.checks import Context, Finding, existing, failure, graded
from app.train.advice import advise_on_disk, checkpoints_bytes, count_checkpoints

_BUSY_SHARE = 0.5
_BYTES_PER_TOKEN = 2
# Compiled code, files of the hub's library, logs and events of a run.
_CACHE_BYTES = 300_000_000
_SPARE_DISK = 1.2
# CUDA's major version -> the oldest driver's (NVIDIA, "CUDA Compatibility", minor versions).
_OLDEST_DRIVER = {"11": 450, "12": 525, "13": 580}
# nvidia-smi takes seconds where the driver is first loaded, and hangs with a GPU that is broken.
_DRIVER_SECONDS = 45.0
# An idle GPU uses less; the driver's own share is counted apart.
_IDLE_GPU_BYTES = 500 << 20
# Elements that are "Yes" in trouble, by the generation of the GPU and of its driver.
_FAULTS = {
    "ecc_errors/unrepairable_memory": "memory that cannot be repaired",
    "remapped_rows/remapped_row_failure": "no spare memory for what is broken",
    "remapped_rows/remapped_row_pending": "broken memory is replaced at the next reset",
    "retired_pages/pending_retirement": "broken memory is retired at the next reset",
    "gpu_reset_status/reset_required": "the driver asks for a reset",
}
# NVML, "Clocks Event Reasons"; idle clocks and the power cap are how a healthy GPU works.
_SLOWDOWNS = {
    "hw_slowdown": "the hardware halves its clocks",
    "hw_thermal_slowdown": "it is too hot",
    "hw_power_brake_slowdown": "the power supply holds it back",
    "sw_thermal_slowdown": "the driver holds it back because it is hot",
}


def check_cpu(_context: Context) -> Iterator[Finding]:
    """Check that the cores that this process may use are granted to it, and idle."""
    cores, quota, load = usable_cores(), cpu_quota(), os.getloadavg()[0]
    threads = os.environ.get("OMP_NUM_THREADS", "")
    used = int(threads) if threads.isdigit() else cores
    found = plural(cores, "core") + (f", of which OMP_NUM_THREADS uses {used}" if threads else "")
    is_limited = quota is not None and quota < min(used, cores)
    is_busy = load > _BUSY_SHARE * cores
    if is_limited:
        found += f"; but this container gets the time of {quota:g} only, and threads wait in turn"
    elif is_busy:
        found += f", which {load:.1f} other threads want: what is measured now is too slow"
    fix = f"set OMP_NUM_THREADS={max(1, round(quota or 0))}, or lift the limit (cpus)"
    again = "run doctor again when they have ended"
    yield graded("cpu", found, ("warn", is_limited, fix), ("warn", is_busy, again))


def check_folders(context: Context) -> Iterator[Finding]:
    """Check that this user can write wherever prepare and train will."""
    settings = context.settings
    data_dir = settings.general.data_dir
    folders = [data_dir, data_dir / "cache", settings.run_dir, settings.run_dir / "checkpoints"]
    if not context.fingerprint:
        folders.append(settings.prepare_dir)
    is_writable = True
    for folder in dict.fromkeys(map(existing, folders)):
        try:
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            error.filename, is_writable = str(folder), False
            yield failure("data folder", error)
    if is_writable:
        lacking = "; it ".join(_weaknesses(existing(data_dir)))
        found = f"{data_dir} can be written by user {os.getuid()}"
        found += f"; its file system {lacking}" if lacking else ""
        fix = "keep this in mind, or set DATA_DIR to a local disk"
        yield graded("data folder", found, ("warn", lacking, fix))


def _weaknesses(folder: Path) -> Iterator[str]:
    """Yield what the file system of a folder lacks, and which guarantee is weaker there."""
    if not has_flock(folder):
        yield NO_FLOCK
    with tempfile.NamedTemporaryFile(dir=folder, prefix="doctor") as file:
        path = Path(file.name)
        if path.with_name(path.name.swapcase()).exists():
            yield "ignores case: names that differ only by case are the same run or dataset"
    if not fsync_folder(folder):
        yield NO_FOLDER_FSYNC


def check_space(context: Context) -> Iterator[Finding]:
    """Check that shards, caches and checkpoints fit on the disk.

    Checkpoints are those kept, the best, one being written, and one from before a cool-down.
    """
    settings, data_dir = context.settings, context.settings.general.data_dir
    disk, shards = existing(data_dir), _shard_bytes(context)
    cfg, model = settings.train, settings.model
    sizes = {
        settings.train_dataset_dir: shards or 0,
        settings.run_dir: checkpoints_bytes(cfg, model),
        data_dir / "cache": _CACHE_BYTES,
    }
    parts = [max(0, size - _size(folder)) for folder, size in sizes.items()]
    needed = sum(parts) + context.download_bytes
    context.disk_bytes, free = needed, shutil.disk_usage(disk).free
    of_shards, of_checkpoints, of_caches = map(format_bytes, parts)
    size = format_bytes(context.download_bytes)
    of_model = f", {size} of {cfg.init_from}" if context.download_bytes else ""
    if shards is None:
        of_shards = "an unknown size"
    # Shards and caches leave this for checkpoints, existing ones included.
    left = free - needed + sizes[settings.run_dir]
    _, fix = next(advise_on_disk(cfg, model, left), ("", ""))
    unknown = "set PREPARE_TOTAL_TOKENS to a number; each token takes 2 bytes"
    yield graded(
        "disk space",
        f"{format_bytes(free)} free in {disk}; the run needs {format_bytes(needed)} more "
        f"({of_shards} of shards, {of_checkpoints} of "
        f"{plural(count_checkpoints(cfg), 'checkpoint')}, {of_caches} of caches{of_model})",
        ("fail", needed > free, fix),
        ("warn", shards is None, unknown),
        ("warn", _SPARE_DISK * needed > free, "have more room to spare: set DATA_DIR"),
    )


def _shard_bytes(context: Context) -> int | None:
    """Return the size of the whole dataset; None if it is unknown until the text is read."""
    cfg = context.settings.prepare
    if context.fingerprint:
        return _size(context.settings.train_dataset_dir)
    if cfg.total_tokens != "all":
        return _BYTES_PER_TOKEN * (cfg.total_tokens + cfg.val_tokens)
    # FineWeb's samples are named after their number of tokens.
    sample = re.fullmatch(r"sample-(\d+)BT", cfg.config or "")
    if sample is None:
        return None
    from app.dataset_names import is_hub_id

    return _BYTES_PER_TOKEN * int(sample[1]) * 10**9 if is_hub_id(cfg.dataset) else None


def _size(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())


def check_driver(context: Context) -> Iterator[Finding]:
    """Check NVIDIA's driver and each of its GPUs.

    Raises:
        UserError: nvidia-smi fails or hangs, or prints no XML.
    """
    if context.settings.train.device == "cpu":
        yield Finding("driver", "skip", "not needed: TRAIN_DEVICE=cpu")
        return
    program = shutil.which("nvidia-smi")
    fix = "on a machine with NVIDIA's GPU, install the driver"
    if in_container():
        fix = "see `nvidia-smi` on the host; it needs the driver and NVIDIA's toolkit"
    if program is None:
        yield Finding("driver", "skip", "not checked: there is no nvidia-smi", fix)
        return
    command = [program, "-q", "-x"]
    try:
        ended = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_DRIVER_SECONDS
        )
    except subprocess.TimeoutExpired:
        problem = f"nvidia-smi has not ended after {_DRIVER_SECONDS:g} s"
        raise UserError(problem, "restart the machine; if this stays, take another one") from None
    if ended.returncode:
        message = " ".join((ended.stdout + ended.stderr).split())[:300]
        raise UserError(f"nvidia-smi ends with {ended.returncode}: {message}", fix)
    yield from driver_findings(ended.stdout, _torch_cuda())


def _torch_cuda() -> str | None:
    """Return the version of CUDA that torch is built for, if any, without importing torch."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")
    version: dict[str, str | None] = runpy.run_path(str(Path(spec.origin).with_name("version.py")))
    return version["cuda"]


def driver_findings(xml: str, cuda: str | None) -> Iterator[Finding]:
    """Yield the findings of the driver and of each GPU.

    Args:
        xml: output of `nvidia-smi -q -x`. It names its DTD (nvsmi_device_v12.dtd, for example):
            elements come and go with the driver's version, and "N/A" stands for what a GPU does not
            have.
        cuda: the version that torch is built for; None for a build without it.

    Raises:
        UserError: that is not XML.
    """
    try:
        root = ElementTree.fromstring(xml)
    except ElementTree.ParseError as error:
        raise UserError(
            f"nvidia-smi does not print XML: {xml.strip()[:200]!r} ({error})",
            "see what `nvidia-smi` prints on this machine",
        ) from None
    version = _text(root, "driver_version")
    major = version.partition(".")[0]
    oldest = _OLDEST_DRIVER.get((cuda or "").partition(".")[0], 0)
    is_too_old = major.isdigit() and int(major) < oldest
    found = f"NVIDIA {version}, for CUDA up to {_text(root, 'cuda_version')}; torch is built for "
    found += f"CUDA {cuda}" if cuda else "the CPU only"
    found += f", which needs {oldest} or newer" if is_too_old else ""
    cpu_build = "install torch's build for CUDA (make TORCH=cuda), or keep to the CPU"
    fix = "update it; or take torch for an older CUDA (TORCH, TORCH_INDEX; images: BASE_IMAGE)"
    yield graded("driver", found, ("warn", cuda is None, cpu_build), ("fail", is_too_old, fix))
    for index, gpu in enumerate(root.findall("gpu")):
        yield _gpu_finding(f"GPU {index}", gpu)


def _gpu_finding(check: str, gpu: ElementTree.Element) -> Finding:
    total, used = (_bytes(_text(gpu, f"fb_memory_usage/{name}")) for name in ("total", "used"))
    free = f"{format_bytes(total - (used or 0))} of {format_bytes(total)} free, " if total else ""
    faults, slowdowns = "; ".join(_faults(gpu)), ", ".join(_slowdowns(gpu))
    others = "; ".join(
        " ".join(_text(process, name) for name in ("pid", "process_name", "used_memory"))
        for process in gpu.findall("processes/process_info")
        # A desktop's graphics (G) do no harm, other computations (C) do.
        if _text(process, "type") != "G"
    )
    if not others and (used or 0) > _IDLE_GPU_BYTES:
        others = "a program outside of this container"
    state = (
        faults
        or (slowdowns and f"slow: {slowdowns}")
        or (others and f"others work on it: {others}")
        or "no errors, no other program on it"
    )
    slow = "wait and look again (nvidia-smi -q -d PERFORMANCE); if it stays, take another machine"
    busy = "stop them, or choose another GPU (GPU=1 in .env; elsewhere CUDA_VISIBLE_DEVICES=1)"
    return graded(
        check,
        f"{_text(gpu, 'product_name')}, {free}{_text(gpu, 'temperature/gpu_temp')}; {state}",
        ("fail", faults, "restart the machine; if this stays, ask for another one"),
        ("warn", slowdowns, slow),
        ("warn", others, busy),
    )


def _slowdowns(gpu: ElementTree.Element) -> Iterator[str]:
    for kind in ("event", "throttle"):
        for name, reason in _SLOWDOWNS.items():
            if _text(gpu, f"clocks_{kind}_reasons/clocks_{kind}_reason_{name}") == "Active":
                yield reason


def _faults(gpu: ElementTree.Element) -> Iterator[str]:
    # A driver counts single kinds of errors, or all of them together; every kind is bad.
    counts = [item for item in gpu.findall("ecc_errors/volatile/*") if "uncorrectable" in item.tag]
    counts += gpu.findall("ecc_errors/volatile/double_bit/total")
    errors = sum(int(text) for item in counts if (text := (item.text or "").strip()).isdigit())
    if errors:
        yield f"{plural(errors, 'memory error')} not corrected since the driver was loaded"
    for path, fault in _FAULTS.items():
        if _text(gpu, path) == "Yes":
            yield fault
    action = _text(gpu, "gpu_recovery_action")
    if action not in ("None", "N/A"):
        yield f"the driver asks for: {action}"


def _text(parent: ElementTree.Element, path: str) -> str:
    return (parent.findtext(path) or "").strip() or "N/A"


def _bytes(text: str) -> int | None:
    mebibytes = re.fullmatch(r"(\d+) MiB", text)
    return int(mebibytes[1]) << 20 if mebibytes else None
