"""Whatever the user gets wrong: one message with place, wanted and got; an exit code; nothing half written."""

from __future__ import annotations

import signal

import pytest

POOL = "builtin:shapes?count=16&size=32&seed=1"
LABELED = "builtin:shapes?count=16&size=32&seed=2"


def untouched(ssld) -> None:
    """Nothing was made for the run."""
    assert not (ssld.folder / "runs").exists()


def unspent(ssld) -> None:
    """No stage has begun, and no temporary file is left."""
    left = {path.name for path in (ssld.folder / "runs" / "tiny").iterdir()}
    assert left <= {"recipe.yaml", "run.json", "run.lock", "train.log", "metrics.jsonl", "labels.store"}
    assert not list((ssld.folder / "runs" / "tiny").rglob("*.safetensors")), "nothing is labelled or trained"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("epochs: 2", "epoch: 2", ("tiny.yaml:13:", "stages.teach.epoch: unknown key, did you mean epochs?")),
        ("batch_size: 8", "batch_size: '8'", ("stages.teach.batch_size: expected a whole number", "got '8'")),
        ("seed: 3", "seed: 3\nseed: 4", ("tiny.yaml:4:1: seed: given twice, first at line 3",)),
        ("kind: pretrain", "kind: pretrian", ("stages.teach.kind", "unknown stage kind 'pretrian'", "pretrain?")),
        ("from: distill", "from: distil", ("stages.finetune", "got 'distil'", "did you mean distill?")),
        ("{stage: teach}", "{stage: fixres}", ("the stages wait for each other", "distill", "out of the circle")),
        (
            "{stage: teach}",
            "{}",
            ("stages.distill.teacher", "expected exactly one of stage, network"),
        ),
        ("  labeled: builtin", "  test: builtin", ("stages.teach.data: expected a source", "add data.labeled")),
        ("data: labeled", "data: unlabeled", ("stages.teach.data: expected labeled, got unlabeled",)),
        ("stages:", "stages: {", ("tiny.yaml:", "not YAML")),
    ],
)
def test_a_recipe_with_a_fault(ssld, old, new, said):
    file = ssld.folder / "tiny.yaml"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))
    refused = ssld("run", "tiny.yaml", code=2)
    for words in said:
        assert words in refused.err
    assert refused.out == ""
    untouched(ssld)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("stages.distil.epochs=3", ("-o stages.distil.epochs=3", "unknown key 'distil'", "did you mean distill?")),
        ("stages.distill.epochs=many", ("stages.distill.epochs", "expected a whole number", "got 'many'")),
        ("stages.distill.epochs", ("-o stages.distill.epochs", "expected key.path=value")),
        ("data.labeled=s3://bucket/train", ("s3://bucket/train", "expected a folder", "copy the data")),
        ("data.labeled=builtin:shape", ("builtin:shape", "did you mean shapes?")),
        ("images.train=[RandCrop]", ("images.train", "RandCrop")),
    ],
)
def test_a_wrong_override(ssld, override, said):
    refused = ssld("run", "tiny.yaml", "-o", override, code=2)
    for words in said:
        assert words in refused.err
    untouched(ssld)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("stages.teach.network=MobileNetV3_small_x35", ("unknown student", "MobileNetV3_small_x0_35")),
        ("stages.distill.loss=jss", ("unknown loss 'jss'", "did you mean js?")),
        ("stages.distill.teacher={plugin: oracle}", ("unknown teacher 'oracle'", "network, onnx, stage")),
    ],
)
def test_an_unknown_plug_in_is_refused_by_the_plan(ssld, override, said):
    refused = ssld("plan", "tiny.yaml", "-o", override, code=2)
    for words in said:
        assert words in refused.err


WRONG_OPTION = "stages.teach.network={name: MobileNetV3_small_x0_35, stem_strid: 1}"


def test_an_unknown_option_of_a_student_is_refused_before_anything_is_spent(ssld):
    refused = ssld("run", "tiny.yaml", "-o", WRONG_OPTION, code=2)
    assert "student 'MobileNetV3_small_x0_35' of package ssld" in refused.err
    assert "stem_strid: unknown option, did you mean stem_stride? (got 1)" in refused.err
    unspent(ssld)


def test_no_command_that_continues_is_printed_where_it_would_end_the_same_way(ssld):
    assert "continue:" not in ssld("run", "tiny.yaml", "-o", WRONG_OPTION, code=2).err


def test_all_faults_come_at_once(ssld):
    refused = ssld("run", "tiny.yaml", "-o", "seed=-1", "-o", "stages.teach.epochs=0", "-o", "name=A b", code=2)
    assert refused.err.startswith("Error: tiny.yaml: 3 faults\n")
    for words in ("seed: expected", "stages.teach.epochs: expected", "name: expected"):
        assert words in refused.err
    untouched(ssld)


