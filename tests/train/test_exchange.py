"""One sum per step: several real processes descend as one does, and hold the same bits after every step."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import paddle
import pytest
from paddle import nn

from ssld.contracts import Ranks
from ssld.train.exchange import Exchange
from ssld.train.ranks import shared_memory

FEATURES, CLASSES, STEPS, RATE = 6, 4, 5, 0.3
OPTIMIZER = {"momentum": 0.9, "weight_decay": 0.02, "clip_norm": 0.5}
BATCHES = {"even": 12, "odd": 7}
"""Rows of a batch; 7 is divided by neither 2 nor 3."""

# What every rank computes. It leaves all that it knows after each step in one file, by case, step and name.
RANK = """
import json, os, socket, sys
from pathlib import Path

import numpy as np
import paddle
from paddle import nn

from ssld.contracts import Ranks
from ssld.errors import RankError
from ssld.train.exchange import Exchange
from ssld.train.momentum import Momentum
from ssld.train.ranks import Meeting

folder, (optimizer, rate) = Path(sys.argv[1]), json.loads(sys.argv[2])
number, count, memory, *lines = map(int, sys.argv[3:])
ranks = Ranks(number, count, Meeting(number, [socket.socket(fileno=line) for line in lines], os.fdopen(memory, "r+b")))
given = np.load(folder.parent / "given.npz")
found = {}


def plain():
    network = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    for weight, name in zip(network.parameters(), "abcd"):
        weight.set_value(given[name])
    return network


def step(network, exchange, images, labels, stop=None):
    rows = ranks.part(len(images))
    logits = network(paddle.to_tensor(images[rows]))
    share = nn.functional.cross_entropy(logits, paddle.to_tensor(labels[rows]), reduction="sum") / len(images)
    share.backward()
    return exchange(float(share), stop)


def note(case, place, network, facts):
    found[f"{case} {place} facts"] = np.array([facts[0], facts[1] or 0], np.float64)
    for name, tensor in network.state_dict().items():
        found[f"{case} {place} {name}"] = tensor.numpy()


for case in ("even", "odd"):
    network = plain()
    exchange, descent = Exchange(network, ranks), Momentum(network, **optimizer)
    for place, (images, labels) in enumerate(zip(given[f"{case} images"], given[f"{case} labels"])):
        facts = step(network, exchange, images, labels)
        for name, weight in network.named_parameters():
            found[f"{case} {place} {name} gradient"] = weight.grad.numpy()
        descent.step(rate)
        note(case, place, network, facts)

images, labels = given["even images"], given["even labels"]

# the first norm learns, the second stands still, as it does where only a head is trained
network = nn.Sequential(nn.BatchNorm1D(6), nn.Linear(6, 5), nn.BatchNorm1D(5), nn.Linear(5, 4))
network[2]._mean.set_value(given["still mean"])
network[2]._variance.set_value(given["still variance"])
for layer, names in ((network[1], "ab"), (network[3], "cd")):
    for weight, name in zip(layer.parameters(), names):
        weight.set_value(given[name])
exchange, descent = Exchange(network, ranks), Momentum(network)
for place in range(3):
    network.train()
    network[2].eval()
    facts = step(network, exchange, images[place], labels[place])
    descent.step(rate)
    note("norms", place, network, facts)

# a parameter that no rank uses
network = plain()
network.spare = network.create_parameter([2], default_initializer=nn.initializer.Constant(0.1))
network.spare.stop_gradient = False
exchange, descent = Exchange(network, ranks), Momentum(network, **optimizer)
note("spare", 0, network, step(network, exchange, images[0], labels[0]))
found["spare gradient"] = np.array(network.spare.grad is None)
descent.step(rate)
note("spare", 1, network, (0, None))



def branched():
    network = nn.LayerDict({"trunk": plain(), "branch": nn.Linear(6, 4, bias_attr=False)})
    network["branch"].weight.set_value(given["branch"])
    return network, lambda rows: network["trunk"](rows) + network["branch"](rows)


# a branch that is taken in every second step, as a layer is that is dropped now and then
network, both = branched()
exchange, descent = Exchange(network, ranks), Momentum(network, **optimizer)
try:
    for place in range(3):
        facts = step(network["trunk"] if place % 2 else both, exchange, images[place], labels[place])
        descent.step(rate)
        note("branch", place, network, facts)
except ValueError as error:
    found["branch fault"] = np.array(str(error))

# a branch that is taken by the last rank alone
network, both = branched()
exchange = Exchange(network, ranks)
try:
    step(both if number == count - 1 else network["trunk"], exchange, images[0], labels[0])
    for name, weight in network.named_parameters():
        found[f"single {name}"] = np.zeros(weight.shape) if weight.grad is None else weight.grad.numpy()
except (RankError, ValueError) as error:
    found["single fault"] = np.array(type(error).__name__)

network = plain()
exchange = Exchange(network, ranks)
for place in range(3):
    stop = 15 if number == 0 and place == 1 else None
    note("stop", place, network, step(network, exchange, images[place], labels[place], stop))

