"""The benchmarks time what they say, on trees small enough for a test."""

import dataclasses
import json
import pathlib
import time

import jax
import numpy as np
import pytest
import rich.progress

from benchmarks import (
    accelerators,
    cases,
    compiled_figure,
    figure,
    report,
    sharding,
    spikes,
    spikes_figure,
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


@pytest.mark.slow
def test_study_of_spikes(tmp_path, optax_promotes):
    methods = {name: spikes.METHODS[name]() for name in ("constant", "skip")}
    steps = 120
    runs = {name: spikes.train(tx, 2, steps, list) for name, tx in methods.items()}
    batches = spikes.batches([spikes.load_sequences(s)[0] for s in range(2)], steps)
    bad = np.array(
        [
            np.isnan(batch.digits.images).any(axis=(1, 2, 3)) | (batch.factor != 1)
            for batch in batches
        ]
    )
    assert bad.any()
    assert not bad[: spikes.FIRST_BAD].any()
    skip = runs["skip"]
    assert skip.norms.shape == (2, steps)
    judged = skip.norms > skip.thresholds
    assert (judged | np.isnan(skip.norms))[bad.T].all()
    np.testing.assert_allclose(skip.skipped, (judged | np.isnan(skip.norms)).mean(1))
    assert (runs["constant"].clipped > 0.5).all()
    assert (skip.losses[:, :20].mean(1) > skip.losses[:, -20:].mean(1)).all()
    runs = {name: runs.get(name, skip) for name in spikes.METHODS}
    spikes_figure.draw(runs, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    row = spikes.row("skip", skip)
    assert spikes.table([row]).row_count == 1


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


def test_transformer_has_gradients_for_all_parameters(optax_promotes):
    params = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, "float32"),
        transformer.shapes(blocks=1),
        is_leaf=lambda node: isinstance(node, tuple),
    )
    tokens = jax.ShapeDtypeStruct((2, 16), "int32")
    with jax.numpy_rank_promotion("allow"):  # As in the code of users.
        grads = jax.eval_shape(jax.grad(transformer.loss_of), params, tokens)
    assert grads == params