@pytest.mark.parametrize("name", ["nowhere.yaml", "mobilenetv3_sld"])
def test_a_recipe_that_is_not_there(ssld, name):
    refused = ssld("run", name, code=2)
    assert f"expected a recipe file or the name of a shipped recipe, got '{name}'" in refused.err
    assert "mobilenetv3_ssld" in refused.err


def nothing(ssld, photos):
    return "data.labeled=nowhere", ("nowhere: expected a folder or a file, got nothing",)


def empty(ssld, photos):
    (ssld.folder / "empty").mkdir()
    return "data.unlabeled=empty", ("empty: expected images", "got a folder without any")


def flat(ssld, photos):
    photos("flat", LABELED, layout="{number:03d}")
    return "data.labeled=flat", ("flat: expected one sub-folder per class, got 16 images and no sub-folder",)


def beyond(ssld, photos):
    photos("flat", LABELED, layout="{number:03d}")
    (ssld.folder / "flat.txt").write_text("000.png 0\n001.png 2\n002.png 1\n")
    (ssld.folder / "two.txt").write_text("cat\ndog\n")
    source = "{list: flat.txt, root: flat, classes: two.txt}"
    return f"data.labeled={source}", ("flat.txt:2: expected a label in [0, 1]", "two.txt", "got 2")


def missing(ssld, photos):
    photos("flat", LABELED, layout="{number:03d}")
    (ssld.folder / "flat.txt").write_text("000.png 0\ngone.png 1\n")
    return "data.labeled={list: flat.txt, root: flat}", ("flat.txt: expected every file", "line 2: gone.png")


def renamed(ssld, photos):
    photos("train", LABELED).joinpath("star").rename(ssld.folder / "train" / "stern")
    photos("val", LABELED)
    return (
        "data={unlabeled: val, labeled: train, validation: val}",
        ("data.validation: expected the 8 classes of data.labeled", "expected 'stern', got 'star'"),
    )


def reordered(ssld, photos):
    photos("flat", LABELED, layout="{number:03d}")
    (ssld.folder / "flat.txt").write_text("000.png 0\n001.png 1\n")
    (ssld.folder / "one.txt").write_text("cat\ndog\n")
    (ssld.folder / "other.txt").write_text("dog\ncat\n")
    labeled, validation = (f"{{list: flat.txt, root: flat, classes: {name}.txt}}" for name in ("one", "other"))
    return (
        f"data={{unlabeled: flat, labeled: {labeled}, validation: {validation}}}",
        ("first difference is at label 0: expected 'cat', got 'dog'", "same names in another order"),
    )


@pytest.mark.parametrize("make", [nothing, empty, flat, beyond, missing, renamed, reordered])
def test_data_that_are_not_what_the_recipe_says(ssld, photos, make):
    override, said = make(ssld, photos)
    refused = ssld("run", "tiny.yaml", "-o", override, code=65)
    for words in said:
        assert words in refused.err
    untouched(ssld)


def test_a_damaged_labeled_image_is_named(ssld, photos):
    victim = sorted(photos("train", LABELED).rglob("*.png"))[3]
    victim.write_bytes(b"\x89PNG\r\n\x1a\nbut no more")
    words = ("-o", "data.labeled=train", "-o", "data.validation={split: 0.5}", "-o", "stages.teach.epochs=6")
    refused = ssld("run", ssld.recipe("teach"), *words, code=65)
    assert str(victim.relative_to(ssld.folder)) in refused.err
    assert "expected at most 0 damaged images, got 1" in refused.err
    assert not list((ssld.folder / "runs" / "tiny").rglob(".*"))


def test_eval_refuses_data_with_the_classes_in_another_order(ssld, reference, photos):
    photos("val", LABELED)
    refused = ssld("eval", reference.directory / "fixres" / "latest", "val", code=65)
    assert "same names in another order" in refused.err


def test_weights_of_another_network_do_not_teach(ssld, reference):
    weights = reference.directory / "teach" / "latest" / "student.safetensors"
    teacher = f"{{network: MobileNetV3_small_x0_5, weights: {weights}}}"
    refused = ssld("run", "tiny.yaml", "-o", f"stages.distill.teacher={teacher}", code=65)
    assert f"{weights} for the teacher MobileNetV3_small_x0_5: expected the " in refused.err
    assert "in the network, " in refused.err
    assert "in the file" in refused.err
    unspent(ssld)


def test_weights_of_another_network_are_no_start(ssld, reference):
    weights = reference.directory / "teach" / "latest" / "student.safetensors"
    words = ("-o", f"stages.finetune.from={weights}", "-o", "stages.finetune.student=MobileNetV3_small_x0_5")
    refused = ssld("run", ssld.recipe("teach", "finetune"), *words, "--trust-teacher", code=65)
    assert f"{weights} (MobileNetV3_small_x0_5), which finetune starts from: expected the " in refused.err
    assert "in the network, " in refused.err
    unspent(ssld)


