"""What each loss needs, and which stages the plan refuses because they cannot feed one."""

from __future__ import annotations

import json

import pytest

from ssld import distances
from ssld.errors import PluginError, RecipeError
from ssld.graph import make_plan
from ssld.needs import Needs, check, declares, needs_of, temperature
from ssld.recipe import read_recipe
from ssld.settings import TaughtSettings, Teachers, Term

CLASSES = 4


class Taught(TaughtSettings):
    teacher: Teachers | None = None


class Unlabeled(Taught):
    needs_labels = False


def term(name, **options):
    return {"name": name, **options}


def settings(loss, labels="online", model=Taught, teacher=({"stage": "teach"},), **more):
    values = {"kind": "any", "data": "labeled", "epochs": 1, "loss": loss, "labels": labels, **more}
    return model.model_validate({**values, "teacher": list(teacher) or None})


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        *[(term(name), Needs()) for name in ("js", "true_js", "kl", "ce", "dkd")],
        (term("kl", temperature=4), Needs(temperature=4)),
        (term("dkd", temperature=2.0, beta=8), Needs(temperature=2)),
        (term("dkd", target="labels"), Needs(dense=True, labels=True)),
        (term("dist"), Needs(dense=True)),
        (term("wsl"), Needs(dense=True, temperature=2)),
        (term("wsl", temperature=1), Needs()),
        (term("wsl", temperature=1.0, target="labels"), Needs(dense=True, labels=True)),
    ],
    ids=str,
)
def test_what_the_losses_of_ssld_need(setting, expected):
    assert needs_of(Term.model_validate(setting)) == expected


def test_a_stranger_declares_by_a_value_or_by_a_function_of_its_options(monkeypatch):
    def mine(student, teacher, temperature: float = 3.0, reach: int = 1): ...

    monkeypatch.setattr(distances, "js", mine)
    assert needs_of(Term(name="js")) == Needs(temperature=3)
    declares(Needs(dense=True))(mine)
    assert needs_of(Term(name="js")) == Needs(dense=True, temperature=3)
    declares(lambda options: Needs(labels=options["reach"] > 5))(mine)
    assert needs_of(Term.model_validate(term("js", reach=7))) == Needs(labels=True, temperature=3)
    assert needs_of(Term(name="js")) == Needs(temperature=3)


@pytest.mark.parametrize(
    "declared",
    [lambda options: options["nothing"], "dense", lambda options: None],
    ids=["an option that is not there", "text", "nothing"],
)
def test_a_stranger_that_cannot_say_what_it_needs_is_named(declared, monkeypatch):
    def mine(student, teacher): ...

    monkeypatch.setattr(distances, "js", declares(declared)(mine))
    with pytest.raises(PluginError, match=r"loss 'js' of package ssld .* cannot say what it needs"):
        needs_of(Term(name="js"))


KEPT = {"views": 1, "top_k": 3}
ALL = {"views": 1, "top_k": CLASSES}
REFUSED = [
    (
        "dist",
        KEPT,
        "loss dist: expected soft labels of all 4 classes, got labels.top_k: 3; keep all classes",
    ),
    ("wsl", KEPT, "loss wsl: expected soft labels of all 4 classes"),
    (["js", "dist"], KEPT, "loss dist: expected soft labels of all 4 classes"),
    (
        term("dkd", temperature=4),
        KEPT,
        "loss dkd: expected soft labels of its temperature, 4, got ",
    ),
    (
        "js",
        {**KEPT, "temperature": 2},
        "loss js: expected soft labels of its temperature, 1, got ",
    ),
    (
        ["js", term("kl", temperature=2)],
        {**KEPT, "temperature": 2},
        "loss js: expected soft labels of its temperature, 1, got labels.temperature: 2 and 3 of 4 classes; make them",
    ),
]


@pytest.mark.parametrize(("loss", "labels", "message"), REFUSED, ids=str)
def test_what_kept_labels_cannot_feed(loss, labels, message):
    with pytest.raises(ValueError, match="^" + message) as caught:
        check(settings(loss, labels), CLASSES)
    assert "top_k: 4" in str(caught.value)
    assert str(caught.value).endswith("or write labels: online")
    # both ways on
    check(settings(loss, {**labels, "top_k": CLASSES}), CLASSES)
    check(settings(loss), CLASSES)


