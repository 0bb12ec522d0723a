"""Two ranks make soft labels together: half each of what is missing, and what one rank would have made."""

from __future__ import annotations

import io
import json
import os
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ssld import engine, threads
from ssld.crew import Crew
from ssld.data.samples import Samples
from ssld.environment import RANKS
from ssld.graph import make_plan
from ssld.recipe import read_recipe

# It writes down who was asked, about how many images, and what share of the cores that rank had.
TEACHER = """\
import os
import numpy as np
from ssld import threads
from ssld.contracts import TeacherSpec

class Bright:
    def __init__(self, gain: float = 1.0):
        self.gain, self.spec = gain, TeacherSpec(8, f"bright {gain}", mean=None, std=None)

    def predict(self, images):
        with open("asked.log", "a") as log:
            log.write(f"{os.getpid()} {len(images)} {threads.share()}\\n")
        return (self.gain * images.reshape(len(images), 4, 48).mean(axis=2) / 32).astype(np.float32)
"""
SHARDS, EACH, VIEWS = 5, 10, 2
BRIGHT, DARK = {"plugin": "bright"}, {"plugin": "bright", "gain": 0.5}
RECIPE = {
    "name": "shared",
    "images": {"resolution": 16, "eval": ["CropImage", "NormalizeImage"]},
    "data": {
        "unlabeled": f"pool/{{000000..{SHARDS - 1:06d}}}.tar",
        "validation": "builtin:shapes?size=16&classes=4&count=8&seed=2",
    },
    "stages": {
        "distill": {
            "kind": "distill",
            "teacher": BRIGHT,
            "student": "MobileNetV3_small_x0_35",
            "data": "unlabeled",
            "epochs": 2,
            "batch_size": 8,
            "labels": {"views": VIEWS, "top_k": 3, "store": "store"},
        }
    },
}


class AllLabelled(Exception):
    """The stage is about to be trained."""


