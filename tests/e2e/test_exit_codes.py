"""Every exit code of README.md, provoked on the installed command, and what is said: wanted, got, where, what to do."""

from __future__ import annotations

import os
import re
import resource
import runpy
import signal
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from ssld.lock import RunLock

ROOT = Path(__file__).parents[2]
TINY = runpy.run_path(str(ROOT / "tests" / "faults" / "tiny.py"))
RUN = ("run", "tiny.yaml", "--until", "teach", "-o", "stages.teach.epochs=90000", "-o", "stages.teach.save_steps=9")
PLUGINS = """\
import time

from ssld.contracts import TeacherSpec

class Mute:
    spec = TeacherSpec(8, "never answers")

    def predict(self, images):
        time.sleep(600)
"""
ENTRIES = """\
[ssld.teachers]
mute = exits:Mute
[ssld.losses]
kl = exits:kl
"""
DYING_RANKS = """\
import os
import signal
import sys

if "ssld.follower" in sys.orig_argv:
    os.kill(os.getpid(), signal.SIGKILL)
"""
BROKEN = "import json\n\njson.dumps = None\n"
"""A defect of ssld, as it were, in a module that is imported before all others."""


def documented() -> list[int]:
    """The exit codes in the table of README.md."""
    (table,) = re.findall(r"^\| exit code \|.*\n((?:\|.*\n)+)", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE)
    rows = re.findall(r"^\| (\d+(?:, \d+)*) \|", table, re.MULTILINE)
    assert len(rows) == table.count("\n") - 1, "a row has no code"
    return [int(code) for row in rows for code in row.split(", ")]


@dataclass(frozen=True)
class Said:
    """The parts of a message, each as a pattern."""

    where: str
    wanted: str
    got: str
    remedy: str


