"""What rank 0 says to the others and hears from them. They are played: by scripts that speak the lines of a rank."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from queue import Queue
from typing import Any

import pytest

from ssld import crew as crews
from ssld.contracts import Ranks
from ssld.crew import Crew
from ssld.environment import RANKS
from ssld.errors import DataError, LabelError, PluginError, RankError, RecipeError, SsldError

# Plays the rank that the command line names: `parts` says line by line what it does.
RANK = """\
#!{python}
import json, os, signal, sys, time

def say(**message):
    print(json.dumps(message), flush=True)

def hear():
    line = sys.stdin.readline()
    if not line:
        sys.exit(0)
    with open(os.path.join(directory, f"heard.{{number}}"), "a") as file:
        file.write(line)
    return json.loads(line)

def die():
    os.kill(os.getpid(), signal.SIGKILL)

module, follower, directory, number, count, line, memory = sys.argv[1:]
assert (module, follower) == ("-m", "ssld.follower")
number = int(number)
{parts}
"""
WAITS = "while True: hear()"


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """play(parts): let the other ranks be processes that do so."""

    def cast(parts: str) -> None:
        script = tmp_path / "rank.py"
        script.write_text(RANK.format(python=sys.executable, parts=parts))
        script.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(script))

    return cast


@pytest.fixture
def lead(tmp_path: Path) -> Iterator[Callable[..., Crew]]:
    """lead(count=2, note=…): a crew, with the test's folder as the run."""
    crews: list[Crew] = []

    def gather(count: int = 2, note: Callable[[str], None] = lambda text: None) -> Crew:
        crews.append(Crew(tmp_path, count, note))
        return crews[-1]

    yield gather
    for member in (member for crew in crews for member in crew.members):
        member.process.kill()
        member.process.stdout.close()


def fail(crew: Crew, error: BaseException, *, after_its_end: bool = False) -> None:
    """Begin to train, and meet the error; or do so when the first of the others has ended."""
    if after_its_end:
        crew.members[0].process.wait()
    crew.train("teach")
    raise error


def heard(tmp_path: Path, number: int) -> list[str]:
    return (tmp_path / f"heard.{number}").read_text().splitlines()


def missed() -> RankError:
    """What a sum raises in rank 0 when another rank is gone."""
    return RankError("expected all ranks, one is gone: connection closed")


# One rank -------------------------------------------------------------------------------------------------------------


def test_one_rank_starts_nobody(monkeypatch, lead):
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("there is nobody to start"))
    before, parts = dict(os.environ), []
    with lead(1) as crew:
        assert crew.ranks == Ranks()
        assert dict(os.environ) == before
        crew.train("distill")
        crew.label("distill", lambda *part: parts.append(part))
    assert parts == [(1, 1)]
    assert dict(os.environ) == before


# Life and end ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [None, "8"])
@pytest.mark.parametrize("error", [None, DataError("broken"), KeyboardInterrupt()])
def test_paddle_is_told_the_number_of_ranks_for_as_long_as_there_are_others(play, monkeypatch, before, error, lead):
    play(WAITS)
    if before is None:
        monkeypatch.delenv(RANKS, raising=False)
    else:
        monkeypatch.setenv(RANKS, before)
    crew = lead(3)
    with pytest.raises(type(error)) if error else nullcontext(), crew:
        assert os.environ[RANKS] == "3"
        assert (crew.ranks.number, crew.ranks.count) == (0, 3)
        if error:
            raise error
    assert os.environ.get(RANKS) == before
    assert [member.process.poll() is None for member in crew.members] == [False, False]


def test_each_is_started_with_its_number_and_ended_by_the_end_of_the_line(play, tmp_path, lead):
    play(f"open(os.path.join(directory, f'words.{{number}}'), 'w').write(count)\n{WAITS}")
    with lead(3) as crew:
        pass
    assert [member.process.returncode for member in crew.members] == [0, 0]
    assert [(tmp_path / f"words.{number}").read_text() for number in (1, 2)] == ["3", "3"]


