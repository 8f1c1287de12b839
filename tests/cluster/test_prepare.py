"""Preparing by tasks gives the documents and tokens of the single-machine run."""

import gzip
import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from app.data.manifest import Manifest
from app.errors import ExitCode
from tests.cluster.cluster_process import PYTHON, Cluster, Slurm, ended
from tests.prepare.hub_folders import write_fineweb
from tests.prepare.loopback_hub import Hub
from tests.prepare.prepare_process import Preparation, library_source, mixed_source, parquet_source

pytestmark = pytest.mark.cluster

Settings = dict[str, str]


def streamed_source(folder: Path) -> dict[str, str]:
    """Write a repository of compressed JSON lines, which only `datasets` can stream."""
    folder.mkdir()
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: own\n  data_files: '*.gz'\n---\n"
    )
    for file in range(5):
        rows = [{"text": f"file {file}, row {row}, " * (row % 9)} for row in range(70)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{file}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    return {"PREPARE_DATASET": str(folder)}


def prepared(place: Path, settings: Settings, python: str | Path = sys.executable) -> Path:
    """Run `prepare` on one machine; return its folder."""
    place.mkdir(parents=True)
    preparation = Preparation(place, settings, python)
    run = preparation.run(workers=2)
    assert run.code == 0, run
    return preparation.out


SOURCES: dict[str, Callable[[Path], dict[str, str]]] = {
    "row groups": parquet_source,
    "text and lines": mixed_source,
    "streamed": streamed_source,
}
SIZES = (
    {"PREPARE_TOTAL_TOKENS": "all", "PREPARE_VAL_TOKENS": "0", "PREPARE_SHARD_SIZE": "100000"},
    {"PREPARE_TOTAL_TOKENS": "all", "PREPARE_VAL_TOKENS": "1000", "PREPARE_SHARD_SIZE": "700"},
    {"PREPARE_TOTAL_TOKENS": "9000", "PREPARE_VAL_TOKENS": "5000", "PREPARE_SHARD_SIZE": "4000"},
)


@pytest.mark.parametrize("sizes", SIZES, ids=("all", "small shards", "some"))
@pytest.mark.parametrize("kind", SOURCES)
def test_local_processes_write_the_same_dataset(kind: str, sizes: Settings, tmp_path: Path) -> None:
    settings = SOURCES[kind](tmp_path / "source") | sizes
    single = prepared(tmp_path / "single", settings)
    cluster = Cluster(tmp_path, settings)
    run = cluster.run()
    assert run.returncode == 0, run
    cluster.equals(single)
    assert f"{cluster.out}: " in run.stdout


@pytest.mark.parametrize("held_out", ({}, {"PREPARE_VAL_TOKENS": "900"}), ids=("share", "set"))
def test_large_documents_are_cut_at_the_same_paragraph(held_out: Settings, tmp_path: Path) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    for name in "ab":
        verses = (f"Verse {n} of {name}\nhas {n % 7} words\n\n" for n in range(3000))
        (folder / f"{name}.txt").write_text("".join(verses))
    settings = {"PREPARE_DATASET": str(folder), "PREPARE_SHARD_SIZE": "700"} | held_out
    single = prepared(tmp_path / "single", settings)
    cluster = Cluster(tmp_path, settings)
    run = cluster.run()
    assert run.returncode == 0, run
    cluster.equals(single)
    assert "held out: the first " in run.stdout


def test_pythons_library_gives_the_same_dataset(tmp_path: Path) -> None:
    # Another Python may have another library.
    single = prepared(tmp_path / "single", library_source(), PYTHON)
    cluster = Cluster(tmp_path, library_source())
    assert cluster.run().returncode == 0
    cluster.equals(single)


@pytest.mark.parametrize("kind", ("row groups", "streamed"))
def test_ray_writes_the_same_dataset(kind: str, tmp_path: Path) -> None:
    settings = SOURCES[kind](tmp_path / "source") | SIZES[1]
    single = prepared(tmp_path / "single", settings)
    cluster = Cluster(tmp_path, settings)
    run = cluster.run("--executor", "ray")
    assert run.returncode == 0, run
    cluster.equals(single)


def test_token_for_the_hub_is_not_stored(tmp_path: Path) -> None:
    token = "hf_StaysInTheEnvironment"
    texts = [[f"file {file}, row {row} " * 20 for row in range(200)] for file in range(3)]
    with Hub() as hub:
        commit = hub.publish("HuggingFaceFW/fineweb", write_fineweb(tmp_path / "hub", texts))
        hub.gates["HuggingFaceFW/fineweb"] = token
        settings = {**SIZES[2], **hub.variables, "HF_TOKEN": token}
        single = prepared(tmp_path / "single", settings)
        cluster = Cluster(tmp_path, settings)
        # Its files stay until the jobs have ended.
        slurm = Slurm(tmp_path / "commands")
        submitting = Cluster(tmp_path, settings | slurm.variables)
        run = submitting.run("--executor", "slurm", "--sbatch", "partition=cpu")
        assert run.returncode == 0, run
        # sbatch stores the environment that it is given.
        assert token not in (tmp_path / "commands" / "given").read_text()
        written = [path for path in cluster.out.rglob("*") if path.is_file()]
        assert "executor.pik" in {path.name for path in written}
        assert not any(token.encode() in path.read_bytes() for path in written)
        # The branch goes on, the dataset stays with the commit that it was begun with.
        hub.publish("HuggingFaceFW/fineweb", write_fineweb(tmp_path / "later", [["later"]]))
        run = cluster.run()
        assert run.returncode == 0, run
    cluster.equals(single)
    manifest = Manifest.load(cluster.out)
    assert manifest is not None
    assert manifest.source["revision"] == commit


def test_single_machine_run_finds_the_dataset_complete(tmp_path: Path) -> None:
    settings = parquet_source(tmp_path / "source")
    cluster = Cluster(tmp_path, settings)
    assert cluster.run().returncode == 0
    for again in (Preparation(tmp_path, settings).run().output, cluster.run().stdout):
        assert [line for line in again.splitlines() if line.startswith("complete already: ")]


def test_little_more_text_is_encoded_than_is_needed(tmp_path: Path) -> None:
    """Of 400 row groups; there may be two plans, since tokens are counted when they are made."""
    settings = parquet_source(tmp_path / "source", rows=1600) | SIZES[2]
    cluster = Cluster(tmp_path, settings)
    process = cluster.start()
    seen = set[str]()
    while process.poll() is None:
        seen |= cluster.completions()
    assert ended(process).returncode == 0
    assert 1 <= len(seen) < 20


def test_broken_text_is_reported_and_other_tasks_stay_done(tmp_path: Path) -> None:
    settings = mixed_source(tmp_path / "source") | {"PREPARE_SHUFFLE_FILES": "false"}
    settings |= SIZES[1]
    single = prepared(tmp_path / "single", settings)
    last = tmp_path / "source" / "rows5.jsonl"
    good = last.read_bytes()
    last.write_bytes(good[:-2] + b"?\n")
    cluster = Cluster(tmp_path, settings)
    run = cluster.run()
    assert run.returncode == ExitCode.USER
    assert run.stderr.startswith(f"error: {last}, line 41 is not JSON")
    assert "Traceback" not in run.stderr
    before = cluster.shards_of_parts()
    assert before
    last.write_bytes(good)
    assert cluster.run().returncode == 0
    cluster.equals(single)
    assert before.keys() & {path.stat().st_ino for path in cluster.out.glob("*.bin")}


def test_too_little_text_is_reported_and_can_be_corrected(tmp_path: Path) -> None:
    settings = parquet_source(tmp_path / "source")
    run = Cluster(tmp_path, settings | {"PREPARE_VAL_TOKENS": "10M"}).run()
    assert run.returncode == ExitCode.USER
    assert "10,000,000 were to be held out\n  fix: lower PREPARE_VAL_TOKENS" in run.stderr
    assert Cluster(tmp_path, settings).run().returncode == 0


def test_wrong_settings_are_reported(tmp_path: Path) -> None:
    run = Cluster(tmp_path, {"PREPARE_SHARD_SIZE": "0"}).run("--executor", "slurm")
    assert run.returncode == ExitCode.USER
    assert "PREPARE_SHARD_SIZE=0 (environment): must be more than 0" in run.stderr
    for wrong in (
        ("--executor", "yarn"),
        ("--task-bytes", "0"),
        ("--sbatch", "cpu"),
        ("--lr", "1"),
    ):
        run = Cluster(tmp_path, {}).run(*wrong)
        assert run.returncode == ExitCode.USER
        assert run.stderr.startswith("error: ")
        assert wrong[0] in run.stderr


def test_unfinished_folder_is_refused_to_other_settings_and_to_one_machine(tmp_path: Path) -> None:
    settings = parquet_source(tmp_path / "source", rows=1600)
    cluster = Cluster(tmp_path, settings)
    process = cluster.start()
    while not cluster.completions():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    run = ended(process)
    assert run.returncode == ExitCode.SIGTERM, run
    assert run.stderr == f"stopped: {cluster.out} is incomplete; the same command continues\n"
    alone = Preparation(tmp_path, settings).run()
    assert alone.code == ExitCode.USER
    assert "was prepared differently: prepared_by was 'app.cluster' and is now None" in alone.error
    other = Cluster(tmp_path, settings | {"PREPARE_SHARD_SIZE": "500"}).run()
    assert other.returncode == ExitCode.USER
    assert "shard_size was 8000 and is now 500" in other.stderr


def test_slurm_gets_a_script_that_does_the_tasks(tmp_path: Path) -> None:
    """With stand-ins for its commands: the script's jobs run here, one after the other."""
    settings = parquet_source(tmp_path / "source")
    single = prepared(tmp_path / "single", settings)
    cluster = Cluster(tmp_path, settings)
    run = cluster.run("--executor", "slurm")
    assert run.returncode == ExitCode.USER
    assert "name yours: --sbatch partition=NAME" in run.stderr
    arguments = ("--executor", "slurm", "--sbatch", "partition=cpu", "--sbatch", "account=me")
    run = cluster.run(*arguments)
    assert run.returncode == ExitCode.USER
    script = cluster.slurm_script
    assert "there is no sbatch on this machine" in run.stderr
    assert f"fix: run this where jobs are submitted, or submit {script} there" in run.stderr
    lines = script.read_text().splitlines()
    assert {"#SBATCH --partition=cpu", "#SBATCH --account=me"} <= {*lines}
    slurm = Slurm(tmp_path / "commands")
    submitting = Cluster(tmp_path, settings | slurm.variables)
    under_way = submitting.run(*arguments)
    assert under_way.returncode == 0, under_way
    # What was submitted does not depend on whether the next command is right.
    run = submitting.run("--executor", "slurm")
    assert run.returncode == ExitCode.USER
    jobs = slurm.run_jobs(script)
    assert f"{jobs} of {jobs} tasks are running or have failed" in under_way.stdout
    assert len(cluster.completions()) == jobs
    assert submitting.run(*arguments).returncode == 0
    cluster.equals(single)


def test_bad_lines_of_all_tasks_together_are_left_out_and_listed(tmp_path: Path) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    for number in range(4):
        lines = [json.dumps({"text": f"Line {number}, {row}"}) for row in range(50)]
        (folder / f"{number}.jsonl").write_text("\n".join([*lines, "bad"]))
    settings = {"PREPARE_DATASET": str(folder), "PREPARE_SKIP_BAD": "4"} | SIZES[0]
    single = prepared(tmp_path / "single", settings)
    run = Cluster(tmp_path, settings | {"PREPARE_SKIP_BAD": "3"}).run("--task-bytes", "1")
    assert run.returncode == ExitCode.USER, run
    assert "4 of 204 lines and files are bad" in run.stderr
    cluster = Cluster(tmp_path, settings)
    assert cluster.run("--task-bytes", "1").returncode == 0
    cluster.equals(single)
    manifests = [Manifest.load(out) for out in (cluster.out, single)]
    assert len({manifest.left_out for manifest in manifests if manifest}) == 1
