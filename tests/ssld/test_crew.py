"""What rank 0 says to the others and hears from them. They are played: by scripts that speak the lines of a rank."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from queue import Queue
from typing import Any

import pytest

from ssld import crew as crews
from ssld.contracts import Ranks
from ssld.crew import Crew
from ssld.errors import DataError, Interrupted, LabelError, PluginError, RankError, RecipeError, SsldError
from ssld.signals import Stop
from ssld.train.ranks import Missed

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

*how, directory, number, count, line, memory = sys.argv[1:]
assert how == ["-P", "-m", "ssld.follower"]
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
    """lead(count=2, note=…, stop=…): a crew, with the test's folder as the run."""
    crews: list[Crew] = []

    def gather(count: int = 2, note: Callable[[str], None] = lambda text: None, **stop: Callable[[], Any]) -> Crew:
        crews.append(Crew(tmp_path, count, note, **stop))
        return crews[-1]

    yield gather
    for follower in (follower for crew in crews for follower in crew.followers):
        follower.process.kill()
        follower.process.stdout.close()


def fail(crew: Crew, error: BaseException, *, after_its_end: bool = False) -> None:
    """Begin to train, and meet the error; or do so when the first of the others has ended."""
    if after_its_end:
        crew.followers[0].process.wait()
    crew.tell(train="teach")
    raise error


def label(crew: Crew) -> None:
    """Let the others label, and wait for them."""
    crew.tell(label="distill")
    crew.expect("labelled")


def heard(tmp_path: Path, number: int) -> list[str]:
    return (tmp_path / f"heard.{number}").read_text().splitlines()


def missed() -> Missed:
    """What a sum raises in rank 0 when another rank is gone."""
    return Missed("expected all ranks, one is gone: connection closed")


# One rank -------------------------------------------------------------------------------------------------------------


def test_one_rank_starts_nobody(monkeypatch, lead):
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("there is nobody to start"))
    monkeypatch.setattr(crews, "shared_memory", lambda: pytest.fail("there is nobody to share it with"))
    with lead(1) as crew:
        assert crew.ranks == Ranks()
        crew.tell(train="teach")
        label(crew)


# Life and end ---------------------------------------------------------------------------------------------------------


def test_each_is_started_with_its_number_and_ended_by_the_end_of_the_line(play, tmp_path, lead):
    play(f"open(os.path.join(directory, f'words.{{number}}'), 'w').write(count)\n{WAITS}")
    with lead(3) as crew:
        pass
    assert [follower.process.returncode for follower in crew.followers] == [0, 0]
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
    assert crew.followers[0].process.returncode == -signal.SIGKILL


def test_what_a_rank_has_started_and_left_keeps_nobody_waiting(play, monkeypatch, lead):
    """It holds the rank's end of the line, which therefore does not end."""
    monkeypatch.setattr(crews, "PARTING", 0.2)
    play("import subprocess\nsubprocess.Popen(['sleep', '2'])\nsay(word='labelled')\n" + WAITS)
    with lead() as crew:
        label(crew)
        began = time.monotonic()
    assert time.monotonic() - began < 1.5
    assert crew.followers[0].process.returncode == 0


def test_when_rank_0_fails_the_others_are_ended_at_once(play, lead):
    play("time.sleep(60)")
    with pytest.raises(DataError, match="broken"), lead(3) as crew:
        fail(crew, DataError("broken"))
    assert {follower.process.returncode for follower in crew.followers} == {-signal.SIGKILL}


def test_one_that_cannot_begin_is_met_in_the_first_work_and_ends_all(play, lead):
    play(
        "if number == 2:\n    say(error='PluginError', message='no such network')\n    sys.exit(70)\n"
        "say(word='labelled')\n" + WAITS
    )
    with pytest.raises(PluginError, match=r"^rank 2: no such network$"), lead(4) as crew:
        label(crew)
    assert len(crew.followers) == 3
    assert all(follower.process.poll() is not None for follower in crew.followers)


def opened() -> set[tuple[str, str]]:
    """Number and target of every file that this process has open, but the listing itself."""
    return {(link.name, os.readlink(link)) for link in Path("/proc/self/fd").iterdir() if link.exists()}


linux = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="there is no list of open files")


@linux
@pytest.mark.parametrize("error", [None, DataError("broken")])
def test_nothing_is_left_open(play, lead, error):
    play(WAITS)
    before, threads = opened(), threading.active_count()
    with suppress(DataError), lead(3) as crew:
        assert len(opened() - before) == 2 * 3 + 1, "two pipes and a line for each, and the memory of all"
        if error:
            raise error
    assert opened() == before
    assert threading.active_count() == threads
    assert crew.memory.closed


@linux
def test_when_one_cannot_be_started_none_is_left(play, monkeypatch, lead):
    play(WAITS)
    before = opened()
    known, started = subprocess.Popen, []

    def start(*words: Any, **options: Any) -> subprocess.Popen:
        if started:
            raise OSError("no more processes")
        started.append(known(*words, **options))
        return started[0]

    monkeypatch.setattr(subprocess, "Popen", start)
    with pytest.raises(OSError, match="no more processes"), lead(3):
        pytest.fail("not all are there")
    assert started[0].poll() is not None
    assert opened() == before


# Work -----------------------------------------------------------------------------------------------------------------


