"""The playground process, over sockets."""

import json
import re
import shutil
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from app.data.tokenizer import Tokenizer
from app.inference.text import Sampling, generate_texts
from app.runs.checkpoint import MODEL_FILE
from app.settings.tools import SampleSettings
from tests.newcomer import REPOSITORY, run_really, settle
from tests.tools.playground_process import Playground, playground, text_of
from tests.tools.served import JSON
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
    """One process for all tests that do not change it."""
    with playground(data_dir) as started:
        yield started


def until_text(messages: Iterator[dict[str, Any]]) -> dict[str, Any]:
    return next(message for message in messages if "pieces" in message)


def test_page_loads_everything_from_the_server(shared: Playground) -> None:
    status, page = shared.request("GET", "/")
    assert status == 200
    places = re.findall(r'(?:src|href)="(/[^"]*)"', page.decode())
    assert places == ["/page.css", "/page.js"]
    for place in places:
        status, content = shared.request("GET", place)
        assert status == 200
        assert not re.search(rb"https?://|//[a-z]+\.", content)
    assert set(re.findall(rb"https?://[a-z.0-9]+", page)) == {b"http://www.w3.org"}


def test_state_lists_all_checkpoints_and_the_settings_as_defaults(
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
    assert state["defaults"].keys() == {
        *("prompt", "num_samples", "max_tokens", "temperature", "top_k", "seed")
    }


@pytest.mark.parametrize("temperature", (0, 0.7, 1.5))
def test_text_is_that_of_sample_with_the_same_seed(
    shared: Playground, tmp_path: Path, temperature: float
) -> None:
    prompt = "Ça va, 世界?"
    options: dict[str, Any] = {"max_tokens": 90, "temperature": temperature, "seed": 3}
    messages = shared.generate(prompt=prompt, **options)
    assert [m["state"] for m in messages if "state" in m] == ["loading", "writing", "ended"]
    assert messages[-1]["why"] == "max_tokens"
    assert [m["tokens"] for m in messages if "pieces" in m] == list(range(1, 91))
    model = write_run(tmp_path)
    sampling = Sampling(prompt, num_samples=1, top_k=50, **options)
    assert [sampling.prompt + text_of(messages)] == generate_texts(model, Tokenizer(), sampling)


def test_several_texts_are_those_of_sample_with_the_same_seed(
    shared: Playground, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"num_samples": 3, "max_tokens": 20, "temperature": 1.0, "seed": 3}
    messages = shared.generate(prompt="Once", **options)
    assert [m["tokens"] for m in messages if "pieces" in m] == list(range(3, 63, 3))
    sampling = Sampling("Once", top_k=50, **options)
    expected = generate_texts(write_run(tmp_path), Tokenizer(), sampling)
    assert [f"Once{text_of(messages, sample)}" for sample in range(3)] == expected
    assert len(set(expected)) == 3


def test_each_token_comes_with_the_models_own_odds(shared: Playground, tmp_path: Path) -> None:
    tokenizer, model = Tokenizer(), write_run(tmp_path)
    for temperature in (0, 2.0):
        messages = shared.generate(prompt="Once", max_tokens=3, temperature=temperature)
        tokens = tokenizer.encode_prompt("Once")
        for message in messages:
            for piece in message.get("pieces", ()):
                with torch.no_grad():
                    odds = model(torch.tensor([tokens]))[0, -1].softmax(-1)
                (text, odd), *likeliest = piece["odds"]
                # The cache of keys and values changes the last digits.
                expected = pytest.approx(odds.topk(5).values.tolist(), rel=1e-3)
                assert [it for _, it in likeliest] == expected
                (token,) = tokenizer.encode(text).tolist()
                assert odd == pytest.approx(float(odds[token]), rel=1e-3)
                assert [text, odd] == likeliest[0] or temperature
                tokens.append(token)


def test_each_checkpoint_generates_its_own_text(shared: Playground) -> None:
    texts = {
        text_of(shared.generate(run=run, step=step)) for run, step in (("small", 7), ("other", 3))
    }
    assert len(texts) == 2


def test_text_arrives_while_it_is_generated_and_disconnecting_stops_it(shared: Playground) -> None:
    with shared.generating(**LONG) as messages:
        assert until_text(messages)["tokens"] == 1
    line = shared.next_line_matching(r"small: (\d+) tokens in .* s, stopped\n")
    assert int(line[1]) < LONG["max_tokens"]
    assert shared.generate(max_tokens=3)[-1]["why"] == "max_tokens"


def test_second_request_waits_for_its_turn(shared: Playground) -> None:
    with ExitStack() as first:
        until_text(first.enter_context(shared.generating(**LONG)))
        with shared.generating(max_tokens=6) as gives_up:
            assert next(gives_up) == {"state": "waiting"}
        with shared.generating(max_tokens=5) as second:
            assert next(second) == {"state": "waiting"}
            first.close()
            assert list(second)[-1]["why"] == "max_tokens"


@pytest.mark.parametrize(
    ("changes", "message"),
    (
        ({"temperature": -0.1}, "temperature: must be greater than or equal to 0"),
        ({"temperature": "hot"}, "temperature: must be a valid number"),
        ({"temperature": float("nan")}, ""),
        ({"top_k": 1.5}, "top_k: must be a valid integer"),
        ({"max_tokens": 0}, "max_tokens: must be greater than or equal to 1"),
        ({"max_tokens": 10**9}, "max_tokens: must be less than or equal to 4096"),
        ({"max_tokens": None}, "max_tokens: must be a valid integer"),
        ({"num_samples": 9}, "num_samples: must be less than or equal to 8"),
        ({"seed": 2**32}, "seed: must be less than 4294967296"),
        ({"seed": True}, "seed: must be a valid integer"),
        ({"prompt": 3}, "prompt: must be a valid string"),
        ({"prompt": "x" * 100_001}, "prompt: String should have at most 100000 characters"),
        ({"run": "../small"}, "run: String should match pattern"),
        ({"step": -1}, "step: must be greater than or equal to 0"),
        ({"sede": 3}, "sede: Extra inputs are not permitted"),
    ),
)
def test_invalid_value_is_refused_by_name(
    shared: Playground, changes: dict[str, Any], message: str
) -> None:
    status, error = shared.refusal(GOOD | changes)
    assert status == 422
    assert error.startswith(message)


def test_all_invalid_values_are_reported_together(shared: Playground) -> None:
    _, error = shared.refusal({"run": "small", "step": "x", "seed": -1})
    assert "step: " in error
    assert "seed: " in error


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    (
        (b"{", JSON, 422),
        (b"[]", JSON, 422),
        (b'{"prompt": "\xff"}', JSON, 422),
        (b" " * (2 << 20), JSON, 413),
        (b" " * 10_000_000, JSON, 413),
        (b'{"run": "small", "step": 7, "temperature": NaN}', JSON, 422),
        (b'{"run": "small", "step": 7, "temperature": 1e999}', JSON, 422),
        (b'{"run": "small", "step": 7, "seed": ' + b"9" * 5000 + b"}", JSON, 422),
        (b"[" * 100_000, JSON, 422),
        (b"{}", JSON, 422),
        (b"", JSON, 422),
        (json.dumps(GOOD).encode(), {"Content-Type": "text/plain"}, 415),
        (json.dumps(GOOD).encode(), {}, 415),
    ),
)
def test_invalid_body_is_refused(
    shared: Playground, body: bytes, headers: dict[str, str], status: int
) -> None:
    actual, response = shared.request("POST", "/api/generate", body, headers)
    assert actual == status
    assert json.loads(response)["error"]


