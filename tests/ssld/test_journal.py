"""The journal: lines for people, lines for programs, and the arithmetic of a clock that is set by hand."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import sys
from contextlib import contextmanager

import pytest
from rich.console import Console

from ssld import journal as module
from ssld.journal import Journal, counting, duration

CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f]")


@pytest.fixture
def clock(monkeypatch):
    """clock(seconds): let so many seconds pass; returns the time that it is then."""
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])

    def advance(seconds):
        now[0] += seconds
        return now[0]

    return advance


@contextmanager
def stage(journal, clock, **numbers):
    """A stage that begins now: the fields of its log are filled in by the system's clock."""
    with journal.stage("distill", samples=80, batch=8, **numbers) as log:
        log.began = log.line_at = clock(0)
        yield log


@pytest.fixture
def screen():
    return io.StringIO()


@pytest.fixture
def journal(tmp_path, screen):
    made = Journal(tmp_path, Console(file=screen, width=40))
    made.place = "1 distill"
    yield made
    made.close()


def events(tmp_path):
    return [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0:00"),
        (7.4, "0:07"),
        (59.6, "1:00"),
        (187, "3:07"),
        (3599.5, "1:00:00"),
        (3600, "1:00:00"),
        (90061, "25:01:01"),
    ],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_a_note_is_on_the_screen_and_in_the_log_with_its_time(journal, screen, tmp_path):
    text = "[1 distill] a line that is longer than the screen, with [brackets] and ümlauts"
    journal.note(text)
    assert screen.getvalue() == text + "\n"
    assert (
        re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d (.*)\n", (tmp_path / "train.log").read_text("utf-8"))[1] == text
    )


EVIL = "a\x1b[2J\x07\udc80 [/] :dog:.png"
SHOWN = "a\\x1b[2J\\x07\\udc80 [/] :dog:.png"


def test_names_are_plain_wherever_they_come(journal, clock, screen, tmp_path):
    """They come from whoever made the data: neither a terminal nor rich may act upon them."""
    journal.detail(EVIL)
    for say in (journal.note, journal.met):
        say(EVIL)
    journal.place = EVIL
    with journal.labelling(EVIL) as advance:
        advance(3, 3)
    lines = [line[20:] for line in (tmp_path / "train.log").read_text("utf-8").splitlines()]
    assert lines == [*[SHOWN] * 3, f"[{SHOWN}] {SHOWN}: 3 of 3 views"]
    assert screen.getvalue().splitlines() == lines[1:]
    assert [event["what"] for event in events(tmp_path)] == [EVIL], "programs are told the name itself"


def test_a_bar_shows_names_as_they_are(clock):
    screen = io.StringIO()
    with module.bar(Console(file=screen, force_terminal=True, width=80)) as progress:
        assert progress is not None
        progress.add_task(module.plain(EVIL), detail="[/]")
        progress.refresh()
    assert f"{SHOWN} " in screen.getvalue()


def test_a_lost_log_is_named_plainly(tmp_path, screen):
    evil = tmp_path / "run\x1b[2J"
    (evil / "train.log").mkdir(parents=True)
    Journal(evil, Console(file=screen, width=40)).close()
    assert screen.getvalue() == f"warning: {tmp_path}/run\\x1b[2J/train.log: lines are lost: Is a directory\n"


def test_events_are_readable_while_the_run_goes_on(journal, tmp_path):
    journal.record("start", seed=3, recipe="a: 1\nb: 2\n")
    journal.measured("distill", 40, 2, {"top1": 0.25, "top5": 1.0}, {})
    start, evaluation = events(tmp_path)
    assert (start["event"], start["seed"], start["recipe"]) == ("start", 3, "a: 1\nb: 2\n")
    expected = {"event": "evaluation", "stage": "distill", "step": 40, "epoch": 2, "top1": 0.25, "top5": 1.0}
    assert {key: value for key, value in evaluation.items() if key != "time"} == expected
    assert "[1 distill] epoch 2 step 40 validation top1 0.2500 top5 1.0000\n" in (tmp_path / "train.log").read_text()


