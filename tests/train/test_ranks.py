"""Processes that meet: all or none agree, all see the same memory, and nobody waits for one that is gone."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from ssld.train.ranks import shared_memory

# A rank that does what it is told by lines, and answers with one line for each.
RANK = """
import json, os, socket, sys, time

from ssld.errors import RankError
from ssld.train.ranks import WORD, Meeting

number, memory, *lines = map(int, sys.argv[1:])
meeting = Meeting(number, [socket.socket(fileno=line) for line in lines], os.fdopen(memory, "r+b"))

def agree(word="", late=0):
    time.sleep(late)
    return meeting.agree(*([word.encode().ljust(WORD)] if word else []))

def when(late):
    time.sleep(late)
    came = time.monotonic()
    meeting.agree()
    return [came, time.monotonic()]

def share(rows, columns):
    global shared
    shared = meeting.share(rows, columns)
    return [list(shared.shape), str(shared.dtype)]

def write(row, value):
    shared[row] = value
    return meeting.agree()

def read():
    return shared.tolist()

print("{}", flush=True)
for line in sys.stdin:
    what, *words = json.loads(line)
    try:
        answer = globals()[what](*words)
    except RankError as error:
        answer = str(error)
    print(json.dumps(answer), flush=True)
"""


class Rank:
    """One such process; ask() tells it something, answer() waits for what it says."""

    def __init__(self, script: Path, number: int, given: list[int]) -> None:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        words = [sys.executable, str(script), *map(str, (number, *given))]
        self.process = subprocess.Popen(words, text=True, pass_fds=given, **pipes)

    def ask(self, *words: Any) -> None:
        self.process.stdin.write(json.dumps(words) + "\n")
        self.process.stdin.flush()

    def answer(self) -> Any:
        return json.loads(self.process.stdout.readline())


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[int], list[Rank]]]:
    """start(count): so many processes that can meet; rank 0 first."""
    ranks: list[Rank] = []
    script = tmp_path / "rank.py"
    script.write_text(RANK)

    def together(count: int) -> list[Rank]:
        with ExitStack() as stack:
            memory = stack.enter_context(shared_memory()).fileno()
            pairs = [[stack.enter_context(end) for end in socket.socketpair()] for _ in range(count - 1)]
            lines = [[own.fileno() for own, _ in pairs], *([other.fileno()] for _, other in pairs)]
            ranks.extend(Rank(script, number, [memory, *lines[number]]) for number in range(count))
        assert [rank.answer() for rank in ranks] == [{}] * count
        return ranks

    yield together
    for rank in ranks:
        rank.process.kill()
        rank.process.communicate()


def all_do(ranks: list[Rank], *words: Any) -> list[Any]:
    for rank in ranks:
        rank.ask(*words)
    return [rank.answer() for rank in ranks]


def test_all_agree_or_none_does(start):
    ranks = start(3)
    assert all_do(ranks, "agree") == [True] * 3
    assert all_do(ranks, "agree", "one") == [True] * 3
    for other in range(3):
        for number, rank in enumerate(ranks):
            rank.ask("agree", "other" if number == other else "one")
        assert [rank.answer() for rank in ranks] == [False] * 3
    assert all_do(ranks, "agree") == [True] * 3, "they go on after it"


@pytest.mark.parametrize("late", [0, 1])
def test_all_wait_for_the_last(start, late):
    ranks = start(2)
    for number, rank in enumerate(ranks):
        rank.ask("when", 0.5 if number == late else 0)
    # all processes of a machine have one such clock
    times = [rank.answer() for rank in ranks]
    assert all(left >= times[late][0] > times[1 - late][0] for _, left in times)


def test_all_see_what_each_writes_in_memory_of_any_size(start):
    ranks = start(3)
    for columns in (2, 5000, 3):
        assert all_do(ranks, "share", 3, columns) == [[[3, columns], "float32"]] * 3
        for number, rank in enumerate(ranks):
            rank.ask("write", number, number + columns)
        assert [rank.answer() for rank in ranks] == [True] * 3
        assert all_do(ranks, "read") == [[[float(number + columns)] * columns for number in range(3)]] * 3


def test_memory_of_different_sizes_is_refused_to_all(start):
    ranks = start(2)
    for columns, rank in enumerate(ranks, 4):
        rank.ask("share", 3, columns)
    for rank in ranks:
        assert rank.answer().startswith("expected all ranks to share as much memory, got different wishes")
    assert all_do(ranks, "share", 3, 4) == [[[3, 4], "float32"]] * 2, "they go on after it"


def test_one_that_dies_is_missed_and_named(start):
    """By rank 0, which knows all others; these wait for it, and miss it when it ends."""
    first, second, third = start(3)
    for rank in (first, second):
        rank.ask("agree")
    third.process.send_signal(signal.SIGKILL)
    assert first.answer() == "expected rank 2 to take part in the next step, it is gone; what was saved stands"
    first.process.send_signal(signal.SIGKILL)
    assert second.answer().startswith("expected rank 0 to take part in the next step, it is gone")


def test_one_that_has_died_before_is_missed_as_well(start):
    first, second = start(2)
    assert all_do([first, second], "agree") == [True] * 2
    second.process.kill()
    second.process.wait()
    for _ in range(2):
        first.ask("agree")
        assert first.answer().startswith("expected rank 1 to take part in the next step, it is gone")