def test_all_are_told_what_to_do_in_its_order(play, tmp_path, lead):
    play(WAITS)
    wanted = [{"label": "distill"}, {"train": "teach", "fingerprint": "f00", "step": 7}, {"attempt": "ü", "batch": 4}]
    with lead(3) as crew:
        for message in wanted:
            crew.tell(**message)
    for number in (1, 2):
        assert [json.loads(line) for line in heard(tmp_path, number)] == wanted


def test_a_word_is_there_when_all_have_said_it(play, lead, tmp_path):
    play(
        "hear()\ntime.sleep(0.2 * number)\n"
        "open(os.path.join(directory, f'done.{number}'), 'w')\nsay(word='labelled')\nwhile True: hear()"
    )
    with lead(3) as crew:
        label(crew)
        assert {file.name for file in tmp_path.glob("done.*")} == {"done.1", "done.2"}


def test_what_is_printed_before_a_rank_begins_is_a_note(play, lead):
    """By a site's own start-up file, say."""
    play("print('welcome: 1 of 2', flush=True)\nsay(word='labelled')\n" + WAITS)
    notes: list[str] = []
    with lead(2, notes.append) as crew:
        crew.expect("labelled")
    assert notes == ["welcome: 1 of 2 (rank 1)"]


@pytest.mark.parametrize("printed", ["42", "[]", "null", '{"size": 3}'])
def test_what_is_printed_is_a_note_also_where_it_is_json(play, lead, printed):
    play(f"print({printed!r}, flush=True)\nsay(word='labelled')\n" + WAITS)
    notes: list[str] = []
    with lead(2, notes.append) as crew:
        crew.expect("labelled")
    assert notes == [f"{printed} (rank 1)"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_wait_for_the_others(play, lead, number):
    play(WAITS)
    stop, began = Stop(), time.monotonic()
    timer = threading.Timer(0.3, os.kill, (os.getpid(), number))
    with stop.listening():
        timer.start()
        with pytest.raises(Interrupted) as raised, lead(3, stop=lambda: stop.number) as crew:
            label(crew)
    # it is looked for within GLANCE, and what is killed ends at once
    assert time.monotonic() - began < 0.3 + 1
    assert raised.value.exit_code == 128 + number
    assert str(raised.value) == f"stopped by {number.name}"


def test_patience_ends(play, lead):
    play("if number == 1: say(word='attempted')\n" + WAITS)
    began = time.monotonic()
    with pytest.raises(RankError, match=r"^expected rank 2 to end, it goes on; train by --nproc 1$"), lead(3) as crew:
        crew.expect("attempted", 0.5)
    assert time.monotonic() - began > 0.5


def test_what_the_others_meet_is_noted_with_their_number(play, lead):
    play("say(note=f'skipped, damaged: ü{number}.png')\nsay(word='labelled')\nwhile True: hear()")
    notes: Queue[str] = Queue()
    with lead(3, notes.put) as crew:
        label(crew)
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
        label(crew)
    assert type(raised.value) is kind
    assert str(raised.value) == "rank 1: expected this, got that"


@pytest.mark.parametrize(("end", "how"), [("sys.exit(3)", "exit code 3"), ("die()", "signal 9")])
def test_one_that_ends_without_a_word_is_named(play, monkeypatch, end, how, lead):
    monkeypatch.setattr(crews, "PARTING", 0.2)
    play(f"hear()\n{end}")
    with pytest.raises(RankError) as raised, lead() as crew:
        label(crew)
    pid = crew.followers[0].process.pid
    assert f"expected rank 1 (pid {pid}) to go on, it ended with {how}" in str(raised.value)
    assert raised.value.exit_code == 71


def test_one_that_ends_is_named_at_once(play, monkeypatch, lead):
    monkeypatch.setattr(crews, "PARTING", 3.0)
    play("hear()\nsys.exit(3)")
    began = time.monotonic()
    with pytest.raises(RankError), lead() as crew:
        label(crew)
    assert time.monotonic() - began < 2


def test_one_that_has_ended_can_be_told_something_and_is_met_where_it_is_missed(play, lead):
    play("sys.exit(3)")
    with pytest.raises(RankError, match="it ended with exit code 3"), lead() as crew:
        fail(crew, missed(), after_its_end=True)


@pytest.mark.parametrize("dead", [1, 2, 3])
def test_who_died_is_blamed_and_not_who_missed_it(play, monkeypatch, dead, lead):
    """Whoever tells first: the one that died does so last here."""
    # a virtual machine may stand still for longer than a rank is given
    monkeypatch.setattr(crews, "PARTING", 100.0)
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


def test_what_all_ranks_have_met_is_said_as_rank_0_has_it(play, lead):
    """Other first weights, say: each rank ends with RankError's code, and none is at fault alone."""
    play("hear()\nsys.exit(71)")
    with pytest.raises(RankError, match="the same first weights"), lead(3) as crew:
        fail(crew, RankError("expected the same first weights on all 3 ranks, got others on rank 0"))


def test_who_have_missed_each_other_only_leave_the_word_to_rank_0(play, lead):
    play("hear()\nsys.exit(71)")
    error = missed()
    with pytest.raises(RankError) as raised, lead(3) as crew:
        fail(crew, error)
    assert raised.value is error


def test_an_error_of_rank_0s_own_is_not_laid_on_others(play, lead):
    play("say(error='DataError', message='theirs')\nsys.exit(65)")
    with pytest.raises(DataError, match=r"^mine$"), lead() as crew:
        fail(crew, DataError("mine"), after_its_end=True)
