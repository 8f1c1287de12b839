"""The state of NVIDIA's driver and of its GPUs, by `nvidia-smi -q -x`.

The output is XML that names its DTD (nvsmi_device_v12.dtd, for example). Elements come and go with
the driver's version, and what a GPU cannot tell is "N/A", so that nothing is taken for granted.
"""

import re
import shutil
import subprocess
from collections.abc import Iterator
from xml.etree import ElementTree

from app.containers import in_container
from app.errors import UserError
from app.tools.doctor.finding import Finding, counted, gigabytes

# CUDA's major version -> the oldest driver's (NVIDIA, "CUDA Compatibility", minor versions).
_OLDEST_DRIVER = {"11": 450, "12": 525, "13": 580}
_TIMEOUT_SECONDS = 30.0
# Of an idle GPU; the driver's own share is counted apart.
_IN_USE_BYTES = 500 << 20
# Elements that say "Yes", by the generation of the GPU and of its driver.
_FAULTS = {
    "ecc_errors/unrepairable_memory": "memory that cannot be repaired",
    "remapped_rows/remapped_row_failure": "no spare memory for what is broken",
    "remapped_rows/remapped_row_pending": "broken memory is replaced at the next reset",
    "retired_pages/pending_retirement": "broken memory is retired at the next reset",
    "gpu_reset_status/reset_required": "the driver asks for a reset",
}
# NVML, "Clocks Event Reasons"; idle clocks and the power cap are how a healthy GPU works.
_SLOWED = {
    "hw_slowdown": "the hardware halves its clocks",
    "hw_thermal_slowdown": "it is too hot",
    "hw_power_brake_slowdown": "the power supply holds it back",
    "sw_thermal_slowdown": "the driver holds it back because it is hot",
}


def check_driver(cuda: str | None, *, wanted: bool) -> Iterator[Finding]:
    """The driver and each of its GPUs.

    Args:
        cuda: the version that torch is built for; None for a build without it.
        wanted: whether the settings let a GPU be used.

    Raises:
        UserError: the driver does not answer, or nobody understands it.
    """
    program = shutil.which("nvidia-smi")
    outside = "see `nvidia-smi` on the machine outside; it needs the driver and NVIDIA's toolkit"
    no_driver = outside if in_container() else "on a machine with NVIDIA's GPU, install the driver"
    if not wanted:
        yield Finding("driver", "skip", "not needed: TRAIN_DEVICE=cpu")
        return
    if program is None:
        yield Finding("driver", "skip", "not asked: there is no nvidia-smi", no_driver)
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
        raise UserError(
            f"nvidia-smi has not answered for {_TIMEOUT_SECONDS:g} s",
            "restart the machine; if that does not help, take another",
        ) from None
    if asked.returncode:
        said = " ".join((asked.stdout + asked.stderr).split())[:300]
        raise UserError(f"nvidia-smi ends with {asked.returncode}: {said}", no_driver)
    yield from driver_findings(asked.stdout, cuda)


def driver_findings(xml: str, cuda: str | None) -> Iterator[Finding]:
    """The rows of a driver and its GPUs, of what `nvidia-smi -q -x` says; see check_driver.

    Raises:
        UserError: that is no XML.
    """
    try:
        root = ElementTree.fromstring(xml)
    except ElementTree.ParseError as error:
        raise UserError(
            f"nvidia-smi says what nobody understands: {xml.strip()[:200]!r} ({error})",
            "see what `nvidia-smi` says on this machine",
        ) from None
    version = _text(root, "driver_version")
    major = version.partition(".")[0]
    said = f"NVIDIA {version}, for CUDA up to {_text(root, 'cuda_version')}; torch is built for "
    oldest = _OLDEST_DRIVER.get((cuda or "").partition(".")[0])
    if cuda is None:
        fix = "install torch's build for CUDA (make TORCH=cuda), or keep to the CPU"
        yield Finding("driver", "warn", f"{said}the CPU only", fix)
    elif oldest and major.isdigit() and int(major) < oldest:
        fix = "update it; or build for an older CUDA (BASE_IMAGE, TORCH and TORCH_INDEX)"
        yield Finding("driver", "fail", f"{said}CUDA {cuda}, which needs {oldest} or newer", fix)
    else:
        yield Finding("driver", "pass", f"{said}CUDA {cuda}")
    for number, gpu in enumerate(root.findall("gpu")):
        yield _gpu_finding(f"GPU {number}", gpu)


def _gpu_finding(check: str, gpu: ElementTree.Element) -> Finding:
    total, used = (_bytes(_text(gpu, f"fb_memory_usage/{name}")) for name in ("total", "used"))
    memory = (
        "" if total is None else f"{gigabytes(total - (used or 0))} of {gigabytes(total)} free, "
    )
    said = f"{_text(gpu, 'product_name')}, {memory}{_text(gpu, 'temperature/gpu_temp')}"
    if faults := "; ".join(_faults(gpu)):
        fix = "restart the machine; if this stays, ask for another one"
        return Finding(check, "fail", f"{said}; {faults}", fix)
    if slowed := ", ".join(_slowed(gpu)):
        fix = (
            "wait and look again (nvidia-smi -q -d PERFORMANCE); if it stays, take another machine"
        )
        return Finding(check, "warn", f"{said}; slow: {slowed}", fix)
    others = "; ".join(
        " ".join(_text(process, name) for name in ("pid", "process_name", "used_memory"))
        for process in gpu.findall("processes/process_info")
        # A desktop's graphics (G) are no hindrance, what computes (C) is.
        if _text(process, "type") != "G"
    )
    if others or (used or 0) > _IN_USE_BYTES:
        others = others or "somebody outside of this container"
        fix = "stop them, or choose another GPU (GPU=1 in .env; elsewhere CUDA_VISIBLE_DEVICES=1)"
        return Finding(check, "warn", f"{said}; others work on it: {others}", fix)
    return Finding(check, "pass", f"{said}, no errors, nobody else on it")


def _faults(gpu: ElementTree.Element) -> Iterator[str]:
    # A driver counts single kinds, or all of them: of each kind all are bad.
    counts = [one for one in gpu.findall("ecc_errors/volatile/*") if "uncorrectable" in one.tag]
    counts += gpu.findall("ecc_errors/volatile/double_bit/total")
    errors = sum(int(text) for one in counts if (text := (one.text or "").strip()).isdigit())
    if errors:
        yield f"{counted(errors, 'memory error')} not corrected since the driver was loaded"
    for place, fault in _FAULTS.items():
        if _text(gpu, place) == "Yes":
            yield fault
    action = _text(gpu, "gpu_recovery_action")
    if action not in ("None", "N/A"):
        yield f"the driver asks for: {action}"


def _slowed(gpu: ElementTree.Element) -> Iterator[str]:
    for kind in ("event", "throttle"):
        for name, reason in _SLOWED.items():
            if _text(gpu, f"clocks_{kind}_reasons/clocks_{kind}_reason_{name}") == "Active":
                yield reason


def _text(parent: ElementTree.Element, place: str) -> str:
    return (parent.findtext(place) or "").strip() or "N/A"


def _bytes(text: str) -> int | None:
    found = re.fullmatch(r"(\d+) MiB", text)
    return int(found[1]) << 20 if found else None
