"""Top-1, time and bytes of a student that is taught online, and from stores of several views and classes.

    python benchmarks/views.py --teacher teacher.safetensors

Runs benchmarks/views.yaml once for each kind of label and seed, below runs/views; what is finished is not done again.
A store is made once, by `ssld label`, and read by all seeds.
"""

import statistics
import subprocess
import sys
import time
from pathlib import Path

import click

import ssld
from ssld.labels.inspect import kept_in

RECIPE = Path(__file__).with_suffix(".yaml")
KINDS = {
    "online": None,
    **{f"V={views}": (views, 10) for views in (1, 2, 4, 8)},
    **{f"V=4, K={top_k}": (4, top_k) for top_k in (1, 2, 3)},
}


def command(*arguments: str | Path) -> float:
    """Seconds that a call of ssld took."""
    began = time.monotonic()
    subprocess.run([sys.executable, "-m", "ssld", *map(str, arguments)], check=True)
    return time.monotonic() - began


def options(kept: tuple[int, int] | None, store: Path, teacher: Path) -> list[str]:
    labels = f"{{views: {kept[0]}, top_k: {kept[1]}, store: {store}}}" if kept else "online"
    return ["-o", f"stages.distill.labels={labels}", "-o", f"stages.distill.teacher.weights={teacher}"]


@click.command()
@click.option("--teacher", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--out", type=click.Path(path_type=Path), default="runs/views", show_default=True)
@click.option("--seeds", type=int, default=3, show_default=True)
@click.option("--epochs", type=int, help="Of each training; the recipe's when left out.")
@click.option("--only", multiple=True, type=click.Choice(list(KINDS)), help="These kinds of label only; repeatable.")
def main(teacher: Path, out: Path, seeds: int, epochs: int | None, only: tuple[str, ...]) -> None:
    """Run what is missing, then print the table."""
    rows = []
    for name, kept in KINDS.items():
        if only and name not in only:
            continue
        place = out / name.replace(", ", "").replace("=", "")
        chosen = options(kept, place / "labels", teacher.resolve())
        length = (
            ["-o", f"stages.distill.epochs={epochs}", "-o", f"stages.distill.eval_interval={epochs}"] if epochs else []
        )
        seconds = command("label", RECIPE, "--out", place / "labelling", *chosen) if kept else 0.0
        found = []
        for seed in range(seeds):
            run = place / f"seed{seed}{f'-{epochs}' if epochs else ''}"
            command("run", RECIPE, "--out", run, "-o", f"seed={seed}", *chosen, *length)
            found.append(ssld.status(run).stages[0][1])
        size = max((item.bytes for item in kept_in(place / "labels")), default=0) if kept else 0
        top1 = [status.metrics["top1"] for status in found]
        rows.append(
            f"| {name} | {', '.join(f'{value:.4f}' for value in top1)} | {statistics.mean(top1):.4f} | "
            f"{statistics.mean(status.metrics['agreement'] for status in found):.4f} | {seconds:.0f} | "
            f"{statistics.median(status.seconds for status in found):.0f} | {size:,} |"
        )
    click.echo("| labels | top-1 of each seed | mean | agreement | labelling s | training s | bytes |")
    click.echo("|---|---|---|---|---|---|---|")
    click.echo("\n".join(rows))


if __name__ == "__main__":
    main()
