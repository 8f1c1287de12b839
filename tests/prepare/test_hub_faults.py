"""A hub that fails costs time, and nothing else."""

import json
import random
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from app.data.manifest import Manifest
from app.prepare.pipeline import prepare
from app.prepare.spec import DatasetSpec, TextSource
from tests.prepare.conftest import Start
from tests.prepare.hub_folders import write_fineweb
from tests.prepare.hub_preparer import Preparer
from tests.prepare.loopback_hub import Fault, Hub

pytestmark = pytest.mark.processes

FINEWEB = "HuggingFaceFW/fineweb"
FILE = "sample/10BT/{:03d}_00000.parquet"
LAST_GROUP = 5
# For a hub that is not to be given up before it has answered.
PATIENT = {
    "PREPARE_RETRY_SECONDS": "3600",
    "HF_HUB_DOWNLOAD_TIMEOUT": "3600",
    "HF_HUB_ETAG_TIMEOUT": "3600",
}
WORDS = ("these", "are", "some", "words", "of", "a", "text")
SETTINGS: dict[str, Any] = {"total_tokens": None, "val_tokens": 1000, "shard_size": 20_000}

NewPreparer = Callable[[str], Preparer]


def texts_of(seed: int) -> list[str]:
    """Return more texts than prepare holds at a time."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=20)) for _ in range(6000)]


@pytest.fixture(scope="module")
def fineweb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults") / "fineweb"
    texts = [texts_of(file) for file in range(3)]
    return write_fineweb(folder, texts, scan_bytes=10, group_rows=1024)


def row_group(fineweb: Path, file: int, group: int) -> str:
    """Return the pattern of requests for the text of a row group."""
    path = FILE.format(file)
    text = pq.read_metadata(fineweb / path).row_group(group).column(0)
    return f"GET storage/.*/{path} bytes={text.dictionary_page_offset or text.data_page_offset}-"


@pytest.fixture(scope="module")
def clean(fineweb: Path, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Return the manifest that prepare makes of the folder itself."""
    out = tmp_path_factory.mktemp("clean")
    return prepare(DatasetSpec(TextSource(str(fineweb), "sample-10BT"), "fineweb", **SETTINGS), out)


@pytest.fixture
def new_preparer(fineweb: Path, start: Start, tmp_path: Path) -> Iterator[NewPreparer]:
    with ExitStack() as hubs:

        def new(name: str) -> Preparer:
            hub = hubs.enter_context(Hub())
            hub.publish(FINEWEB, fineweb)
            return Preparer(hub, start, tmp_path / name)

        yield new


@pytest.fixture
def preparer(new_preparer: NewPreparer) -> Preparer:
    return new_preparer("one")


