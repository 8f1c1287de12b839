"""The output of `nvidia-smi -q -x`, as three generations of the driver write it.

The elements are those of NVIDIA's DTDs nvsmi_device_v11 (driver 450), v12 (535) and v13 (590), of
which only those that are read are here, with each DTD's own names and "N/A".
"""

import re
from pathlib import Path

import pytest

from app.errors import UserError
from app.settings.sources import load_settings
from app.tools.doctor import machine
from app.tools.doctor.checks import Context
from app.tools.doctor.machine import check_driver, driver_findings


def log(dtd: str, driver: str, cuda: str, *gpus: str) -> str:
    return f"""\
<?xml version="1.0" ?>
<!DOCTYPE nvidia_smi_log SYSTEM "nvsmi_device_{dtd}.dtd">
<nvidia_smi_log>
	<driver_version>{driver}</driver_version>
	<cuda_version>{cuda}</cuda_version>
	<attached_gpus>{len(gpus)}</attached_gpus>
	{"".join(gpus)}
</nvidia_smi_log>
"""


T4 = """
<gpu id="00000000:00:1E.0">
	<product_name>Tesla T4</product_name>
	<clocks_throttle_reasons>
		<clocks_throttle_reason_gpu_idle>Active</clocks_throttle_reason_gpu_idle>
		<clocks_throttle_reason_sw_power_cap>Active</clocks_throttle_reason_sw_power_cap>
		<clocks_throttle_reason_hw_slowdown>Not Active</clocks_throttle_reason_hw_slowdown>
	</clocks_throttle_reasons>
	<fb_memory_usage>
		<total>15109 MiB</total>
		<used>0 MiB</used>
		<free>15109 MiB</free>
	</fb_memory_usage>
	<ecc_errors>
		<volatile>
			<sram_correctable>7</sram_correctable>
			<sram_uncorrectable>0</sram_uncorrectable>
			<dram_correctable>1</dram_correctable>
			<dram_uncorrectable>0</dram_uncorrectable>
		</volatile>
	</ecc_errors>
	<retired_pages>
		<pending_retirement>No</pending_retirement>
	</retired_pages>
	<remapped_rows>N/A</remapped_rows>
	<temperature>
		<gpu_temp>35 C</gpu_temp>
	</temperature>
	<processes>
	</processes>
</gpu>"""
A100 = """
<gpu id="00000000:01:00.0">
	<product_name>NVIDIA A100-SXM4-80GB</product_name>
	<gpu_reset_status>
		<reset_required>No</reset_required>
		<drain_and_reset_recommended>No</drain_and_reset_recommended>
	</gpu_reset_status>
	<clocks_event_reasons>
		<clocks_event_reason_gpu_idle>Not Active</clocks_event_reason_gpu_idle>
		<clocks_event_reason_hw_slowdown>{slowed}</clocks_event_reason_hw_slowdown>
		<clocks_event_reason_hw_thermal_slowdown>{slowed}</clocks_event_reason_hw_thermal_slowdown>
	</clocks_event_reasons>
	<fb_memory_usage>
		<total>81920 MiB</total>
		<reserved>869 MiB</reserved>
		<used>{used} MiB</used>
		<free>80999 MiB</free>
	</fb_memory_usage>
	<ecc_errors>
		<volatile>
			<sram_correctable>0</sram_correctable>
			<sram_uncorrectable>{sram}</sram_uncorrectable>
			<dram_correctable>0</dram_correctable>
			<dram_uncorrectable>{dram}</dram_uncorrectable>
		</volatile>
		<aggregate>
			<dram_uncorrectable>9</dram_uncorrectable>
		</aggregate>
	</ecc_errors>
	<remapped_rows>
		<remapped_row_corr>0</remapped_row_corr>
		<remapped_row_unc>1</remapped_row_unc>
		<remapped_row_pending>{pending}</remapped_row_pending>
		<remapped_row_failure>{failure}</remapped_row_failure>
	</remapped_rows>
	<temperature>
		<gpu_temp>27 C</gpu_temp>
	</temperature>
	<processes>{processes}
	</processes>
</gpu>"""
OTHER_A100 = """
<gpu id="00000000:41:00.0">
	<product_name>NVIDIA A100-SXM4-80GB</product_name>
	<fb_memory_usage>
		<total>81920 MiB</total>
		<used>50 MiB</used>
	</fb_memory_usage>
	<temperature>
		<gpu_temp>26 C</gpu_temp>
	</temperature>
</gpu>"""
RTX_3090 = """
<gpu id="00000000:09:00.0">
	<product_name>NVIDIA GeForce RTX 3090</product_name>
	<gpu_recovery_action>{action}</gpu_recovery_action>
	<clocks_event_reasons>
		<clocks_event_reason_sw_power_cap>Active</clocks_event_reason_sw_power_cap>
		<clocks_event_reason_hw_slowdown>Not Active</clocks_event_reason_hw_slowdown>
	</clocks_event_reasons>
	<fb_memory_usage>
		<total>24576 MiB</total>
		<used>7 MiB</used>
	</fb_memory_usage>
	<ecc_errors>
		<volatile>
			<sram_correctable>N/A</sram_correctable>
			<sram_uncorrectable_parity>{parity}</sram_uncorrectable_parity>
			<sram_uncorrectable_secded>N/A</sram_uncorrectable_secded>
			<dram_uncorrectable>N/A</dram_uncorrectable>
		</volatile>
		<unrepairable_memory>{unrepairable}</unrepairable_memory>
	</ecc_errors>
	<remapped_rows>N/A</remapped_rows>
	<temperature>
		<gpu_temp>32 C</gpu_temp>
	</temperature>
	<processes>
		<process_info>
			<gpu_instance_id>N/A</gpu_instance_id>
			<compute_instance_id>N/A</compute_instance_id>
			<pid>1804</pid>
			<type>G</type>
			<process_name>/usr/lib/xorg/Xorg</process_name>
			<used_memory>4 MiB</used_memory>
		</process_info>
	</processes>
</gpu>"""
WELL = {
    "slowed": "Not Active", "used": 50, "sram": 0, "dram": 0, "pending": "No", "failure": "No",
    "processes": "",
}  # fmt: skip
PROCESS = """
			<process_info>
				<pid>4242</pid>
				<type>C</type>
				<process_name>python3</process_name>
				<used_memory>70000 MiB</used_memory>
			</process_info>"""


