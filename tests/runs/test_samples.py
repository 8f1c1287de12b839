from pathlib import Path

import pytest

from app.runs.samples import format_samples, read_samples


@pytest.mark.parametrize(
    "texts",
    (
        ["one"],
        ["", ""],
        ["two\n\nparagraphs\n", "\n\n\n"],
        ["東京 مرحبا 🙂\r\n\ttab \x00", "<b>&amp;"],
        ["----- after 3 steps", "x ----- after 3 steps -----\n", "----- after three steps -----\n"],
    ),
)
def test_texts_are_read_as_they_were_written(tmp_path: Path, texts: list[str]) -> None:
    path = tmp_path / "samples.txt"
    path.write_bytes(format_samples(250, texts) + format_samples(500, ["last"]))
    assert read_samples(path) == [(250, texts), (500, ["last"])]


def test_half_a_character_is_replaced_and_the_rest_is_read(tmp_path: Path) -> None:
    path = tmp_path / "samples.txt"
    path.write_bytes(format_samples(1, ["ab"])[:-2] + "京".encode()[:2])
    assert read_samples(path) == [(1, ["ab\ufffd"])]
    path.write_bytes(format_samples(1, ["half \ud83d"]))
    assert read_samples(path) == [(1, ["half ?"])]


def test_no_file_has_no_samples(tmp_path: Path) -> None:
    assert read_samples(tmp_path / "samples.txt") == []
