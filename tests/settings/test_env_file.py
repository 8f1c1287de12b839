"""Lines of .env and recipes; what is expected of $ is what `docker compose config` printed."""

from pathlib import Path

import pytest

from app.settings.env_file import read_env_file

DEFINED = {"HOME": "/me", "EMPTY": ""}


def read(content: str | bytes, tmp_path: Path) -> tuple[dict[str, str], list[str]]:
    path = tmp_path / "mine.env"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    values, faults = read_env_file(path, "mine.env", DEFINED)
    return {name: value.text for name, value in values.items()}, faults


@pytest.mark.parametrize(
    ("text", "value"),
    (
        ("$HOME/x", "/me/x"),
        ("${HOME}x", "/mex"),
        ('"$HOME/x"', "/me/x"),
        ("'$HOME/x ${UNSET}'", "$HOME/x ${UNSET}"),
        ("${UNSET:-d e}", "d e"),
        ("${UNSET-d}", "d"),
        ("x${EMPTY:-d}", "xd"),
        ("x${EMPTY-d}", "x"),
        ("x${EMPTY}", "x"),
        ("x${UNSET:-}", "x"),
        ("${HOME:+d}", "d"),
        ("x${EMPTY:+d}", "x"),
        ("x${EMPTY+d}", "xd"),
        ("x${UNSET+d}", "x"),
        ("${HOME:?no home}", "/me"),
        ("a$$b$$$HOME", "a$b$/me"),
        (r'"\$HOME"', "$HOME"),
        ("cost $5", "cost $5"),
        ("a$", "a$"),
        ('"it\'s ${HOME}"', "it's /me"),
        ('"say \\"hi\\"\\n$HOME"', 'say "hi"\n/me'),
        ("a # b", "a"),
        ("a#b", "a#b"),
    ),
)
def test_dollar_signs_and_quotes_mean_what_compose_takes_them_for(
    text: str, value: str, tmp_path: Path
) -> None:
    assert read(f"NAME={text}\n", tmp_path) == ({"NAME": value}, [])
    assert read(f"export NAME = {text}\r\nOTHER=1\r\n", tmp_path) == (
        {"NAME": value, "OTHER": "1"},
        [],
    )


@pytest.mark.parametrize("text", ("$UNSET", "${UNSET}", '"a${UNSET}"', "${UNSET:?}"))
def test_a_variable_that_is_not_set_is_a_fault_and_its_line_sets_nothing(
    text: str, tmp_path: Path
) -> None:
    assert read(f"# mine\nname={text}\n", tmp_path) == (
        {},
        [
            "NAME (mine.env, line 2): ${UNSET} is not set: set it in the environment or above this "
            "line, or write ${UNSET:-DEFAULT}; a $ that is only a $ goes into 'single quotes'"
        ],
    )


def test_a_message_for_a_variable_that_must_be_set_is_shown(tmp_path: Path) -> None:
    for text in ("${EMPTY:?name the experiment}", "${UNSET?name the experiment}"):
        _, (fault,) = read(f"NAME={text}", tmp_path)
        assert "} is not set (name the experiment): set it" in fault


@pytest.mark.parametrize("text", ("${", "${HOME", "${HOME:0:3}", "${}", "${UNSET:-${HOME}}"))
def test_braces_of_another_form_are_a_fault(text: str, tmp_path: Path) -> None:
    values, (fault,) = read(f"NAME={text}", tmp_path)
    assert values == {}
    assert fault.startswith("NAME (mine.env, line 1): ${ must begin ${NAME} or ")


def test_lines_above_define_variables_and_the_environment_comes_before_them(
    tmp_path: Path,
) -> None:
    content = "BASE=a\nHOME=/file\nEMPTY=1\nNAME=${BASE}-$HOME$EMPTY-2\nBLANK=\nOTHER=x$BLANK\n"
    values, faults = read(content, tmp_path)
    assert faults == []
    assert (values["NAME"], values["OTHER"]) == ("a-/me-2", "x")
    _, (fault,) = read("NAME=$BELOW\nBELOW=1\n", tmp_path)
    assert fault.startswith("NAME (mine.env, line 1): ${BELOW} is not set")


@pytest.mark.parametrize(
    ("content", "fault"),
    (
        (b"A=1\n# caf\xe9\nB=2\n", "mine.env, line 2: not UTF-8; save the file as UTF-8 text"),
        ("A=1".encode("utf-16"), "mine.env, line 1: not UTF-8; save the file as UTF-8 text"),
        (
            "A=1".encode("utf-16-le"),
            "mine.env is UTF-16, or no text at all: save it as UTF-8 text",
        ),
    ),
)
def test_another_encoding_is_a_fault(content: bytes, fault: str, tmp_path: Path) -> None:
    assert read(content, tmp_path) == ({}, [fault])


def test_a_byte_order_mark_of_utf8_is_no_part_of_the_first_name(tmp_path: Path) -> None:
    assert read("\ufeffNAME=1\n", tmp_path) == ({"NAME": "1"}, [])


def test_a_file_that_cannot_be_read_is_a_fault(tmp_path: Path) -> None:
    for path, reason in (
        (tmp_path, "Is a directory"),
        (tmp_path / "absent", "No such file or directory"),
    ):
        assert read_env_file(path, ".env", {}) == (
            {},
            [f".env cannot be read ({reason}): make it readable, or move it away"],
        )


def test_lines_that_set_nothing_are_one_fault(tmp_path: Path) -> None:
    (fault,) = read("root:x:0:0\n" * 24, tmp_path)[1]
    assert fault == "mine.env, lines 1, 2, 3 and 21 more: not of the form NAME=VALUE"
    (fault,) = read("A=1\nroot:x:0:0\n", tmp_path)[1]
    assert fault == "mine.env, line 2: not of the form NAME=VALUE"