network = plain()
network[0].bias.set_value(given["b"] + np.float32(number))
try:
    Exchange(network, ranks)
except RankError as error:
    found["refusal"] = np.array(str(error))
np.savez(folder / f"{number}.npz", **found)
"""


def given() -> dict[str, np.ndarray]:
    """First weights and batches, drawn here and read by every rank."""
    rng = np.random.default_rng(4)
    shapes = {"a": (FEATURES, 5), "b": (5,), "c": (5, CLASSES), "d": (CLASSES,)}
    drawn = {name: rng.normal(0, 0.5, shape).astype(np.float32) for name, shape in shapes.items()}
    for case, rows in BATCHES.items():
        drawn[f"{case} images"] = rng.normal(0.7, 2, (STEPS, rows, FEATURES)).astype(np.float32)
        drawn[f"{case} labels"] = rng.integers(0, CLASSES, (STEPS, rows))
    drawn["branch"] = rng.normal(size=(FEATURES, CLASSES)).astype(np.float32)
    drawn["still mean"] = rng.normal(size=5).astype(np.float32)
    drawn["still variance"] = rng.uniform(0.5, 2, 5).astype(np.float32)
    return drawn


def together(folder: Path, count: int) -> list[dict[str, np.ndarray]]:
    """What each of so many ranks, processes of their own, has found."""
    folder.mkdir()
    words = [sys.executable, str(folder.parent / "rank.py"), str(folder), json.dumps([OPTIMIZER, RATE])]
    with ExitStack() as stack:
        memory = stack.enter_context(shared_memory())
        pairs = [[stack.enter_context(end) for end in socket.socketpair()] for _ in range(count - 1)]
        lines = [[own.fileno() for own, _ in pairs], *([other.fileno()] for _, other in pairs)]
        processes = []
        for number in range(count):
            given = [memory.fileno(), *lines[number]]
            numbers = map(str, (number, count, *given))
            processes.append(subprocess.Popen([*words, *numbers], stderr=subprocess.PIPE, text=True, pass_fds=given))
    try:
        for process in processes:
            _, err = process.communicate(timeout=120)
            assert process.returncode == 0, err
    finally:
        for process in processes:
            process.kill()
    return [dict(np.load(folder / f"{number}.npz")) for number in range(count)]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "rank.py").write_text(RANK)
    np.savez(folder / "given.npz", **given())
    return folder


@pytest.fixture(scope="module")
def two(site: Path) -> list[dict[str, np.ndarray]]:
    return together(site / "two", 2)


@pytest.fixture(scope="module")
def three(site: Path) -> list[dict[str, np.ndarray]]:
    return together(site / "three", 3)


@pytest.fixture(params=["two", "three"])
def ranks(request: pytest.FixtureRequest) -> list[dict[str, np.ndarray]]:
    return request.getfixturevalue(request.param)


def plain_network(start: dict[str, np.ndarray]) -> nn.Layer:
    network = nn.Sequential(nn.Linear(FEATURES, 5), nn.Tanh(), nn.Linear(5, CLASSES))
    for weight, name in zip(network.parameters(), "abcd", strict=True):
        weight.set_value(start[name])
    return network


def alone(case: str) -> dict[str, np.ndarray]:
    """The same steps by one process with the optimizer of paddle, on whole batches and without an exchange."""
    start = given()
    network = plain_network(start)
    optimizer = paddle.optimizer.Momentum(
        RATE,
        OPTIMIZER["momentum"],
        network.parameters(),
        weight_decay=OPTIMIZER["weight_decay"],
        grad_clip=nn.ClipGradByGlobalNorm(OPTIMIZER["clip_norm"]),
    )
    found = {}
    for place in range(STEPS):
        images, labels = (paddle.to_tensor(start[f"{case} {what}"][place]) for what in ("images", "labels"))
        loss = nn.functional.cross_entropy(network(images), labels)
        loss.backward()
        found[f"{case} {place} loss"] = loss.numpy()
        for name, weight in network.named_parameters():
            found[f"{case} {place} {name} gradient"] = weight.grad.numpy()
        optimizer.step()
        optimizer.clear_grad()
        found |= {f"{case} {place} {name}": weight.numpy() for name, weight in network.named_parameters()}
    return found


@pytest.mark.parametrize("case", BATCHES)
def test_gradients_and_weights_are_those_of_one_process(ranks, case):
    expected = alone(case)
    assert any(np.sqrt(sum((g**2).sum() for g in gradients_of(expected, case, place))) > 0.5 for place in range(STEPS))
    for found in ranks:
        for name, value in expected.items():
            if not name.endswith("loss"):
                np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-5 * abs(value).max(), err_msg=name)


def gradients_of(found, case, place):
    return [value for name, value in found.items() if name.startswith(f"{case} {place} ") and "gradient" in name]


@pytest.mark.parametrize("case", BATCHES)
def test_the_loss_is_the_mean_of_the_whole_batch(ranks, case):
    expected = alone(case)
    for found in ranks:
        for place in range(STEPS):
            assert found[f"{case} {place} facts"][0] == pytest.approx(float(expected[f"{case} {place} loss"]), rel=1e-6)


def bits(found):
    """All that was found by ranks that did the same; what one of them did alone has a test of its own."""
    return {name: value.tobytes() for name, value in found.items() if not name.startswith("single")}


def test_all_ranks_hold_the_same_bits_after_every_step(ranks):
    first, *others = ranks
    for found in others:
        assert bits(found) == bits(first)


def test_two_runs_have_the_same_bits(two, site):
    again = together(site / "again", 2)
    for one, other in zip(two, again, strict=True):
        assert bits(one) == bits(other)


def test_running_statistics_are_the_mean_of_the_ranks_own(ranks):
    """By the definition: 0.9 of the old and 0.1 of the mean, or of the biased variance, of a rank's own rows."""
    mean, variance, drawn = np.zeros(FEATURES), np.ones(FEATURES), given()["even images"].astype(np.float64)
    for place in range(3):
        parts = np.split(drawn[place], len(ranks))
        mean = np.mean([0.9 * mean + 0.1 * part.mean(0) for part in parts], axis=0)
        variance = np.mean([0.9 * variance + 0.1 * part.var(0) for part in parts], axis=0)
        for found in ranks:
            np.testing.assert_allclose(found[f"norms {place} 0._mean"], mean, atol=1e-6)
            np.testing.assert_allclose(found[f"norms {place} 0._variance"], variance, atol=1e-5)