def test_what_a_result_is_seen_beside_stands_with_it(journal, tmp_path):
    journal.measured("distill", 40, 2, {"agreement": 0.75}, {"teacher_top1": 0.9, "chance_top1": 0.1})
    (event,) = events(tmp_path)
    assert {"agreement": 0.75, "teacher_top1": 0.9, "chance_top1": 0.1}.items() <= event.items()
    expected = "step 40 validation agreement 0.7500 (teacher_top1 0.9000 chance_top1 0.1000)\n"
    assert (tmp_path / "train.log").read_text().endswith(expected)


def test_a_second_journal_appends(journal, tmp_path):
    journal.record("first")
    second = Journal(tmp_path, Console(file=io.StringIO()))
    second.record("second")
    second.close()
    assert [event["event"] for event in events(tmp_path)] == ["first", "second"]


def test_rates_and_the_time_that_is_left(journal, clock, tmp_path):
    """100 steps of 8 images from step 20 on: 2 seconds a step, of which a quarter waits for data."""
    with stage(journal, clock, total=100, start=20) as log:
        for step in range(21, 25):
            clock(2)
            log.step(step, loss=0.5, rate=0.1, waited=0.5)
    (event,) = events(tmp_path)  # of the steps at 2, 4, 6 and 8 seconds, the third is the first beyond five
    assert {key: event[key] for key in ("step", "epoch", "lr", "loss")} == {
        "step": 23,
        "epoch": 2.3,
        "lr": 0.1,
        "loss": 0.5,
    }
    assert event["images_per_second"] == 4.0
    assert event["data_wait"] == 0.25
    assert event["eta_seconds"] == 2 * (100 - 23)
    assert "step 23/100 eta 2:34 loss 0.5000 lr 0.1 4 img/s data wait 25%" in (tmp_path / "train.log").read_text()


def test_a_rate_is_that_of_the_time_since_the_last_line(journal, clock, tmp_path):
    with stage(journal, clock, total=100, start=0) as log:
        clock(10)
        log.step(1, 1.0, 0.1, 10.0)
        clock(3)
        log.step(2, 1.0, 0.1, 0.0)
        clock(3)
        log.step(3, 1.0, 0.1, 3.0)
    first, second = events(tmp_path)
    assert (first["images_per_second"], first["data_wait"]) == (0.8, 1.0)
    assert (second["step"], second["images_per_second"], second["data_wait"]) == (3, round(16 / 6, 1), 0.5)
    assert second["eta_seconds"] == round(97 * 16 / 3)


def test_the_last_step_always_has_a_line(journal, clock, tmp_path):
    with stage(journal, clock, total=2, start=0) as log:
        log.step(1, 1.0, 0.1, 0.0)
        clock(0.5)
        log.step(2, 0.5, 0.05, 0.0)
    (event,) = events(tmp_path)
    assert (event["step"], event["eta_seconds"]) == (2, 0)


def test_labelling_says_how_far_it_is_every_few_seconds_and_at_the_end(journal, clock, tmp_path):
    """400 views in 4 seconds, another 300 in 3, and 100 at the end."""
    with journal.labelling("labelling pool by onnx b") as advance:
        clock(4)
        advance(400, 800)
        clock(3)
        advance(700, 800)
        clock(1)
        advance(800, 800)
    first, last = events(tmp_path)
    assert (first["event"], first["what"]) == ("labelling", "labelling pool by onnx b")
    assert (first["done"], first["total"], first["views_per_second"]) == (700, 800, 100)
    assert last["done"] == 800
    lines = (tmp_path / "train.log").read_text().splitlines()
    assert lines[0].endswith("[1 distill] labelling pool by onnx b: 700 of 800 views, 100 views/s, eta 0:01")
    assert len(lines) == 2