@pytest.mark.parametrize("media_type", ("application/json; charset=utf-8", "Application/JSON"))
def test_a_request_as_other_clients_send_it_is_answered(
    shared: Playground, media_type: str
) -> None:
    body, headers = json.dumps(GOOD).encode(), {"Content-Type": media_type}
    assert shared.request("POST", "/api/generate", body, headers)[0] == 200


def test_values_at_their_edges_generate_what_the_command_line_does(shared: Playground) -> None:
    greedy, all_tokens = (
        text_of(shared.generate(prompt="Once", max_tokens=20, **options))
        for options in ({"temperature": 0}, {"top_k": 0})
    )
    for edge, expected in (
        ({"temperature": 5e-324}, greedy),
        ({"temperature": 1e-300}, greedy),
        ({"top_k": 1}, greedy),
        ({"temperature": 0, "prompt": "<|endoftext|>Once"}, greedy),
        ({"temperature": 0, "prompt": "\ufeffOnce"}, greedy),
        ({"top_k": 50_257}, all_tokens),
        ({"top_k": 10**18}, all_tokens),
    ):
        assert text_of(shared.generate(**{"prompt": "Once", "max_tokens": 20} | edge)) == expected


def test_a_client_that_leaves_in_its_request_leaves_no_trace(data_dir: Path) -> None:
    with playground(data_dir) as server:
        head = (
            "POST /api/generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        )
        with socket.create_connection(("localhost", server.port)) as leaving:
            leaving.sendall(f"{head}Content-Length: 99\r\n\r\n{{".encode())
        assert server.generate(max_tokens=2)[-1]["why"] == "max_tokens"
        server.process.send_signal(signal.SIGTERM)
        assert server.wait() == (143, "stopped: by SIGTERM\n")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    (
        ("GET", "/x", 404),
        ("GET", "/api/", 404),
        ("GET", "/%2e%2e/routes.py", 404),
        ("PUT", "/", 405),
        ("GET", "/api/generate", 405),
        ("DELETE", "/api/state", 405),
    ),
)
def test_other_requests_are_refused_in_json(
    shared: Playground, method: str, path: str, status: int
) -> None:
    actual, response = shared.request(method, path)
    assert (actual, set(json.loads(response))) == (status, {"error"})


