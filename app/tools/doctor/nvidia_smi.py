"""What NVIDIA's driver says of itself and of its GPUs: `nvidia-smi -q -x`.

The output is XML that names its DTD (nvsmi_device_v12.dtd, for example). Elements come and go with
the driver's version, and what a GPU cannot tell is "N/A", so that nothing is taken for granted.
"""

import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from xml.etree import ElementTree

from app.containers import in_container
from app.errors import UserError
from app.tools.doctor.finding import Finding, gigabytes

# CUDA's major version -> the oldest driver's (NVIDIA, "CUDA Compatibility", minor versions).
_OLDEST_DRIVER = {"11": 450, "12": 525, "13": 580}
_TIMEOUT_SECONDS = 30.0
# Of an idle GPU: what the driver keeps for itself is counted apart.
_IN_USE_BYTES = 500 << 20
# NVML, "Clocks Event Reasons"; idle clocks and the power cap are how a healthy GPU works.
_SLOWED = {
    "hw_slowdown": "the hardware halves its clocks",
    "hw_thermal_slowdown": "it is too hot",
    "hw_power_brake_slowdown": "the power supply holds it back",
    "sw_thermal_slowdown": "the driver holds it back because it is hot",
}


@dataclass(frozen=True)
class Gpu:
    """A GPU as the driver describes it.

    Attributes:
        name: as its maker calls it
        total_bytes, used_bytes: of its memory; None where it does not tell
        temperature: in degrees Celsius, with the unit; or N/A
        faults: what makes it unfit for work
        slowed: why its clocks are low
        processes: that compute on it: number, name and memory
    """

    name: str
    total_bytes: int | None
    used_bytes: int | None
    temperature: str
    faults: tuple[str, ...]
    slowed: tuple[str, ...]
    processes: tuple[str, ...]


@dataclass(frozen=True)
class Driver:
    """NVIDIA's driver: its version, the newest CUDA it knows, and its GPUs."""

    version: str
    cuda: str
    gpus: tuple[Gpu, ...]


def read_driver(xml: str) -> Driver:
    """Read the output of `nvidia-smi -q -x`.

    Raises:
        UserError: it is something else.
    """
    try:
        root = ElementTree.fromstring(xml)
    except ElementTree.ParseError as error:
        raise UserError(
            f"nvidia-smi says what nobody understands: {xml.strip()[:200]!r} ({error})",
            "see what `nvidia-smi` says on this machine",
        ) from None
    return Driver(
        _text(root, "driver_version"),
        _text(root, "cuda_version"),
        tuple(_gpu(gpu) for gpu in root.findall("gpu")),
    )


def _gpu(gpu: ElementTree.Element) -> Gpu:
    memory = gpu.find("fb_memory_usage")
    return Gpu(
        _text(gpu, "product_name"),
        _bytes(_text(memory, "total")),
        _bytes(_text(memory, "used")),
        _text(gpu, "temperature/gpu_temp"),
        tuple(_faults(gpu)),
        tuple(_slowed(gpu)),
        tuple(
            " ".join(_text(one, name) for name in ("pid", "process_name", "used_memory"))
            for one in gpu.findall("processes/process_info")
            # A desktop's graphics (G) are no hindrance, what computes (C) is.
            if _text(one, "type") != "G"
        ),
    )


def _faults(gpu: ElementTree.Element) -> Iterator[str]:
    # A driver counts single kinds, or all of them: of each kind all are bad.
    counts = gpu.findall("ecc_errors/volatile/*")
    errors = sum(_count(one) for one in counts if "uncorrectable" in one.tag)
    errors += sum(_count(one) for one in gpu.findall("ecc_errors/volatile/double_bit/total"))
    if errors:
        yield f"{errors} memory errors that could not be corrected since the driver was loaded"
    for place, fault in (
        ("ecc_errors/unrepairable_memory", "memory that cannot be repaired"),
        ("remapped_rows/remapped_row_failure", "no spare memory for what is broken"),
        ("remapped_rows/remapped_row_pending", "broken memory is replaced at the next reset"),
        ("retired_pages/pending_retirement", "broken memory is retired at the next reset"),
        ("gpu_reset_status/reset_required", "the driver asks for a reset"),
    ):
        if _text(gpu, place) == "Yes":
            yield fault
    action = _text(gpu, "gpu_recovery_action")
    if action not in ("None", "N/A"):
        yield f"the driver asks for: {action}"


