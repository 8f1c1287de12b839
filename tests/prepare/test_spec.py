from pathlib import Path

import pytest

from app.prepare.spec import absence, is_doubtful


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_texts").mkdir()
    (tmp_path / "my_texts" / "novels.txt").touch()
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("dataset", "similar"),
    (
        ("my_text", "my_texts"),
        ("my_texts/novels", "my_texts/novels.txt"),
        ("HuggingFaceFW/fineweb", ""),
        ("wikitext", ""),
    ),
)
def test_what_is_not_here_is_told_with_what_is_similar(dataset: str, similar: str) -> None:
    assert absence(dataset) == (
        f"there is no file or folder {dataset} here" + (f" (but {similar})" if similar else "")
    )


@pytest.mark.parametrize(
    ("dataset", "doubtful"),
    (("my_text", True), ("my_texts/x", True), ("wikitext", True), ("HuggingFaceFW/x", False)),
)
def test_a_hub_dataset_has_an_owner_who_is_no_folder_here(dataset: str, doubtful: bool) -> None:
    assert is_doubtful(dataset) == doubtful
