"""The command line: words to calls, errors to one message and an exit code, results alone on standard output."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

import ssld
from ssld import engine, errors
from ssld.cli import main, show
from ssld.labels import inspect
from ssld.overview import Overview
from ssld.soft import Labelled

RECIPE = """\
name: tiny
images: {resolution: 16}
data: {labeled: "builtin:shapes?count=24&size=16", validation: "builtin:shapes?count=8&size=16&seed=1"}
stages:
  teach: {kind: pretrain, network: MobileNetV3_small_x0_35, data: labeled, epochs: 12, batch_size: 8}
"""


@pytest.fixture
def call(tmp_path, monkeypatch):
    """call(*words): the command in a directory that holds tiny.yaml."""
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(RECIPE)
    return lambda *words: CliRunner().invoke(main, list(words))


def cells(result):
    return [line.split() for line in result.stdout.splitlines()]


def test_help_names_every_command_and_an_example(call):
    found = call("--help")
    assert found.exit_code == 0
    for name in main.commands:
        assert name in found.stdout
        assert "Example" in call(name, "--help").stdout


def test_version(call):
    assert call("--version").stdout == f"ssld, version {ssld.__version__}\n"


def test_plan_shows_the_derived_numbers_and_writes_no_run(call):
    found = call("plan", "tiny.yaml")
    assert found.exit_code == 0
    header, row = cells(found)
    assert header[:4] == ["stage", "kind", "network", "px"]
    # 12 epochs of 24 images in batches of 8; 0.1 per 256 images; a tenth of the epochs
    expected = ["0", "teach", "pretrain", "MobileNetV3_small_x0_35", "16", "24", "12", "36", "8", "0.00313", "1.2"]
    assert row == [*expected, "run:", "not", "run", "yet"]
    assert not Path("runs").exists()


def test_overrides_and_limit_reach_the_plan(call):
    row = cells(
        call("plan", "tiny.yaml", "-o", "stages.teach.epochs=2", "-o", "images.resolution=24", "--limit", "16")
    )[1]
    assert row[4:8] == ["24", "16", "2", "4"]


def test_a_wrong_recipe_is_one_message_and_exit_code_2(call):
    found = call("plan", "tiny.yaml", "-o", "stages.teach.epoch=3")
    assert found.exit_code == 2
    assert found.stdout == ""
    assert found.stderr.startswith("Error: ")
    assert "did you mean epochs?" in found.stderr
    assert "Traceback" not in found.stderr


def documented_codes():
    known = [errors.SsldError]
    for kind in known:
        known += kind.__subclasses__()
    return {kind.__name__: kind for kind in known if kind is not errors.Interrupted}


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("RecipeError", 2),
        ("DataError", 65),
        ("CheckpointError", 65),
        ("LabelError", 65),
        ("TeacherError", 65),
        ("StallError", 69),
        ("PluginError", 70),
        ("ProcessError", 71),
        ("RankError", 71),
        ("OutputError", 73),
        ("StorageError", 74),
        ("BusyError", 75),
        ("ChangedError", 78),
    ],
)
def test_every_error_has_its_exit_code_and_its_notes(call, monkeypatch, name, code):
    def fail(*_, **__):
        error = documented_codes()[name]("what is wrong")
        error.add_note("continue: so")
        raise error

    monkeypatch.setattr(ssld, "run", fail, raising=False)
    found = call("run", "tiny.yaml")
    assert (found.exit_code, found.stdout) == (code, "")
    assert found.stderr == "Error: what is wrong\ncontinue: so\n"


def test_a_signal_ends_with_its_own_code(call, monkeypatch):
    def stop(*_, **__):
        raise errors.Interrupted("stopped", 143)

    monkeypatch.setattr(ssld, "resume", stop, raising=False)
    assert call("resume").exit_code == 143


@pytest.mark.parametrize("error", [ZeroDivisionError(), EOFError("in a file"), BrokenPipeError(32, "to a process")])
def test_a_defect_keeps_its_traceback(call, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(ssld, "status", fail, raising=False)
    defect = call("status")
    assert defect.exit_code == 1
    assert error in (defect.exception, defect.exception.__cause__)
    assert defect.exception.__notes__ == [
        "This is a defect of ssld: report it with these lines. What was committed stays."
    ]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["run", "r.yaml"],
            (
                ("r.yaml", None),
                {
                    "overrides": (),
                    "device": "cpu",
                    "limit": None,
                    "until": None,
                    "rerun": False,
                    "trust_teacher": False,
                    "nproc": None,
                    "stall_timeout": None,
                },
            ),
        ),
        (
            [
                "run",
                "r",
                "--out",
                "o",
                "-o",
                "a=1",
                "-o",
                "b=2",
                "--device",
                "gpu",
                "--limit",
                "3",
                "--until",
                "distill",
                "--rerun",
                "--trust-teacher",
                "--stall-timeout",
                "90",
                "--nproc",
                "4",
            ],
            (
                ("r", Path("o")),
                {
                    "overrides": ("a=1", "b=2"),
                    "device": "gpu",
                    "limit": 3,
                    "until": "distill",
                    "rerun": True,
                    "trust_teacher": True,
                    "nproc": 4,
                    "stall_timeout": 90.0,
                },
            ),
        ),
        (["resume"], ((None,), {"stage": None, "nproc": None, "stall_timeout": None})),
        (
            ["resume", "--stage", "2", "--out", "o", "--nproc", "3", "--stall-timeout", "0"],
            ((Path("o"),), {"stage": "2", "nproc": 3, "stall_timeout": 0.0}),
        ),
    ],
)
def test_words_become_calls(call, monkeypatch, words, expected):
    calls = []

    def remember(*arguments, **options):
        calls.append((arguments, options))
        raise errors.RecipeError("seen")

    monkeypatch.setattr(ssld, words[0], remember, raising=False)
    call(*words)
    assert calls == [expected]


@pytest.mark.parametrize(
    ("words", "given"),
    [
        (
            [],
            {
                "stage": None,
                "part": (1, 1),
                "device": "cpu",
                "limit": None,
                "trust_teacher": False,
                "stall_timeout": None,
            },
        ),
        (
            ["--stage", "2", "--part", "3/10", "--device", "gpu", "--limit", "5", "--trust-teacher"],
            {"stage": "2", "part": (3, 10), "device": "gpu", "limit": 5, "trust_teacher": True, "stall_timeout": None},
        ),
    ],
)
def test_labels_are_made_as_the_words_say_and_shown_by_teacher(call, monkeypatch, words, given):
    calls = []

    def remember(*arguments, **options):
        calls.append((arguments, options))
        return [Labelled("distill", "the teacher stage teach", 3, 1, Path("store/0123"))]

    monkeypatch.setattr(engine, "label", remember)
    found = call("label", "r.yaml", "--out", "o", "-o", "a=1", *words)
    assert calls == [(("r.yaml", Path("o")), {"overrides": ("a=1",), **given})]
    header, row = found.stdout.splitlines()
    assert header.split() == ["stage", "teacher", "shards", "written", "missing", "labels"]
    assert re.split(r"  +", row) == ["distill", "the teacher stage teach", "3", "1", "store/0123"]


@pytest.mark.parametrize("part", ["0/3", "4/3", "3", "1/2/3", "-1/3", "1/", "/3", "a/b", "1/0", "1.0/2", "²/3"])
def test_a_part_is_one_of_n(call, part):
    found = call("label", "r.yaml", f"--part={part}")
    assert found.exit_code == 2
    assert f"expected I/N with I from 1 to N, such as 3/10, got {part!r}" in found.stderr


@pytest.mark.parametrize("words", [["info"], ["verify"], ["rm", "--yes"]])
def test_a_place_without_labels_is_said(call, words):
    found = call("labels", *words, ".")
    assert (found.exit_code, found.stdout) == (65, "")
    assert "expected soft labels, a store of them or a run that keeps some, got none" in found.stderr


@pytest.mark.parametrize("words", [["run"], ["run", "r", "--limit", "0"], ["run", "r", "--device", "tpu"], ["fly"]])
def test_wrong_words_are_click_errors(call, words):
    found = call(*words)
    assert found.exit_code == 2
    assert "Usage: " in found.stderr


def test_nothing_to_resume_is_said(call):
    found = call("resume")
    assert found.exit_code == 2
    assert "expected a run, got none; start one with ssld run RECIPE" in found.stderr


def test_plugins_are_listed_with_their_distribution(call):
    found = call("list", "students")
    assert cells(found)[0] == ["student", "distribution", "version"]
    names = [row[0] for row in cells(found)[1:]]
    assert {"ResNet50_vd", "ResNeXt101_32x16d_wsl"} <= set(names)
    assert names == sorted(names)
    assert cells(call("list", "losses"))[0][0] == "loss"


def test_shipped_recipes_are_listed(call):
    assert [row[0] for row in cells(call("list", "recipes"))].count("mobilenetv3_ssld") == 1


def test_the_schema_is_json(call):
    found = json.loads(call("schema").stdout)
    assert {"name", "data", "stages"} <= found["properties"].keys()


def test_the_list_of_commands_says_one_whole_sentence_of_each(call):
    listed = call("--help").stdout.partition("Commands:")[2]
    shown = re.split(r"\n  (?=\S)", listed)[1:]
    assert [entry.split()[0] for entry in shown] == sorted(main.commands)
    for entry in shown:
        assert re.fullmatch(r"[\w-]+ [A-Z][^.]*\.", " ".join(entry.split()))
    assert "order, the numbers that are derived, and what would run, and why." in " ".join(listed.split())


def test_a_table_is_padded_and_cut_nowhere(capsys):
    show(("a", "long header"), [("longer cell", "x"), ("", "y")])
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["a            long header", "longer cell  x", "             y"]


def test_nothing_that_a_terminal_acts_upon_is_shown(call, monkeypatch, capsys):
    """Names come from whoever made the data."""

    def fail(*_, **__):
        raise errors.DataError("a\x1b[2J\x07\x9b\u202e\udc80.png: Grün\nnext line")

    monkeypatch.setattr(ssld, "status", fail, raising=False)
    assert call("status").stderr == "Error: a\\x1b[2J\\x07\\x9b\\u202e\\udc80.png: Grün\nnext line\n"
    show(("name",), [("a\rb",)])
    assert capsys.readouterr().out.splitlines()[1] == "a\\rb"


def test_words_that_click_repeats_are_plain(call):
    """A shell puts the names of files there."""
    for words in (["status", "a", "b\x1b]0;evil\x07"], ["list", "c\x9b"], ["--d\x07"]):
        refused = call(*words)
        assert refused.exit_code == 2
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", refused.stderr), repr(refused.stderr)


def test_remarks_and_what_is_finished_are_plain(call, monkeypatch):
    found = Overview(Path("runs/a\x1b[2J"), (), remarks=("b\x1b[2J",))
    monkeypatch.setattr(ssld, "status", lambda *_: found, raising=False)
    monkeypatch.setattr(ssld, "resume", lambda *_, **__: found, raising=False)
    assert call("status").stderr == "b\\x1b[2J\n"
    assert call("resume").stderr == "runs/a\\x1b[2J is finished already; nothing was run\n"


@pytest.mark.parametrize(("typed", "code", "end"), [("y\n", 0, ""), ("n\n", 1, "Aborted!\n"), ("", 1, "Aborted!\n")])
def test_labels_are_removed_where_the_answer_is_yes(monkeypatch, typed, code, end):
    monkeypatch.setattr(inspect, "kept_in", lambda _: [])
    found = CliRunner().invoke(main, ["labels", "rm", "a\x07"], input=typed)
    assert (found.exit_code, found.stdout) == (code, "" if code else "removed 0 directories of labels, 0 bytes\n")
    assert found.stderr == f"remove 0 directories of labels, 0 bytes, in a\\x07? [y/N]: {end}"


# Streams that take no more --------------------------------------------------------------------------------------------

FULL = pytest.mark.skipif(not Path("/dev/full").exists(), reason="a stream that is always full is /dev/full")


def ended(*words):
    """The exit code of a command on the streams that there are."""
    with pytest.raises(SystemExit) as end:
        main(list(words))
    return end.value.code or 0


@FULL
@pytest.mark.parametrize(
    "words",
    [["--help"], ["--version"], ["run", "--help"], ["labels", "rm", "-h"], ["schema"], ["list", "losses"], ["pack"]],
    ids=" ".join,
)
def test_a_result_that_cannot_be_written_is_said(call, monkeypatch, capsys, words):
    words = [*words, "builtin:shapes?count=2&size=16", "shards"] if words == ["pack"] else words
    with open("/dev/full", "w") as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        assert ended(*words) == errors.StorageError.exit_code
    said = "Error: cannot write standard output: No space left on device; free space or lead it elsewhere"
    assert capsys.readouterr().err.startswith(said)


def interrupted(*_, **__):
    raise KeyboardInterrupt


@FULL
@pytest.mark.parametrize("stream", ["/dev/full", None])
@pytest.mark.parametrize(("words", "code"), [("status", 0), ("resume", 0), ("run r", 130), ("fly", 2), ("labels", 2)])
def test_a_standard_error_that_takes_nothing_changes_no_exit_code(call, monkeypatch, stream, words, code):
    found = Overview(Path("runs/a"), (), remarks=("damaged",))
    monkeypatch.setattr(ssld, "status", lambda *_: found, raising=False)
    monkeypatch.setattr(ssld, "resume", lambda *_, **__: found, raising=False)
    monkeypatch.setattr(ssld, "run", interrupted, raising=False)
    with open(stream or os.devnull, "w") as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", full if stream else None)
        assert ended(*words.split()) == code


def test_ctrl_c_outside_of_a_stage_is_said(call, monkeypatch):
    monkeypatch.setattr(ssld, "run", interrupted, raising=False)
    found = call("run", "tiny.yaml")
    assert (found.exit_code, found.stderr) == (130, "Error: interrupted; nothing that was saved is lost\n")
