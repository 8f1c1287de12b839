"""Folders that are laid out as repositories of the hub are."""

import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

README = """---
license: odc-by
configs:
- config_name: default
  data_files:
  - split: train
    path: data/*/*
  - split: test
    path: held/*
- config_name: sample-10BT
  data_files:
  - split: train
    path: sample/10BT/*
---
# A dataset
"""


def write_parquet(
    path: Path, texts: list[str], *, scan_bytes: int = 8192, group_rows: int = 16
) -> None:
    """A file in row groups, with columns beside `text` that take most of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ids = [f"<urn:uuid:{number}>" for number in range(len(texts))]
    scans = [random.Random(number).randbytes(scan_bytes) for number in range(len(texts))]
    columns = {"text": texts, "id": ids, "scan": scans, "token_count": list(range(len(texts)))}
    pq.write_table(pa.table(columns), path, row_group_size=group_rows)


def write_fineweb(folder: Path, texts: list[list[str]], **options: int) -> Path:
    """A folder that is laid out as FineWeb is on the hub, one file of `sample-10BT` for each."""
    folder.mkdir(parents=True)
    (folder / "README.md").write_text(README)
    write_parquet(folder / "data" / "CC-MAIN-2024-10" / "000_00000.parquet", ["default"])
    write_parquet(folder / "held" / "000.parquet", ["test"])
    for file, rows in reversed(tuple(enumerate(texts))):
        write_parquet(folder / "sample" / "10BT" / f"{file:03d}_00000.parquet", rows, **options)
    return folder
