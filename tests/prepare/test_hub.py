import json
import shutil
import socket
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app.data.manifest import Manifest
from app.errors import UserError
from app.prepare.pipeline import prepare
from app.prepare.sources import open_documents
from app.prepare.spec import DatasetSpec, TextSource
from tests.mounts import alone
from tests.prepare.conftest import Start, read
from tests.prepare.hub_folders import write_fineweb, write_parquet
from tests.prepare.loopback_hub import Hub

SAMPLE = [[f"file {file}, row {row} " * 20 for row in range(50)] for file in range(3)]


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that is laid out as FineWeb is on the hub."""
    return write_fineweb(tmp_path_factory.mktemp("hub") / "fineweb", SAMPLE)


def repository_of(folder: Path, **files: str) -> Path:
    """A repository with one configuration `own` of the files given, part_0=… is part_0."""
    folder.mkdir()
    kind = next(iter(files)).rpartition("_")[2]
    (folder / "README.md").write_text(
        f"---\nconfigs:\n- config_name: own\n  data_files: '*.{kind}'\n---\n"
    )
    for name, content in files.items():
        (folder / name.replace(f"_{kind}", f".{kind}")).write_text(content)
    return folder


def texts_of(dataset: Path, config: str | None = None, **options: Any) -> list[str]:
    return read(open_documents(TextSource(str(dataset), config=config, **options)))


def test_configuration_is_read_in_the_order_of_files_and_rows(repository: Path) -> None:
    assert texts_of(repository, "sample-10BT") == [text for file in SAMPLE for text in file]


def test_without_a_configuration_the_default_is_read(repository: Path) -> None:
    assert texts_of(repository) == ["default"]


def test_split_is_read(repository: Path) -> None:
    assert texts_of(repository, split="test") == ["test"]


def test_relative_folder_is_read(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository.parent)
    assert texts_of(Path("fineweb"), "sample-10BT")[0] == SAMPLE[0][0]


def test_another_column_is_read(repository: Path) -> None:
    assert texts_of(repository, text_column="id") == ["<urn:uuid:0>"]


def test_source_names_configuration_and_files(repository: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(repository, tmp_path / "elsewhere" / "fineweb")
    one, other = (
        open_documents(TextSource(str(at), config="sample-10BT")).source
        for at in (repository, moved)
    )
    assert one == other
    assert one["dataset"] == "fineweb"
    assert one["config"] == "sample-10BT"
    assert one["split"] == "train"
    write_parquet(moved / "sample" / "10BT" / "001_00000.parquet", ["other"])
    assert open_documents(TextSource(str(moved), config="sample-10BT")).source != one


def test_unknown_configuration_is_refused_and_the_existing_ones_are_listed(
    repository: Path,
) -> None:
    with pytest.raises(UserError, match="has no configuration 'sample-10TB'") as raised:
        open_documents(TextSource(str(repository), config="sample-10TB"))
    assert raised.value.fix.endswith("one of: default, sample-10BT")


def test_missing_configuration_is_refused_and_the_existing_ones_are_listed(tmp_path: Path) -> None:
    folder = repository_of(tmp_path / "two", a_jsonl='{"text": "a"}\n')
    names = "- config_name: one\n  data_files: a.jsonl\n- config_name: two\n  data_files: a.jsonl\n"
    (folder / "README.md").write_text(f"---\nconfigs:\n{names}---\n")
    with pytest.raises(UserError, match="has several configurations") as raised:
        open_documents(TextSource(str(folder)))
    assert raised.value.fix.endswith("one of: one, two")


def test_unknown_split_is_refused_and_the_existing_ones_are_listed(repository: Path) -> None:
    with pytest.raises(UserError, match="has no split 'validation'") as raised:
        open_documents(TextSource(str(repository), split="validation"))
    assert raised.value.fix.endswith("one of: train, test")


def test_unknown_column_is_refused_and_the_existing_ones_are_listed(repository: Path) -> None:
    with pytest.raises(UserError, match="has no column 'body'") as raised:
        texts_of(repository, text_column="body")
    assert raised.value.fix.endswith("one of: text, id, scan, token_count")


def test_configuration_without_files_is_refused(tmp_path: Path) -> None:
    folder = repository_of(tmp_path / "r", a_jsonl='{"text": "a"}\n')
    (folder / "a.jsonl").unlink()
    with pytest.raises(UserError, match="cannot be read") as raised:
        open_documents(TextSource(str(folder), config="own"))
    assert len(str(raised.value)) < 600


def test_json_lines_are_streamed_in_order(tmp_path: Path) -> None:
    rows = [[json.dumps({"n": n, "text": f"{file} {n}"}) for n in range(300)] for file in "ab"]
    folder = repository_of(tmp_path / "r", b_jsonl="\n".join(rows[1]), a_jsonl="\n".join(rows[0]))
    assert texts_of(folder, "own") == [f"{file} {n}" for file in "ab" for n in range(300)]


def test_csv_is_streamed(tmp_path: Path) -> None:
    folder = repository_of(tmp_path / "r", a_csv='id,text\n1,"one, ""1"""\n2,\n3,"three\n3"\n')
    assert texts_of(folder) == ['one, "1"', "three\n3"]


