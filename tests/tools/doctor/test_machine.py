import pytest

from app.tools.doctor.machine import cpu_quota


@pytest.mark.parametrize(
    ("text", "cores"),
    (("max 100000\n", None), ("200000 100000\n", 2.0), ("50000 100000\n", 0.5), ("", None)),
)
def test_the_quota_of_a_control_group_is_read(text: str, cores: float | None) -> None:
    """The format of cpu.max: Linux, Documentation/admin-guide/cgroup-v2.rst."""
    assert cpu_quota(text) == cores
