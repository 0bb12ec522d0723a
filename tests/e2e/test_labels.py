"""Soft labels that are kept: the teacher is asked once, whatever ends, shares or damages the work."""

from __future__ import annotations

import hashlib
import json
import re
import resource
import shutil
import signal
import subprocess
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from ssld.seeds import derive

# The cheapest teacher there is. It writes down the hash of every image that it is shown, so that a test knows what it
# was asked; SECONDS makes it slow enough to be killed at a chosen batch, DRIFT makes it another one by the same name.
TEACHER = '''\
import hashlib, os, time
import numpy as np
from ssld.contracts import TeacherSpec

class Quarters:
    """Logits for four classes from the mean brightness of the four quarters of an image."""

    def __init__(self, scale):
        self.scale = scale
        self.spec = TeacherSpec(8, hashlib.sha256(f"quarters {scale}".encode()).hexdigest(), mean=None, std=None)

    def predict(self, images):
        with open("asked.log", "a") as log:
            log.write("".join(hashlib.sha256(image.tobytes()).hexdigest() + "\\n" for image in images))
        time.sleep(float(os.environ.get("SECONDS", 0)))
        means = images.reshape(len(images), 2, 4, 2, 4, 3).mean(axis=(2, 4, 5)).reshape(len(images), 4)
        return (means / 32 * self.scale + float(os.environ.get("DRIFT", 0)) * np.arange(4)).astype(np.float32)

def quarters(scale: float = 1.0):
    return Quarters(scale)
'''
POOL = "builtin:shapes?count=448&size=16&classes=4&seed=1"
SIZES = (124, 124, 124, 62)
"""Images in the four shards of the pool, less the 32nd part that is held out of each."""
PASSES = 2 * sum(SIZES)
HELD_OUT = 448 - sum(SIZES)
VALIDATION = 48
RECIPE = """\
# A student of a teacher that costs nothing; its soft labels lie beside the runs.
name: kept
seed: 3
images:
  resolution: 16
  train: [RandCropImage: {scale: [0.5, 1.0]}, RandFlipImage, NormalizeImage]
  eval: [ResizeImage: {resize_short: 16}, CropImage, NormalizeImage]
data:
  unlabeled: "pool/shard-{000000..000003}.tar"
  validation: builtin:shapes?count=48&size=16&classes=4&seed=3
stages:
  distill:
    kind: distill
    teacher: {plugin: quarters}
    student: MobileNetV3_small_x0_35
    data: unlabeled
    epochs: 2
    batch_size: 64
    learning_rate: 0.05
    eval_interval: 2
    save_steps: 5
    labels: {views: 2, top_k: 3, store: store}
"""
LABEL = ("label", "kept.yaml", "--trust-teacher")
RUN = ("run", "kept.yaml", "--trust-teacher")
SHARDS = len(SIZES)


def option(**values: object) -> tuple[str, ...]:
    """Overrides of keys of the stage."""
    return tuple(word for key, value in values.items() for word in ("-o", f"stages.distill.{key}={value}"))


def asked(ssld) -> list[str]:
    """The hash of every image that the teacher was shown in the test's folder so far."""
    log = ssld.folder / "asked.log"
    return log.read_text().split() if log.is_file() else []


def files(store: Path) -> dict[str, str]:
    """sha256 of every label file below a folder."""
    return {
        str(file.relative_to(store)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(store.rglob("*.safetensors"))
    }


def of_the_pool(store: Path) -> Path:
    """The directory with the labels of the training views, as its description says."""
    (found,) = (path for path in store.iterdir() if json.loads((path / "labels.json").read_text())["views"] == 2)
    return found


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that is to Python what an installed package with this teacher is."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "quarters.py").write_text(TEACHER)
    about = folder / "quarters-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: quarters\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[ssld.teachers]\nquarters = quarters:quarters\n")
    return folder


