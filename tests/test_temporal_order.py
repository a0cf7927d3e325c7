"""The paper's task, its training, and that an interruption costs nothing."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.progress

from benchmarks import temporal_order, temporal_order_figure

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("optax_promotes")]


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(temporal_order, "CHECK_EVERY", 20)
    monkeypatch.setattr(temporal_order, "TEST_SIZE", 500)
    temporal_order._train_and_test.clear_cache()
    yield
    temporal_order._train_and_test.clear_cache()


def trained(steps, out):
    with rich.progress.Progress(disable=True) as progress:
        task = progress.add_task("", total=steps)
        return temporal_order.train(10, steps, 2, out, progress, task)


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
    found = temporal_order.updated(params, batch, max_norm, True)
    grads = jax.grad(temporal_order.loss_of)(params, batch)
    norm = np.sqrt(sum(np.sum(np.square(np.float64(g))) for g in grads.values()))
    assert 1e-3 < norm < np.inf
    for name, value in found.items():
        expected = params[name] - 0.01 * grads[name] * min(1, max_norm / norm)
        np.testing.assert_allclose(value, expected, 1e-5, 1e-9)


@pytest.mark.parametrize("rule", [False, True])
def test_rule_of_the_authors_for_what_is_not_finite(rule):
    params = temporal_order.initial(np.random.default_rng(0))
    params = params | {"bias": np.full(4, np.nan, np.float32)}
    batch = temporal_order.draw(jax.random.key(0), 20, 10)
    found = temporal_order.updated(params, batch, 1.0, rule)
    if rule:
        shrunk = params["recur"] * (1 - 0.01 * 0.02)
        np.testing.assert_allclose(found["recur"], shrunk, 1e-6)
        np.testing.assert_array_equal(found["read"], params["read"])
    else:
        assert np.isnan(found["recur"]).all()


def test_an_interruption_costs_nothing(quick, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    expected = trained(80, whole)
    saved = parts / "temporal-order-10-80-2.msgpack"

    class Interrupted(Exception):
        pass

    advanced, calls = temporal_order.advanced, []

    def interrupted(state, length):
        calls.append(int(state.step))
        if len(calls) == 3:
            raise Interrupted
        return advanced(state, length)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(temporal_order, "advanced", interrupted)
        with pytest.raises(Interrupted):
            trained(80, parts)
        assert saved.exists()
        assert trained(80, parts) == expected
    assert calls == [0, 20, 40, 40, 60]


@pytest.mark.slow
def test_table_and_figure(quick, tmp_path, capsys):
    temporal_order.main(
        [
            "--lengths",
            "10",
            "20",
            "--steps",
            "20",
            "--seeds",
            "2",
            "--out",
            str(tmp_path),
        ]
    )
    written = json.loads((tmp_path / "temporal-order.json").read_text())
    assert [row["length"] for row in written["rows"]] == [10] * 3 + [20] * 3
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".png"}
    printed = capsys.readouterr().out
    for line in temporal_order.lines(written["rows"]):
        assert re.search(r"\s*│\s*".join(line), printed)
    assert temporal_order_figure.METHOD_COLOURS.keys() >= set(temporal_order.METHODS)


@pytest.mark.slow
def test_learns_the_shortest_sequences():
    state = temporal_order.start(1)
    state = temporal_order.advanced(state, 10)
    state = temporal_order.advanced(state, 10)
    assert np.nanmin(state.errors) < 0.5
    assert jnp.isfinite(state.params["recur"]).all()
