"""Disks, streams and files that fail under the installed command: an exit code, a message, and nothing that is lost."""

from __future__ import annotations

import hashlib
import io
import os
import re
import resource
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from ssld import checkpoint
from ssld.data.sources import open_source

NETWORK = "MobileNetV3_small_x0_35"
HEAD = """\
name: small
images:
  resolution: 16
  train: [RandCropImage: {scale: [0.5, 1.0]}, RandFlipImage, NormalizeImage]
  eval: [ResizeImage: {resize_short: 16}, CropImage, NormalizeImage]
data:
  unlabeled: "pool/shard-{000000..000001}.tar"
  labeled: builtin:shapes?count=16&size=16&classes=4
  validation: builtin:shapes?count=8&size=16&classes=4&seed=1
stages:
"""
TEACH = f"""\
  teach:
    kind: pretrain
    network: {NETWORK}
    data: labeled
    epochs: 2
    batch_size: 8
    eval_interval: 2
    save_steps: 1
"""
DISTILL = f"""\
  distill:
    kind: distill
    teacher: {{network: {NETWORK}, weights: teacher.safetensors}}
    student: {NETWORK}
    data: unlabeled
    epochs: 1
    batch_size: 8
    labels: {{views: 1, top_k: 2, store: store}}
"""
RUN = ("run", "small.yaml", "--out", "run")
RARELY = ("-o", "stages.teach.save_steps=4")


def write_shard(path: Path, seed: int) -> None:
    """64 images; which, the seed says."""
    drawn = open_source(f"builtin:shapes?count=64&size=16&classes=4&seed={seed}", labeled=False)
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for i in range(64):
            image = io.BytesIO()
            Image.fromarray(drawn.read(i)).save(image, "PNG")
            info = tarfile.TarInfo(f"{i:03d}.png")
            info.size = len(image.getvalue())
            tar.addfile(info, io.BytesIO(image.getvalue()))


def prepare(folder: Path, stage: str = TEACH) -> None:
    (folder / "small.yaml").write_text(HEAD + stage)
    for number in range(2):
        write_shard(folder / "pool" / f"shard-{number:06d}.tar", seed=number)


@dataclass(frozen=True)
class Trained:
    """A run of four steps that nothing disturbed."""

    run: Path
    weights: dict[str, str]


@pytest.fixture(scope="module")
def trained(command, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    ssld = command(tmp_path_factory.mktemp("trained"))
    prepare(ssld.folder)
    ssld(*RUN)
    return Trained(ssld.folder / "run", ssld.weights(ssld.folder / "run"))


@pytest.fixture
def small(ssld):
    """The command where the recipe lies."""
    prepare(ssld.folder)
    return ssld


@pytest.fixture
def copy(small, trained: Trained) -> Path:
    """A copy of the finished run."""
    return shutil.copytree(trained.run, small.folder / "run", symlinks=True)


def shell(ssld, script: str, code: int = 0):
    return ssld.wait(ssld.start(program=("bash", "-c", script)), code)


# A disk that takes no more --------------------------------------------------------------------------------------------


def test_a_limit_of_the_size_of_files_ends_a_run_that_goes_on_without_it(small, trained):
    # what Python compiles is cut as well, and would stay
    small.extra["PYTHONDONTWRITEBYTECODE"] = "1"
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (100_000, 100_000))
    failed = small.wait(small.start(*RUN, preexec_fn=limit), 74)
    assert "Error: cannot write run/teach/step-00000001: File too large" in failed.err
    assert not list((small.folder / "run").rglob("*.safetensors"))
    assert not list((small.folder / "run").rglob(".tmp-*"))
    shell(small, failed.continuation)
    assert small.weights(small.folder / "run") == trained.weights


def test_a_run_that_is_moved_stops_and_goes_on_where_it_is(small):
    run, moved = small.folder / "deep" / "er" / "run", small.folder / "moved"
    process = small.start("run", "small.yaml", "--out", run, "-o", "stages.teach.epochs=12", *RARELY)
    small.until((run / "teach" / "latest").exists, process)
    run.rename(moved)
    stopped = small.wait(process, 74)
    assert re.search(r"cannot write step \d+ of teach: expected the run in \S+/deep/er/run, got none", stopped.err)
    assert "continue:" not in stopped.err
    assert not run.exists()
    done = small("resume", "--out", "moved")
    assert "going on after step" in done.err
    assert done.table()[0]["state"] == "finished"


@pytest.mark.usefixtures("mounting")
def test_ranks_share_nothing_by_shared_memory_that_may_be_short(small, trained):
    """They use memory without a name, which no file system has to hold."""
    size = (trained.run / "teach" / "latest" / "student.safetensors").stat().st_size
    assert size > 2**20, "too little is shared for this test"
    mount = "mount -t tmpfs -o size=1m none /dev/shm"
    done = small.wait(
        small.start(program=("unshare", "-Urm", "sh", "-c", f"{mount} && exec ssld {' '.join(RUN)} --nproc 2"))
    )
    assert "on 2 ranks" in done.err
    assert done.table()[0]["state"] == "finished"