@pytest.mark.parametrize(
    ("loss", "labels"),
    [
        ("js", KEPT),
        (["js", "dkd", "ce", term("wsl", temperature=1)], KEPT),
        ([term("kl", temperature=4), term("dkd", temperature=4)], {**KEPT, "temperature": 4}),
        (["dist", "wsl", term("kl", temperature=9)], ALL),
    ],
    ids=str,
)
def test_what_kept_labels_can_feed(loss, labels):
    check(settings(loss, labels), CLASSES)


def test_a_stage_that_reads_no_labels_cannot_feed_a_loss_that_does():
    loss = term("dkd", target="labels")
    check(settings(loss), CLASSES)
    with pytest.raises(ValueError, match="loss dkd: expected a stage that reads labels, got any, which reads none"):
        check(settings(loss, model=Unlabeled), CLASSES)
    check(settings("dkd", model=Unlabeled), CLASSES)


def test_teachers_asked_in_every_step_are_averaged_at_one_temperature():
    two = [{"stage": "a"}, {"stage": "b"}]
    mixed = ["js", term("kl", temperature=4)]
    with pytest.raises(ValueError, match=r"at which 2 teachers are averaged, got 1 of js, 4 of kl; make them equal"):
        check(settings(mixed, teacher=two), CLASSES)
    check(settings(mixed), CLASSES)
    check(settings(mixed, ALL, teacher=two), CLASSES)
    warm = settings([term("kl", temperature=4), term("dkd", temperature=4)], teacher=two)
    check(warm, CLASSES)
    assert temperature(warm) == 4
    assert temperature(settings("wsl")) == 2


def test_a_temperature_that_is_no_number_is_left_to_the_trial_of_the_loss():
    check(settings(term("kl", temperature="warm"), KEPT), CLASSES)


def test_without_a_teacher_no_loss_is_asked():
    check(settings("dist", KEPT, teacher=()), CLASSES)


RECIPE = {
    "name": "needy",
    "images": {"resolution": 16},
    "data": {
        "labeled": "builtin:shapes?size=16&classes=4&count=16",
        "validation": "builtin:shapes?size=16&classes=4&count=16&seed=1",
    },
    "stages": {
        "teach": {"kind": "pretrain", "network": "ResNet18_vd", "data": "labeled", "epochs": 1},
        "distill": {
            "kind": "distill",
            "teacher": {"stage": "teach"},
            "student": "ResNet18_vd",
            "data": "labeled",
            "epochs": 1,
        },
    },
}


@pytest.mark.parametrize(
    ("loss", "labels"),
    [(["js", term("dist", weight=2, beta=1)], KEPT), ("dist", KEPT), (term("wsl", target="labels"), "online")],
    ids=str,
)
def test_the_plan_refuses_at_the_stage(tmp_path, loss, labels):
    stages = {**RECIPE["stages"], "distill": {**RECIPE["stages"]["distill"], "loss": loss, "labels": labels}}
    file = tmp_path / "needy.yaml"
    file.write_text(json.dumps({**RECIPE, "stages": stages}, indent=1))
    placed = r"needy\.yaml:\d+:\d+: stages\.distill: loss (dist|wsl): expected"
    with pytest.raises(RecipeError, match=placed) as caught:
        make_plan(read_recipe(file), cache=tmp_path / "cache")
    line = int(str(caught.value).split(":")[1])
    assert "distill" in file.read_text().splitlines()[line - 1]


def prints(tmp_path, loss):
    file = tmp_path / "needy.yaml"
    stages = {**RECIPE["stages"], "distill": {**RECIPE["stages"]["distill"], "loss": loss}}
    file.write_text(json.dumps({**RECIPE, "stages": stages}))
    return make_plan(read_recipe(file), cache=tmp_path / "cache").nodes[-1].fingerprint


def test_weights_and_every_term_of_a_sum_change_what_is_learned(tmp_path):
    different = ["js", term("js", weight=2), ["js", "dist"], ["js", term("dist", weight=2)], ["dist", "js"]]
    assert len({prints(tmp_path, loss) for loss in different}) == len(different)
    one = ["js", ["js"], [term("js")], term("js", weight=1), term("js", weight=1.0)]
    assert len({prints(tmp_path, loss) for loss in one}) == 1
