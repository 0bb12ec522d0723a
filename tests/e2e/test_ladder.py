"""A run from nothing to four finished stages, and every command that looks at it afterwards."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest

VALIDATION = "builtin:shapes?count=48&size=32&seed=3"
STAGES = ["0 teach", "1 distill", "2 finetune", "3 fixres"]


def test_the_table_on_standard_output_names_four_whole_checkpoints(reference):
    rows = reference.result.table()
    assert [row["stage"] for row in rows] == STAGES
    for row in rows:
        assert row["state"] == "finished"
        assert 0 <= float(row["top-1"]) <= float(row["top-5"]) <= 1
        assert re.fullmatch(r"\d+:\d\d", row["time"])
        assert (reference.directory.parents[1] / row["checkpoint"] / "manifest.json").is_file()
        assert Path(row["checkpoint"]).parent.name == row["stage"].split()[1]


def test_what_the_screen_shows_is_in_the_log_as_well(reference):
    log = (reference.directory / "train.log").read_text()
    stamped = [
        line.split(" ", 2)[2] for line in log.splitlines() if re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d .", line)
    ]
    shown = reference.result.err.splitlines()
    assert [line for line in stamped if line in shown] == shown


def test_the_log_holds_the_resolved_recipe_and_the_environment(reference):
    log = (reference.directory / "train.log").read_text()
    assert (reference.directory / "recipe.yaml").read_text() in log
    (resolved,) = re.findall(r"fixres, resolved: (.*)", log)
    assert (json.loads(resolved)["resolution"], json.loads(resolved)["warmup_epochs"]) == (48, 0.0)
    (environment,) = re.findall(r"environment: (.*)", log)
    assert json.loads(environment)["paddlepaddle"] == version("paddlepaddle")


def test_the_table_holds_the_last_evaluation_of_each_stage(reference):
    events = [json.loads(line) for line in (reference.directory / "metrics.jsonl").read_text().splitlines()]
    measured = {event["stage"]: event["top1"] for event in events if event["event"] == "evaluation"}
    table = {row["stage"].split()[1]: float(row["top-1"]) for row in reference.result.table()}
    assert table == {stage: pytest.approx(top1, abs=5e-5) for stage, top1 in measured.items()}


def test_a_second_run_says_that_all_is_finished_and_changes_nothing(ssld, finished, reference):
    before = ssld.snapshot(finished)
    began = time.monotonic()
    again = ssld("run", "tiny.yaml", "--trust-teacher")
    assert time.monotonic() - began < 5, "a finished run needs no paddle"
    assert "runs/tiny is finished already; nothing was run" in again.err
    assert again.out == reference.result.out
    assert ssld.snapshot(finished) == before


def test_status_shows_the_same_table(ssld, finished, reference):
    assert ssld("status", "runs/tiny").out == reference.result.out
    assert ssld("status").out == reference.result.out


def test_plan_shows_every_number_and_writes_nothing(ssld):
    before = {path for path in ssld.folder.rglob("*") if "cache" not in path.parts}
    rows = ssld("plan", "tiny.yaml").table()
    assert [(row["stage"], row["images"], row["steps"], row["px"]) for row in rows] == [
        ("0 teach", "48", "12", "32"),
        ("1 distill", "62", "16", "32"),  # two of the 64 are held out, to compare student and teacher on
        ("2 finetune", "48", "12", "32"),
        ("3 fixres", "48", "6", "48"),  # 32 * 320 / 224 is 45.7, and the nearest multiple of 8 is 48
    ]
    assert {row["what and why"] for row in rows} == {"run: not run yet"}
    assert {path for path in ssld.folder.rglob("*") if "cache" not in path.parts} == before | {ssld.folder / "home"}


def test_plan_of_a_finished_run_skips_it_and_says_why_a_change_does_not(ssld, finished):
    done = ssld("plan", "tiny.yaml").table()
    assert {row["what and why"] for row in done} == {"skip: finished"}
    changed = ssld("plan", "tiny.yaml", "-o", "stages.finetune.epochs=3").table()
    assert [row["what and why"].split(":")[0] for row in changed] == ["skip", "skip", "run again", "run again"]
    assert "settings.epochs: 2 → 3" in changed[2]["what and why"]


def test_eval_measures_what_the_table_says(ssld, reference):
    (row,) = ssld("eval", reference.directory / "distill" / "latest", VALIDATION).table()
    (told,) = (row for row in reference.result.table() if row["stage"] == "1 distill")
    assert row == {"images": "48", "top1": told["top-1"], "top5": told["top-5"]}


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("stages", {"pretrain", "distill", "finetune", "fixres"}),
        ("teachers", {"network", "stage", "onnx"}),
        ("students", {"ResNet50_vd", "MobileNetV3_large_x1_0", "MobileNetV3_small_x0_35"}),
        ("losses", {"js", "kl", "ce"}),
    ],
)
def test_list_shows_what_is_installed_and_whose_it_is(ssld, what, expected):
    rows = ssld("list", what).table()
    (name,) = set(rows[0]) - {"distribution", "version"}
    assert {name.removesuffix(" kind") + ending for ending in ("s", "es")} & {what}
    assert expected <= {row[name] for row in rows if row["distribution"] == "ssld"}


def test_list_recipes_gives_names_that_plan_takes(ssld):
    names = [row["recipe"] for row in ssld("list", "recipes").table()]
    assert "mobilenetv3_ssld" in names
    rows = ssld("plan", "mobilenetv3_ssld", "--limit", "50").table()
    assert [row["stage"] for row in rows if row["kind"] != "label"] == STAGES


@pytest.fixture(scope="module")
def examined(command, tmp_path_factory):
    """What doctor says."""
    return command(tmp_path_factory.mktemp("doctor"))("doctor")


def test_doctor_finds_nothing_wrong(examined):
    findings = [line.split()[:3] for line in examined.out.splitlines()[1:]]
    assert findings
    assert all("ok" in words for words in findings)
    assert "WRONG" not in examined.out


def test_doctor_keeps_standard_error_clean(examined):
    assert examined.err == ""


def test_schema_describes_every_stage_kind(ssld):
    schema = json.loads(ssld("schema").out)
    assert {"name", "seed", "images", "data", "stages", "extends"} <= set(schema["properties"])
    kinds = schema["properties"]["stages"]["additionalProperties"]["properties"]["kind"]["enum"]
    assert {"pretrain", "distill", "finetune", "fixres"} <= set(kinds)


def test_the_module_is_the_command(ssld):
    def printed(*words: str) -> str:
        return ssld.wait(ssld.start(*words, program=(sys.executable, "-m", "ssld"))).out

    assert printed("list", "losses") == ssld("list", "losses").out
    assert printed("--version") == ssld("--version").out


def test_three_lines_of_python_give_the_same_bytes(ssld, reference):
    recipe = ssld.recipe("teach")
    program = f"import ssld\nresult = ssld.run({recipe!r}, 'api')\nheader, rows = result.table()\nprint(rows)"
    done = ssld.wait(ssld.start(program=(sys.executable, "-c", program)))
    assert done.out.startswith("[('0 teach', 'finished', ")
    assert ssld.weights(ssld.folder / "api") == {"teach": reference.weights["teach"]}


def test_a_terminal_sees_a_live_display_and_standard_output_stays_plain(ssld):
    controller, terminal = os.openpty()
    process = ssld.start("run", ssld.recipe("teach"), stderr=terminal)
    os.close(terminal)
    shown = b""
    while chunk := read(controller):
        shown += chunk
    os.close(controller)
    assert process.wait(60) == 0
    assert b"\x1b[" in shown
    assert re.search(rb"step \d+/12 eta", shown), shown
    table = process.stdout.read()
    assert "0 teach" in table
    assert "\x1b" not in table
    assert "\x1b" not in (ssld.folder / "runs" / "tiny" / "train.log").read_text()


def read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 4096)
    except OSError:  # Linux says that a terminal without a writer is an input/output error
        return b""