# Streams that take no more --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streams", ["2>/dev/full", ">&- 2>&- <&-"])
def test_a_screen_that_is_gone_costs_no_weights(small, trained, streams):
    shell(small, f"ssld {' '.join(RUN)} {streams}")
    assert small.weights(small.folder / "run") == trained.weights


def test_a_reader_that_wants_no_more_is_no_fault(small, copy):
    assert small("status", copy).out.count("\n") == 2
    done = shell(small, "ssld status run | head -n 0")
    assert done.err == "run\n"


def test_a_table_that_cannot_be_written_is_said(small, copy):
    failed = shell(small, "ssld status run >/dev/full", 74)
    assert "Error: cannot write standard output: No space left on device" in failed.err


def test_a_message_that_cannot_be_written_leaves_the_exit_code(small):
    shell(small, "ssld resume --out nowhere 2>/dev/full", 2)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="only Linux says where descriptors lead")
def test_closed_streams_lead_nowhere(small):
    script = f"exec ssld {' '.join(RUN)} -o stages.teach.epochs=40 >&- 2>&- <&-"
    process = small.start(program=("bash", "-c", script))
    small.until((small.folder / "run" / "teach").exists, process)
    places = [os.readlink(f"/proc/{process.pid}/fd/{number}") for number in range(3)]
    small.stop(process)
    assert places == ["/dev/null"] * 3


# What changed or is damaged -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [("resume",), RUN[:2]], ids=["resume", "run"])
def test_where_all_checkpoints_are_damaged_nothing_begins_anew(small, copy, words):
    for manifest in copy.glob("teach/step-*/manifest.json"):
        manifest.write_bytes(manifest.read_bytes()[:-9])
    before = small.snapshot(copy / "teach")
    refused = small(*words, "--out", "run", code=65)
    assert re.search(r"expected a whole checkpoint in run/teach, got 2 that are all damaged \(step 3, 4\)", refused.err)
    assert "restore one from a copy, or delete run/teach to begin this stage anew" in refused.err
    assert small.snapshot(copy / "teach") == before


@pytest.mark.parametrize(
    ("key", "said"), [("learning_rate=0.5", "0.5"), ("batch_size=4", "8 → 4"), ("epochs=3", "2 → 3")]
)
def test_another_number_in_the_recipe_is_said(small, copy, key, said):
    refused = small(*RUN, "-o", f"stages.teach.{key}", code=78)
    assert re.search(rf"stages\.teach\.{key.partition('=')[0]}: .*{said}", refused.err)


def test_a_loss_that_leaves_the_numbers_stops_before_it_is_saved(small):
    lost = small(*RUN, "-o", "stages.teach.learning_rate=1.0e+20", "-o", "stages.teach.epochs=8", code=65)
    (step,) = re.findall(r"Error: .*?(?:loss of|after) step (\d+)", lost.err)
    saved = [load_file(file) for file in (small.folder / "run").rglob("student.safetensors")]
    assert all(np.isfinite(array).all() for weights in saved for array in weights.values())
    assert all(saved < int(step) for saved in checkpoint.steps(small.folder / "run" / "teach"))


@pytest.fixture
def labelled(small, trained):
    """Labels of two shards by the weights of a file; a function that makes what is missing and says how many it was."""
    shutil.copy(trained.run / "teach" / "latest" / "student.safetensors", small.folder / "teacher.safetensors")
    (small.folder / "small.yaml").write_text(HEAD + DISTILL)

    def label() -> tuple[int, Path]:
        (row,) = small("label", "small.yaml", "--trust-teacher").table()
        return int(row["shards written"]), small.folder / row["labels"]

    assert label()[0] == 2
    return label


def sums(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.glob("*.safetensors")}


def test_labels_belong_to_every_bit_of_the_teacher_and_of_the_shards(small, labelled: Callable[[], tuple[int, Path]]):
    written, first = labelled()
    assert written == 0
    before, weights = sums(first), small.folder / "teacher.safetensors"
    sound = weights.read_bytes()
    weights.write_bytes(sound[:-4] + bytes([sound[-4] ^ 1]) + sound[-3:])
    written, second = labelled()
    assert (written, second != first) == (2, True)
    weights.write_bytes(sound)
    write_shard(small.folder / "pool" / "shard-000001.tar", seed=7)
    written, third = labelled()
    assert (written, third) == (1, first)
    after = sums(first)
    assert {name: after[name] for name in before} == before
    assert len(after) == 3
