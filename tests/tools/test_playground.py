"""The playground: a real server, asked over real sockets."""

import json
import re
import shutil
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from app.data.tokenizer import Tokenizer
from app.inference.text import Sampling, generate_texts
from app.runs.checkpoint import MODEL_FILE
from app.settings.tools import SampleSettings
from tests.newcomer import REPOSITORY, run_really, settle
from tests.tools.playground_process import JSON, Playground, playground, text_of
from tests.tools.written_run import write_run

pytestmark = pytest.mark.processes

LONG = {"max_tokens": 4096, "top_k": 5}
GOOD = {"run": "small", "step": 7}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_run(folder / "runs" / "other", 3, seed=1)
    write_run(folder / "runs" / "broken", 1)
    weights = folder / "runs/broken/checkpoints/step-000001" / MODEL_FILE
    weights.write_bytes(weights.read_bytes()[:-1])
    write_run(folder / "runs" / "small", 7)
    return folder


@pytest.fixture(scope="module")
def shared(data_dir: Path) -> Iterator[Playground]:
    """One for all tests that leave it as it was."""
    with playground(data_dir) as started:
        yield started


def until_text(messages: Iterator[dict[str, Any]]) -> dict[str, Any]:
    return next(message for message in messages if "text" in message)


def test_the_page_is_whole_and_names_no_other_machine(shared: Playground) -> None:
    status, page = shared.request("GET", "/")
    assert status == 200
    places = re.findall(r'(?:src|href)="(/[^"]*)"', page.decode())
    assert places == ["/page.css", "/page.js"]
    for place in places:
        status, content = shared.request("GET", place)
        assert status == 200
        assert not re.search(rb"https?://|//[a-z]+\.", content)
    assert set(re.findall(rb"https?://[a-z.0-9]+", page)) == {b"http://www.w3.org"}


def test_the_checkpoints_of_all_runs_are_listed_and_the_settings_are_the_defaults(
    shared: Playground,
) -> None:
    state = json.loads(shared.request("GET", "/api/state")[1])
    assert state["run"] == "small"
    assert {one["run"]: one["steps"] for one in state["checkpoints"]} == {
        "small": [{"step": 7, "val_loss": 4.5}],
        "other": [{"step": 3, "val_loss": 4.5}],
        "broken": [{"step": 1, "val_loss": 4.5}],
    }
    defaults = SampleSettings().model_dump()
    assert state["defaults"] == {name: defaults[name] for name in state["defaults"]}
    assert state["defaults"].keys() == {"prompt", "max_tokens", "temperature", "top_k", "seed"}


@pytest.mark.parametrize("temperature", (0, 0.7, 1.5))
def test_it_writes_what_sample_writes_from_the_same_seed(
    shared: Playground, tmp_path: Path, temperature: float
) -> None:
    prompt = "Ça va, 世界?"
    options: dict[str, Any] = {"max_tokens": 90, "temperature": temperature, "seed": 3}
    messages = shared.generate(prompt=prompt, **options)
    assert [m["state"] for m in messages if "state" in m] == ["loading", "writing", "ended"]
    assert messages[-1]["why"] == "max_tokens"
    assert [m["tokens"] for m in messages if "text" in m] == list(range(1, 91))
    model = write_run(tmp_path)
    sampling = Sampling(prompt, num_samples=1, top_k=50, **options)
    assert [sampling.prompt + text_of(messages)] == generate_texts(model, Tokenizer(), sampling)


def test_each_checkpoint_writes_its_own_text(shared: Playground) -> None:
    texts = {
        text_of(shared.generate(run=run, step=step)) for run, step in (("small", 7), ("other", 3))
    }
    assert len(texts) == 2


def test_text_arrives_while_it_is_drawn_and_who_leaves_ends_it(shared: Playground) -> None:
    with shared.generating(**LONG) as messages:
        assert until_text(messages)["tokens"] == 1
    said = shared.said_matching(r"small: (\d+) tokens in .* s, stopped\n")
    assert int(said[1]) < LONG["max_tokens"]
    assert shared.generate(max_tokens=3)[-1]["why"] == "max_tokens"


def test_a_second_reader_is_told_to_wait_and_gets_their_turn(shared: Playground) -> None:
    with ExitStack() as first:
        until_text(first.enter_context(shared.generating(**LONG)))
        with shared.generating(max_tokens=6) as gives_up:
            assert next(gives_up) == {"state": "waiting"}
        with shared.generating(max_tokens=5) as second:
            assert next(second) == {"state": "waiting"}
            first.close()
            assert list(second)[-1]["why"] == "max_tokens"


@pytest.mark.parametrize(
    ("changes", "said"),
    (
        ({"temperature": -0.1}, "temperature: must be greater than or equal to 0"),
        ({"temperature": "hot"}, "temperature: must be a valid number"),
        ({"temperature": float("nan")}, ""),
        ({"top_k": 1.5}, "top_k: must be a valid integer"),
        ({"max_tokens": 0}, "max_tokens: must be greater than or equal to 1"),
        ({"max_tokens": 10**9}, "max_tokens: must be less than or equal to 4096"),
        ({"max_tokens": None}, "max_tokens: must be a valid integer"),
        ({"seed": 2**32}, "seed: must be less than 4294967296"),
        ({"seed": True}, "seed: must be a valid integer"),
        ({"prompt": 3}, "prompt: must be a valid string"),
        ({"prompt": "x" * 100_001}, "prompt: String should have at most 100000 characters"),
        ({"run": "../small"}, "run: String should match pattern"),
        ({"step": -1}, "step: must be greater than or equal to 0"),
        ({"sede": 3}, "sede: Extra inputs are not permitted"),
    ),
)
def test_a_bad_value_is_refused_by_name(
    shared: Playground, changes: dict[str, Any], said: str
) -> None:
    status, told = shared.refusal(GOOD | changes)
    assert status == 422
    assert told.startswith(said)


