"""The benchmarks time what they say, on trees small enough for a test."""

import dataclasses
import functools
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import matplotlib.colors
import numpy as np
import pytest
import rich.progress
from jax.sharding import PartitionSpec as P

from benchmarks import (
    __main__ as command,
    accelerators,
    cases,
    figures,
    measured,
    networks,
    programs,
    results,
    style,
)
from benchmarks.measure import Contender, interleaved, rows
from benchmarks.programs import Collective, Program
from benchmarks.targets import TARGETS, Compiled

ROOT = pathlib.Path(__file__).parent.parent
OPTIMIZERS = ("AdamW", "SGD with momentum", "Lion", "Adafactor")


# --- What is timed.


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


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        *(
            cases.optimizer_step(name, "float32", divisor=64)
            for name in cases.OPTIMIZERS
        ),
        cases.optimizer_step("AdamW", "bfloat16", cases.EVERY, divisor=64),
        cases.training_step("dense", "float32", cases.EVERY, width=16),
        cases.alone("clip alone, small", (100, 3), "float32"),
    ],
    ids=str,
)
def test_every_case_is_timed(case, progress, optax_promotes):
    with jax.numpy_rank_promotion("allow"):  # As in the code of users.
        found = {row["contender"]: row for row in measured.rows_of(case, 2, progress)}
    assert {*case.contenders, "one read"} <= set(found)
    assert all(row["milliseconds"] > 0 for row in found.values())
    assert found["ours"]["temporary_mb"] is not None
    assert ("share_of_copy_bandwidth" in found["ours"]) == (case.optimizer is None)


@pytest.fixture
def quick_cases(monkeypatch, tmp_path):
    """Two cases in place of all; gives the arguments, and the file of results."""
    two = [cases.alone("small", (100,), dtype) for dtype in ("float32", "bfloat16")]
    monkeypatch.setattr(cases, "measured", lambda quick: two)
    monkeypatch.setattr(measured, "outside_jit", lambda rounds, progress: [])
    return ["--out", str(tmp_path)], tmp_path / f"{results.slug()}.json"


@pytest.mark.slow
def test_a_run_goes_on_where_it_was_interrupted(quick_cases, monkeypatch):
    arguments, path = quick_cases
    timed, calls = measured.rows_of, []

    def interrupted(case, *rest):
        calls.append(str(case))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return timed(case, *rest)

    monkeypatch.setattr(measured, "rows_of", interrupted)
    with pytest.raises(KeyboardInterrupt):
        command.main(arguments)
    command.main([*arguments, "--only", "bfloat16"])
    command.main(arguments)
    small = ["small, float32", "small, bfloat16"]
    assert calls == [*small, small[1], small[1]]  # What --only prints is not kept.
    assert {row["dtype"] for row in results.read(path)["rows"]} == {
        "float32",
        "bfloat16",
    }
    monkeypatch.setattr(results, "source", lambda: "another")
    command.main(arguments)
    assert calls[4:] == small


def test_plans_differ(tmp_path):
    def plan(quick=False, gpu=False, small=False):
        options = dict(quick=quick, gpu=gpu, small=small)
        return command.plan(type("Options", (), options))

    assert len(plan(quick=True)) < len(plan())
    assert list(plan(gpu=True))[0] == list(plan(gpu=True, small=True))[0]
    assert any("step of decoder" in name for name in plan(gpu=True))
    written = json.loads((results.FOLDER / "cpu-2-cores.json").read_text())
    timed = {f"{row['case']}, {row['dtype']}" for row in written["rows"]}
    assert timed == set(plan())


def test_rows_of_another_setting_are_left_out(tmp_path):
    path = tmp_path / "folder" / "file.json"
    assert results.rows(path, {"a": 1}) == []
    results.write({"a": 1, "b": 2, "rows": [{"c": 3}]}, path)
    assert results.rows(path, {"a": 1}) == [{"c": 3}]
    assert results.rows(path, {"a": 2}) == []


def test_tables_have_the_columns_that_hold_a_value(capsys):
    found = [{"a_b": 1000, "c": None}, {"a_b": [1, 2.5], "c": None, "d": "[x]"}]
    table = results.table(found, "A title")
    assert (table.title, table.row_count) == ("A title", 2)
    assert [column.header for column in table.columns] == ["a b", "d"]
    cells = [list(column.cells) for column in table.columns]
    assert cells == [["1,000", "1 to 2.5"], ["", r"\[x]"]]


# --- Networks.