def test_streamed_source_changes_with_its_files(tmp_path: Path) -> None:
    folder = repository_of(tmp_path / "r", a_csv="text\none\n")
    before = open_documents(TextSource(str(folder))).source
    (folder / "a.csv").write_text("text\none\ntwo\n")
    assert open_documents(TextSource(str(folder))).source != before


def test_unknown_column_of_a_stream_is_refused_and_the_existing_ones_are_listed(
    tmp_path: Path,
) -> None:
    folder = repository_of(tmp_path / "r", a_csv="id,body\n1,one\n")
    with pytest.raises(UserError, match="has no column 'text'") as raised:
        texts_of(folder)
    assert raised.value.fix.endswith("one of: id, body")


def test_broken_file_of_a_stream_is_refused(tmp_path: Path) -> None:
    folder = repository_of(tmp_path / "r", a_jsonl='{"text": "fine"}\n{"text": broken}\n')
    with pytest.raises(UserError, match="r cannot be read: ") as raised:
        texts_of(folder)
    assert len(str(raised.value)) < 600


@pytest.mark.parametrize(
    ("name", "content"),
    (
        ("README.md", "---\nconfigs: [\n---\n"),
        ("r.py", "import datasets\n\nclass Own(datasets.GeneratorBasedBuilder):\n    pass\n"),
    ),
    ids=("README", "program"),
)
def test_repository_that_datasets_does_not_read_is_refused(
    hub: Hub, tmp_path: Path, start: Start, name: str, content: str
) -> None:
    folder = tmp_path / "r"
    folder.mkdir()
    (folder / name).write_text(content)
    hub.publish("own/r", folder)
    own = {"PREPARE_DATASET": "own/r", "DATA_DIR": str(tmp_path / "data")}
    output, error = (process := start("-m", "app", "prepare", **hub.variables, **own)).communicate()
    assert process.returncode == 2, error
    assert error.startswith("error: own/r cannot be read: ")
    assert "fix: correct PREPARE_DATASET, or choose another dataset" in error
    assert output == ""


LEAVE_EARLY = """
import sys
from pathlib import Path
from app.prepare.spec import DatasetSpec, TextSource
from app.prepare.pipeline import prepare
for kind in ("parquet", "jsonl"):
    text, out = (Path(folder) / kind for folder in sys.argv[1:])
    prepare(DatasetSpec(TextSource(str(text)), kind, total_tokens=1000), out)
"""


