"""A run that an earlier version began goes on: its checkpoints, labels and fingerprints mean what they meant.

The archive holds the tiny run (tiny.py) as version 0.1.0 left it when it was stopped after step 4 of finetuning, with
its pool. It is never made anew: where a change makes this test fail, the runs of users are lost in the same way, so
the format, or the revision of a kind of stage, has to go up, and old runs have to be refused in words.
"""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import pytest

from ssld import checkpoint

ARCHIVE = Path(__file__).with_name("stopped-0.1.0.tar.gz")
STEPS = {"teach": 9, "distill": 12, "finetune": 9, "fixres": 9}


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A folder with the old run in runs/tiny."""
    with tarfile.open(ARCHIVE) as tar:
        tar.extractall(tmp_path, filter="data")
    return tmp_path


def test_a_run_of_an_earlier_version_goes_on(forks, old, contents_of):
    states = forks("status", "runs/tiny", folder=old).said
    for words in ("0 teach     finished", "1 distill   finished", "2 finetune  stopped", "3 fixres    to do"):
        assert words in states
    before = contents_of(old / "runs" / "tiny")
    labels = [name for name in before if name.startswith("labels.store/")]
    resumed = forks("resume", folder=old)
    assert resumed.code == 0, resumed.said
    assert "finetune Tiny (3 of 4 stages), 24 images, 9 steps at 8 px, lr 0.1, going on after step 4" in resumed.said
    after = contents_of(old / "runs" / "tiny")
    kept = [name for name in before if name.startswith(("teach/", "distill/")) or name in labels]
    assert len(kept) > 30
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
    expect_the_same_weights(forks, old, bits="not promised" not in resumed.said)


def expect_the_same_weights(forks, old: Path, *, bits: bool) -> None:
    """What went on has the weights of a run that this version makes of these data, on the same machine to the bit."""
    (old / "runs" / "tiny").rename(old / "resumed")
    assert forks("run", "tiny.yaml", "--trust-teacher", folder=old).code == 0
    for stage in STEPS:
        got, wanted = (checkpoint.read_weights(run / stage / "latest") for run in (old / "resumed", old / "runs/tiny"))
        assert got.keys() == wanted.keys()
        for name, value in wanted.items():
            if bits:
                np.testing.assert_array_equal(got[name], value, err_msg=f"{stage} {name}")
            else:
                np.testing.assert_allclose(got[name], value, rtol=1e-3, atol=1e-4, err_msg=f"{stage} {name}")