def test_each_can_meet_rank_0(play, lead):
    """By the line and the memory that it was given; each brings its number, so that they do not agree."""
    play(
        "sys.path[:] = {path!r}\n".replace("{path!r}", repr(sys.path))
        + "import socket, numpy\n"
        + "from ssld.train.ranks import Meeting\n"
        + "meeting = Meeting(number, [socket.socket(fileno=int(line))], os.fdopen(int(memory), 'r+b'))\n"
        + "meeting.share(3, 2)[number] = number\n"
        + "meeting.agree()\n"
        + WAITS
    )
    with lead(3) as crew:
        shared = crew.ranks.meeting.share(3, 2)
        assert crew.ranks.meeting.agree()
        assert shared.tolist() == [[0, 0], [1, 1], [2, 2]]


def test_who_does_not_end_by_itself_is_killed(play, monkeypatch, lead):
    monkeypatch.setattr(crews, "PARTING", 0.2)
    play("time.sleep(60)")
    with lead() as crew:
        pass
    assert crew.members[0].process.returncode == -signal.SIGKILL


def test_when_rank_0_fails_the_others_are_ended_at_once(play, lead):
    play("time.sleep(60)")
    with pytest.raises(DataError, match="broken"), lead(3) as crew:
        fail(crew, DataError("broken"))
    assert {member.process.returncode for member in crew.members} == {-signal.SIGKILL}


def test_one_that_cannot_begin_is_met_in_the_first_work_and_ends_all(play, monkeypatch, lead):
    monkeypatch.delenv(RANKS, raising=False)
    play(
        "if number == 2:\n    say(error='PluginError', message='no such network')\n    sys.exit(70)\n"
        "say(labelled=True)\n" + WAITS
    )
    with pytest.raises(PluginError, match=r"^rank 2: no such network$"), lead(4) as crew:
        crew.label("distill", lambda *_: None)
    assert len(crew.members) == 3
    assert all(member.process.poll() is not None for member in crew.members)
    assert RANKS not in os.environ


def test_nothing_is_left_open(play, lead):
    play(WAITS)
    with lead() as crew:
        process = crew.members[0].process
    assert process.stdin.closed
    assert process.stdout.closed
    assert [line.fileno() for line in crew.lines] == [-1]
    assert crew.memory.closed


@pytest.mark.xfail(strict=True, reason="the line to the one that cannot be started stays open")
def test_when_one_cannot_be_started_none_is_left(play, monkeypatch, lead):
    play(WAITS)
    known, started = subprocess.Popen, []

    def start(*words: Any, **options: Any) -> subprocess.Popen:
        if started:
            raise OSError("no more processes")
        started.append(known(*words, **options))
        return started[0]

    monkeypatch.setattr(subprocess, "Popen", start)
    crew = lead(3)
    try:
        with pytest.raises(OSError, match="no more processes"):
            crew.__enter__()
        assert started[0].poll() is not None
    finally:
        started[0].kill()
        started[0].wait()
        started[0].stdin.close()
        started[0].stdout.close()


# Work -----------------------------------------------------------------------------------------------------------------


def test_all_are_told_which_stage_to_train(play, tmp_path, lead):
    play(WAITS)
    with lead(3) as crew:
        crew.train("teach")
        crew.train("distill")
    for number in (1, 2):
        assert heard(tmp_path, number) == ['{"train": "teach"}', '{"train": "distill"}']


def test_labelling_is_over_when_all_have_done_their_part(play, tmp_path, lead):
    play(
        "hear()\ntime.sleep(0.2 * number)\n"
        "open(os.path.join(directory, f'done.{number}'), 'w')\nsay(labelled=True)\nwhile True: hear()"
    )
    parts = []

    def own(number: int, of: int) -> None:
        # they are at work already
        while not (tmp_path / "done.1").exists():
            time.sleep(0.01)
        parts.append((number, of))

    with lead(3) as crew:
        crew.label("distill", own)
        assert (tmp_path / "done.2").exists()
    assert parts == [(1, 3)]
    assert heard(tmp_path, 2) == ['{"label": "distill"}']


