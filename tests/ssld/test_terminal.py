"""What is said, and streams that take it or not."""

from __future__ import annotations

import ast
import errno
import io
import os
import sys
from pathlib import Path

import pytest

from ssld.errors import StorageError
from ssld.terminal import ask, give, plain, show, tell

ROOT = Path(__file__).parents[2]
EVIL = "a\x1b[2J\x1b]0;evil\x07\x9b\u202e\udc80\r\t"
SHOWN = "a\\x1b[2J\\x1b]0;evil\\x07\\x9b\\u202e\\udc80\\r\\t"


class Broken(io.StringIO):
    """A reader that is gone, or a full disk."""

    def __init__(self, code: int) -> None:
        super().__init__()
        self.code = code

    def flush(self) -> None:
        raise OSError(self.code, os.strerror(self.code))


def test_only_what_a_terminal_would_act_upon_is_escaped():
    assert plain(EVIL) == SHOWN
    assert plain("Grün 日本 [x] :smile:\n…") == "Grün 日本 [x] :smile:\n…"


def test_lines_for_people_are_plain_and_on_standard_error(capsys):
    tell("one", EVIL)
    tell()
    assert capsys.readouterr() == ("", f"one\n{SHOWN}\n")


def test_results_are_plain_and_on_standard_output(capsys):
    give(EVIL)
    show(("n", EVIL), [(3, EVIL)])
    assert capsys.readouterr() == (f"{SHOWN}\nn  {SHOWN}\n3  {SHOWN}\n", "")


@pytest.mark.parametrize("stream", [None, Broken(errno.ENOSPC), Broken(errno.EPIPE), Broken(errno.EIO)])
def test_what_cannot_be_told_is_no_fault(monkeypatch, stream):
    monkeypatch.setattr(sys, "stderr", stream)
    tell("a line")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_result_that_cannot_be_given_is_said(monkeypatch, code):
    monkeypatch.setattr(sys, "stdout", Broken(code))
    with pytest.raises(StorageError, match=f"cannot write standard output: {os.strerror(code)}; .* lead it elsewhere"):
        give("a result")


def test_a_reader_of_results_that_wants_no_more_ends_the_process_quietly(monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Broken(errno.EPIPE))
        with pytest.raises(SystemExit, match="1"):
            give("a result")
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("encoding", "shown"), [("latin-1", "ü \\u65e5 2 \\u2192 3"), ("utf-8", "ü 日 2 → 3")])
def test_a_letter_that_an_encoding_lacks_is_escaped(monkeypatch, encoding, shown):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    give("ü 日 2 → 3")
    assert stream.buffer.getvalue().decode(encoding) == f"{shown}\n"


def test_a_standard_output_that_was_closed_from_the_start_wants_no_result(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    give("a result")


@pytest.mark.parametrize(
    ("typed", "answer"),
    [("y\n", True), ("Yes \n", True), ("n\n", False), ("\n", False), ("", False), ("yet\n", False), (None, False)],
)
def test_only_yes_is_yes(monkeypatch, capsys, typed, answer):
    monkeypatch.setattr(sys, "stdin", None if typed is None else io.StringIO(typed))
    assert ask(f"remove {EVIL}?") is answer
    assert capsys.readouterr() == ("", f"remove {SHOWN}? [y/N]: ")


# The one way ----------------------------------------------------------------------------------------------------------

WAYS = {
    "ssld/terminal.py": "the one way",
    "ssld/importing/pickles.py": "a process of its own, whose standard output is a pipe",
}
"""The files that write to a stream, and why."""
WRITING = {"click": {"echo", "secho", "confirm", "prompt", "pause", "echo_via_pager"}, "sys": {"stdout", "stderr"}}


def writes(source: str) -> list[int]:
    """Lines that write to a terminal by another way than ssld.terminal."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.attr in WRITING.get(node.value.id, ()):
                found.append(node.lineno)
        elif isinstance(node, ast.ImportFrom):
            found += [node.lineno for alias in node.names if alias.name in WRITING.get(node.module or "", ())]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            found.append(node.lineno)
    return found


def test_nothing_is_said_by_another_way():
    places = [file for room in ("ssld", "stages", "teachers", "students") for file in (ROOT / room).rglob("*.py")]
    assert len(places) > 50
    found = {str(file.relative_to(ROOT)) for file in places if writes(file.read_text("utf-8"))}
    assert found == set(WAYS)


@pytest.mark.parametrize(
    "source",
    [
        "import click\nclick.echo('x', err=True)",
        "import sys\n\nsys.stderr.write('x')",
        "from click import echo",
        "from sys import stdout",
        "print('x')",
    ],
)
def test_the_test_sees_other_ways(source):
    assert writes(source) == [source.count("\n") + 1]