@pytest.mark.parametrize(
    ("override", "code"),
    [
        ("stages.distill.teacher={network: ResNet50_vd, weights: net.pdparams}", 65),
        ("stages.finetune.from=net.pdparams", 2),
    ],
)
def test_a_pickle_is_refused(ssld, override, code):
    (ssld.folder / "net.pdparams").write_bytes(b"\x80\x04cposix\nsystem\n")
    refused = ssld("run", "tiny.yaml", "-o", override, code=code)
    assert "expected" in refused.err
    assert ".safetensors" in refused.err
    assert "net.pdparams" in refused.err


@pytest.fixture
def installed(ssld):
    """Install a distribution that offers one entry point, in a folder that Python searches."""
    site = ssld.folder / "site"
    ssld.extra["PYTHONPATH"] = str(site)

    def install(name: str, group: str, entry: str) -> None:
        info = site / f"{name}-1.5.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.5\n")
        (info / "entry_points.txt").write_text(f"[{group}]\n{entry}\n")

    return install


def test_a_plug_in_that_fails_to_import(ssld, installed):
    installed("acme-teachers", "ssld.teachers", "oracle = acme_oracle:make")
    (ssld.folder / "site" / "acme_oracle.py").write_text("import a_library_that_is_not_there\n")
    assert "acme-teachers" in ssld("list", "teachers").out
    refused = ssld("run", "tiny.yaml", "-o", "stages.distill.teacher={plugin: oracle}", code=70)
    assert "teacher 'oracle' of package acme-teachers 1.5 failed to load: ModuleNotFoundError" in refused.err
    assert "a_library_that_is_not_there" in refused.err
    unspent(ssld)


def test_a_plug_in_named_twice(ssld, installed):
    installed("acme-stages", "ssld.stages", "distill = acme:stage")
    refused = ssld("run", "tiny.yaml", code=70)
    assert "two packages offer the stage kind 'distill': acme-stages 1.5 and ssld 0.1.0" in refused.err
    assert "uninstall all but one" in refused.err
    untouched(ssld)


def test_a_run_directory_belongs_to_one_process(ssld):
    run = ssld.folder / "runs" / "tiny"
    first = ssld.start("run", "tiny.yaml")
    ssld.until((run / "train.log").exists, first)
    refused = ssld("run", "tiny.yaml", code=75)
    assert f"runs/tiny is in use by pid {first.pid} on host " in refused.err
    assert "another --out" in refused.err
    assert first.poll() is None, "the first goes on"
    ssld.stop(first, signal.SIGKILL)
    first.wait()
    assert ssld("status").out.startswith("stage")


def test_no_run_below_a_file(ssld):
    (ssld.folder / "file").write_text("mine")
    refused = ssld("run", "tiny.yaml", "--out", "file/run", code=73)
    assert "cannot write file/run: a file is where a directory is needed" in refused.err
    assert "choose a directory you can write (--out" in refused.err
    assert (ssld.folder / "file").read_text() == "mine"


def test_a_log_that_cannot_be_written_is_said_once_and_costs_no_weights(ssld, reference):
    run = ssld.folder / "runs" / "tiny"
    run.mkdir(parents=True)
    (run / "train.log").symlink_to("/dev/full")  # as when others fill the disk between two checkpoints
    done = ssld("run", "tiny.yaml", "--trust-teacher")
    assert done.err.count("runs/tiny/train.log: lines are lost: No space left on device") == 1
    assert ssld.weights(run) == reference.weights


# Disks ---------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("mounting")
def test_no_run_on_a_medium_that_is_read_only(ssld):
    (ssld.folder / "disk").mkdir()
    script = "mount -t tmpfs -o ro none disk && exec ssld run tiny.yaml --out disk/run"
    refused = ssld.wait(ssld.start(program=("unshare", "-Urm", "sh", "-c", script)), 73)
    assert "cannot write disk/run: Read-only file system" in refused.err
    assert "choose a directory you can write (--out" in refused.err


@pytest.mark.usefixtures("mounting")
def test_a_full_disk_ends_the_run_and_what_was_saved_goes_on(ssld, reference):
    (ssld.folder / "disk").mkdir()
    size = sum(file.stat().st_size for file in (reference.directory / "teach" / "latest").iterdir())
    # room for the two checkpoints that stay, not for a third one beside them
    mount = f"mount -t tmpfs -o size={size * 5 // 2} none disk"
    recipe = ssld.recipe("teach")
    script = f"{mount} && ssld run {recipe} --out disk/run; code=$?; cp -a disk/run saved; exit $code"
    refused = ssld.wait(ssld.start(program=("unshare", "-Urm", "sh", "-c", script)), 74)
    assert "No space left on device" in refused.err
    assert "bytes are needed and" in refused.err
    assert refused.err.endswith("continue: ssld resume --out disk/run\n")
    saved = ssld.folder / "saved"
    assert {path.name for path in (saved / "teach").iterdir()} == {"latest", "step-00000003", "step-00000006"}
    assert not list(saved.rglob(".*"))
    done = ssld("resume", "--out", "saved")
    assert "going on after step 6" in done.err
    assert ssld.weights(saved) == {"teach": reference.weights["teach"]}