def test_what_the_others_meet_is_noted_with_their_number(play, lead):
    play("say(note=f'skipped, damaged: ü{number}.png')\nsay(labelled=True)\nwhile True: hear()")
    notes: Queue[str] = Queue()
    with lead(3, notes.put) as crew:
        crew.label("distill", lambda *_: None)
        told = {notes.get(timeout=10), notes.get(timeout=10)}
    assert told == {"skipped, damaged: ü1.png (rank 1)", "skipped, damaged: ü2.png (rank 2)"}


# Faults ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((kind.__name__, kind) for kind in (RecipeError, DataError, LabelError, PluginError)),
        ("StrangersError", SsldError),
    ],
)
def test_the_error_of_another_rank_is_raised_as_its_own_kind(play, name, kind, lead):
    play(f"hear()\nsay(error={name!r}, message='expected this, got that')\nsys.exit(1)")
    with pytest.raises(SsldError) as raised, lead() as crew:
        crew.label("distill", lambda *_: None)
    assert type(raised.value) is kind
    assert str(raised.value) == "rank 1: expected this, got that"


@pytest.mark.parametrize(("end", "how"), [("sys.exit(3)", "exit code 3"), ("die()", "signal 9")])
def test_one_that_ends_without_a_word_is_named(play, monkeypatch, end, how, lead):
    monkeypatch.setattr(crews, "PARTING", 0.2)
    play(f"hear()\n{end}")
    with pytest.raises(RankError) as raised, lead() as crew:
        crew.label("distill", lambda *_: None)
    pid = crew.members[0].process.pid
    assert f"expected rank 1 (pid {pid}) to go on, it ended with {how}" in str(raised.value)
    assert raised.value.exit_code == 71


@pytest.mark.xfail(strict=True, reason="who is named already is asked again, and given its time to answer")
def test_one_that_ends_is_named_at_once(play, monkeypatch, lead):
    monkeypatch.setattr(crews, "PARTING", 3.0)
    play("hear()\nsys.exit(3)")
    began = time.monotonic()
    with pytest.raises(RankError), lead() as crew:
        crew.label("distill", lambda *_: None)
    assert time.monotonic() - began < 2


def test_one_that_has_ended_can_be_told_something_and_is_met_where_it_is_missed(play, lead):
    play("sys.exit(3)")
    with pytest.raises(RankError, match="it ended with exit code 3"), lead() as crew:
        fail(crew, missed(), after_its_end=True)


@pytest.mark.parametrize("dead", [1, 2, 3])
def test_who_died_is_blamed_and_not_who_missed_it(play, dead, lead):
    """Whoever tells first: the one that died does so last here."""
    play(f"hear()\nif number == {dead}:\n    time.sleep(0.3)\n    die()\nsys.exit(71)")
    error = missed()
    with pytest.raises(RankError, match=rf"rank {dead} .* ended with signal 9") as raised, lead(4) as crew:
        fail(crew, error)
    assert raised.value.__cause__ is error


def test_a_word_of_the_one_that_failed_says_more_than_that_it_is_gone(play, lead):
    play("hear()\nif number == 1: sys.exit(71)\nsay(error='DataError', message='damaged')\nsys.exit(65)")
    with pytest.raises(DataError, match=r"^rank 2: damaged$"), lead(3) as crew:
        fail(crew, missed())


def test_when_nobody_says_why_the_sum_has_the_last_word(play, monkeypatch, lead):
    monkeypatch.setattr(crews, "PARTING", 0.4)
    play("time.sleep(60)")
    error = missed()
    with pytest.raises(RankError) as raised, lead(3):
        raise error
    assert raised.value is error


@pytest.mark.xfail(strict=True, reason="a rank that says nothing but 71 is blamed when there is no other")
def test_what_all_ranks_have_met_is_said_as_rank_0_has_it(play, lead):
    """Other first weights, say: each rank ends with RankError's code, and none is at fault alone."""
    play("hear()\nsys.exit(71)")
    with pytest.raises(RankError, match="the same first weights"), lead(3) as crew:
        fail(crew, RankError("expected the same first weights on all 3 ranks, got others on rank 0"))


def test_an_error_of_rank_0s_own_is_not_laid_on_others(play, lead):
    play("say(error='DataError', message='theirs')\nsys.exit(65)")
    with pytest.raises(DataError, match=r"^mine$"), lead() as crew:
        fail(crew, DataError("mine"), after_its_end=True)