def _slowed(gpu: ElementTree.Element) -> Iterator[str]:
    for reason in (
        *gpu.findall("clocks_event_reasons/*"),
        *gpu.findall("clocks_throttle_reasons/*"),
    ):
        name = re.sub(r"^clocks_(event|throttle)_reason_", "", reason.tag)
        if name in _SLOWED and (reason.text or "").strip() == "Active":
            yield _SLOWED[name]


def _text(parent: ElementTree.Element | None, place: str) -> str:
    found = None if parent is None else parent.findtext(place)
    return (found or "").strip() or "N/A"


def _count(element: ElementTree.Element) -> int:
    text = (element.text or "").strip()
    return int(text) if text.isdigit() else 0


def _bytes(text: str) -> int | None:
    found = re.fullmatch(r"(\d+) MiB", text)
    return int(found[1]) << 20 if found else None


def check_driver(cuda: str | None, *, wanted: bool) -> Iterator[Finding]:
    """The driver and each of its GPUs.

    Args:
        cuda: the version that torch is built for; None for a build without it.
        wanted: whether the settings let a GPU be used.
    """
    program = shutil.which("nvidia-smi")
    if not wanted:
        yield Finding("driver", "skip", "not needed: TRAIN_DEVICE=cpu")
        return
    if program is None:
        yield Finding(
            "driver",
            "skip",
            "there is no nvidia-smi, so NVIDIA's driver cannot be asked",
            _no_driver(),
        )
        return
    try:
        asked = subprocess.run(
            [program, "-q", "-x"],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TIMEOUT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        yield Finding(
            "driver",
            "fail",
            f"nvidia-smi has not answered for {_TIMEOUT_SECONDS:g} s",
            "restart the machine; if that does not help, take another",
        )
        return
    if asked.returncode:
        said = " ".join((asked.stdout + asked.stderr).split())[:300]
        yield Finding(
            "driver", "fail", f"nvidia-smi ends with {asked.returncode}: {said}", _no_driver()
        )
        return
    yield from driver_findings(read_driver(asked.stdout), cuda)


def _no_driver() -> str:
    if in_container():
        return "see `nvidia-smi` on the machine outside; it needs the driver and NVIDIA's toolkit"
    return "on a machine with a GPU of NVIDIA's, install the driver"


def driver_findings(driver: Driver, cuda: str | None) -> Iterator[Finding]:
    """The rows of a driver and its GPUs; see check_driver."""
    said = f"NVIDIA {driver.version}, for CUDA up to {driver.cuda}"
    oldest = _OLDEST_DRIVER.get((cuda or "").partition(".")[0])
    major = driver.version.partition(".")[0]
    if cuda is None:
        yield Finding(
            "driver",
            "warn",
            f"{said}; but this torch is built for the CPU only",
            "install torch's build for CUDA (make TORCH=cuda), or keep to the CPU",
        )
    elif oldest and major.isdigit() and int(major) < oldest:
        yield Finding(
            "driver",
            "fail",
            f"{said}; torch is built for CUDA {cuda}, which needs {oldest} or newer",
            f"update the driver to {oldest} or newer; or build the image for an older CUDA "
            "(BASE_IMAGE, TORCH and TORCH_INDEX)",
        )
    else:
        yield Finding("driver", "pass", f"{said}; torch is built for CUDA {cuda}")
    for number, gpu in enumerate(driver.gpus):
        yield _gpu_finding(f"GPU {number}", gpu)


def _gpu_finding(check: str, gpu: Gpu) -> Finding:
    said = gpu.name
    if gpu.total_bytes is not None and gpu.used_bytes is not None:
        free = gpu.total_bytes - gpu.used_bytes
        said += f", {gigabytes(free)} of {gigabytes(gpu.total_bytes)} free"
    said += f", {gpu.temperature}"
    if gpu.faults:
        return Finding(
            check,
            "fail",
            f"{said}; {'; '.join(gpu.faults)}",
            "restart the machine; if this stays, ask for another one",
        )
    if gpu.slowed:
        return Finding(
            check,
            "warn",
            f"{said}; slow: {', '.join(gpu.slowed)}",
            "wait and look again (nvidia-smi -q -d PERFORMANCE); if it stays, take another machine",
        )
    if gpu.processes or (gpu.used_bytes or 0) > _IN_USE_BYTES:
        others = "; ".join(gpu.processes) or "somebody outside of this container"
        return Finding(
            check,
            "warn",
            f"{said}; others work on it: {others}",
            "stop them, or choose another GPU (GPU=1 in .env, CUDA_VISIBLE_DEVICES=1 outside "
            "of containers)",
        )
    return Finding(check, "pass", f"{said}, no errors, nobody else on it")