@pytest.fixture(scope="module")
def ssld(command: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The command in one folder for all: with the tiny recipe, and a package of teachers of which none will do."""
    made = command(tmp_path_factory.mktemp("exits"))
    site = TINY["write"](made.folder)
    about = site / "exits-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: exits\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(ENTRIES)
    (site / "exits.py").write_text(PLUGINS)
    # what Python compiles is cut where files may not be large, and would stay
    made.extra |= {"PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1"}
    yield made
    made.clean_up()


def customized(ssld: Any, text: str, *words: object) -> Any:
    """A command, started where that is in the module that Python imports first."""
    folder = ssld.folder / "custom"
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(text)
    path = f"{folder}:{ssld.extra['PYTHONPATH']}"
    return ssld.start(*words, program=("env", f"PYTHONPATH={path}", "ssld"))


# What provokes each ---------------------------------------------------------------------------------------------------


def done(ssld: Any) -> str:
    result = ssld("list", "losses")
    assert result.out.startswith("loss ")
    return result.err


def defect(ssld: Any) -> str:
    out, err = (process := customized(ssld, BROKEN, "schema")).communicate()
    assert (process.returncode, out) == (1, "")
    return err


def wrong_recipe(ssld: Any) -> str:
    return ssld("plan", "tiny.yaml", "-o", "stages.teach.epohcs=2", code=2).err


def absent_data(ssld: Any) -> str:
    (ssld.folder / "list.txt").write_text("gone.png 0\n")
    return ssld("plan", "tiny.yaml", "-o", "data.labeled=list.txt", code=65).err


def stall(ssld: Any) -> str:
    words = ("-o", "stages.distill.teacher={plugin: mute}", "--out", "mute", "--trust-teacher", "--stall-timeout", 0.5)
    return ssld("label", "tiny.yaml", *words, code=69).err


def plug_in_twice(ssld: Any) -> str:
    return ssld("plan", "tiny.yaml", "-o", "stages.distill.loss=kl", code=70).err


def lost_rank(ssld: Any) -> str:
    return ssld.wait(customized(ssld, DYING_RANKS, *RUN, "--out", "ranks", "--nproc", 2), 71).err


def no_folder(ssld: Any) -> str:
    (ssld.folder / "file").write_text("mine")
    return ssld("pack", "builtin:shapes?count=4&size=16", "file/shards", code=73).err


def no_space(ssld: Any) -> str:
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (2000, 2000))
    return ssld.wait(ssld.start("pack", "builtin:shapes?count=16&size=32", "small", preexec_fn=limit), 74).err


def second_run(ssld: Any) -> str:
    (ssld.folder / "runs" / "tiny").mkdir(parents=True, exist_ok=True)
    with RunLock(ssld.folder / "runs" / "tiny"):
        return ssld(*RUN, code=75).err


def changed(ssld: Any) -> str:
    if not (ssld.folder / "runs" / "tiny" / "teach" / "latest").exists():
        stopped(signal.SIGTERM, ssld)
    return ssld(*RUN, "-o", "stages.teach.learning_rate=0.7", code=78).err


def stopped(number: int, ssld: Any) -> str:
    """Begin the run, or go on with it, and stop."""
    process = ssld.start(*RUN)
    ssld.until_in("teach", ssld.folder / "runs" / "tiny", process)
    process.send_signal(number)
    return ssld.wait(process, 128 + number).err


def saved(name: str) -> Said:
    """What is said at a signal."""
    onward = r"^continue: ssld resume --out runs/tiny$"
    return Said(r"teach: stopped", r"of \d+; the state is saved", rf"by {name} after step \d+", onward)


CASES: dict[int, tuple[Callable[[Any], str], Said | None]] = {
    0: (done, None),
    1: (
        defect,
        Said(
            r'File ".*ssld/cli\.py", line \d+, in schema',
            "This is a defect of ssld",
            "TypeError: 'NoneType' object is not callable",
            "report it with these lines. What was committed stays",
        ),
    ),
    2: (
        wrong_recipe,
        Said(r"-o stages\.teach\.epohcs=2", "unknown key", r"got 2", r"did you mean epochs\?"),
    ),
    65: (
        absent_data,
        Said(r"list\.txt", "expected every file", r"1 of 1 missing.*line 1: gone\.png", "correct the list"),
    ),
    69: (
        stall,
        Said(
            "plugin mute .* about 12 images from builtin:shapes",
            r"expected an answer of",
            r"within 0\.5 s, got nothing",
            "raise --stall-timeout",
        ),
    ),
    70: (
        plug_in_twice,
        Said(
            "exits 1.0 and ssld|ssld .* and exits 1.0", "the loss 'kl'", "two packages offer", "uninstall all but one"
        ),
    ),
    71: (
        lost_rank,
        Said(
            r"rank 1 \(pid \d+\)",
            "expected rank 1 .* to go on",
            "it ended with signal 9",
            r"lower --nproc or batch_size\ncontinue: ssld resume --out ranks$",
        ),
    ),
    73: (
        no_folder,
        Said("file/shards: ", "expected to create this directory", "got: Not a directory", "choose another"),
    ),
    74: (
        no_space,
        Said("small: ", "expected to write shards", "got: .*File too large", "free space or mend the disk"),
    ),
    75: (
        second_run,
        Said("runs/tiny", "is in use by", rf"by pid {os.getpid()} on host ", "wait for it or choose another --out"),
    ),
    78: (
        changed,
        Said(r"stages\.teach\.learning_rate", r"0\.1 → ", r"→ 0\.7", "run with --rerun .*; with another --out"),
    ),
    129: (partial(stopped, signal.SIGHUP), saved("SIGHUP")),
    130: (partial(stopped, signal.SIGINT), saved("SIGINT")),
    143: (partial(stopped, signal.SIGTERM), saved("SIGTERM")),
}


def test_every_code_of_the_readme_has_a_case():
    assert documented() == sorted(CASES)


@pytest.mark.parametrize("code", documented())
def test_a_code_comes_with_what_was_wanted_and_got_and_where_and_what_to_do(ssld, code):
    provoke, said = CASES[code]
    err = provoke(ssld)
    if said is None:
        assert err == ""
        return
    missing = [part for part, pattern in asdict(said).items() if not re.search(pattern, err, re.MULTILINE)]
    assert not missing, err
