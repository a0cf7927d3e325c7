"""The studies train what they say, and an interruption costs one network."""

import json
import math
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from studies import common, figures, spikes, temporal_order

pytestmark = pytest.mark.usefixtures("optax_promotes")


# --- What they share.


def plain(recur, read):
    def step(hidden, read):
        return jnp.tanh(hidden @ recur + read), None

    return jax.lax.scan(step, jnp.zeros_like(read[0]), read)[0]


@pytest.mark.slow
def test_values_and_gradients_are_those_of_a_scan():
    rng = np.random.default_rng(0)
    recur = rng.standard_normal((5, 5)).astype(np.float32) / 2
    read = rng.standard_normal((7, 3, 5)).astype(np.float32)
    weights = rng.standard_normal((3, 5)).astype(np.float32)
    np.testing.assert_allclose(
        common.last_hidden(recur, read), plain(recur, read), 1e-6
    )
    found, expected = (
        jax.grad(lambda *a, f=f: jnp.vdot(weights, f(*a)), argnums=(0, 1))(recur, read)
        for f in (common.last_hidden, plain)
    )
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, 1e-5, 1e-6)


@pytest.mark.parametrize(("successes", "trials"), [(0, 20), (7, 20), (20, 20)])
def test_interval_of_a_share_is_wilsons(successes, trials):
    z, p = 1.959964, successes / trials
    middle = (p + z**2 / (2 * trials)) / (1 + z**2 / trials)
    margin = math.sqrt(p * (1 - p) / trials + z**2 / (4 * trials**2))
    margin *= z / (1 + z**2 / trials)
    expected = (middle - margin, middle + margin)
    found = common.interval_of_share(successes, trials)
    np.testing.assert_allclose(found, expected, 1e-5, 1e-6)


def test_interval_of_a_mean_is_students():
    found = common.interval_of_mean(np.array([1.0, 2.0, 3.0, 4.0]))
    margin = 3.182446 * math.sqrt(5 / 3) / 2  # t of 3 degrees of freedom.
    np.testing.assert_allclose(found, (2.5 - margin, 2.5 + margin), 1e-5)


@pytest.mark.slow
def test_figures_are_drawn_from_the_results(tmp_path):
    for path in common.FOLDER.glob("*.json"):
        shutil.copy(path, tmp_path)
    figures.main(["--out", str(tmp_path)])
    drawn = {path.name for path in tmp_path.glob("*.png")}
    assert drawn == {path.name for path in common.FOLDER.glob("*.png")}


# --- Bad batches.


@pytest.mark.parametrize("kind", spikes.KINDS)
def test_bad_batches_are_those_of_the_kind(kind):
    found = spikes.faults(kind, 10_000, seed=0)
    bad = found.nan | found.random | (found.factor != 1)
    assert not bad[: spikes.FIRST_BAD].any()
    shares = {"clean": 0, "scaled": 0.01, "bursts": 0.02, "labels": 0.05, "NaN": 0.01}
    assert bad.mean() == pytest.approx(shares[kind], rel=0.25)
    assert found.nan.any() == (kind == "NaN")
    assert found.random.any() == (kind in ("bursts", "labels"))
    assert set(found.factor[bad]) <= {1, 100, 1000}
    again = spikes.faults(kind, 10_000, seed=0)
    for one, other in zip(found, again, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("method", spikes.METHODS)
def test_every_method_survives_a_nan(method):
    faults = spikes.faults("NaN", 300, seed=1)
    assert faults.nan.any()
    value = spikes.VALUES[method][-1]
    run = spikes.train(spikes.Setting(method, value, 0.1), 1, faults)
    assert run.accuracy > 0.5
    np.testing.assert_array_equal(np.isnan(run.norms), faults.nan)


@pytest.mark.slow
def test_a_scaled_batch_ends_the_run_without_a_clip():
    faults = spikes.faults("scaled", 400, seed=1)
    settings = (
        spikes.Setting("no clipping", None, 0.1),
        spikes.Setting("constant", 1.0, 0.1),
    )
    lost, kept = (spikes.train(setting, 1, faults) for setting in settings)
    assert lost.accuracy < spikes.LOST < 0.5 < kept.accuracy
    left_out = spikes.train(settings[0], 1, faults, leave_out=True)
    assert left_out.accuracy > 0.5
    assert (left_out.norms[faults.factor > 1] > 20).all()
    assert lost.touched == 0 < kept.touched


def runs_of(*accuracies):
    return [spikes.Run(accuracy, 0.5, None) for accuracy in accuracies]


def test_lost_runs_are_counted_and_not_averaged():
    row = spikes.row(runs_of(0.1, 0.9, 0.8), runs_of(0.9, 0.9, 0.9))
    assert row["lost"] == 1
    assert row["accuracy"] == 0.85
    assert row["more_than_constant"] == -0.05
    assert row["accuracies"] == [0.1, 0.9, 0.8]
    none_left = spikes.row(runs_of(0.1, 0.1), runs_of(0.9, 0.9))
    assert none_left["accuracy"] is None
    assert none_left["lost"] == 2


def test_the_best_setting_of_each_method_is_chosen():
    tuned = {
        (setting, kind): runs_of(0.9 if setting.learning_rate == 0.1 else 0.5)
        for setting in spikes.grid()
        for kind in spikes.KINDS
    }
    chosen = spikes.best(tuned)
    assert [setting.method for setting in chosen] == list(spikes.METHODS)
    assert {setting.learning_rate for setting in chosen} == {0.1}
    rows = spikes.grid_rows(tuned, chosen)
    assert len(rows) == len(spikes.grid())
    assert sum(row["chosen"] for row in rows) == len(spikes.METHODS)


@pytest.mark.slow
def test_spikes_are_drawn_and_tabled(tmp_path):
    tuned = {
        (setting, kind): runs_of(0.9, 0.8, 0.1)
        for setting in spikes.grid()
        for kind in spikes.KINDS
    }
    chosen = spikes.best(tuned)
    tested = {(s, kind): runs for (s, kind), runs in tuned.items() if s in chosen}
    results = {"grid": spikes.grid_rows(tuned, chosen), "rows": spikes.rows(tested)}
    lines = spikes.lines(results["rows"])
    assert [line[0] for line in lines] == list(spikes.METHODS)
    figures.draw_spikes(results, tmp_path / "spikes.png")
    figures.draw_grid(results, tmp_path / "grid.png")
    for path in tmp_path.iterdir():
        assert path.stat().st_size > 10_000


# --- The order of two symbols.


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(temporal_order, "CHECK_EVERY", 20)
    monkeypatch.setattr(temporal_order, "TEST_SIZE", 500)
    temporal_order._trained.clear_cache()
    yield
    temporal_order._trained.clear_cache()


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_network_that_succeeds_is_trained_no_further(quick, monkeypatch):
    advanced = []
    monkeypatch.setattr(temporal_order, "SUCCESS", 1.0)
    found = temporal_order.train(10, "clipped", 0, 80, lambda: advanced.append(1))
    assert len(advanced) == 1
    assert found.solved_at == 20
    assert found.error is not None
    assert found.error < 1
    assert found.largest_norm > 0


@pytest.mark.slow
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


@pytest.mark.slow
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
