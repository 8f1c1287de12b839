"""docs/troubleshooting.md quotes the program's messages word for word."""

import ast
import functools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.errors import ExitCode
from tests.newcomer import REPOSITORY, run_really, settle

PAGE = (REPOSITORY / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
RUN = [block for block in BLOCKS if block.startswith("$ ")]
QUOTED = [block for block in BLOCKS if block not in RUN and not block.startswith("docker ")]
SEPARATOR = "\n  fix: "
# A pattern with fewer letters would match almost anything.
LEAST_LETTERS = 6


def pattern(node: ast.expr) -> str:
    """Return a regular expression of the texts that an expression can have."""
    match node:
        case ast.Constant(value=str(text)):
            return re.escape(text)
        case ast.JoinedStr(values=parts):
            return "".join(map(pattern, parts))
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return pattern(left) + pattern(right)
        case ast.IfExp(body=body, orelse=orelse):
            return f"(?:{pattern(body)}|{pattern(orelse)})"
        case ast.FormattedValue(value=ast.JoinedStr() | ast.IfExp() as value):
            return pattern(value)
    return ".*"


def own_letters(text: str) -> int:
    return len(re.findall("[a-z]", re.sub(r"\\.|\.\*", "", text)))


def expressions() -> Iterator[ast.AST]:
    for path in sorted((REPOSITORY / "app").rglob("*.py")):
        yield from ast.walk(ast.parse(path.read_text(encoding="utf-8")))


@functools.cache
def messages() -> list[re.Pattern[str]]:
    """Return the patterns of all errors: the problem and the fix."""
    patterns = []
    for node in expressions():
        match node:
            case ast.Call(func=function, args=[problem, fix]):
                text = pattern(problem)
                if own_letters(text) + own_letters(pattern(fix)) > 2 * LEAST_LETTERS:
                    # What is wrong with a file is said after its name.
                    before = ".* " if getattr(function, "id", "") == "Fault" else ""
                    patterns.append(re.compile(before + text + re.escape(SEPARATOR) + pattern(fix)))
    return patterns


@functools.cache
def lines() -> list[re.Pattern[str]]:
    """Return the patterns of all other texts that the program may print."""
    patterns = []
    for node in expressions():
        if isinstance(node, ast.JoinedStr | ast.BinOp | ast.Constant | ast.IfExp):
            text = pattern(node).removesuffix(re.escape("\n"))
            if own_letters(text) > LEAST_LETTERS:
                patterns.append(re.compile(text))
    return patterns


@pytest.mark.parametrize("block", QUOTED, ids=lambda block: block[:40])
def test_quoted_message_is_one_of_the_program(block: str) -> None:
    text = block.rstrip("\n")
    known = messages() if text.startswith("error: ") else lines()
    message = text.removeprefix("error: ")
    assert any(one.fullmatch(message) for one in known)


@pytest.mark.parametrize("block", RUN, ids=lambda block: block[:40])
def test_quoted_command_fails_as_quoted(
    block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settle(tmp_path, monkeypatch)
    typed, _, expected = block.removeprefix("$ ").partition("\n")
    ended = run_really(typed.replace("python -m app ", ""))
    assert (ended.returncode, ended.stderr) == (ExitCode.USER, expected)
    assert shlex.split(typed)


def test_changed_message_is_noticed() -> None:
    """The patterns do not match more than the messages."""
    for block in QUOTED:
        if block.startswith("error: "):
            message = block.removeprefix("error: ").rstrip("\n")
            for changed in (message.replace(SEPARATOR, "\n  fixed: "), f"{message} and more words"):
                close = [one for one in messages() if one.fullmatch(changed)]
                assert all(one.pattern.endswith(".*") for one in close), changed


def test_page_has_every_exit_code_and_many_messages() -> None:
    codes = {int(code) for code in re.findall(r"(?:^\| |, )(\d+)(?=[, ])", PAGE, re.MULTILINE)}
    public = {*ExitCode} - {ExitCode.RANK_LOST}
    assert {int(code) for code in public} <= codes
    assert 15 <= sum("error: " in block for block in BLOCKS) <= 36