def test_trees_have_the_sizes_of_the_models():
    def sizes(shapes):
        leaves = jax.tree.leaves(networks.abstract(shapes, "bfloat16"))
        return len(leaves), sum(leaf.size for leaf in leaves)

    assert sizes(networks.gpt2_small()) == (148, 124_439_808)
    assert sizes(networks.resnet50()) == (161, 25_557_032)
    shapes, specs = networks.llama_70b()
    assert sizes(shapes) == (723, 70_553_706_496)
    assert len(jax.tree.leaves(specs, is_leaf=lambda node: isinstance(node, P))) == 723


@pytest.mark.slow
@pytest.mark.parametrize("name", networks.NETWORKS)
def test_networks_have_gradients_for_all_parameters(name, optax_promotes):
    case = cases.training_step(name, "float32")
    with jax.numpy_rank_promotion("allow"):
        grads = jax.eval_shape(jax.grad(case.loss_of), case.params, case.data)
    assert grads == case.params


@pytest.mark.slow
@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("name", cases.EIGHT)
def test_steps_on_eight_devices_are_traced(name, mode, optax_promotes, monkeypatch):
    """For CPU devices, as there need be no compiler for others."""
    target = dataclasses.replace(TARGETS["v5e"], platform="cpu")
    monkeypatch.setattr(
        type(target), "devices", lambda self, count=1: jax.devices()[:count]
    )
    monkeypatch.setattr(networks, "LENGTH", 16)
    with jax.numpy_rank_promotion("allow"):
        found = accelerators.compiled(target, cases.on_eight(name, mode), "by hand")
    assert any(each.kind == "all-reduce" for each in found.program.collectives)


# --- What is compiled.


def compiled_rows(target):
    """As if each program of the plan had been compiled."""
    reduced = (Collective("all-reduce", 2), Collective("all-reduce", 1))
    cycles = None if target.name == "h100" else 10**6
    program = Program(10**9, 10**9, 100, cycles, 0, 1, reduced)
    compiled = Compiled(program, temporary_bytes=10**6, build_seconds=1.0)
    return [
        accelerators.row(case, clip, compiled)
        for case in cases.compiled(target.name)
        for clip in case.contenders
    ]


@pytest.mark.parametrize("name", ["v5e", "h100"])
def test_compiled_programs_are_summed_up_in_groups(name):
    found = compiled_rows(TARGETS[name])
    assert accelerators.shown(found[0])["collectives"] == "2 all-reduce (3)"
    groups = {line["group"] for line in accelerators.summary(found)}
    assert {"one device", "eight devices", "added to AdamW"} < groups


def test_summary_has_the_geometric_mean_and_the_worst():
    found = compiled_rows(TARGETS["v5e"])
    mine = [row for row in found if row["contender"] == "ours"][:2]
    mine[0]["cycles"], mine[1]["cycles"] = 4 * 10**6, 10**6
    pairs = [row for row in found if row["case"] == mine[0]["case"]]
    (line,) = [
        each
        for each in accelerators.summary(pairs)
        if each["what"] == "cost: ours to optax"
    ]
    assert (line["mean"], line["worst"], line["programs"]) == (2, 4, 2)
    assert line["worst_in"] == f"{mine[0]['case']}, {mine[0]['dtype']}"


def test_a_gpu_costs_bytes_and_kernels():
    row = {"cycles": None, "hbm_gb": 3.35, "kernels": 500}
    assert accelerators.cost(row) == pytest.approx(2e-3)
    assert accelerators.cost(row | {"cycles": 7}) == 7


def test_only_what_is_missing_is_compiled(monkeypatch, tmp_path):
    target, compiled = TARGETS["v5e"], []
    found = iter(compiled_rows(target))
    monkeypatch.setattr(accelerators, "_warm_up", lambda target: None)
    monkeypatch.setattr(accelerators, "compiled", lambda *args: compiled.append(args))
    monkeypatch.setattr(
        accelerators,
        "row",
        lambda case, clip, _: {
            **next(found),
            "case": case.name,
            "dtype": case.dtype,
            "contender": clip,
            "source": accelerators._source(clip),
        },
    )
    plan = cases.compiled("v5e")[:2]
    both = [(case, clip) for case in plan for clip in case.contenders]

    def run(chosen, anew=False):
        compiled.clear()
        path, console = tmp_path / "file.json", results.console()
        kept = accelerators.run(target, plan, chosen, path, anew=anew, console=console)
        assert len(kept) == len(chosen)
        return len(compiled), len(results.read(path)["rows"])

    assert run(both[:3]) == (3, 3)
    assert run(both) == (5, 8)
    assert run(both[:1]) == (0, 8)
    assert run(both[:1], anew=True) == (1, 8)
    monkeypatch.setattr(results, "source", lambda: "another")
    assert run(both) == (2, 8)  # Ours, in two cases.


