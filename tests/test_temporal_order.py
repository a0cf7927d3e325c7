"""The paper's task, its training, and that an interruption costs one network."""

import json
import re

import jax
import numpy as np
import pytest

from benchmarks import temporal_order

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("optax_promotes")]


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(temporal_order, "CHECK_EVERY", 20)
    monkeypatch.setattr(temporal_order, "TEST_SIZE", 500)
    temporal_order._trained.clear_cache()
    yield
    temporal_order._trained.clear_cache()


def test_sequences_are_those_of_the_paper():
    batch = temporal_order.draw(jax.random.key(0), 2000, 50)
    symbols = np.asarray(batch.symbols)
    assert symbols.shape == (50, 2000)
    places = np.argwhere((symbols < 2).T)
    assert len(places) == 2 * 2000  # Two in each sequence.
    first, second = places[::2, 1], places[1::2, 1]
    assert set(first) == set(range(5, 10))
    assert set(second) == set(range(25, 30))
    sequences = np.arange(2000)
    labels = symbols[first, sequences] + 2 * symbols[second, sequences]
    np.testing.assert_array_equal(batch.labels, labels)
    assert set(labels) == {0, 1, 2, 3}
    assert set(symbols.ravel()) == set(range(6))


def test_networks_start_as_in_the_paper():
    params = temporal_order.initial(np.random.default_rng(0))
    assert {p.dtype for p in params.values()} == {np.dtype(np.float32)}
    radius = np.abs(np.linalg.eigvals(params["recur"].astype(np.float64))).max()
    np.testing.assert_allclose(radius, 0.95, 1e-5)
    np.testing.assert_array_equal((params["recur"] != 0).sum(axis=1), [15] * 50)


@pytest.mark.parametrize("max_norm", [np.inf, 1e-3])
def test_one_step_of_sgd(max_norm):
    params = temporal_order.initial(np.random.default_rng(0))
    batch = temporal_order.draw(jax.random.key(0), 20, 10)
    found, measured = temporal_order.updated(params, batch, max_norm)
    grads = jax.grad(temporal_order.loss_of)(params, batch)
    norm = np.sqrt(sum(np.sum(np.square(np.float64(g))) for g in grads.values()))
    assert 1e-3 < norm < np.inf
    np.testing.assert_allclose(measured, norm, 1e-5)
    for name, value in found.items():
        expected = params[name] - 0.01 * grads[name] * min(1, max_norm / norm)
        np.testing.assert_allclose(value, expected, 1e-5, 1e-9)


def test_a_network_that_succeeds_is_trained_no_further(quick, monkeypatch):
    advanced = []
    monkeypatch.setattr(temporal_order, "SUCCESS", 1.0)
    found = temporal_order.train(10, "clipped", 0, 80, lambda: advanced.append(1))
    assert len(advanced) == 1
    assert found.solved_at == 20
    assert found.error is not None
    assert found.error < 1
    assert found.largest_norm > 0


def test_a_network_that_is_not_finite_has_no_error(quick, monkeypatch):
    initial = temporal_order.initial
    monkeypatch.setattr(
        temporal_order,
        "initial",
        lambda rng: initial(rng) | {"bias": np.full(4, np.nan, np.float32)},
    )
    found = temporal_order.train(10, "no clipping", 0, 20, lambda: None)
    assert found.error is None
    assert found.solved_at == 0


def test_an_interruption_costs_one_network(quick, tmp_path, monkeypatch):
    expected = temporal_order.train_all([10], 2, 40, tmp_path / "whole.json")
    train, calls = temporal_order.train, []

    def interrupted(*arguments):
        calls.append(arguments[:3])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return train(*arguments)

    monkeypatch.setattr(temporal_order, "train", interrupted)
    part = tmp_path / "part.json"
    with pytest.raises(KeyboardInterrupt):
        temporal_order.train_all([10], 2, 40, part)
    assert temporal_order.train_all([10], 2, 40, part) == expected
    networks = [
        (10, method, seed) for method in temporal_order.METHODS for seed in (0, 1)
    ]
    assert calls == [*networks[:3], *networks[2:]]


@pytest.mark.slow
def test_table_and_figure(quick, tmp_path, capsys):
    def run(*lengths, steps=20):
        argument = f"--steps {steps} --seeds 2 --out {tmp_path} --lengths"
        temporal_order.main([*argument.split(), *map(str, lengths)])

    # Another setting is not mixed in, other lengths of this one stay.
    run(30, steps=40)
    run(20)
    run(10)
    written = json.loads((tmp_path / "temporal-order.json").read_text())
    assert [row["length"] for row in written["rows"]] == [10] * 2 + [20] * 2
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".png"}
    printed = capsys.readouterr().out
    for line in temporal_order.lines(written["rows"]):
        assert re.search(r"\s*│\s*".join(map(re.escape, line)), printed)


@pytest.mark.slow
def test_learns_the_shortest_sequences():
    found = temporal_order.train(10, "clipped", 0, 3000, lambda: None)
    assert 0 < found.solved_at <= 3000
    assert found.error is not None
    assert found.error < temporal_order.SUCCESS
