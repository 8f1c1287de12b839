"""What can go wrong silently with benchmarks of a GPU: their tables, and what they compare."""

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Literal

import pytest
import torch

from app.hardware.device import Device
from benchmarks import memory_table
from benchmarks.gpu_table import PAGES, page_with_tables
from benchmarks.gpu_variants import PROGRAM, Call, Case, block, output_layer, step
from benchmarks.mutations import FAULTS
from tests.pages import REPOSITORY

SPEC = {
    "model": {
        "context_length": 32,
        "vocab_size": 515,
        "num_layers": 3,
        "embd_size": 32,
        "num_heads": 2,
    },
    "micro_batch": 2,
    "sequences_per_step": 4,
    "compile": False,
}


def test_what_mutations_break_is_in_the_code() -> None:
    for fault, (file, right, _) in FAULTS.items():
        assert (REPOSITORY / file).read_text("utf-8").count(right) == 1, fault


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_tables_are_those_of_the_committed_results(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "<!-- gpu_table.py" in text
    assert page_with_tables(text) == text


def test_every_script_finds_what_it_imports() -> None:
    folder = Path(__file__).parent.parent / "benchmarks"
    for path in folder.glob("*.py"):
        import_module(f"benchmarks.{path.stem}")


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
@pytest.mark.parametrize("group", (block, output_layer, step))
@pytest.mark.parametrize("precision", ("float32", "bf16"))
def test_variants_of_a_step_give_the_same_numbers(
    group: Callable[[Case], dict[str, Callable[[], Call]]], precision: Literal["float32", "bf16"]
) -> None:
    case = Case(SPEC, Device(torch.device("cpu"), "CPU", precision, False, None))
    variants = group(case)
    expected = variants.pop(PROGRAM)()()
    for name, prepare in variants.items():
        found = prepare()()
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            error = (one.double() - other.double()).norm() / other.double().norm()
            is_rounded = precision == "bf16" or "8-bit" in name
            assert error < (0.05 if is_rounded else 2e-6), (name, error)


@pytest.mark.slow
def test_the_table_of_what_fits_is_the_memory_models() -> None:
    page = Path(__file__).parent.parent / "docs/recipes.md"
    assert f"\n\n{memory_table.table()}\n\n" in page.read_text(encoding="utf-8")