def test_a_norm_in_test_mode_keeps_its_bits(ranks):
    start = given()
    for found in ranks:
        for place in range(3):
            assert found[f"norms {place} 2._mean"].tobytes() == start["still mean"].tobytes()
            assert found[f"norms {place} 2._variance"].tobytes() == start["still variance"].tobytes()


def test_what_no_rank_uses_gets_no_gradient_and_keeps_its_bits(ranks):
    for found in ranks:
        assert found["spare gradient"]
        assert found["spare 1 spare"].tobytes() == np.full(2, 0.1, np.float32).tobytes()
        assert found["spare 1 0.bias"].tobytes() != found["spare 0 0.bias"].tobytes()


def test_what_is_used_in_some_steps_only_is_left_alone_in_the_others(ranks):
    """As one process does it: no gradient, no step of this weight."""
    for found in ranks:
        assert "branch fault" not in found
        first, second, third = (found[f"branch {place} branch.weight"].tobytes() for place in range(3))
        assert given()["branch"].tobytes() != first
        assert first == second
        assert second != third


def test_what_one_rank_uses_alone_is_added_up_or_refused(ranks):
    """Never is the gradient of one weight added to that of another."""
    if "single fault" in ranks[0]:
        assert {str(found["single fault"]) for found in ranks} == {"RankError"}
        return
    start, network = given(), plain_network(given())
    images, labels = (paddle.to_tensor(start[f"even {what}"][0]) for what in ("images", "labels"))
    branch = paddle.to_tensor(start["branch"], stop_gradient=False)
    rows = len(images) * (len(ranks) - 1) // len(ranks)
    logits = paddle.concat([network(images[:rows]), network(images[rows:]) + images[rows:] @ branch])
    nn.functional.cross_entropy(logits, labels).backward()
    expected = {f"trunk.{name}": weight.grad for name, weight in network.named_parameters()}
    for found in ranks:
        for name, gradient in {**expected, "branch.weight": branch.grad}.items():
            np.testing.assert_allclose(found[f"single {name}"], gradient.numpy(), atol=1e-6)


def test_a_signal_that_rank_0_has_met_reaches_all_in_the_same_step(ranks):
    for found in ranks:
        assert [found[f"stop {place} facts"][1] for place in range(3)] == [0, 15, 0]


def test_other_first_weights_are_refused_on_every_rank(ranks):
    for found in ranks:
        message = str(found["refusal"])
        assert f"expected the same first weights on all {len(ranks)} ranks, got different ones" in message
        assert "draw them by paddle alone" in message


@pytest.mark.filterwarnings("ignore:When training, we now always track")
def test_one_rank_adds_up_nothing(monkeypatch):
    """Not a byte is copied: gradients and statistics stay where they are, as they are."""
    monkeypatch.setattr("ssld.train.exchange._memory", lambda _: pytest.fail("one rank has nobody to share with"))
    network = nn.Sequential(nn.BatchNorm1D(FEATURES), nn.Linear(FEATURES, CLASSES))
    exchange = Exchange(network, Ranks())
    network(paddle.to_tensor(given()["even images"][0])).sum().backward()
    watched = {
        "gradient": network[1].weight.grad,
        "mean": network[0]._mean,
        "variance": network[0]._variance,
    }
    before = {name: (tensor.data_ptr(), tensor.numpy().tobytes()) for name, tensor in watched.items()}
    loss = 0.1 + 0.2
    assert exchange(loss, None) == (loss, None)
    assert exchange(loss, 15) == (loss, 15)
    assert {name: (tensor.data_ptr(), tensor.numpy().tobytes()) for name, tensor in watched.items()} == before
