"""Questions of HellaSwag's form."""

import json
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("questions.jsonl")


def own_questions() -> list[dict[str, Any]]:
    """Return the lines of FILE."""
    return [json.loads(line) for line in FILE.read_bytes().splitlines()]


def mixed_questions() -> list[dict[str, Any]]:
    """Return each beginning with the endings of each question."""
    questions = own_questions()
    return [
        {**beginning, "endings": other["endings"], "label": (i + 3 * j) % 4, "ind": 8 * i + j}
        for i, beginning in enumerate(questions)
        for j, other in enumerate(questions)
    ]


def write_questions(path: Path, questions: list[dict[str, Any]]) -> Path:
    text = "".join(json.dumps(question) + "\n" for question in questions)
    path.write_text(text, encoding="utf-8")
    return path
