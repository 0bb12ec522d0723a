"""The command line: words to calls, and every SsldError to one message and its exit code."""

from __future__ import annotations

import io
import json
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click

import ssld
from ssld.errors import Interrupted, LabelError, SsldError
from ssld.signals import importing, interrupting
from ssld.terminal import ask, give, giving, occupy, show, tell

SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100, "show_default": True}
PATH = click.Path(path_type=Path)
DEVICE = partial(click.option, "--device", type=click.Choice(["cpu", "gpu"]), default="cpu")
TRUST = click.option("--trust-teacher", is_flag=True, help="Go on with a teacher that is no better than chance.")
NPROC = click.option(
    "--nproc",
    type=click.IntRange(min=1),
    help="Processes that train together, sharing every batch; kept by the run, at first 1.",
)
STALL = click.option(
    "--stall-timeout",
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    help="End where an image, an answer, a step or a save takes longer, 0: never; kept by the run, at first 600.",
)
OVERRIDES = click.option(
    "-o", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of the recipe; repeatable."
)
RECIPE = (
    click.argument("recipe"),
    OVERRIDES,
    click.option("--limit", type=click.IntRange(min=1), help="A smoke run: at most so many images of each set."),
    click.option("--out", type=PATH, help="The run directory; runs/NAME when left out."),
)


def with_recipe(command: Callable[..., None]) -> Callable[..., None]:
    """The argument and options of every command that reads a recipe."""
    for option in reversed(RECIPE):
        command = option(command)
    return command


class Command(click.Command):
    """Its help is an example and what it does; a list of commands has the first sentence of that, or `short_help`."""

    def make_context(self, *arguments: Any, **options: Any) -> click.Context:
        # click itself writes --help and --version
        with giving():
            return super().make_context(*arguments, **options)

    def get_short_help_str(self, limit: int = 45) -> str:
        said = " ".join((self.help or "").split("\n\n")[1].split())
        return self.short_help or said.partition(". ")[0].removesuffix(".") + "."


class Commands(Command, click.Group):
    """Shows an error as one message and ends with its exit code; a defect of ssld keeps its traceback."""

    command_class = Command
    group_class = type

    def main(self, *words: Any, **options: Any) -> Any:
        occupy()
        try:
            code = super().main(*words, **{**options, "standalone_mode": False})
        except SsldError as error:
            tell(f"Error: {error}", *getattr(error, "__notes__", ()))
            code = error.exit_code
        except click.ClickException as error:
            said = io.StringIO()
            error.show(said)
            # click sets lists in with tabs
            tell(said.getvalue().expandtabs(4), end="")
            code = error.exit_code
        except click.Abort:
            tell("Aborted!")
            code = 1
        except Exception as error:
            error.add_note("This is a defect of ssld: report it with these lines. What was committed stays.")
            raise
        if options.get("standalone_mode", True):
            sys.exit(code)
        return code

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with interrupting():
                return super().invoke(ctx)
        except KeyboardInterrupt as error:
            message = "interrupted; nothing that was saved is lost"
            raise Interrupted(message, 128 + signal.SIGINT) from error
        except (EOFError, BrokenPipeError) as error:
            # click would end without a word, as if it were the user's own streams
            raise RuntimeError("a stream of ssld's own has ended") from error