def test_all_bad_values_are_told_together(shared: Playground) -> None:
    _, told = shared.refusal({"run": "small", "step": "x", "seed": -1})
    assert "step: " in told
    assert "seed: " in told


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    (
        (b"{", JSON, 422),
        (b"[]", JSON, 422),
        (b'{"prompt": "\xff"}', JSON, 422),
        (b" " * (2 << 20), JSON, 413),
        (json.dumps(GOOD).encode(), {"Content-Type": "text/plain"}, 415),
    ),
)
def test_a_bad_body_is_refused(
    shared: Playground, body: bytes, headers: dict[str, str], status: int
) -> None:
    found, answer = shared.request("POST", "/api/generate", body, headers)
    assert found == status
    assert json.loads(answer)["error"]


@pytest.mark.parametrize(("method", "path", "status"), (("GET", "/x", 404), ("PUT", "/", 405)))
def test_other_requests_are_refused_in_json(
    shared: Playground, method: str, path: str, status: int
) -> None:
    found, answer = shared.request(method, path)
    assert (found, set(json.loads(answer))) == (status, {"error"})


@pytest.mark.parametrize("host", ("localhost", "127.0.0.1", "[::1]", "LOCALHOST"))
def test_its_own_names_are_served(shared: Playground, host: str) -> None:
    own = {"Host": f"{host}:{shared.port}", "Origin": f"http://{host}:{shared.port}"}
    assert shared.request("GET", "/api/state", headers=own)[0] == 200


@pytest.mark.parametrize(
    "headers",
    (
        {"Host": "rebound.example"},
        {"Host": "rebound.example:8000"},
        {"Host": "localhost.rebound.example"},
        {"Host": "localhost@rebound.example"},
        {"Host": "["},
        {"Origin": "https://elsewhere.example"},
        {"Origin": "http://localhost:1"},
        {"Origin": "null"},
    ),
)
def test_what_other_sites_let_a_browser_send_is_refused(
    shared: Playground, headers: dict[str, str]
) -> None:
    for method, path in (("GET", "/"), ("GET", "/api/state"), ("POST", "/api/generate")):
        status, answer = shared.request(method, path, json.dumps(GOOD).encode(), JSON | headers)
        assert status in (400, 403)
        assert b"small" not in answer


def test_a_missing_and_a_damaged_checkpoint_are_told_and_the_next_text_comes(
    shared: Playground,
) -> None:
    missing, broken = shared.generate(step=8)[-1], shared.generate(run="broken", step=1)[-1]
    assert "has no checkpoint of step 8" in missing["error"]
    assert missing["fix"] == "choose one of: 7"
    assert "is damaged" in broken["error"]
    assert "there is no run" in shared.generate(run="none")[-1]["error"]
    assert shared.generate(max_tokens=2)[-1]["why"] == "max_tokens"


def test_a_run_trained_again_under_its_name_is_loaded_again(
    shared: Playground, data_dir: Path
) -> None:
    run_dir = data_dir / "runs" / "again"
    texts = set()
    for seed in range(2):
        write_run(run_dir, seed=seed)
        texts.add(text_of(shared.generate(run="again")))
    assert len(texts) == 2
    shutil.rmtree(run_dir)


def test_a_prompt_longer_than_the_context_is_told(shared: Playground) -> None:
    messages = shared.generate(prompt="one two " * 50, max_tokens=2)
    notes = [message["note"] for message in messages if "note" in message]
    assert notes == ["the prompt has 102 tokens; the model sees the last 64 of them"]


@pytest.mark.parametrize(
    ("number", "code"), ((signal.SIGTERM, 143), (signal.SIGINT, 130)), ids=("SIGTERM", "SIGINT")
)
def test_a_signal_ends_it_and_the_text_under_way(
    data_dir: Path, number: signal.Signals, code: int
) -> None:
    with playground(data_dir) as server:
        with server.generating(**LONG) as messages:
            until_text(messages)
            server.process.send_signal(number)
            assert list(messages)[-1] == {"state": "ended", "why": "closing"}
        found, errors = server.wait()
        assert found == code, errors
        assert errors.startswith("stopped")
        assert errors.count("\n") == 1


def test_without_any_run_the_page_is_there_and_a_signal_ends_it(tmp_path: Path) -> None:
    with playground(tmp_path) as server:
        assert server.request("GET", "/")[0] == 200
        assert json.loads(server.request("GET", "/api/state")[1])["checkpoints"] == []
        server.process.send_signal(signal.SIGTERM)
        assert server.wait() == (143, "stopped: by SIGTERM\n")


def test_a_place_where_it_cannot_listen_is_told(
    shared: Playground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settle(tmp_path, monkeypatch)
    for words, problem, fix in (
        (f"--port {shared.port}", f"cannot listen at 127.0.0.1, port {shared.port}: ", "PORT"),
        ("--host 192.0.2.1", "cannot listen at 192.0.2.1, port 8000: ", "HOST"),
        ("--host no..name", "cannot listen at no..name, port 8000: ", "HOST"),
    ):
        ended = run_really(f"playground --device cpu {words}")
        assert ended.returncode == 2
        assert ended.stderr.startswith(f"error: {problem}")
        assert ended.stderr.splitlines()[1].startswith(f"  fix: set PLAYGROUND_{fix} to ")
        assert ended.stderr.count("\n") == 2


def test_the_wheel_and_the_image_have_the_page() -> None:
    folder = REPOSITORY / "app" / "tools" / "playground"
    assert {path.name for path in folder.glob("page.*")} == {"page.html", "page.css", "page.js"}
