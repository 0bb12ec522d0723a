"""What a loss on K classes and one bucket for the rest differs by from the loss on all classes of the true teacher.

    python benchmarks/bucket_error.py

1,000 classes, 256 drawn teacher outputs of each kind (see label_size.py). A student at the start is near uniform; one
at the end is the teacher with noise on every logit. Each cell holds the ratio of the mean losses, the ratio of the
norms of the gradients by the student's logits, over the whole batch, and the cosine between these gradients, so that
1.00 1.00 1.000 is no error. `bucket` has the teacher's exact probabilities, `stored` those that label files hold, and
`spread`, for comparison, gives each class outside the K an equal part of the rest. All draws have fixed seeds.
"""

from collections.abc import Iterator

import click
import numpy as np
import paddle
from label_size import MIXED, draw
from measuring import show

from ssld.contracts import Soft
from ssld.labels import format
from ssld.settings import Named
from ssld.train import losses

CLASSES = 1_000
BATCH = 256
KEPT = (1, 3, 10, 50)
STUDENTS = {"start": 0.1, "end": 0.5}
"""Standard deviation of the logits' noise."""
SEED = 0


def student(teacher: np.ndarray, when: str) -> np.ndarray:
    noise = np.random.default_rng(SEED).normal(0, STUDENTS[when], teacher.shape).astype(np.float32)
    return teacher + noise if when == "end" else noise


def forms(teacher: np.ndarray, top_k: int) -> dict[str, Soft]:
    """The soft labels of the teacher's top_k classes, as the columns of the table have them."""
    stored = format.unpack(format.pack(teacher, top_k), CLASSES, top_k)
    assert stored.ids is not None
    logs = teacher.astype(np.float64) - np.log(np.exp(teacher.astype(np.float64)).sum(axis=1, keepdims=True))
    kept = np.take_along_axis(logs, stored.ids, axis=1)
    rest = np.log1p(-np.exp(kept).sum(axis=1, keepdims=True))
    spread = np.repeat(rest - np.log(CLASSES - top_k), CLASSES, axis=1)
    np.put_along_axis(spread, stored.ids, kept, axis=1)
    return {
        "bucket": Soft(stored.ids, np.concatenate([kept, rest], axis=1).astype(np.float32)),
        "stored": stored,
        "spread": Soft(None, spread.astype(np.float32)),
    }


def evaluated(loss: losses.Loss, logits: np.ndarray, soft: Soft) -> tuple[float, np.ndarray]:
    """The mean loss, and its gradient by the student's logits."""
    tensor = paddle.to_tensor(logits, stop_gradient=False)
    value = loss(tensor, soft).mean()
    value.backward()
    assert tensor.grad is not None
    return float(value), tensor.grad.numpy().astype(np.float64)


def compared(found: tuple[float, np.ndarray], exact: tuple[float, np.ndarray]) -> str:
    size, wanted = np.linalg.norm(found[1]), np.linalg.norm(exact[1])
    cosine = (found[1] * exact[1]).sum() / (size * wanted)
    return f"{found[0] / exact[0]:.2f} {size / wanted:.2f} {cosine:.3f}"


def table() -> Iterator[list[str]]:
    yield ["loss", "teacher", "student", "exact loss", "K", "mass of the K", "bucket", "stored", "spread"]
    for name in ("js", "kl"):
        loss = losses.named(Named(name=name))
        for kind in MIXED:
            teacher = draw(kind, BATCH, CLASSES)
            for when in STUDENTS:
                logits = student(teacher, when)
                exact = evaluated(loss, logits, Soft(None, teacher))
                for top_k in KEPT:
                    made = forms(teacher, top_k)
                    mass = np.exp(made["bucket"].logits[:, :-1]).sum(axis=1).mean()
                    cells = [compared(evaluated(loss, logits, soft), exact) for soft in made.values()]
                    yield [name, kind, when, f"{exact[0]:.3f}", str(top_k), f"{mass:.3f}", *cells]


@click.command()
def main() -> None:
    """Print the table."""
    show(table())


if __name__ == "__main__":
    main()