def part_of(context: click.Context, option: click.Parameter, value: str) -> tuple[int, int]:
    """I/N as two numbers."""
    number, slash, of = value.partition("/")
    if not (slash and number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
        raise click.BadParameter(f"expected I/N with I from 1 to N, such as 3/10, got {value!r}")
    return int(number), int(of)


def finish(result: ssld.Overview) -> None:
    """The closing table."""
    if not result.fresh:
        whole = all(status.kind == "done" for _, status in result.stages)
        tell(f"{result.directory}{'' if whole else ', as far as asked for,'} is finished already; nothing was run")
    show(*result.table())


@click.group(cls=Commands, context_settings=SETTINGS)
@click.version_option(ssld.__version__, prog_name="ssld")
def main() -> None:
    """Distil a big image classifier into a small one on unlabeled images.

    \b
    Example:
      ssld run mobilenetv3_ssld
    """


@main.command()
@with_recipe
@DEVICE()
@click.option("--until", metavar="STAGE", help="Stop after this stage (number or name).")
@NPROC
@STALL
@click.option("--rerun", is_flag=True, help="Do again what a changed recipe affects; old results move to attempt.N.")
@TRUST
def run(recipe: str, out: Path | None, overrides: tuple[str, ...], **options: Any) -> None:
    """\b
    Examples:
      ssld run mobilenetv3_ssld
      ssld run recipes/mobilenetv3_ssld.yaml -o data.unlabeled=POOL -o data.labeled=TRAIN -o data.validation=VAL

    Do what a recipe says, or go on where an earlier run of it stopped.
    """
    finish(ssld.run(recipe, out, overrides=overrides, **options))


@main.command()
@click.option("--stage", help="Start again from this stage (number or name); what comes before stays.")
@click.option("--out", type=PATH, help="The run directory; the newest under runs/ when left out.")
@NPROC
@STALL
def resume(out: Path | None, **options: Any) -> None:
    """\b
    Examples:
      ssld resume
      ssld resume --stage 2

    Go on exactly where a run stopped, or start again from one of its stages.
    """
    finish(ssld.resume(out, **options))


@main.command()
@with_recipe
@click.option("--measure", is_flag=True, help="Try for at most a minute what each stage will take in time and disk.")
@DEVICE(help="To measure on.")
def plan(
    recipe: str, out: Path | None, overrides: tuple[str, ...], limit: int | None, measure: bool, device: str
) -> None:
    """\b
    Examples:
      ssld plan mobilenetv3_ssld -o stages.distill.epochs=30
      ssld plan mobilenetv3_ssld --measure

    Show the stages in order, the numbers that are derived, and what would run, and why. Writes only the index cache.
    """
    overview = ssld.plan(recipe, out, overrides=overrides, limit=limit)
    tell(*overview.remarks)
    show(*overview.forecast())
    if measure:
        from ssld.preview.costs import advice, table
        from ssld.preview.probe import measure as probe

        tell("measuring, for at most a minute")
        costs = probe(recipe, out, overrides=overrides, device=device, limit=limit)
        give("")
        show(*table(costs))
        if words := advice(costs):
            give(f"\n{words}")


@main.command(short_help="Say how good the teachers are, before anything is spent.")
@with_recipe
@DEVICE()
@click.option(
    "--stall-timeout",
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    default=600.0,
    help="End where an image or an answer takes longer, 0: never.",
)
def check(recipe: str, out: Path | None, device: str, stall_timeout: float, **options: Any) -> None:
    """\b
    Example:
      ssld check mine.yaml

    Say how good the teachers of a recipe are on at most 1,000 validation images, in at most a minute for each. A
    poor one is shown the images with other normalizations and sizes too. Writes only the index cache.
    """
    from ssld.ending import watched
    from ssld.preview.examination import examine_all
    from ssld.train.networks import use_device

    use_device(device)
    with watched(stall_timeout):
        report = examine_all(recipe, out, device=device, **options)
    tell(*report.remarks)
    show(*report.table())
    for found in report.examined:
        if found.finding:
            give(f"\n{found.finding}")
            show(*found.table())
    report.raise_faults()


@main.command()
@click.argument("recipe")
@click.argument("image", type=PATH)
@click.argument("out", type=PATH)
@OVERRIDES
@click.option("--views", type=click.IntRange(min=1, max=99), default=15, help="How many.")
def augment(recipe: str, image: Path, out: Path, **options: Any) -> None:
    """\b
    Example:
      ssld augment mine.yaml photo.jpg views.png

    Draw views of an image as training shows them, into one picture. The image itself is the first.
    """
    from ssld.preview.augment import views_of

    give(views_of(recipe, image, out, **options))


@main.command()
@with_recipe
@click.option("--stage", help="Of this stage only (number or name).")
@click.option("--part", callback=part_of, metavar="I/N", default="1/1", help="The I-th of N slices of the shards.")
@DEVICE()
@TRUST
@STALL
def label(recipe: str, out: Path | None, overrides: tuple[str, ...], **options: Any) -> None:
    """\b
    Example, on the third of ten machines:
      ssld label mine.yaml --part 3/10

    Make the soft labels that a recipe keeps, without training. Any number of processes may work on one store.
    """
    with importing():
        from ssld.engine import label as make

    done = make(recipe, out, overrides=overrides, **options)
    rows = [(item.stage, item.who, item.written, item.missing, item.directory) for item in done]
    show(("stage", "teacher", "shards written", "missing", "labels"), rows)


@main.group(short_help="Look at soft labels that are kept: info, verify, rm.")
def labels() -> None:
    """\b
    Example:
      ssld labels info runs/mobilenetv3_ssld

    Look at soft labels that are kept.
    """


@labels.command(short_help="Show what is kept: teacher, views, files, bytes.")
@click.argument("place", type=PATH)
def info(place: Path) -> None:
    """\b
    Example:
      ssld labels info runs/mobilenetv3_ssld

    Show what is kept at a place (a run, a store or one directory of label files): teacher, views, files, bytes.
    """
    from ssld.verification import kept_at
    from ssld.wording import size

    rows = []
    for kept in kept_at(place):
        made: dict[str, Any] = next((header["made"] for _, header, _ in kept.headers() if header), {})
        about, drawn = kept.about, kept.about["transform"]
        views = f"{drawn['size']} px, {', '.join(name for step in drawn['steps'] for name in step)}"
        numbers = (about["views"], about["top_k"], f"{about['temperature']:g}", len(kept.files), size(kept.bytes))
        rows.append((kept.directory.name, made.get("teacher", ""), made.get("engine", ""), views, *numbers))
    header = ("labels", "teacher", "engine", "views of", "views", "top-k", "temperature", "files", "size")
    show(header, rows)


@labels.command(short_help="Check every byte, and ask the teacher again about a sample.")
@click.argument("place", type=PATH)
@click.option("--run", type=PATH, help="A run that uses the labels; the one they lie in.")
@click.option("--tolerance", type=float, default=1e-3, help="Largest mean KL divergence, in nats.")
def verify(place: Path, run: Path | None, tolerance: float) -> None:
    """\b
    Example:
      ssld labels verify runs/mobilenetv3_ssld

    Check every byte of the label files, and ask the teacher again about a sample of 64 images.
    """
    from ssld.rundir import RunDirectory
    from ssld.verification import kept_at, verify_all

    run = place if run is None and RunDirectory(place).exists() else run
    rows, faults = verify_all(kept_at(place), run, tolerance, tell)
    show(("labels", "files", "images asked", "views", "same top-1", "KL", "largest difference"), rows)
    if faults:
        raise LabelError("\n  ".join([f"{len(faults)} faults:", *faults]))


@labels.command(short_help="Remove soft labels.")
@click.argument("place", type=PATH)
@click.option("--yes", is_flag=True, help="Do not ask.")
def rm(place: Path, yes: bool) -> None:
    """\b
    Example:
      ssld labels rm runs/mobilenetv3_ssld/labels.store/0123456789abcdef

    Remove soft labels: one directory of them, or all of a store or a run.
    """
    from ssld.labels.inspect import kept_in, remove
    from ssld.wording import size

    found = kept_in(place)
    total = sum(kept.bytes for kept in found)
    if not yes and not ask(f"remove {len(found)} directories of labels, {size(total)}, in {place}?"):
        raise click.Abort
    for kept in found:
        remove(kept)
    give(f"removed {len(found)} directories of labels, {size(total)}")


@main.command()
@click.argument("directory", required=False, type=PATH)
def status(directory: Path | None) -> None:
    """\b
    Example:
      ssld status runs/mobilenetv3_ssld

    Show where each stage of a run stands.
    """
    overview = ssld.status(directory)
    tell(*overview.remarks)
    show(*overview.table())


@main.command("list")
@click.argument("what", type=click.Choice(["teachers", "students", "stages", "losses", "recipes"]))
def list_(what: str) -> None:
    """\b
    Example:
      ssld list students

    List what is installed: name, distribution and version. Nothing is imported.
    """
    from ssld import plugins, recipe

    if what == "recipes":
        rows = [(name, "ssld", ssld.__version__, note) for name, note in recipe.known_recipes().items()]
        show(("recipe", "distribution", "version", "what it is"), rows)
    else:
        header = (plugins.KINDS[what], "distribution", "version")
        show(header, [(found.name, found.distribution, found.version) for found in plugins.find(what)])


@main.command()
@click.argument("source")
@click.argument("out", type=PATH)
@click.option("--unlabeled", is_flag=True, help="The source has no labels, or they are not wanted.")
@click.option("--shard-size", type=click.IntRange(min=1), default=1000, help="Images per shard.")
@click.option("--max-damaged", type=click.IntRange(min=0), default=0, help="Skip so many at most.")
def pack(source: str, out: Path, unlabeled: bool, shard_size: int, max_damaged: int) -> None:
    """\b
    Example:
      ssld pack photos/ shards/ --unlabeled

    Write a folder or a list of images as shards.
    """
    from ssld.data.pack import pack as write
    from ssld.data.sources import open_source
    from ssld.journal import counting

    images = open_source(source, labeled=not unlabeled)
    with counting("packing") as progress:
        report = write(images, out, shard_size=shard_size, max_damaged=max_damaged, progress=progress)
    tell(*(f"skipped, damaged: {name}" for name in report.damaged))
    give(f"{report.written} images in {report.shards} shards in {out}, {len(report.damaged)} skipped")


@main.command("import", short_help="Bring weights of PaddleClas or torch over, without running them.")
@click.argument("file")
@click.option("--network", metavar="NAME", help="The network that the weights have to fit; looked for when left out.")
@click.option("--out", type=PATH, help="The .safetensors file; beside a .pdparams file, or here, when left out.")
@click.option("--head-mismatch", is_flag=True, help="Leave the classifier out, for a start with other classes.")
def import_(file: str, network: str | None, out: Path | None, head_mismatch: bool) -> None:
    """\b
    Examples:
      ssld import ResNet50_vd_ssld_pretrained.pdparams
      ssld import ResNet50_vd_ssld
      ssld import resnet50.safetensors --out ResNet50.safetensors
      ssld import ResNet50_vd_pretrained.pdparams --head-mismatch --out start.safetensors

    Write the weights of a .pdparams file as a .safetensors file, with PaddleClas's names of today. A .pdparams file is
    a pickle, a program; it is read without running it. Those of a .safetensors file may be named as torch and
    torchvision do. FILE may be an http(s) address, or the name of weights that PaddleClas has published; what is
    downloaded is kept in XDG_CACHE_HOME/ssld/weights. A file that is there already is not replaced.
    """
    from ssld.importing.conversion import convert
    from ssld.importing.published import locate

    found = locate(file, tell)
    done = convert(found.file, out or found.out, network or found.network, tell, head_mismatch=head_mismatch)
    fits = ", ".join(
        f"{name} (without its classifier)" if head_mismatch else f"{name} ({classes} classes)"
        for name, classes in done.networks.items()
    )
    show(("weights", "tensors", "network"), [(done.path, done.tensors, fits or "none")])


@main.command("eval")
@click.argument("checkpoint", type=PATH)
@click.argument("data")
@DEVICE()
def evaluate(checkpoint: Path, data: str, device: str) -> None:
    """\b
    Example:
      ssld eval runs/mobilenetv3_ssld/finetune/best photos/test

    Measure a checkpoint on a labeled set.
    """
    from ssld.score import score

    images, metrics = score(checkpoint, data, device)
    show(("images", *metrics), [(images, *(f"{value:.4f}" for value in metrics.values()))])


@main.command()
@DEVICE()
def doctor(device: str) -> None:
    """\b
    Example:
      ssld doctor

    Say whether the installation is right: versions, device, threads, one training step.
    """
    from ssld.doctor import examine

    findings = examine(device)
    show(("check", "", "found"), [(item.name, "ok" if item.ok else "WRONG", item.detail) for item in findings])
    if wrong := [item for item in findings if not item.ok]:
        raise SsldError(f"{len(wrong)} of {len(findings)} checks failed: {', '.join(item.name for item in wrong)}")


@main.command()
def schema() -> None:
    """\b
    Example:
      ssld schema > recipe.schema.json

    Print the JSON schema of recipes, for editors.
    """
    from ssld.recipe import schema as recipe_schema

    give(json.dumps(recipe_schema(), indent=2))
