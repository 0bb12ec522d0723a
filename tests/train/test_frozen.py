"""The engine against the layer it was exported from, and what must not change around it."""

import hashlib
import os
import tempfile
import threading
from pathlib import Path

import numpy as np
import paddle
import pytest
from paddle import inference, nn
from paddle.base import core

from ssld.errors import DataError, RecipeError, SsldError, StorageError
from ssld.threads import of_step
from ssld.train.frozen import Frozen, _eager

SIZE = 16
needs_bfloat16 = pytest.mark.skipif(not core.supports_bfloat16(), reason="bfloat16 needs a CPU with AVX-512")


def network(seed=0, classes=5):
    """A convolution, batch norm with statistics of its own, dropout, a classifier; some parts frozen in eval mode."""
    paddle.seed(seed)
    layer = nn.Sequential(
        nn.Conv2D(3, 8, 3, stride=2, padding=1),
        nn.BatchNorm2D(8),
        nn.Hardswish(),
        nn.Sequential(nn.Conv2D(8, 8, 3, padding=1, groups=8), nn.BatchNorm2D(8)),
        nn.AdaptiveAvgPool2D(1),
        nn.Flatten(),
        nn.Dropout(0.5, mode="downscale_in_infer"),
        nn.Linear(8, classes),
    )
    for norm in (layer[1], layer[3][1]):
        norm._mean.set_value(paddle.randn([8]) / 4)
        norm._variance.set_value(paddle.rand([8]) + 0.5)
    layer[3].eval()
    return layer


def images(count, seed=0):
    return np.random.default_rng(seed).normal(size=(count, 3, SIZE, SIZE)).astype(np.float32)


def expected(layer, batch):
    """The layer's own answer, in eval mode; it is left there."""
    layer.eval()
    with paddle.no_grad():
        return layer(paddle.to_tensor(batch)).numpy()


def digest(layer):
    arrays = [tensor.numpy() for tensor in layer.state_dict().values()]
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()


@pytest.fixture(scope="module")
def layer():
    return network()


@pytest.fixture(scope="module")
def frozen(layer):
    return Frozen(layer, SIZE)


@pytest.mark.parametrize("count", [1, 3, 20])
def test_answers_as_the_layer_does(layer, frozen, count):
    logits = frozen(images(count))
    assert logits.dtype == np.float32
    assert logits.shape == (count, 5)
    np.testing.assert_allclose(logits, expected(layer, images(count)), atol=1e-5)


def test_the_bits_of_a_sample_do_not_depend_on_its_batch(frozen):
    batch = images(64)
    together = frozen(batch)
    for size in (1, 7):
        parts = [frozen(batch[start : start + size]) for start in range(0, 64, size)]
        np.testing.assert_array_equal(np.concatenate(parts), together)


def test_the_bits_do_not_depend_on_threads(layer):
    one = Frozen(layer, SIZE, threads=1)
    np.testing.assert_array_equal(Frozen(layer, SIZE, threads=2)(images(16)), one(images(16)))


@pytest.mark.parametrize("threads", [2, 4, 8])
def test_the_bits_of_a_wide_classifier_do_not_depend_on_threads(threads):
    """Its sums are the ones that are long enough to be cut up."""
    paddle.seed(0)
    wide = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, 2048), nn.ReLU(), nn.Linear(2048, 10))
    one, more = Frozen(wide, SIZE, threads=1), Frozen(wide, SIZE, threads=threads)
    for count in (1, 5):
        np.testing.assert_array_equal(more(images(count)), one(images(count)))


def test_a_fully_connected_layer_may_take_more_than_vectors():
    paddle.seed(0)
    layer = nn.Sequential(nn.Linear(SIZE, 4), nn.Flatten(), nn.Linear(3 * SIZE * 4, 5))
    np.testing.assert_allclose(Frozen(layer, SIZE)(images(3)), expected(layer, images(3)), atol=1e-5)