@pytest.fixture(scope="module")
def pool(command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """448 images in shards of 128 and a rest."""
    ssld = command(tmp_path_factory.mktemp("pool"))
    ssld("pack", POOL, "pool", "--unlabeled", "--shard-size", "128")
    return ssld.folder / "pool"


@dataclass(frozen=True)
class Kept:
    """What one undisturbed process makes: label files, and weights; what it said, and what it asked its teacher."""

    folder: Path
    table: list[dict[str, str]]
    labelled: dict[str, str]
    asked_to_label: list[str]
    files: dict[str, str]
    asked_to_run: list[str]
    weights: dict[str, str]


@pytest.fixture(scope="module")
def kept(command, site: Path, pool: Path, tmp_path_factory: pytest.TempPathFactory) -> Kept:
    """`ssld label`, and after it `ssld run`, in one folder."""
    ssld = command(tmp_path_factory.mktemp("kept"))
    prepare(ssld, site, pool)
    table = ssld(*LABEL).table()
    labelled, first = files(ssld.folder / "store"), asked(ssld)
    ssld(*RUN)
    weights = ssld.weights(ssld.folder / "runs" / "kept")
    return Kept(ssld.folder, table, labelled, first, files(ssld.folder / "store"), asked(ssld)[len(first) :], weights)


def prepare(ssld, site: Path, pool: Path) -> None:
    """Install the teacher, and put the recipe and the pool into the folder."""
    ssld.extra["PYTHONPATH"] = str(site)
    (ssld.folder / "kept.yaml").write_text(RECIPE)
    (ssld.folder / "pool").symlink_to(pool)


@pytest.fixture
def taught(ssld, site: Path, pool: Path):
    """The command in a folder with the recipe, where the teacher is installed and nothing is labelled."""
    prepare(ssld, site, pool)
    return ssld


@pytest.fixture
def stored(taught, kept: Kept):
    """The same with a copy of all labels, but of no run."""
    shutil.copytree(kept.folder / "store", taught.folder / "store")
    return taught


# Once ----------------------------------------------------------------------------------------------------------------


def test_label_shows_every_view_of_the_pool_to_the_teacher_once(kept):
    (row,) = kept.table
    assert (row["stage"], row["shards written"], row["missing"]) == ("distill", str(SHARDS), "0")
    assert row["teacher"] == "the teacher plugin quarters (quarters 1.0)"
    directory = Path(row["labels"]).name
    assert sum(Path(name).parent.name == directory for name in kept.labelled) == SHARDS
    assert len(kept.asked_to_label) == VALIDATION + PASSES + HELD_OUT
    # a square that is drawn on one colour may look the same twice, after a crop and a flip
    assert len(set(kept.asked_to_label)) > 0.9 * len(kept.asked_to_label)


def test_a_run_from_labels_asks_the_teacher_nothing(kept):
    assert kept.asked_to_run == []


def test_label_again_writes_nothing_and_asks_nothing(stored, kept):
    (row,) = stored(*LABEL).table()
    assert (row["shards written"], row["missing"]) == ("0", "0")
    assert asked(stored) == []
    assert files(stored.folder / "store") == kept.files


# Killed and shared ---------------------------------------------------------------------------------------------------


def test_kill_in_the_middle_of_labelling_changes_no_byte_of_labels_or_weights(taught, kept):
    store = taught.folder / "store"
    taught.extra["SECONDS"] = "0.2"
    # images that the process is shown before it is killed: in the first shard, the second, that one again, the third
    for words, moment in ((LABEL, VALIDATION + 100), (LABEL, 2 * 124 + 100), (RUN, 200), (RUN, 2 * 124 + 50)):
        before, goal = files(store), len(asked(taught)) + moment
        process = taught.start(*words)
        taught.until(lambda goal=goal: len(asked(taught)) >= goal, process)
        taught.stop(process)
        process.wait()
        assert before.items() <= files(store).items() <= kept.files.items()
    left = PASSES - 2 * 124 * (len(list(of_the_pool(store).glob("*.safetensors"))))
    del taught.extra["SECONDS"]
    before = len(asked(taught))
    taught("resume")
    assert len(asked(taught)) - before <= left + HELD_OUT
    assert files(store) == kept.files
    assert taught.weights(taught.folder / "runs" / "kept") == kept.weights


@pytest.mark.parametrize("parts", [(), ("1/3", "2/3", "3/3")], ids=["the same", "slices"])
def test_processes_that_label_one_pool_at_once_make_what_one_makes(taught, kept, parts):
    taught.extra["SECONDS"] = "0.1"
    words = [("--part", part) for part in parts] or [(), ()]
    processes = [taught.start(*LABEL, *more) for more in words]
    rows = [taught.wait(process).table()[0] for process in processes]
    assert files(taught.folder / "store") == kept.labelled
    assert sum(int(row["shards written"]) for row in rows) == SHARDS, "of each shard, one process was the first"
    assert min(int(row["missing"]) for row in rows) == 0
    if parts:
        assert [row["shards written"] for row in rows] == ["2", "1", "1"]
    assert not list((taught.folder / "store").rglob(".tmp-*"))


def test_kill_in_the_middle_of_a_training_from_labels_changes_no_byte_of_the_weights(stored, kept):
    run = stored.folder / "runs" / "kept"
    process = stored.start(*RUN)
    stored.until(lambda: (run / "distill" / "step-00000005").is_dir(), process)
    stored.stop(process)
    process.wait()
    resumed = stored("resume")
    assert re.search(r"going on after step \d+", resumed.err)
    assert "warning" not in resumed.err
    assert stored.weights(run) == kept.weights
    assert asked(stored) == []


def test_a_signal_ends_labelling_with_whole_shards_kept(taught, kept):
    taught.extra["SECONDS"] = "0.1"
    process = taught.start(*LABEL)
    taught.until(lambda: len(asked(taught)) > VALIDATION + 2 * 124 + 64, process)
    taught.stop(process, signal.SIGTERM)
    stopped = taught.wait(process, 143)
    assert re.search(r"labelling: stopped after \d+ of \d+ views; whole shards are kept", stopped.err)
    made = files(taught.folder / "store")
    assert 1 < len(made) < len(kept.labelled)
    assert made.items() <= kept.labelled.items()


# Shared by students --------------------------------------------------------------------------------------------------


OTHERS = {
    "student": option(student="MobileNetV3_small_x0_5"),
    "seed": ("-o", "seed=4"),
    "resolution": option(resolution=24),
}


@pytest.mark.parametrize("what", OTHERS)
def test_the_plan_says_that_the_next_student_needs_no_teacher_and_what_that_saves(stored, what):
    label, stage = stored("plan", "kept.yaml", *OTHERS[what]).table()
    assert (label["kind"], stage["kind"]) == ("label", "distill")
    assert f"skip: all {SHARDS} shards are in " in label["what and why"]
    assert f"no pass of the teacher instead of {sum(SIZES) * 2:,} online" in label["what and why"]


def test_the_next_student_asks_no_teacher(stored, kept):
    stored(*RUN, *(word for words in OTHERS.values() for word in words), *option(epochs=1))
    assert asked(stored) == []
    assert files(stored.folder / "store") == kept.files


def test_the_plan_counts_what_is_missing(stored, kept):
    directory = of_the_pool(stored.folder / "store")
    sizes = {path: path.stat().st_size for path in directory.glob("*.safetensors")}
    smallest = min(sizes, key=sizes.__getitem__)
    smallest.unlink()
    what = stored("plan", "kept.yaml").table()[0]["what and why"]
    count, kilobytes = re.search(
        r"^run: 1 of 4 shards, ([\d,]+) passes of the teacher .*, ([\d.]+) kB in ", what
    ).groups()
    assert int(count) == 2 * SIZES[-1]
    assert float(kilobytes) * 1000 == pytest.approx(sizes[smallest], rel=0.3)
    stored(*LABEL)
    assert len(asked(stored)) == int(count)
    assert files(stored.folder / "store") == kept.files


def test_another_teacher_beside_the_first_is_the_only_one_that_is_asked(stored, kept):
    both = "[{plugin: quarters}, {plugin: quarters, scale: 2.0, weight: 3}]"
    rows = stored(*LABEL, *option(teacher=both)).table()
    assert [row["shards written"] for row in rows] == ["0", str(SHARDS)]
    assert Counter(asked(stored)) == Counter(kept.asked_to_label), "the second sees what the first saw"
    assert kept.files.items() <= files(stored.folder / "store").items()


# Online and stored ---------------------------------------------------------------------------------------------------

SMALL = ("--limit", "128")


def trained(ssld, out: str, **keys: object) -> tuple[float, dict[str, np.ndarray], list[str]]:
    """The loss of the last step, the weights, and what the teacher was shown, of two steps of a whole epoch each."""
    before = len(asked(ssld))
    ssld(*RUN, *SMALL, "--out", out, *option(warmup_epochs=0, learning_rate=1e-3, **keys))
    run = ssld.folder / out
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    loss = [event["loss"] for event in events if event["event"] == "step"][-1]
    return loss, load_file(run / "distill" / "latest" / "student.safetensors"), asked(ssld)[before:]


def test_stored_labels_of_all_classes_and_views_teach_what_an_online_teacher_does(taught):
    # with a step for each epoch, the two steps see views 0 and 1
    images = int(taught("plan", "kept.yaml", *SMALL).table()[-1]["images"])
    # an online teacher is shown the views of the training seed, so that is the seed of the labels too
    same = f"{{views: 3, top_k: 4, seed: {derive(3, 'distill')}}}"
    online = trained(taught, "online", batch_size=images, labels="online")
    stored = trained(taught, "stored", batch_size=images, labels=same)
    other = trained(taught, "other", batch_size=images, labels=f"{{views: 3, top_k: 4, seed: {derive(4, 'distill')}}}")

    # the same pixels, bit for bit; stored labels have a third view besides, which two epochs do not use
    assert not Counter(online[2]) - Counter(stored[2])
    assert len(set(online[2]) - set(other[2])) > images
    # the labels are rounded to 8 bits, and nothing else differs: the rate is low, so that little is made of it
    assert stored[0] == pytest.approx(online[0], abs=2e-3)
    assert distance(stored[1], online[1]) < 0.05 * distance(other[1], online[1])


def distance(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    return float(sum(np.sum((a[name].astype(np.float64) - b[name]) ** 2) for name in a) ** 0.5)


# Damaged and strange files -------------------------------------------------------------------------------------------


def test_label_files_that_are_not_what_they_should_be_are_named_and_made_again(stored, kept):
    store = stored.folder / "store"
    directory = of_the_pool(store)
    stored(*LABEL, *option(teacher="{plugin: quarters, scale: 2.0}", labels="{views: 2, top_k: 3, store: scale}"))
    stored(*LABEL, *option(labels="{views: 2, top_k: 3, seed: 1, store: seed}"))
    bit, cut, teacher, seed = sorted(directory.glob("*.safetensors"))
    before = len(asked(stored))
    for file, strangers in ((teacher, "scale"), (seed, "seed")):
        shutil.copy(of_the_pool(stored.folder / strangers) / file.name, file)
    cut.write_bytes(cut.read_bytes()[:-1])
    flip(bit)
    assert files(store) != kept.files

    done = stored(*RUN)
    warnings = [line for line in done.err.splitlines() if line.startswith("warning: ")]
    for file, said in (
        (bit, "is damaged: expected the content that its sha256 was made of, got another"),
        (cut, "is damaged: expected the header and the arrays of a label file"),
        (teacher, "the labels of another teacher, transform, seed or shard"),
        (seed, "the labels of another teacher, transform, seed or shard"),
    ):
        (line,) = (line for line in warnings if file.name in line)
        assert said in line
        assert str(file.relative_to(stored.folder)) in line
    assert len(warnings) == 4
    assert files(store) == kept.files
    assert stored.weights(stored.folder / "runs" / "kept") == kept.weights
    assert set(asked(stored)[before:]) <= set(kept.asked_to_label)


def flip(file: Path) -> None:
    """Turn one bit of a file's last labels."""
    content = bytearray(file.read_bytes())
    content[-10] ^= 4
    file.write_bytes(content)


def test_a_damaged_image_of_the_pool_has_no_label_and_no_part_in_training(taught, photos):
    folder = photos("photos", "builtin:shapes?count=60&size=16&classes=4&seed=1", suffix="jpg")
    victim = sorted(folder.rglob("*.jpg"))[31]
    victim.write_bytes(victim.read_bytes()[:200])
    words = ("-o", "data.unlabeled=photos", *option(batch_size=16, epochs=1))
    labelled = taught(*LABEL, *words)
    assert f"skipped, damaged: {victim.relative_to(taught.folder)}" in labelled.err
    before = len(asked(taught))
    done = taught(*RUN, *words)
    assert [row["state"] for row in done.table()] == ["finished"]
    assert len(asked(taught)) - before < 4, "at most what was held out of 60 images"


# Looking at labels ---------------------------------------------------------------------------------------------------


@pytest.fixture
def seen(kept: Kept, taught):
    """The run as well as its labels, to be damaged at will."""
    for name in ("store", "runs"):
        shutil.copytree(kept.folder / name, taught.folder / name, symlinks=True)
    return taught


def test_info_counts_files_and_bytes(seen):
    directory = of_the_pool(seen.folder / "store")
    rows = {row["labels"]: row for row in seen("labels", "info", "store").table()}
    assert set(rows) == {path.name for path in (seen.folder / "store").iterdir()}
    row = rows[directory.name]
    assert (row["views"], row["top-k"], row["temperature"], row["files"]) == ("2", "3", "1", str(SHARDS))
    assert row["views of"] == "8 px, RandCropImage, RandFlipImage"
    assert row["teacher"] == "the teacher plugin quarters (quarters 1.0)"
    bytes_there = sum(path.stat().st_size for path in directory.iterdir())
    assert row["size"] == f"{bytes_there / 1000:.3g} kB"


def test_verify_asks_the_teacher_about_a_sample_and_finds_it_as_it_was(seen):
    rows = {row["labels"]: row for row in seen("labels", "verify", "store", "--run", "runs/kept").table()}
    row = rows[of_the_pool(seen.folder / "store").name]
    assert (row["files"], row["images asked"], row["views"]) == (str(SHARDS), "64", "128")
    assert float(row["same top-1"]) >= 0.99
    assert 0 <= float(row["KL"]) < 1e-3
    assert float(row["largest difference"]) < 0.02


def test_verify_names_a_teacher_that_answers_otherwise_than_it_did(seen):
    seen.extra["DRIFT"] = "0.2"
    refused = seen("labels", "verify", "store", "--run", "runs/kept", code=65)
    directory = of_the_pool(seen.folder / "store")
    (line,) = (line for line in refused.err.splitlines() if f"{directory.name}: " in line)
    assert "expected the teacher to agree with at least " in line
    assert "a KL of at most 0.001, got " in line


@pytest.mark.parametrize("damage", [flip, lambda file: file.write_bytes(file.read_bytes()[:1000])])
def test_verify_names_a_damaged_file_and_nothing_else(seen, damage):
    file = sorted(of_the_pool(seen.folder / "store").glob("*.safetensors"))[2]
    damage(file)
    refused = seen("labels", "verify", file.parent, "--run", "runs/kept", code=65)
    assert f"{file.relative_to(seen.folder)}" in refused.err
    assert "is damaged" in refused.err
    assert "Error: 1 faults:" in refused.err
    assert asked(seen) == []


def test_rm_takes_labels_away_and_nothing_else(seen, kept):
    directory = of_the_pool(seen.folder / "store")
    (directory / "notes.txt").write_text("somebody's own\n")
    runs = seen.snapshot(seen.folder / "runs")
    total = sum(path.stat().st_size for path in directory.iterdir())
    done = seen("labels", "rm", directory, "--yes")
    assert "removed 1 directories of labels" in done.out
    assert [path.name for path in directory.iterdir()] == ["notes.txt"], total
    left = files(seen.folder / "store")
    assert left == {name: sha for name, sha in kept.files.items() if not name.startswith(directory.name)}
    assert seen.snapshot(seen.folder / "runs") == runs


def test_rm_without_an_answer_removes_nothing(seen, kept):
    seen("labels", "rm", "store", code=1)
    assert files(seen.folder / "store") == kept.files


@pytest.mark.parametrize("verb", ["info", "verify", "rm"])
def test_where_no_labels_are_the_place_is_named(taught, verb):
    refused = taught("labels", verb, "nowhere", code=65)
    assert "nowhere: expected soft labels" in refused.err


# Refused before anything is spent ------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["0/3", "4/3", "x"])
def test_a_part_that_is_none(taught, part):
    refused = taught(*LABEL, "--part", part, code=2)
    assert f"expected I/N with I from 1 to N, such as 3/10, got '{part}'" in refused.err
    assert not (taught.folder / "store").exists()
    assert not (taught.folder / "runs").exists()


@pytest.mark.parametrize("words", [(), ("--stage", "teach"), ("--stage", "1")])
def test_a_recipe_that_keeps_no_labels(ssld, words):
    refused = ssld("label", "tiny.yaml", *words, code=2)
    assert "expected a stage that keeps soft labels, got " in refused.err
    assert "write labels: {views: 8, top_k: 10} for it" in refused.err
    assert not (ssld.folder / "runs").exists()


def test_a_teacher_that_is_still_to_be_trained(ssld):
    refused = ssld("label", "tiny.yaml", *option(labels="{views: 2}"), code=2)
    assert "expected the stage teach to be finished, got: not run yet; run it first, with ssld run" in refused.err
    assert not (ssld.folder / "runs" / "tiny" / "labels.store").exists()


def test_a_loss_of_another_temperature_than_the_labels(taught):
    hot = option(loss="{name: kl, temperature: 4}")
    refused = taught("plan", "kept.yaml", *hot, code=2)
    for words in ("labels.temperature: 1 and 3 of 4 classes", "top_k: 4", "labels: online"):
        assert words in refused.err
    for way_on in (
        option(labels="{views: 2, top_k: 4}"),
        option(labels="{views: 2, top_k: 3, temperature: 4}"),
        option(labels="online"),
    ):
        taught("plan", "kept.yaml", *hot, *way_on)


def test_more_classes_than_there_are_means_all(taught):
    taught(*LABEL, "--limit", "60", *option(labels="{views: 1, top_k: 10, store: store}"))
    rows = taught("labels", "info", "store").table()
    assert {row["top-k"] for row in rows} == {"4"}
    words = ("--limit", "60", *option(labels="{views: 1, top_k: 4, store: store}"))
    assert taught("plan", "kept.yaml", *words).table()[0]["what and why"].startswith("skip: ")


# A full disk ---------------------------------------------------------------------------------------------------------


def test_a_full_disk_keeps_what_is_committed_and_names_the_bytes_that_are_needed(taught, kept):
    inside = ["unshare", "--user", "--map-root-user", "--mount"]
    mount = "mount -t tmpfs -o size=20k tmpfs store"
    (taught.folder / "store").mkdir()
    if subprocess.run([*inside, "sh", "-c", mount], cwd=taught.folder, capture_output=True).returncode:
        pytest.skip("no file system of a chosen size can be mounted here")
    label = f"ssld {' '.join(LABEL)}"
    script = f"""
        {mount} || exit 1
        {label} || echo exit $?
        cp -r store full
        mount -o remount,size=10m store
        {label} || exit 1
        cp -r store room
    """
    done = taught.wait(taught.start(program=(*inside, "sh", "-c", script)))
    assert "exit 74" in done.out
    said = re.search(r"cannot write store/\S+: No space left on device; ([\d,]+) bytes are needed and ", done.err)
    needed = int(said[1].replace(",", ""))
    full = files(taught.folder / "full")
    assert full.items() < kept.labelled.items()
    pool = of_the_pool(kept.folder / "store").name
    missing = [name for name in kept.labelled if name.startswith(pool) and name not in full]
    # the smaller last shard is counted as if it were like the one that did not fit
    sizes = sum((kept.folder / "store" / name).stat().st_size for name in missing)
    assert sizes <= needed < 2 * sizes
    assert not list((taught.folder / "full").rglob(".tmp-*"))
    assert files(taught.folder / "room") == kept.labelled


def test_a_limit_of_the_size_of_files_ends_like_a_full_disk(taught, kept):
    # what the teacher writes is not what is limited
    (taught.folder / "asked.log").symlink_to("/dev/null")
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (2600, 2600))
    # Python keeps what it could write of a module's code, and everybody's next import fails
    taught.extra["PYTHONDONTWRITEBYTECODE"] = "1"
    failed = taught.wait(taught.start(*LABEL, preexec_fn=limit), 74)
    assert re.search(r"Error: cannot write store/\S+: File too large", failed.err)
    made = files(taught.folder / "store")
    assert made.items() <= kept.labelled.items()
    assert not list((taught.folder / "store").rglob(".tmp-*"))


def test_a_labelling_that_cannot_be_written_says_how_to_go_on(taught):
    (taught.folder / "asked.log").symlink_to("/dev/null")
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (2600, 2600))
    # Python keeps what it could write of a module's code, and everybody's next import fails
    taught.extra["PYTHONDONTWRITEBYTECODE"] = "1"
    failed = taught.wait(taught.start(*LABEL, preexec_fn=limit), 74)
    assert "ssld label" in failed.err
    assert "ssld resume" not in failed.err