@pytest.fixture(autouse=True)
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Install the teacher, for this process and for those that it starts, and write a pool of shards."""
    about = tmp_path / "site" / "bright-1.0.dist-info"
    about.mkdir(parents=True)
    (tmp_path / "site" / "bright.py").write_text(TEACHER)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: bright\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[ssld.teachers]\nbright = bright:Bright\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.delenv(RANKS, raising=False)
    monkeypatch.delitem(sys.modules, "bright", raising=False)
    monkeypatch.setattr(threads, "cores", lambda: 12)
    monkeypatch.chdir(tmp_path)
    Path("pool").mkdir()
    draw = np.random.default_rng(0)
    for shard in range(SHARDS):
        with tarfile.open(f"pool/{shard:06d}.tar", "w") as tar:
            for number in range(EACH):
                buffer = io.BytesIO()
                Image.fromarray(draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(buffer, "PNG")
                member = tarfile.TarInfo(f"{shard}-{number}.png")
                member.size = buffer.tell()
                tar.addfile(member, io.BytesIO(buffer.getvalue()))
        # what is held out of a shard depends on it
        os.utime(f"pool/{shard:06d}.tar", (1e9, 1e9))


@dataclass(frozen=True)
class Made:
    """What a run has made until it begins to train.

    told: the shards that the ranks were told to share, for each teacher, None where they were told nothing; views: that
    rank 0 and the others were asked about; shares: of the cores that rank 0 had when it was asked.
    """

    told: list[list[int]] | None
    views: tuple[int, int]
    shares: list[int]


@pytest.fixture
def labelled(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Made]:
    """labelled(nproc, teacher=…): let a run of so many ranks make what is missing, and end it before the training."""

    def make(nproc: int, teacher: Any = BRIGHT) -> Made:
        told: list[dict[str, Any]] = []
        tell = Crew.tell

        def note(crew: Crew, **message: Any) -> None:
            if "train" in message:
                raise AllLabelled
            told.append(message)
            tell(crew, **message)

        Path("shared.yaml").write_text(json.dumps(recipe(teacher)))
        Path("asked.log").unlink(missing_ok=True)
        with monkeypatch.context() as patch:
            patch.setattr(Crew, "tell", note)
            with pytest.raises(AllLabelled):
                engine.run("shared.yaml", "run", nproc=nproc, trust_teacher=True, rerun=True)
        lines = Path("asked.log").read_text().splitlines() if Path("asked.log").exists() else []
        asked = [tuple(map(int, line.split())) for line in lines]
        own = [(count, share) for pid, count, share in asked if pid == os.getpid()]
        views = sum(count for count, _ in own), sum(count for pid, count, _ in asked if pid != os.getpid())
        assert len(told) <= 1
        return Made(told[0]["shards"] if told else None, views, [share for _, share in own])

    return make


def recipe(teacher: Any = BRIGHT) -> dict[str, Any]:
    return {**RECIPE, "stages": {"distill": {**RECIPE["stages"]["distill"], "teacher": teacher}}}


def pool() -> Samples:
    """What is trained on."""
    Path("pool.yaml").write_text(json.dumps(recipe()))
    return make_plan(read_recipe("pool.yaml")).data.named(("unlabeled",))


def files() -> dict[Path, bytes]:
    """The label files of the pool, in the order of its shards."""
    found = [path for name in pool().shard_ids for path in sorted(Path("store").glob(f"*/{name[:32]}.safetensors"))]
    return {path: path.read_bytes() for path in found}


def views(*shards: int) -> int:
    return VIEWS * sum(int(pool().shard_sizes[shard]) for shard in shards)


def test_both_make_half_of_what_is_missing_whichever_shards_these_are(labelled):
    alone = labelled(1)
    assert alone.told is None
    whole, paths = files(), list(files())
    assert len(whole) == SHARDS
    for shard in (0, 2, 4):
        paths[shard].unlink()
    shared = labelled(2)
    assert shared.told == [[0, 2, 4]]
    assert shared.views == (views(0, 4), views(2))
    assert set(shared.shares) == {6}
    assert files() == whole


def test_damaged_files_are_named_once_and_shared_like_missing_ones(labelled):
    labelled(1)
    whole, paths = files(), list(files())
    for shard in (1, 3):
        paths[shard].write_bytes(b"damaged")
    shared = labelled(2)
    assert shared.told == [[1, 3]]
    assert shared.views == (views(1), views(3))
    assert files() == whole
    log = Path("run", "train.log").read_text()
    assert [log.count(f"warning: {path}") for path in paths] == [0, 1, 0, 1, 0]


def test_fewer_shards_than_ranks_are_made_by_rank_0_with_all_cores(labelled):
    labelled(1)
    whole, paths = files(), list(files())
    paths[3].unlink()
    lone = labelled(2)
    assert lone.told is None
    assert lone.views == (views(3), 0)
    assert lone.shares == [12]
    assert files() == whole


def test_of_several_teachers_each_has_its_own_missing_shards(labelled):
    labelled(1)
    whole, paths = files(), list(files())
    for shard in (0, 1, 2, 4):
        paths[shard].unlink()
    both = labelled(2, [BRIGHT, DARK])
    assert both.told == [[0, 1, 2, 4], [0, 1, 2, 3, 4]]
    assert both.views[1] == views(1, 4) + views(1, 3)
    assert whole.items() < files().items()
    assert len(files()) == 2 * SHARDS
    for path in (paths[0], *[path for path in files() if path not in whole][:2]):
        path.unlink()
    again = labelled(2, [BRIGHT, DARK])
    assert [len(shards) for shards in again.told] == [0, 2]
    assert len(files()) == 2 * SHARDS


def test_what_is_there_already_is_asked_of_nobody(labelled):
    labelled(2)
    done = labelled(2)
    assert (done.told, done.views) == (None, (0, 0))


def test_the_progress_says_whose_part_it_is(labelled):
    labelled(2)
    lines = [line for line in Path("run", "train.log").read_text().splitlines() if "labelling pool" in line]
    assert lines
    assert all("rank 0's part of 2" in line for line in lines)