@pytest.mark.parametrize(("ranks", "threads"), [("1", 6), ("3", 2), ("8", 1)])
def test_takes_the_share_of_its_rank(layer, monkeypatch, ranks, threads):
    """As many as the config of the engine is told."""
    told = []
    config = inference.Config

    class Told(config):
        def set_cpu_math_library_num_threads(self, number):
            told.append(number)
            super().set_cpu_math_library_num_threads(number)

    monkeypatch.setattr(inference, "Config", Told)
    monkeypatch.setattr("ssld.threads.cores", lambda: 6)
    monkeypatch.setenv("SSLD_RANKS", ranks)
    Frozen(layer, SIZE)
    assert told == [threads]


def test_weights_that_have_diverged_are_said_to_have(layer):
    broken = network(seed=3)
    next(iter(broken.parameters())).set_value(next(iter(broken.parameters())) * float("inf"))
    with pytest.raises(DataError, match=r"expected finite logits .* its weights have diverged; lower learning_rate"):
        Frozen(broken, SIZE)(images(2))


def test_any_memory_layout_is_taken(frozen):
    batch = images(4)
    turned = np.ascontiguousarray(batch.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    assert not turned.flags.c_contiguous
    np.testing.assert_array_equal(frozen(turned), frozen(batch))


def test_an_answer_is_the_callers_own(frozen):
    first = frozen(images(4))
    kept = first.copy()
    frozen(images(4, seed=1))
    np.testing.assert_array_equal(first, kept)
    assert first.flags.owndata
    assert first.flags.c_contiguous
    assert first.flags.writeable


def test_the_layer_stays_as_it_was():
    layer = network()
    modes = [part.training for part in layer.sublayers(include_self=True)]
    before, forward = digest(layer), layer.forward
    trainable = [not weight.stop_gradient for weight in layer.parameters()]
    Frozen(layer, SIZE)(images(2))
    assert [part.training for part in layer.sublayers(include_self=True)] == modes
    assert len(set(modes)) == 2
    assert digest(layer) == before
    assert layer.forward == forward
    assert [not weight.stop_gradient for weight in layer.parameters()] == trainable
    assert all(weight.grad is None for weight in layer.parameters())


def test_randomness_goes_on_as_if_nothing_had_happened():
    layer = network()
    draws = []
    for build in (False, True):
        paddle.seed(3)
        np.random.seed(3)
        if build:
            Frozen(layer, SIZE)(images(2))
        draws.append((paddle.rand([8]).tolist(), np.random.rand(8).tolist()))
    assert draws[0] == draws[1]


def test_the_snapshot_stays_while_the_layer_trains_on():
    layer = network()
    frozen = Frozen(layer, SIZE)
    before = expected(layer, images(4))
    layer(paddle.to_tensor(images(4))).sum().backward()
    paddle.optimizer.SGD(10.0, parameters=layer.parameters()).step()
    assert not np.allclose(expected(layer, images(4)), before, atol=0.1)
    np.testing.assert_allclose(frozen(images(4)), before, atol=1e-5)


def test_two_networks_do_not_mix():
    layers = [network(seed) for seed in (1, 2)]
    engines = [Frozen(layer, SIZE) for layer in layers]
    for batch in (images(3), images(5, seed=9)):
        for layer, engine in zip(layers, engines, strict=True):
            np.testing.assert_allclose(engine(batch), expected(layer, batch), atol=1e-5)


def test_runs_in_threads_that_did_not_make_it(frozen):
    batches = [images(count, seed=count) for count in (1, 4, 9, 16)]
    wanted = [frozen(batch) for batch in batches]
    wrong = []

    def ask(number):
        for _ in range(20):
            if not np.array_equal(frozen(batches[number]), wanted[number]):
                wrong.append(number)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# A refreshed one ---------------------------------------------------------------------------------------------------


class Whole(nn.Layer):
    """Weights, statistics, a buffer that no checkpoint keeps, and a Python value; all change what it answers."""

    def __init__(self):
        super().__init__()
        self.body = network()
        self.register_buffer("shift", paddle.zeros([5]), persistable=False)
        self.factor = 1.0

    def forward(self, x):
        return (self.body(x) + self.shift) * self.factor


def change_weights(layer):
    layer.body[-1].weight.set_value(layer.body[-1].weight + 10.0)


def change_statistics(layer):
    layer.body[1]._mean.set_value(layer.body[1]._mean + 2.0)


def change_buffer(layer):
    layer.shift.set_value(layer.shift + 3.0)


def change_value(layer):
    layer.factor = 2.0


CHANGES = (change_weights, change_statistics, change_buffer, change_value)


@pytest.mark.parametrize("change", CHANGES)
def test_a_refreshed_one_answers_as_the_layer_does_now(change):
    layer = Whole()
    frozen = Frozen(layer, SIZE)
    before = frozen(images(4))
    change(layer)
    np.testing.assert_array_equal(frozen(images(4)), before)
    frozen.refresh(layer)
    now = frozen(images(4))
    assert np.abs(now - before).max() > 0.1
    np.testing.assert_allclose(now, expected(layer, images(4)), atol=1e-5)
    np.testing.assert_array_equal(now, Frozen(layer, SIZE)(images(4)))


def test_a_refreshed_one_is_not_exported_anew(monkeypatch):
    layer = Whole()
    frozen = Frozen(layer, SIZE)
    frozen(images(4))
    monkeypatch.setattr(paddle.jit, "to_static", lambda *_, **__: pytest.fail("exported anew"))
    for change in CHANGES[:3]:
        change(layer)
        frozen.refresh(layer)
        frozen(images(4))


def test_a_layer_that_is_refreshed_stays_as_it_was():
    layer = Whole()
    frozen = Frozen(layer, SIZE)
    before = digest(layer)
    for _ in range(2):
        frozen.refresh(layer)
        frozen(images(4))
    assert digest(layer) == before
    assert layer.training
    assert all(weight.grad is None for weight in layer.parameters())


def test_a_refreshed_one_is_compared_again():
    class Late(Whole):
        """Its export forgets the buffer."""

        def forward(self, x):
            return self.body(x) + self.shift if paddle.in_dynamic_mode() else self.body(x) + self.shift * 0

    layer = Late()
    frozen = Frozen(layer, SIZE)
    frozen(images(4))
    change_buffer(layer)
    frozen.refresh(layer)
    for _ in range(2):
        with pytest.raises(SsldError, match="exported Late in float32 to answer as the layer itself"):
            frozen(images(4))


def test_another_device_is_refreshed_too():
    layer = Whole()
    frozen = Frozen(layer, SIZE, device="gpu")
    before = frozen(images(4))
    change_weights(layer)
    np.testing.assert_array_equal(frozen(images(4)), before)
    frozen.refresh(layer)
    np.testing.assert_array_equal(frozen(images(4)), expected(layer, images(4)))


# What paddle has to rewrite ------------------------------------------------------------------------------------------


class Branching(nn.Layer):
    """Asks the images which way to go."""

    def __init__(self):
        super().__init__()
        self.light, self.dark = (nn.Linear(3, 4) for _ in range(2))

    def forward(self, x):
        means = x.mean(axis=[2, 3])
        return self.light(means) if means.mean() > 0 else self.dark(means)


class Tokens(nn.Layer):
    """Puts a token before those of each image, as a vision transformer does: it asks for the size of the batch."""

    def __init__(self):
        super().__init__()
        self.token = self.create_parameter([1, 1, SIZE])
        self.mix = nn.Linear(SIZE, 4)

    def forward(self, x):
        token = self.token.expand([x.shape[0], -1, -1])
        return self.mix(paddle.concat([token, x.mean(axis=2)], axis=1)).sum(axis=1)


@pytest.mark.parametrize("kind", [Branching, Tokens])
def test_what_depends_on_the_images_is_exported_with_care(kind):
    paddle.seed(0)
    layer = kind()
    frozen = Frozen(layer, SIZE)
    for count, side in ((1, 1), (5, -1), (64, 1), (3, 1)):
        batch = np.abs(images(count)) * np.float32(side)
        np.testing.assert_allclose(frozen(batch), expected(layer, batch), atol=1e-5)


# The process around it -----------------------------------------------------------------------------------------------


def product():
    """A matrix product large enough that its bits depend on the number of threads."""
    paddle.seed(0)
    return paddle.matmul(paddle.randn([300, 2000]), paddle.randn([2000, 300])).numpy()


@pytest.fixture
def step_of(monkeypatch):
    """step_of(threads): paddle computes in so many threads, as the user asks."""

    def ask(threads):
        monkeypatch.setenv("OMP_NUM_THREADS", str(threads))
        core.set_num_threads(threads)

    yield ask
    monkeypatch.undo()
    core.set_num_threads(of_step())


@pytest.mark.parametrize("threads", [1, 2])
def test_the_threads_of_the_process_stay(layer, step_of, threads):
    step_of(3 - threads)
    other = product()
    step_of(threads)
    before = product()
    assert not np.array_equal(before, other)
    frozen = Frozen(layer, SIZE, threads=3 - threads)
    np.testing.assert_array_equal(product(), before)
    frozen(images(2))
    np.testing.assert_array_equal(product(), before)


def test_leaves_no_files(layer, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    frozen = Frozen(layer, SIZE)
    assert list(tmp_path.iterdir()) == []
    np.testing.assert_allclose(frozen(images(2)), expected(layer, images(2)), atol=1e-5)


class Enlarging(nn.Layer):
    """By an operation that paddle's engine cannot run; its input has a name of its own."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 4)

    def forward(self, x):
        return self.head(nn.functional.interpolate(x, scale_factor=2, mode="nearest").mean([2, 3]))


def test_what_no_export_can_run_is_said_in_the_words_of_the_engine():
    with pytest.raises(
        SsldError, match=r"the exported Enlarging .* got NotImplementedError: .*; compute that part of its"
    ):
        Frozen(Enlarging(), SIZE)(images(2))


@pytest.mark.parametrize("share", [0, 0.5])
@pytest.mark.parametrize("part", ["json", "pdiparams"])
def test_an_export_that_finds_no_room_is_said_to(layer, monkeypatch, part, share):
    """Paddle's own save says nothing."""
    save = paddle.jit.save

    def no_room(traced, path):
        save(traced, path)
        file = Path(f"{path}.{part}")
        os.truncate(file, int(share * file.stat().st_size))

    monkeypatch.setattr(paddle.jit, "save", no_room)
    weights = sum(value.numpy().nbytes for value in layer.state_dict().values())
    with pytest.raises(StorageError, match=f"{tempfile.gettempdir()}.* {weights:,} bytes are needed"):
        Frozen(layer, SIZE)


class Treacherous(nn.Layer):
    """Answers near `level` when asked eagerly, and something else in an export."""

    def __init__(self, level, exported):
        super().__init__()
        self.head = nn.Linear(3, 4)
        self.level, self.exported = level, exported

    def forward(self, x):
        logits = self.head(x.mean(axis=[2, 3])) + self.level
        return logits if paddle.in_dynamic_mode() else self.exported(logits)


@pytest.mark.parametrize(
    ("level", "exported"),
    [
        (0.0, lambda logits: logits + 0.01),
        (1.0, lambda logits: logits - 0.05),
        (100.0, lambda logits: logits + 0.5),
        (0.0, lambda logits: (logits - logits) / (logits - logits)),
    ],
    ids=["off by 0.01", "off by 0.05", "off by 0.5 of 100", "not a number"],
)
def test_a_wrong_engine_is_never_trusted(level, exported):
    frozen = Frozen(Treacherous(level, exported), SIZE)
    for _ in range(2):
        with pytest.raises(SsldError, match="exported Treacherous in float32 to answer as the layer itself"):
            frozen(images(12))


@pytest.mark.parametrize(("level", "off"), [(0.0, 0.0005), (100.0, 0.05)])
def test_the_tolerance_is_relative_to_the_largest_logit(level, off):
    assert Frozen(Treacherous(level, lambda logits: logits + off), SIZE)(images(12)).shape == (12, 4)


@needs_bfloat16
def test_bfloat16_is_near_float32_and_another(layer, frozen):
    """A product of two numbers of 8 bits is off by at most a part in 128; some dozen of them follow each other."""
    rough = Frozen(layer, SIZE, precision="bfloat16")
    logits, exact = rough(images(20)), expected(layer, images(20))
    assert logits.dtype == np.float32
    assert 1e-5 < np.abs(logits - exact).max() < 0.02 * np.abs(exact).max()
    np.testing.assert_allclose(frozen(images(20)), exact, atol=1e-5)


@needs_bfloat16
def test_the_bits_of_bfloat16_depend_neither_on_the_batch_nor_on_threads(layer):
    one, two = (Frozen(layer, SIZE, precision="bfloat16", threads=threads) for threads in (1, 2))
    batch = images(16)
    parts = [one(batch[start : start + 5]) for start in range(0, 16, 5)]
    np.testing.assert_array_equal(np.concatenate(parts), one(batch))
    np.testing.assert_array_equal(two(batch), one(batch))


@needs_bfloat16
def test_bfloat16_may_be_off_by_more_but_not_by_much():
    def answer(off):
        return Frozen(Treacherous(10.0, lambda logits: logits + off), SIZE, precision="bfloat16")(images(12))

    assert answer(0.3).shape == (12, 4)
    with pytest.raises(SsldError, match=r"Treacherous in bfloat16 to answer .* leave precision out"):
        answer(3.0)


def test_bfloat16_is_refused_where_it_would_not_be_used(layer, monkeypatch):
    with pytest.raises(RecipeError, match=r"precision: bfloat16 is for --device cpu, got gpu"):
        Frozen(layer, SIZE, device="gpu", precision="bfloat16")
    monkeypatch.setattr(core, "supports_bfloat16", lambda: False)
    with pytest.raises(RecipeError, match=r"precision: bfloat16 needs a CPU with AVX-512"):
        Frozen(layer, SIZE, precision="bfloat16")


def test_eager_answers_the_same(layer, frozen):
    """What a GPU runs."""
    layer.eval()
    np.testing.assert_allclose(_eager(layer)(images(6)), frozen(images(6)), atol=1e-5)


@pytest.mark.parametrize(
    "batch",
    [
        np.zeros((2, 3, SIZE, SIZE)),
        np.zeros((2, 3, SIZE, SIZE), np.uint8),
        np.zeros((2, 3, SIZE, SIZE + 1), np.float32),
        np.zeros((2, SIZE, SIZE, 3), np.float32),
        np.zeros((3, SIZE, SIZE), np.float32),
        np.zeros((0, 3, SIZE, SIZE), np.float32),
    ],
    ids=lambda batch: f"{batch.dtype}-{batch.shape}",
)
def test_other_input_is_refused(frozen, batch):
    with pytest.raises(DataError, match=rf"float32 \[batch, 3, {SIZE}, {SIZE}\].*got {batch.dtype}"):
        frozen(batch)


def test_follows_the_share_of_its_rank(layer, monkeypatch):
    told = []

    class Told(inference.Config):
        def set_cpu_math_library_num_threads(self, number):
            told.append(number)
            super().set_cpu_math_library_num_threads(number)

    monkeypatch.setattr(inference, "Config", Told)
    monkeypatch.setattr("ssld.threads.cores", lambda: 6)
    found = []
    frozen = None
    for ranks in ("3", "3", "1", "3"):
        monkeypatch.setenv("SSLD_RANKS", ranks)
        frozen = frozen or Frozen(layer, SIZE)
        found.append(frozen(images(4)))
    assert told == [2, 6, 2]
    for answer in found:
        np.testing.assert_array_equal(answer, found[0])
