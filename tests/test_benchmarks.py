"""The benchmarks time what they say, on trees small enough for a test."""

import dataclasses
import json
import pathlib
import shutil
import time

import jax
import matplotlib
import numpy as np
import pytest
import rich.progress

from benchmarks import (
    accelerators,
    cases,
    compiled_figure,
    dense,
    figure,
    redraw,
    report,
    sharding,
    spikes,
    spikes_figure,
    style,
    transformer,
)
from benchmarks.__main__ import plan, table
from benchmarks.measure import Contender, interleaved, rows
from benchmarks.programs import Collective, Program
from benchmarks.targets import TARGETS, Compiled
from benchmarks.trees import gpt2_small_shapes, llama_70b, resnet50_shapes

pytestmark = pytest.mark.slow

RESULTS = pathlib.Path(__file__).parent.parent / "benchmarks" / "results"


@pytest.fixture
def progress():
    return rich.progress.Progress(disable=True)


def orders_of(names, rounds, progress):
    """In which order contenders ran in each round; they share what is updated."""
    calls = []

    def contender(name):
        def run(value):
            time.sleep(0.03)  # One call a round.
            calls.append(name)
            return value + 1

        return Contender(run)

    contenders = {name: contender(name) for name in names}
    interleaved(contenders, rounds, progress, shared=0)
    assert all(len(each.seconds) == rounds for each in contenders.values())
    timed = calls[2 * len(names) :]  # After those that warm up.
    return [timed[i : i + len(names)] for i in range(0, len(timed), len(names))]


def test_contenders_run_in_random_order_once_a_round(progress):
    orders = orders_of("abc", 4, progress)
    assert all(sorted(order) == ["a", "b", "c"] for order in orders)
    assert len({tuple(order) for order in orders}) > 1
    assert orders == orders_of("abc", 4, progress)


def test_preparations_are_not_timed(progress):
    # Far longer than what a busy machine adds to a call.
    slow = Contender(lambda value: value, prepare=lambda _: time.sleep(0.3))
    # One call a round.
    slow.run = lambda _: time.sleep(0.03)
    interleaved({"slow": slow}, 2, progress)
    assert all(0.03 <= seconds < 0.3 for seconds in slow.seconds)


def test_what_is_added_is_the_difference_in_each_round():
    contenders = {
        "none": Contender(lambda _: None, seconds=[1.0, 2.0, 9.0]),
        "optax": Contender(lambda _: None, seconds=[3.0, 4.0, 9.5]),
        "ours": Contender(lambda _: None, seconds=[1.5, 2.5, 9.5]),
    }
    found = rows("added", "float32", contenders, beside="none")
    assert [row["added_milliseconds"] for row in found] == [0, 2000, 500]
    assert [row["ratio"] for row in found] == [0, 1, 0.25]
    # In the three rounds 0.25, 0.25 and 1.
    assert found[2]["ratio_quartiles"] == [0.25, 0.625]


@pytest.mark.parametrize("optimizer", list(cases.OPTIMIZERS))
def test_every_optimizer_runs(optimizer, progress, optax_promotes):
    found = cases.added_to_step(optimizer, [(130, 140)], "float32", 2, progress)
    names = [row["contender"] for row in found]
    assert names == ["none", "by hand", "optax", "ours", "one read"]
    assert all(row["milliseconds"] > 0 for row in found)
    assert found[1]["temporary_mb"] is not None


