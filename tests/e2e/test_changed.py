"""A recipe or data that changed after a run: nothing is lost, and the user is told what differs and what to do."""

from __future__ import annotations

import os
import shutil

import pytest

EPOCHS = ("-o", "stages.distill.epochs=1")


def stage_files(snapshot: dict) -> dict:
    """What a snapshot holds of the results."""
    return {name: facts for name, facts in snapshot.items() if "/step-" in name}


def test_a_changed_key_is_refused_with_the_difference_and_both_ways_on(ssld, finished):
    before = ssld.snapshot(finished)
    refused = ssld("run", "tiny.yaml", *EPOCHS, code=78)
    assert "runs/tiny holds results of another recipe" in refused.err
    assert "stages.distill.epochs: 2 → 1" in refused.err
    assert "with --rerun does distill, finetune, fixres again" in refused.err
    assert "another --out" in refused.err
    assert "continue:" not in refused.err
    assert ssld.snapshot(finished) == before


def test_both_ways_on_lead_to_the_same_weights(ssld, finished, reference):
    before = stage_files(ssld.snapshot(finished))
    again = ssld("run", "tiny.yaml", *EPOCHS, "--rerun", "--trust-teacher")
    assert "stages.distill.epochs: 2 → 1: 3 results, " in again.err
    assert "of work, are set aside in runs/tiny/attempt.1" in again.err
    after = ssld.snapshot(finished)
    kept = [name for name in before if name.startswith("teach/")]
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
    made = ssld.weights(finished)
    assert made["teach"] == reference.weights["teach"]
    assert all(made[stage] != reference.weights[stage] for stage in ("distill", "finetune", "fixres"))
    assert ssld.weights(finished / "attempt.1") == {
        stage: digest for stage, digest in reference.weights.items() if stage != "teach"
    }
    short = ssld.recipe("teach", "distill", name="short.yaml")
    ssld("run", short, *EPOCHS, "--trust-teacher", "--out", "other")
    assert ssld.weights(ssld.folder / "other") == {stage: made[stage] for stage in ("teach", "distill")}


@pytest.mark.parametrize("key", ["stages.teach.keep_last=5", "stages.distill.save_steps=1"])
def test_what_is_kept_on_disk_is_no_change(ssld, finished, key):
    before = stage_files(ssld.snapshot(finished))
    assert "is finished already" in ssld("run", "tiny.yaml", "-o", key).err
    assert stage_files(ssld.snapshot(finished)) == before


def test_comments_order_and_layout_are_no_change(ssld, finished):
    text = (ssld.folder / "tiny.yaml").read_text()
    head, stages = text.split("data:\n", 1)
    data, stages = stages.split("stages:\n", 1)
    spread = stages.replace("{kind: pretrain, network:", "{kind: pretrain,\n    network:")
    (ssld.folder / "tiny.yaml").write_text(f"# another comment\nstages:\n{spread}data:\n{data}{head}")
    assert "is finished already" in ssld("run", "tiny.yaml").err


def test_another_limit_is_named(ssld, finished):
    refused = ssld("run", "tiny.yaml", "--limit", "20", code=78)
    assert "--limit: not given → 20" in refused.err


def test_changed_data_are_named(ssld, photos):
    photos("labeled", "builtin:shapes?count=16&size=32&seed=2")
    words = ("-o", "data.labeled=labeled", "-o", "data.validation={split: 0.5}", "-o", "stages.teach.epochs=1")
    command = ("run", ssld.recipe("teach"), *words)
    ssld(*command)
    run = ssld.folder / "runs" / "tiny"
    before = ssld.snapshot(run)
    file = sorted((ssld.folder / "labeled").rglob("*.png"))[0]

    def refused(change: str) -> None:
        message = ssld(*command, code=78).err
        assert "teach: data.labeled: " in message, change
        assert "with --rerun does teach again" in message, change
        assert ssld.snapshot(run) == before, change

    facts = file.stat()
    os.utime(file)
    refused("touched")
    os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert "is finished already" in ssld(*command).err
    copy = shutil.copy(file, file.with_name("zz.png"))
    refused("added")
    os.unlink(copy)
    file.unlink()
    refused("removed")