def test_what_was_done_at_once_has_neither_rate_nor_time(journal, clock, tmp_path):
    """31 views that were there, or came by one answer: no seconds were measured in which they came."""
    for _ in range(2):
        with journal.labelling("labelling pool by onnx b") as advance:
            clock(9)
            advance(31, 31)
    lines = [line[20:] for line in (tmp_path / "train.log").read_text().splitlines()]
    assert lines == ["[1 distill] labelling pool by onnx b: 31 of 31 views"] * 2
    assert all("views_per_second" not in event for event in events(tmp_path))


def everything(journal, clock):
    journal.note("a note")
    with stage(journal, clock, total=3, start=0) as log:
        for step in (1, 2, 3):
            clock(4)
            log.step(step, 1.0, 0.1, 0.0)
        journal.measured("distill", 3, 3, {"top1": 0.5}, {"teacher_top1": 0.75})
    with journal.labelling("labelling the pool") as advance:
        clock(6)
        advance(5, 10)
        advance(10, 10)


def test_off_a_terminal_no_control_character_is_written(journal, clock, screen, tmp_path):
    everything(journal, clock)
    for text in (screen.getvalue(), (tmp_path / "train.log").read_text(), (tmp_path / "metrics.jsonl").read_text()):
        assert text
        assert not CONTROL.search(text)


def test_on_a_terminal_the_files_stay_plain(tmp_path, clock):
    screen = io.StringIO()
    journal = Journal(tmp_path, Console(file=screen, force_terminal=True, highlight=False))
    everything(journal, clock)
    journal.close()
    assert CONTROL.search(screen.getvalue())
    for name in ("train.log", "metrics.jsonl"):
        assert not CONTROL.search((tmp_path / name).read_text())
    log = (tmp_path / "train.log").read_text().splitlines()
    assert all(any(line[20:] in shown for shown in screen.getvalue().splitlines()) for line in log)


def test_counting_says_a_line_every_few_seconds(clock, capsys):
    with counting("packing") as advance:
        advance(1, 9)
        clock(6)
        advance(2, 9)
        clock(1)
        advance(3, 9)
        clock(6)
        advance(9, 9)
    out, err = capsys.readouterr()
    assert (out, err) == ("", "packing: 2 of 9\npacking: 9 of 9\n")


# Where it cannot be written -------------------------------------------------------------------------------------------


class Broken(io.StringIO):
    """A reader that is gone, or a full disk."""

    def __init__(self, code):
        super().__init__()
        self.code = code

    def write(self, text):
        raise OSError(self.code, os.strerror(self.code))


@pytest.mark.parametrize("code", [errno.EPIPE, errno.ENOSPC, errno.EIO, None])
@pytest.mark.parametrize("terminal", [False, True])
def test_a_screen_that_cannot_be_written_costs_nothing(journal, tmp_path, clock, monkeypatch, code, terminal):
    everything(journal, clock)
    whole = (tmp_path / "train.log").read_text()
    stderr = None if code is None else Broken(code)
    if stderr is not None:
        stderr.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", stderr)
    broken = Journal(tmp_path)
    broken.place = journal.place
    assert broken.console.is_terminal == (terminal and code is not None)
    everything(broken, clock)
    broken.close()
    lines = [line[20:] for line in (tmp_path / "train.log").read_text().splitlines()]
    assert lines == [line[20:] for line in whole.splitlines()] * 2


def test_the_screen_is_what_standard_error_is_at_the_time(tmp_path, capsys):
    journal = Journal(tmp_path)
    journal.note("a line")
    assert capsys.readouterr() == ("", "a line\n")
    journal.close()


@pytest.mark.parametrize("name", ["train.log", "metrics.jsonl"])
def test_a_log_that_cannot_be_opened_is_said_once(tmp_path, screen, name):
    (tmp_path / name).mkdir()
    journal = Journal(tmp_path, Console(file=screen, width=40))
    journal.note("a line")
    journal.record("start")
    journal.close()
    assert screen.getvalue() == f"warning: {tmp_path / name}: lines are lost: Is a directory\na line\n"
    (other,) = {"train.log", "metrics.jsonl"} - {name}
    assert (tmp_path / other).stat().st_size > 0