@pytest.mark.slow
def test_clip_alone_table_and_figure(tmp_path, progress, optax_promotes):
    found = cases.alone("clip alone, small", (100, 3), "float32", 2, progress)
    found += cases.added_to_step("AdamW", [(10, 10)], "float32", 2, progress)
    found += cases.against_parameters([160, 320], 2, progress)
    found += cases.against_leaves([1, 2], progress)
    assert table(found).row_count == len(found)
    figure.draw({"machine": "a test", "rows": found}, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    lines = report.lines({"rows": found})
    assert len(lines) == 2
    assert lines[0].startswith("| clip alone, small, float32 | ")


@pytest.mark.parametrize("mode", sharding.MODES)
@pytest.mark.parametrize("what", ["clip", "AdamW"])
def test_sharded_programs_are_compiled(mode, what, optax_promotes):
    ours = sharding.row(8, mode, what, "ours", layers=1)
    theirs = sharding.row(8, mode, what, "optax", layers=1)
    assert ours.others == theirs.others == 0
    if mode == "jit, auto":
        assert 0 < ours.all_reduces <= theirs.all_reduces
    else:
        assert (ours.all_reduces, ours.numbers) == (1, 3)
    # What a mesh of CPU devices holds besides is no goal: it serves tests.
    assert ours.temporary_mb > 0
    results = {"rows": [dataclasses.asdict(row) for row in (theirs, ours)]}
    (line,) = report.sharding_lines(results)
    assert line.startswith(f"| 8 | {mode} | {what} | {theirs.all_reduces} → ")


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


@pytest.mark.parametrize("method", spikes.METHODS)
def test_every_method_survives_a_nan(method, optax_promotes):
    faults = spikes.faults("NaN", 300, seed=1)
    assert faults.nan.any()
    value = spikes.VALUES[method][-1]
    run = spikes.train(spikes.Setting(method, value, 0.1), 1, faults)
    assert run.accuracy > 0.5
    np.testing.assert_array_equal(np.isnan(run.norms), faults.nan)


@pytest.mark.slow
def test_a_scaled_batch_ends_the_run_without_a_clip(optax_promotes):
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


def test_spikes_are_drawn_and_tabled(tmp_path):
    tuned = {
        (setting, kind): runs_of(0.9, 0.8, 0.1)
        for setting in spikes.grid()
        for kind in spikes.KINDS
    }
    chosen = spikes.best(tuned)
    tested = {(s, kind): runs for (s, kind), runs in tuned.items() if s in chosen}
    results = {"grid": spikes.grid_rows(tuned, chosen), "rows": spikes.rows(tested)}
    assert spikes.table(results["rows"]).row_count == len(spikes.METHODS)
    spikes_figure.draw(results, tmp_path / "spikes.png")
    spikes_figure.draw_grid(results, tmp_path / "grid.png")
    for path in tmp_path.iterdir():
        assert path.stat().st_size > 10_000


def test_all_figures_are_drawn_from_the_results(tmp_path):
    for path in RESULTS.glob("*.json"):
        shutil.copy(path, tmp_path)
    redraw.main(["--out", str(tmp_path)])
    drawn = {path.name for path in tmp_path.glob("*.png")}
    made_elsewhere = {"demo.png"}
    assert drawn == {path.name for path in RESULTS.glob("*.png")} - made_elsewhere


def luminance(colour):
    channels = np.array(matplotlib.colors.to_rgb(colour))
    linear = np.where(
        channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4
    )
    return linear @ [0.2126, 0.7152, 0.0722]


@pytest.mark.parametrize("background", ["#ffffff", "#0d1117"])
def test_colours_can_be_read_on_light_and_dark(background):
    for colour in (style.TEXT, *style.COLOURS.values()):
        low, high = sorted([luminance(colour), luminance(background)])
        assert (high + 0.05) / (low + 0.05) >= 3, colour


def test_trees_have_the_sizes_of_the_models():
    def sizes(shapes):
        shapes = jax.tree.leaves(shapes, is_leaf=lambda x: isinstance(x, tuple))
        return len(shapes), sum(jax.numpy.prod(jax.numpy.array(s)) for s in shapes)

    assert sizes(gpt2_small_shapes()) == (148, 124_439_808)
    assert sizes(resnet50_shapes()) == (161, 25_557_032)
    params, specs = sharding.abstract_params(llama_70b())
    leaves = jax.tree.leaves(params)
    assert len(leaves) == len(jax.tree.leaves(specs)) == 723
    assert sum(leaf.size for leaf in leaves) == 70_553_706_496


def test_mutants_that_are_explained_are_known_by_what_they_add():
    pytest.importorskip("cosmic_ray")
    from benchmarks import mutants

    known = mutants.equivalent(mutants.REASONS.read_text())
    assert len(known) >= 2
    zipped = ["-    zip(a, b, strict=True)", "+    zip(a, b, strict=False)"]
    assert mutants.is_known(zipped, known)
    assert mutants.is_known(["-jnp.sign(parts[0])", "+jnp.sign(parts[ -1])"], known)
    largest = "largest, smallest = 2 {} int(own.maxexp), 2 * (int(own.minexp) - 1)"
    either = [f"-{largest.format('*')}", f"+{largest.format('|')}"]
    assert mutants.is_known(either, known)
    assert not mutants.is_known(["-zip(a, b, strict=False)", "+a"], known)
    assert not mutants.is_known(["-a + b", "+a - b"], known)


def test_report_counts_the_mutants_that_were_run_so_far():
    pytest.importorskip("cosmic_ray")
    from benchmarks import mutants

    killed = {"outcome": "killed", "killed_by": "tests/test_norm.py::test_a"}
    lives = {"outcome": "survived", "killed_by": None, "change": ["-a", "+b"]}
    report = mutants.report_of([killed, killed, lives], mutants=9, seed=0)
    assert (report["run"], report["killed"], report["survivors"]) == (3, 2, [lives])
    assert report["killed_by"] == ["tests/test_norm.py::test_a"]


def test_results_hold_every_case_of_the_plan():
    written = json.loads((RESULTS / "cpu-2-cores.json").read_text())
    timed = {(row["case"], row["dtype"]) for row in written["rows"]}
    for optimizer in cases.OPTIMIZERS:
        for dtype in ("float32", "bfloat16", "float16"):
            assert (f"added to {optimizer}", dtype) in timed
    assert len(plan(quick=True)) < len(plan(quick=False))


def test_cases_are_selected_by_a_part_of_their_names():
    assert list(plan(quick=True, only="AdamW")) == ["AdamW, float32", "AdamW, bfloat16"]
    assert plan(quick=True, only="no such case") == {}


def compiled_rows(target):
    """As if each program of the plan had been compiled."""
    reduced = (Collective("all-reduce", 2), Collective("all-reduce", 1))
    cycles = None if target.name == "h100" else 10**6
    program = Program(10**9, 10**9, 100, cycles, 0, 1, reduced)
    compiled = Compiled(program, temporary_bytes=10**6, build_seconds=1.0)
    return [
        accelerators.row(case, clip, compiled)
        for case in accelerators.plan(quick=False)
        for clip in case.contenders
    ]


def test_compiled_programs_are_shown_as_not_measured(tmp_path):
    for target in (TARGETS["v5e"], TARGETS["h100"]):
        found = compiled_rows(target)
        printed = accelerators.table(target, found)
        assert printed.title == f"{target.title}: compiled, not measured"
        assert printed.row_count == len(found)
        path = tmp_path / f"compiled-{target.name}.json"
        results = accelerators.merged(path, target, found)
        assert results["what"] == "Compiled, not measured"
        path.write_text(json.dumps(results))
    assert accelerators.exchanged(found[0]["collectives"]) == "2 all-reduce (3)"
    compiled_figure.draw(tmp_path)
    assert (tmp_path / "compiled.png").stat().st_size > 10_000


def test_compiled_rows_replace_those_of_the_same_cases(tmp_path):
    path, target = tmp_path / "compiled-v5e.json", TARGETS["v5e"]
    found = compiled_rows(target)
    path.write_text(json.dumps(accelerators.merged(path, target, found)))
    newer = [row | {"kernels": 1} for row in found[:4]]
    rows = accelerators.merged(path, target, newer)["rows"]
    assert rows == found[4:] + newer


NETWORKS = {
    "transformer": (transformer, jax.ShapeDtypeStruct((2, 16), "int32")),
    "dense": (dense, jax.ShapeDtypeStruct(dense.BATCH, "bfloat16")),
}


@pytest.mark.parametrize("network", NETWORKS)
def test_networks_have_gradients_for_all_parameters(network, optax_promotes):
    module, batch = NETWORKS[network]
    params = accelerators.abstract(module.shapes(1), "float32")
    with jax.numpy_rank_promotion("allow"):  # As in the code of users.
        grads = jax.eval_shape(jax.grad(module.loss_of), params, batch)
    assert grads == params