# An ONNX teacher -----------------------------------------------------------------------------------------------------


def test_an_onnx_teacher_labels_and_teaches(taught):
    pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    write_onnx(onnx, taught.folder / "colours.onnx")
    words = ("--limit", "100", *option(teacher="{onnx: colours.onnx}", epochs=1))
    labelled = taught(*LABEL, *words).table()
    assert [row["missing"] for row in labelled] == ["0"]
    made = files(taught.folder / "store")
    done = taught(*RUN, *words)
    assert [row["state"] for row in done.table()] == ["finished"]
    assert made.items() <= files(taught.folder / "store").items()
    assert taught("labels", "verify", "store", "--run", "runs/kept").table()


def write_onnx(onnx, file: Path) -> None:
    """The mean colour of an image, times a matrix."""
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    matrix = helper.make_tensor("matrix", kind, [3, 4], np.arange(12.0) % 5 - 2)
    nodes = [
        helper.make_node("GlobalAveragePool", ["images"], ["means"]),
        helper.make_node("Flatten", ["means"], ["flat"]),
        helper.make_node("MatMul", ["flat", "matrix"], ["logits"]),
    ]
    shown = helper.make_tensor_value_info("images", kind, ["batch", 3, 8, 8])
    answer = helper.make_tensor_value_info("logits", kind, ["batch", 4])
    graph = helper.make_graph(nodes, "colours", [shown], [answer], [matrix])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    onnx.save(model, file)