# --- What is counted in a compiled program, on a text with known counts.


TEXT = """\
HloModule jit_step, is_scheduled=true, num_partitions=8

%fused (p: f32[100]) -> f32[] {
  %p = f32[100]{0} parameter(0)
  ROOT %inside = f32[] reduce(%p), dimensions={0}, to_apply=%add
}

%rescue (q: (f32[100])) -> (f32[]) {
  %q = (f32[100]{0}) parameter(0)
  %g = f32[100]{0} get-tuple-element(%q), index=0
  %dear = f32[] fusion(%g), kind=kLoop, calls=%fused
  ROOT %r = (f32[]) tuple(%dear)
}

%body (s: (s32[])) -> (s32[]) {
  %s = (s32[]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %next = s32[] add(%i, %i)
  ROOT %t = (s32[]) tuple(%next)
}

%called (c: bf16[10,10]) -> bf16[10,10] {
  %c = bf16[10,10]{1,0} parameter(0)
  ROOT %twice = bf16[10,10]{1,0} add(%c, %c)
}

ENTRY %main (x: f32[100], y: bf16[10,10]) -> (f32[100], bf16[10,10]) {
  %x = f32[100]{0:T(128)} parameter(0)
  %y = bf16[10,10]{1,0} parameter(1)
  %slice-start = ((f32[100]{0:T(128)}), f32[25]{0:T(128)S(1)}, s32[]{:S(2)}) \
slice-start(%x), slice={[0:25]}
  %slice-done = f32[25]{0:T(128)S(1)} slice-done(%slice-start)
  %copy-start = (f32[100]{0:T(128)S(1)}, f32[100]{0:T(128)}, u32[]{:S(2)}) \
copy-start(%x)
  %copy-done = f32[100]{0:T(128)S(1)} copy-done(%copy-start)
  %view = f32[25]{0:T(128)S(1)} custom-call(%slice-done), \
custom_call_target="ConcatBitcast"
  %sums = (f32[3]{0:T(128)}, /*index=1*/f32[]) fusion(%copy-done, %view, \
/*index=2*/%y), kind=kInput, calls=%fused, \
backend_config={"estimated_cycles":"1000","size":"1"}
  %three = f32[3]{0:T(128)} get-tuple-element(%sums), index=0
  %all-reduce-start = f32[3]{0} all-reduce-start(%three), channel_id=1, to_apply=%add
  %all-reduce-done = f32[3]{0} all-reduce-done(%all-reduce-start)
  %in = (f32[100]{0:T(128)}) tuple(%x)
  %one = s32[] constant(1)
  %n = s32[]{:T(128)} parameter(2)
  %next_n = s32[]{:T(128)S(6)} add(%n, %n)
  %branch = (f32[]) conditional(%one, %in, %in), branch_computations={%rescue, %rescue}
  %count = (s32[]) tuple(%one)
  %loop = (s32[]) while(%count), condition=%condition, body=%body
  %doubled = bf16[10,10]{1,0} call(%y), to_apply=%called
  %scaled = f32[100]{0:T(128)} multiply(%copy-done, %all-reduce-done), \
metadata={op_name="jit(f)/mul"}, backend_config={"estimated_cycles":"200"}
  ROOT %out = (f32[100]{0:T(128)}, bf16[10,10]{1,0}) tuple(%scaled, %doubled)
}
"""


@pytest.fixture(scope="module")
def program():
    return programs.parse(TEXT)


def test_reads_count_what_comes_from_hbm(program):
    slice_, copy, sums = 4 * 25, 4 * 100, 2 * 100
    reduced, turn, call, scaled = 4 * 3, 2 * 4, 2 * 200, 4 * 3
    expected = slice_ + copy + sums + reduced + turn + call + scaled
    assert program.read_bytes == expected


def test_writes_count_what_goes_to_hbm(program):
    sums, reduced, turn, call, scaled = 4 * 4, 4 * 3, 4, 200, 400
    assert program.written_bytes == sums + reduced + turn + call + scaled
    assert program.hbm_bytes == program.read_bytes + program.written_bytes


