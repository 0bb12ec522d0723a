"""Every `ssld …` command that is written down is one that the command line takes, and every exit code is explained."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

import click
import pytest

from ssld import errors
from ssld.cli import main

ROOT = Path(__file__).parents[1]
# a fence may be indented, under a list item; its language does not matter
FENCE = re.compile(r"^(?P<indent> *)```.*?\n(?P<body>.*?)^(?P=indent)```", re.MULTILINE | re.DOTALL)
CALL = re.compile(r"(?:^|[;&|])\s*(?:\w+=\S*\s+)*(?:\S*python\S*\s+-m\s+)?ssld\s")
REDIRECTION = re.compile(r"\s\d?[<>]+&?\s*\S+")


def fenced(text: str) -> Iterator[str]:
    """The lines of the code blocks of a Markdown text, continued lines joined; where some have a prompt, only those."""
    for block in FENCE.finditer(text):
        lines = block["body"].replace("\\\n", " ").splitlines()
        prompted = [line.strip().removeprefix("$ ") for line in lines if line.strip().startswith("$ ")]
        yield from prompted or lines


def ssld_calls(line: str) -> Iterator[tuple[str, ...]]:
    """The arguments of each `ssld` in a line of shell; variables, pipes, redirections and comments are passed over."""
    if not CALL.search(line):
        return
    lexer = shlex.shlex(REDIRECTION.sub("", line), posix=True, punctuation_chars="();|&")
    lexer.whitespace_split = True
    for operator, words in groupby(lexer, lambda word: "operator" if set(word) <= set("();|&") else ""):
        command = list(words)
        if not operator and "ssld" in command:
            yield tuple(command[command.index("ssld") + 1 :])


def fault(arguments: Sequence[str]) -> str | None:
    """What click has against these arguments; nothing is executed."""
    command: click.Command = main
    words = list(arguments)
    try:
        while isinstance(command, click.Group) and words and not words[0].startswith("-"):
            if (inner := command.commands.get(words[0])) is None:
                return f"no such command {words[0]!r}"
            command, words = inner, words[1:]
        command.make_context("ssld", words)
    except click.exceptions.Exit:  # --help and --version end here
        return None
    except click.ClickException as error:
        return error.format_message()
    return None


def commands(group: click.Group = main, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every command below a group, with the words by which it is called."""
    for name, command in group.commands.items():
        yield (*path, name), command
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))


def written() -> Iterator[tuple[str, str]]:
    """(place, line of shell): in the documents, in the help of each command, in the lab note of each recipe."""
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")]
    for page in pages:
        for line in fenced(page.read_text("utf-8")):
            yield page.relative_to(ROOT).as_posix(), line
    for words, command in [((), main), *commands()]:
        for line in (command.help or "").splitlines():
            if line.startswith("  "):
                yield f"the help of {' '.join(('ssld', *words))}", line
    for recipe in (ROOT / "recipes").rglob("*.yaml"):
        for line in re.findall(r"^# command:(.*)$", recipe.read_text("utf-8"), re.MULTILINE):
            yield recipe.relative_to(ROOT).as_posix(), line


def written_calls() -> list[object]:
    found = dict.fromkeys((place, call) for place, line in written() for call in ssld_calls(line))
    return [pytest.param(call, id=f"{place}: ssld {' '.join(call)}") for place, call in found]


@pytest.mark.parametrize("call", written_calls())
def test_a_written_command_is_taken(call: tuple[str, ...]) -> None:
    assert fault(call) is None


def test_every_command_shows_an_example_of_itself() -> None:
    for words, command in commands():
        calls = [call for line in (command.help or "").splitlines() for call in ssld_calls(line)]
        assert calls, f"ssld {' '.join(words)} --help shows no example"
        assert {call[: len(words)] for call in calls} == {words}


def test_every_fault_has_tests_that_there_are_or_a_reason() -> None:
    rows = [
        line.split(" | ") for line in (ROOT / "docs" / "faults.md").read_text("utf-8").splitlines() if line[:2] == "| "
    ]
    assert len(rows) > 48
    for fault, answer, tests in rows[1:]:
        named = re.findall(r"`([\w/]+\.py)::(\w+)`", tests)
        assert bool(named) != answer.startswith("none: "), fault
        for file, function in named:
            assert f"\ndef {function}(" in (ROOT / "tests" / file).read_text("utf-8"), f"{fault}: {file}::{function}"


def exit_codes() -> set[int]:
    """Those of all errors, of a defect, and of an end by a signal."""
    known = [errors.SsldError]
    for kind in known:
        known += kind.__subclasses__()
    return {0, 1, 129, 130, 143, *(kind.exit_code for kind in known)}


def test_the_readme_has_every_exit_code_once_in_order() -> None:
    rows = re.findall(r"^\| (\d+(?:, \d+)*) \|", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE)
    told = [int(code) for row in rows for code in row.split(", ")]
    assert told == sorted(exit_codes())


def test_ci_installs_and_tests_as_the_readme_says() -> None:
    steps = re.findall(r"^step (pip .*|pytest.*)$", (ROOT / ".ci" / "run").read_text("utf-8"), re.MULTILINE)
    assert " && ".join(steps) in fenced((ROOT / "README.md").read_text("utf-8"))


# The test sees what it is for ----------------------------------------------------------------------------------------

PAGE = r"""
Text with ssld nonsense in it.

1. In a list:

   ```console
   $ X=1 ssld run mobilenetv3_ssld -o seed=1 \
       --limit 8 2>&1 | tee log  # a comment
   ssld says this
   ```

```sh
pip install ssld
python -m ssld --help && ssld list students > names.txt
```
"""


def test_commands_are_found_in_a_page() -> None:
    assert [call for line in fenced(PAGE) for call in ssld_calls(line)] == [
        ("run", "mobilenetv3_ssld", "-o", "seed=1", "--limit", "8"),
        ("--help",),
        ("list", "students"),
    ]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("train x", "no such command 'train'"),
        ("run x --epochs 3", "--epochs"),
        ("run", "RECIPE"),
        ("list dogs", "dogs"),
        ("labels list", "no such command 'list'"),
        ("labels rm", "PLACE"),
        ("run x --limit 0", "0 is not in the range"),
        ("--verbose", "--verbose"),
    ],
)
def test_a_command_that_is_not_taken_is_seen(call: str, message: str) -> None:
    assert message in (fault(tuple(call.split())) or "")