V11 = log("v11", "450.80.02", "11.0", T4)


def v12(**changes: object) -> str:
    return log("v12", "535.54.03", "12.2", A100.format(**(WELL | changes)), OTHER_A100)


def v13(action: str = "None", parity: str = "N/A", unrepairable: str = "N/A") -> str:
    gpu = RTX_3090.format(action=action, parity=parity, unrepairable=unrepairable)
    return log("v13", "590.44.01", "13.1", gpu)


def test_healthy_gpus_of_every_generation_pass() -> None:
    for xml, cuda, gpus in (
        (V11, "11.8", 1),
        (v12(), "12.6", 2),
        (v13(), "13.0", 1),
    ):
        expected = [("driver", "pass"), *((f"GPU {number}", "pass") for number in range(gpus))]
        assert [(row.check, row.status) for row in driver_findings(xml, cuda)] == expected
    (_, gpu) = driver_findings(V11, "11.8")
    assert gpu.found.startswith("Tesla T4, 15.8 GB of 15.8 GB free, 35 C")


@pytest.mark.parametrize(
    ("xml", "cuda", "status", "message"),
    (
        (v12(), "13.0", "fail", "needs 580 or newer"),
        (V11, "12.6", "fail", "needs 525 or newer"),
        (v12(), None, "warn", "torch is built for the CPU only"),
        (v12(), "99.0", "pass", "NVIDIA 535.54.03, for CUDA up to 12.2"),
    ),
)
def test_the_driver_must_support_the_cuda_of_torch(
    xml: str, cuda: str | None, status: str, message: str
) -> None:
    driver = next(driver_findings(xml, cuda))
    assert driver.status == status
    assert message in driver.found
    assert bool(driver.fix) == (status != "pass")


@pytest.mark.parametrize(
    ("changes", "status", "message"),
    (
        ({"dram": 2, "sram": 1}, "fail", "3 memory errors not corrected"),
        ({"pending": "Yes"}, "fail", "broken memory is replaced at the next reset"),
        ({"failure": "Yes"}, "fail", "no spare memory for what is broken"),
        ({"slowed": "Active"}, "warn", "the hardware halves its clocks, it is too hot"),
        ({"processes": PROCESS, "used": 70000}, "warn", "4242 python3 70000 MiB"),
        ({"used": 70000}, "warn", "a program outside of this container"),
    ),
)
def test_trouble_of_a_gpu_is_reported(
    changes: dict[str, object], status: str, message: str
) -> None:
    _, gpu, other = driver_findings(v12(**changes), "12.6")
    assert (gpu.check, gpu.status) == ("GPU 0", status)
    assert message in gpu.found
    assert gpu.fix
    assert (other.check, other.status) == ("GPU 1", "pass")


@pytest.mark.parametrize(
    ("changes", "message"),
    (
        ({"action": "Reset"}, "the driver asks for: Reset"),
        ({"parity": "1"}, "1 memory error "),
        ({"parity": "0", "unrepairable": "Yes"}, "memory that cannot be repaired"),
    ),
)
def test_elements_of_newer_drivers(changes: dict[str, str], message: str) -> None:
    _, gpu = driver_findings(v13(**changes), "13.0")
    assert gpu.status == "fail"
    assert message in gpu.found


@pytest.mark.parametrize("text", ("", "No devices were found\n", "<nvidia_smi_log><gpu>"))
def test_output_other_than_xml_is_reported(text: str) -> None:
    with pytest.raises(UserError, match="nvidia-smi does not print XML"):
        list(driver_findings(text, None))


def test_a_driver_that_fails_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    message = "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver."
    program.write_text(f'#!/bin/sh\necho "{message}"\nexit 9\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.chdir(tmp_path)
    on_gpu, on_cpu = (
        Context(load_settings({"TRAIN_DEVICE": device}, "doctor")) for device in ("auto", "cpu")
    )
    with pytest.raises(UserError, match="^" + re.escape(f"nvidia-smi ends with 9: {message}")):
        list(check_driver(on_gpu))
    (tmp_path / "answer.xml").write_text(v12())
    program.write_text(f'#!/bin/sh\n[ "$*" = "-q -x" ] && exec cat {tmp_path}/answer.xml\n')
    driver, *gpus = check_driver(on_gpu)
    assert "torch is built for" in driver.found
    assert [row.status for row in gpus] == ["pass", "pass"]
    assert [row.status for row in check_driver(on_cpu)] == ["skip"]


def test_a_driver_that_hangs_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\nexec sleep 1000\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(machine, "_DRIVER_SECONDS", 0.1)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^nvidia-smi has not ended after 0\.1 s"):
        list(check_driver(Context(load_settings({}, "doctor"))))


def test_a_missing_nvidia_smi_is_not_a_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (row,) = check_driver(Context(load_settings({}, "doctor")))
    assert row.status == "skip"