@pytest.mark.parametrize("host", ("localhost", "127.0.0.1", "[::1]", "LOCALHOST"))
def test_requests_for_its_own_names_are_served(shared: Playground, host: str) -> None:
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
def test_cross_origin_requests_are_refused(shared: Playground, headers: dict[str, str]) -> None:
    for method, path in (("GET", "/"), ("GET", "/api/state"), ("POST", "/api/generate")):
        status, response = shared.request(method, path, json.dumps(GOOD).encode(), JSON | headers)
        assert status in (400, 403)
        assert b"small" not in response


def test_server_goes_on_after_a_missing_and_a_damaged_checkpoint(
    shared: Playground,
) -> None:
    missing, broken = shared.generate(step=8)[-1], shared.generate(run="broken", step=1)[-1]
    assert "has no checkpoint of step 8" in missing["error"]
    assert missing["fix"] == "choose one of: 7"
    assert "is damaged" in broken["error"]
    assert "there is no run" in shared.generate(run="none")[-1]["error"]
    assert shared.generate(max_tokens=2)[-1]["why"] == "max_tokens"


def test_run_trained_again_under_the_same_name_is_loaded_again(
    shared: Playground, data_dir: Path
) -> None:
    run_dir = data_dir / "runs" / "again"
    texts = set()
    for seed in range(2):
        write_run(run_dir, seed=seed)
        texts.add(text_of(shared.generate(run="again")))
    assert len(texts) == 2
    shutil.rmtree(run_dir)


def test_prompt_longer_than_the_context_is_noted(shared: Playground) -> None:
    messages = shared.generate(prompt="one two " * 50, max_tokens=2)
    notes = [message for message in messages if "note" in message]
    assert notes == [
        {
            "note": "the first 38 of the prompt's 102 tokens are cut off: the model sees the last "
            "64 of them",
            "seen": " two" + " one two" * 31 + " ",
        }
    ]


@pytest.mark.parametrize(
    ("number", "code"), ((signal.SIGTERM, 143), (signal.SIGINT, 130)), ids=("SIGTERM", "SIGINT")
)
def test_signal_ends_the_server_and_the_current_text(
    data_dir: Path, number: signal.Signals, code: int
) -> None:
    with playground(data_dir) as server:
        with server.generating(**LONG) as messages:
            until_text(messages)
            server.process.send_signal(number)
            assert list(messages)[-1] == {"state": "ended", "why": "closing"}
        exit_code, errors = server.wait()
        assert exit_code == code, errors
        assert errors.startswith("stopped")
        assert errors.count("\n") == 1


def test_page_is_served_without_any_run(tmp_path: Path) -> None:
    with playground(tmp_path) as server:
        assert server.request("GET", "/")[0] == 200
        assert json.loads(server.request("GET", "/api/state")[1])["checkpoints"] == []
        server.process.send_signal(signal.SIGTERM)
        missing = (
            f"warning: there is no run {tmp_path}/runs/small: train first, or correct DATA_DIR\n"
        )
        assert server.wait() == (143, f"{missing}stopped: by SIGTERM\n")


def test_unusable_address_is_refused(
    shared: Playground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settle(tmp_path, monkeypatch)
    for words, problem, fix in (
        (f"--port {shared.port}", f"cannot listen on 127.0.0.1, port {shared.port}: Addr", "PORT"),
        ("--host 192.0.2.1", "cannot listen on 192.0.2.1, port 8000: Cannot assign", "HOST"),
        ("--host no..name", "cannot listen on no..name, port 8000: ", "HOST"),
    ):
        ended = run_really(f"playground --device cpu {words}")
        assert ended.returncode == 2
        assert ended.stderr.startswith(f"error: {problem}")
        assert "while attempting" not in ended.stderr
        assert ended.stderr.splitlines()[1].startswith(f"  fix: set PLAYGROUND_{fix} to ")
        assert ended.stderr.count("\n") == 2


def test_package_has_the_page() -> None:
    folder = REPOSITORY / "app" / "tools" / "playground"
    assert {path.name for path in folder.glob("page.*")} == {"page.html", "page.css", "page.js"}