@pytest.mark.slow
def test_leaving_a_stream_early_ends_the_process_with_0(tmp_path: Path, start: Start) -> None:
    """A token limit stops in the first of many files and row groups, three times over."""
    texts = [f"{number} " * 50 for number in range(4000)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    for file in range(4):
        write_parquet(tmp_path / "parquet" / f"{file}.parquet", texts, scan_bytes=40)
        (tmp_path / "jsonl").mkdir(exist_ok=True)
        (tmp_path / "jsonl" / f"{file}.jsonl").write_text(lines)
    for kind in ("parquet", "jsonl"):
        configs = "configs:\n- config_name: own\n  data_files: '*'\n"
        (tmp_path / kind / "README.md").write_text(f"---\n{configs}---\n")
    for process in [start("-c", LEAVE_EARLY, tmp_path, tmp_path / str(run)) for run in range(3)]:
        output, error = process.communicate(timeout=300)
        assert process.returncode == 0, error
        assert output.count("1,000 training") == 2


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        yield server


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FineWeb's layout with as much real text as the default settings hold out, and more."""
    root = Path(sysconfig.get_paths()["stdlib"])
    modules = sorted((*root.glob("[a-z]*.py"), *root.glob("[a-r]*/*.py")))
    texts = [module.read_text("utf-8", "replace") for module in modules]
    return write_fineweb(tmp_path_factory.mktemp("library") / "fineweb", [texts[0::2], texts[1::2]])


def test_default_settings_prepare_fineweb_through_the_hub(
    hub: Hub, library: Path, tmp_path: Path, start: Start
) -> None:
    commit = hub.publish("HuggingFaceFW/fineweb", library)
    process = start("-m", "app", "prepare", **hub.variables)
    output, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    assert error == ""
    assert "training tokens" in output
    manifest = Manifest.load(tmp_path / "fineweb20M")
    assert manifest is not None
    assert manifest.source == {
        "dataset": "HuggingFaceFW/fineweb",
        "config": "sample-10BT",
        "split": "train",
        "revision": commit,
    }
    settings: dict[str, Any] = {"total_tokens": 20_000_000, "val_tokens": 1_048_576}
    folder = tmp_path / "folder"
    local = prepare(
        DatasetSpec(TextSource(str(library), "sample-10BT"), "fineweb", **settings), folder
    )
    assert manifest.shards == local.shards


def test_only_the_text_column_is_transferred(hub: Hub, repository: Path, start: Start) -> None:
    hub.publish("HuggingFaceFW/fineweb", repository)
    process = start("-m", "app", "prepare", **SMALL, **hub.variables)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    size = (repository / "sample" / "10BT" / "000_00000.parquet").stat().st_size
    assert hub.bytes_sent < size, "that is of one of three files"


SMALL = {"PREPARE_TOTAL_TOKENS": "10000", "PREPARE_VAL_TOKENS": "1000", "PREPARE_OUT_DIR": "out"}


@pytest.mark.parametrize("kind", ("jsonl", "csv"))
def test_other_files_are_streamed_from_the_hub(
    hub: Hub, tmp_path: Path, start: Start, kind: str
) -> None:
    texts = [f"row {row} " * 20 for row in range(400)]
    rows = texts if kind == "csv" else [json.dumps({"text": text}) for text in texts]
    lines = [*(["text"] if kind == "csv" else ()), *rows]
    folder = repository_of(tmp_path / kind, **{f"a_{kind}": "\n".join(lines)})
    hub.publish(f"own/{kind}", folder)
    process = start("-m", "app", "prepare", "--dataset", f"own/{kind}", **SMALL, **hub.variables)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    manifest = Manifest.load(tmp_path / "out")
    assert manifest is not None
    local = prepare(
        DatasetSpec(TextSource(str(folder)), kind, total_tokens=10_000, val_tokens=1000),
        tmp_path / "x",
    )
    assert manifest.shards == local.shards


def test_hub_dataset_without_network_fails_after_its_retries(start: Start) -> None:
    process = start("-m", "app", "prepare", PREPARE_RETRY_SECONDS="0.1,0.2")
    output, error = process.communicate(timeout=300)
    assert process.returncode == 5
    assert len(output.splitlines()) == 2
    assert error.startswith("error: the hub does not answer: ")
    assert len(error.splitlines()) == 2


@pytest.fixture
def silent_hub() -> Iterator[str]:
    """Return the address of a server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize("kind", ("refused", "silent", "no network", "forbidden"))
def test_mistyped_folder_without_the_hub_is_told_at_once_and_not_tried_again(
    kind: str, start: Start, tmp_path: Path, silent_hub: str
) -> None:
    (tmp_path / "my_texts").mkdir()
    missing = "there is no file or folder my_text here (but my_texts)"
    variables = {"HF_ENDPOINT": silent_hub, "HF_HUB_DOWNLOAD_TIMEOUT": "1", "no_proxy": "*"}
    problem, fix = f"{missing}; nor can the hub be reached: ", "correct PREPARE_DATASET; for the"
    command = ["-m", "app", "prepare", "--dataset", "my_text", "--out-dir", "new"]
    if kind == "refused":
        variables = {}
    elif kind == "forbidden":
        variables["HF_HUB_OFFLINE"] = "1"
        problem, fix = f"{missing}, and HF_HUB_OFFLINE=1 forbids", "unset HF_HUB_OFFLINE, or point"
    elif kind == "no network":
        enter = "import os, sys; os.execvp(sys.argv[1], sys.argv[1:])"
        command = ["-c", enter, *alone("-n"), sys.executable, *command]
    process = start(*command, **variables)
    output, error = process.communicate(timeout=300)
    assert process.returncode == 2, error
    assert output == f"{missing}: asking the hub\n"
    assert error.startswith(f"error: {problem}")
    assert error.splitlines()[1].startswith(f"  fix: {fix}")
    assert len(error.splitlines()) == 2
    assert not (tmp_path / "new").exists()


def test_every_message_until_the_hub_answers_says_that_there_is_no_such_folder(
    start: Start,
) -> None:
    process = start(
        *("-m", "app", "prepare", "--dataset", "textz/mine"), PREPARE_RETRY_SECONDS="0,0"
    )
    output, error = process.communicate(timeout=300)
    assert process.returncode == 5
    *retries, given_up = [*output.splitlines(), error.splitlines()[0]]
    assert len(retries) == 2
    for line in retries:
        assert line.endswith(
            "; and there is no file or folder textz/mine here; trying again in 0 s"
        )
    assert given_up.endswith("; and there is no file or folder textz/mine here")


def refused(start: Start, variable: str, text: str) -> tuple[str, str, str]:
    """Return what prepare prints with a variable that it refuses: output, error and fix."""
    process = start("-m", "app", "prepare", **{variable: text})
    output, printed = process.communicate(timeout=300)
    assert process.returncode == 2, printed
    error, fix = printed.splitlines()
    return output, error, fix


@pytest.mark.parametrize(
    ("variable", "text", "problem"),
    (
        ("HF_ENDPOINT", "huggingface.co", "HF_ENDPOINT=huggingface.co does not begin with https"),
        ("SSL_CERT_FILE", "absent.pem", "[Errno 2] No such file or directory"),
        ("https_proxy", "socks9://127.0.0.1:9", ""),
        ("https_proxy", "http://proxy:port", "Invalid port: 'port'"),
    ),
)
def test_nonsense_about_the_way_to_the_hub_is_reported_at_once(
    variable: str, text: str, problem: str, start: Start
) -> None:
    output, error, fix = refused(start, variable, text)
    assert output == ""
    assert error.startswith(f"error: the hub cannot be asked: {problem}")
    assert fix == "  fix: correct HF_ENDPOINT, SSL_CERT_FILE or the proxy in the environment"


@pytest.mark.parametrize(
    ("variable", "text", "problem"),
    (
        ("HF_ENDPOINT", "http://[::1", "Invalid IPv6 URL"),
        ("HF_ENDPOINT", "http://hub:port", "Port could not be cast to integer value as 'port'"),
        ("HF_HUB_DOWNLOAD_TIMEOUT", "long", "invalid literal for int() with base 10: 'long'"),
    ),
)
def test_a_variable_that_the_hubs_library_cannot_read_is_named(
    variable: str, text: str, problem: str, start: Start
) -> None:
    _, error, fix = refused(start, variable, text)
    assert error == f"error: the hub cannot be asked: {problem}"
    assert fix.startswith("  fix: correct one of the variables ")
    assert variable in fix