def test_kernels_are_those_of_the_path_that_runs(program):
    # The sums, their all-reduce, a turn of the loop, the call, the product. A TPU's
    # addition of scalars is none.
    assert program.kernels == 5


def test_cycles_are_added(program):
    assert program.cycles == 1200


def test_cycles_are_none_without_an_estimate():
    assert programs.parse(TEXT.replace("estimated_cycles", "x")).cycles is None


def test_control_flow_is_counted(program):
    assert (program.conditionals, program.whiles) == (1, 1)


def test_collectives_carry_how_many_numbers_a_device_contributes(program):
    assert program.collectives == (Collective("all-reduce", 3),)


@pytest.mark.parametrize(
    ("dtype", "size"),
    [("float32", 4), ("bfloat16", 2), ("int8", 1), ("bool", 1), ("complex64", 8)],
)
def test_real_programs_are_parsed(dtype, size):
    leaf = jax.ShapeDtypeStruct((1000,), jnp.dtype(dtype))
    text = jax.jit(jnp.flip).lower(leaf).compile().as_text()
    program = programs.parse(text)
    assert program.kernels == 1
    assert program.read_bytes == program.written_bytes == 1000 * size
    assert program.collectives == ()


# --- Figures.


@pytest.mark.slow
def test_all_figures_are_drawn_from_the_results(tmp_path):
    for path in results.FOLDER.glob("*.json"):
        shutil.copy(path, tmp_path)
    figures.main(["--out", str(tmp_path)])
    drawn = {path.name for path in tmp_path.glob("*.png")}
    made_elsewhere = {"demo.png", "half-precision.png"}
    kept = {path.name for path in results.FOLDER.glob("*.png")}
    assert drawn == kept - made_elsewhere


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


# --- Mutants.


def test_mutants_that_are_explained_are_known_by_what_they_add():
    pytest.importorskip("cosmic_ray")
    from benchmarks import mutants

    known = mutants.equivalent(mutants.REASONS.read_text())
    assert len(known) >= 2
    zipped = ["-    zip(a, b, strict=True)", "+    zip(a, b, strict=False)"]
    assert mutants.is_known(zipped, known)
    assert mutants.is_known(["-jnp.sign(parts[0])", "+jnp.sign(parts[ -1])"], known)
    either = mutants.equivalent(r"| `a \| b` | no dtype tells |")
    assert mutants.is_known(["-a * b", "+a | b"], either)
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


# --- Several machines: real processes.

STEPS = 4


def start(processes, *options):
    """Starts all processes of one run, each with one device, on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "examples.machines", *options]
    command += ["--coordinator", address, "--processes", str(processes)]
    return [
        subprocess.Popen(
            [*command, "--process", str(process)],
            cwd=ROOT,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for process in range(processes)
    ]


@functools.cache
def norms_of(processes):
    """The norm of every step, with each layout."""
    running = start(processes, "--steps", str(STEPS))
    try:
        outputs = [process.communicate(timeout=300)[0] for process in running]
    finally:
        stop(running)
    assert [process.returncode for process in running] == [0] * processes, outputs
    found = re.findall(r"^(\S+), step \d+: .* norm (\S+)$", outputs[0], re.MULTILINE)
    layouts = dict.fromkeys(layout for layout, _ in found)
    return {
        each: [float(norm) for layout, norm in found if layout == each]
        for each in layouts
    }


def stop(running):
    for process in running:
        process.kill()
        process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("layout", ["data-parallel", "fully-sharded"])
def test_norms_are_those_of_one_process(processes, layout):
    expected = norms_of(1)["data-parallel"]
    assert len(expected) == STEPS
    assert max(expected) > 1  # So that the clip has something to do.
    np.testing.assert_allclose(norms_of(processes)[layout], expected, 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_lost_process_ends_the_others(victim):
    running = start(2, "--steps", "100000")
    deadline = threading.Timer(200, stop, [running])
    deadline.start()
    try:
        while "step 3:" not in (line := running[0].stdout.readline()):
            assert line, "the run ended by itself"
        running[victim].send_signal(signal.SIGKILL)
        lost = time.monotonic()
        output, _ = running[1 - victim].communicate(timeout=100)
        assert time.monotonic() - lost < 60
        assert running[1 - victim].returncode not in (0, None)
        assert re.search("(?i)error|failed|unhealthy|unavailable", output)
    finally:
        deadline.cancel()
        stop(running)
    assert all(process.returncode is not None for process in running)