READING: dict[str, dict[str, Any]] = {
    "500": {"status": 500},
    "503": {"status": 503, "headers": {"Retry-After": "1"}},
    "429": {"status": 429, "headers": {"Retry-After": "1"}},
    "stall": {"body": "stall"},
    "reset": {"body": "reset"},
    "cut": {"body": "cut"},
    "short": {"body": "short"},
    "down": {"down": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("names", ("500 503 429 stall", "reset cut short down"))
def test_fault_while_reading_loses_no_committed_shard(
    preparer: Preparer, fineweb: Path, clean: Manifest, names: str
) -> None:
    """Each fault occurs always in one run, then once in the next, which continues."""
    hub = preparer.hub
    footer = f"GET storage/.*/{FILE.format(1)} bytes="
    once: list[Fault] = []
    kept: dict[str, int] = {}
    for name in names.split():
        hub.faults = [*once, Fault(row_group(fineweb, 1, 0), **READING[name])]
        ended = preparer.run()
        ended.assert_given_up()
        assert len(ended.retries) > len(once)
        assert all(fault.times == 0 for fault in once)
        assert preparer.committed().items() >= kept.items()
        kept = preparer.committed()
        assert len(kept) > 1
        hub.up()
        once = [Fault(footer, **READING[name], times=1)]
    hub.faults = once
    preparer.begin().end(up_after_retry=True).assert_done(retries=1)
    assert preparer.manifest.shards == clean.shards
    assert preparer.committed().items() >= kept.items()


def test_faults_while_resolving_cost_only_time(preparer: Preparer, clean: Manifest) -> None:
    wait = {"Retry-After": "2"}
    preparer.hub.faults = [
        Fault("GET api/datasets/.*/revision/", status=429, headers=wait, times=1),
        Fault("HEAD .*/README.md", body="reset", times=1),
        Fault("GET .*/README.md", body="cut", times=1),
        Fault("GET api/datasets/.*/tree/", body="stall", times=1),
        Fault(r"HEAD .*/fineweb\.py", status=500, times=1),
    ]
    ended = preparer.run()
    ended.assert_done(retries=5)
    assert all(fault.times == 0 for fault in preparer.hub.faults)
    first, second = [one.at for one in preparer.hub.requests if "/revision/" in one.line][:2]
    assert second - first >= 2
    assert preparer.manifest.shards == clean.shards


def test_fault_while_resolving_ends_the_run(new_preparer: NewPreparer) -> None:
    faults = {
        "commit": Fault("GET api/datasets/.*/revision/", status=503),
        "readme": Fault("HEAD .*/README.md", body="stall"),
        "listing": Fault("GET api/datasets/.*/tree/", body="stall"),
    }
    runs = []
    for name, fault in faults.items():
        preparer = new_preparer(name)
        preparer.hub.faults = [fault]
        runs.append(preparer.begin())
    for running in runs:
        running.end().assert_given_up()


def test_fault_of_a_stream_loses_no_committed_shard(preparer: Preparer, tmp_path: Path) -> None:
    folder = tmp_path / "lines"
    folder.mkdir()
    configs = "configs:\n- config_name: own\n  data_files: '*.jsonl'\n"
    (folder / "README.md").write_text(f"---\n{configs}---\n")
    for file, name in enumerate("ab"):
        lines = [json.dumps({"text": text}) for text in texts_of(file)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    preparer.hub.publish("own/lines", folder)
    reading = r"GET datasets/.*/b\.jsonl"

    preparer.hub.faults = [Fault(reading, status=503)]
    preparer.run(PREPARE_DATASET="own/lines").assert_given_up()
    kept = preparer.committed()
    assert len(kept) > 1

    preparer.hub.faults = [Fault(reading, body="stall", times=1)]
    preparer.run(PREPARE_DATASET="own/lines").assert_done(retries=1)
    local = prepare(DatasetSpec(TextSource(str(folder)), "lines", **SETTINGS), tmp_path / "local")
    assert preparer.manifest.shards == local.shards
    assert preparer.committed().items() >= kept.items()


def test_continued_run_stays_at_its_commit(
    preparer: Preparer, fineweb: Path, clean: Manifest, tmp_path: Path
) -> None:
    hub = preparer.hub
    commit = hub.main[FINEWEB]
    hub.faults = [Fault(row_group(fineweb, 1, 0), status=503)]
    preparer.run().assert_given_up()
    kept = preparer.committed()
    hub.faults = []
    hub.publish(FINEWEB, write_fineweb(tmp_path / "changed", [texts_of(9)], scan_bytes=10))

    folder = hub.folders.pop((FINEWEB, commit))
    preparer.run().assert_refused(2, commit, "PREPARE_OUT_DIR")
    assert preparer.committed() == kept

    hub.folders[FINEWEB, commit] = folder
    preparer.run().assert_done()
    assert preparer.manifest.shards == clean.shards
    assert preparer.manifest.source["revision"] == commit
    assert preparer.committed().items() >= kept.items()


def test_refusal_of_the_hub_is_one_readable_error(new_preparer: NewPreparer, fineweb: Path) -> None:
    gated = {"PREPARE_DATASET": "own/gated", "PREPARE_DATASET_CONFIG": "sample-10BT"}
    refused: tuple[tuple[dict[str, str], tuple[str, ...]], ...] = (
        ({"PREPARE_DATASET": "own/nothing"}, ("there is no dataset own/nothing on the hub",)),
        ({"PREPARE_DATASET_REVISION": "v9"}, ("HuggingFaceFW/fineweb has no revision 'v9'",)),
        (gated, ("own/gated", "gated", "HF_TOKEN")),
        ({**gated, "HF_TOKEN": "hf_other"}, ("own/gated", "gated", "accept")),
    )
    runs = []
    for number, (change, words) in enumerate(refused):
        preparer = new_preparer(str(number))
        preparer.hub.publish("own/gated", fineweb)
        preparer.hub.gates["own/gated"] = "hf_right"
        runs.append((preparer.begin(**change), words))
    for running, words in runs:
        ended = running.end()
        ended.assert_refused(2, *words)
        assert ended.output == ""


def test_gated_dataset_is_prepared_with_its_token(
    preparer: Preparer, fineweb: Path, clean: Manifest
) -> None:
    hub = preparer.hub
    hub.publish("own/fineweb", fineweb)
    hub.gates["own/fineweb"] = "hf_right"
    gated = {"PREPARE_DATASET": "own/fineweb", "PREPARE_DATASET_CONFIG": "sample-10BT"}
    ended = preparer.run(**gated, HF_TOKEN="hf_right")
    ended.assert_done()
    assert preparer.manifest.shards == clean.shards
    assert "hf_right" not in ended.output + str(preparer.manifest)


def test_end_does_not_wait_for_reads_ahead(preparer: Preparer, fineweb: Path) -> None:
    preparer.hub.faults = [Fault(row_group(fineweb, 0, LAST_GROUP), status=503)]
    ended = preparer.run(PREPARE_TOTAL_TOKENS="10000", **PATIENT)
    assert (ended.code, ended.error) == (0, "")
    assert preparer.manifest.complete


def test_signal_does_not_wait_for_a_retry(preparer: Preparer, fineweb: Path) -> None:
    preparer.hub.faults = [Fault(row_group(fineweb, 1, 0), status=503)]
    running = preparer.begin(**PATIENT)
    assert "trying again in 3600 s" in running.line()
    running.process.send_signal(signal.SIGTERM)
    ended = running.end()
    assert ended.code == 143
    assert ended.error.endswith("the same command continues\n")


def test_signal_does_not_wait_for_a_download(preparer: Preparer, fineweb: Path) -> None:
    preparer.hub.faults = [Fault(row_group(fineweb, 1, 0), body="stall")]
    running = preparer.begin(**PATIENT)
    shard = preparer.place / "out" / "fineweb_000000.bin"
    while running.process.poll() is None and not shard.exists():
        threading.Event().wait(0.01)
    running.process.send_signal(signal.SIGTERM)
    ended = running.end()
    assert ended.code == 143
    assert ended.error.endswith("the same command continues\n")


@pytest.mark.parametrize("status", (401, 403, 404))
def test_refusal_in_the_middle_is_one_readable_error(
    preparer: Preparer, fineweb: Path, status: int
) -> None:
    preparer.hub.faults = [Fault(row_group(fineweb, 1, 0), status=status)]
    ended = preparer.run()
    ended.assert_refused(2, "the hub refuses", str(status), "HF_TOKEN")
    assert "signed" not in ended.output + ended.error
    assert preparer.committed()
    preparer.hub.faults = []
    preparer.run().assert_done()


def test_wrong_token_and_answers_of_another_server_are_reported(new_preparer: NewPreparer) -> None:
    request = "GET api/datasets/.*/revision/"
    refused = new_preparer("token")
    refused.hub.faults = [
        Fault(request, status=401, headers={"X-Error-Message": "Invalid credentials"})
    ]
    log_in = new_preparer("portal")
    log_in.hub.faults = [Fault(request, status=200)]
    strange = new_preparer("strange")
    strange.hub.faults = [Fault(request, status=522)]
    runs = [one.begin(HF_TOKEN="hf_wrong") for one in (refused, log_in, strange)]
    runs[0].end().assert_refused(2, "the hub does not know this token", "HF_TOKEN")
    runs[1].end().assert_refused(5, "is not the hub, but perhaps a log-in page")
    runs[2].end().assert_given_up()
