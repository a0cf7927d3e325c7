"""What the compiled code must not hold: copies, and what depends on them.

Times are for the benchmarks. These are their causes, read off what XLA compiled.
"""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from optax_globalclip import (
    clip_by_global_norm,
    clip_updates,
    global_norm,
    metrics,
    skip_by_global_norm,
    zscore_threshold,
)

# Nothing but the memory depends on it, which is then that of optax's clip.
fuses_sums = pytest.mark.skipif(
    not oracle.RECENT_JAX, reason="XLA on CPU wrote the squares of a sum out"
)
dtypes = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
CLIP = clip_by_global_norm(1.0)
SKIP = skip_by_global_norm(CLIP, zscore_threshold(6.0))
OURS = CLIP, SKIP


def abstract(shape, dtype="float32", sharding=None):
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding)


def compiled_step(tx, params, donate=(0, 1)):
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.eval_shape(tx.init, params)
    step = jax.jit(step, donate_argnums=donate)
    return step.lower(params, state, params).compile()


def compiled_clip(updates, tx=CLIP):
    state = jax.eval_shape(tx.init, updates)
    return jax.jit(tx.update, donate_argnums=0).lower(updates, state).compile()


def temporary(compiled):
    return compiled.memory_analysis().temp_size_in_bytes


def entry_of(compiled):
    """What the compiled program runs first; fusions and branches left out."""
    text = compiled.as_text()
    return text[text.index("\nENTRY ") :]


# --- No copy of the gradients.


@fuses_sums
@dtypes
def test_step_holds_no_copy_of_the_gradients(dtype, optax_promotes):
    params = [abstract((1000 + i, 1024), dtype) for i in range(4)]
    size = sum(math.prod(leaf.shape) * 4 for leaf in params)

    def arrays_written(compiled):
        found = re.findall(
            r"= \w+\[100\d,1024\]\S* (?!parameter)\S+\(", entry_of(compiled)
        )
        return len(found) / len(params)

    def step(clip):
        return compiled_step(optax.chain(clip, optax.adamw(1e-3)), params)

    ours, theirs = step(CLIP), step(optax.clip_by_global_norm(1.0))
    # Optax's shows what a copy looks like. (In float32 whatever the dtype.)
    assert temporary(theirs) > 0.9 * size
    assert temporary(ours) < 0.1 * size
    # Parameters and two moments.
    assert arrays_written(theirs) > arrays_written(ours) == 3


@fuses_sums
@pytest.mark.parametrize(
    "dtype", ["float32", "bfloat16", "float16", "complex64", "float64"]
)
def test_clip_in_place_holds_no_copy(dtype):
    trees = [[abstract((size,), dtype)] for size in (2**22, 2**22 + 12345)]
    trees += [[abstract((200, 300), dtype)] * 40]
    with jax.enable_x64(dtype == "float64"):
        for tree in trees:
            compiled = compiled_clip(tree)
            size = sum(leaf.size * leaf.dtype.itemsize for leaf in tree)
            assert temporary(compiled) < min(2**20, 0.1 * size)
            assert compiled.memory_analysis().alias_size_in_bytes >= size


@pytest.mark.slow
@fuses_sums
@dtypes
def test_skip_adds_no_temporary(dtype, optax_promotes):
    params = [abstract((1000 + i, 1024), dtype) for i in range(16)]
    plain = optax.chain(CLIP, optax.adamw(1e-3))
    guarded = skip_by_global_norm(plain, zscore_threshold(6.0))
    most = temporary(compiled_step(plain, params, donate=())) + 1000
    assert temporary(compiled_step(guarded, params, donate=())) <= most
    # In place XLA on CPU copies moments that it would overwrite before their last use:
    # one of the two, and a leaf of the other.
    sizes = [math.prod(leaf.shape) * 4 for leaf in params]
    assert temporary(compiled_step(guarded, params)) < sum(sizes) + 1.01 * max(sizes)


# --- Few operations.


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "complex64"])
@pytest.mark.parametrize("ord", [1, 2, 3, math.inf])
def test_leaf_adds_few_equations_and_lines_to_the_program(ord, dtype):
    def length(num_leaves):
        tree = [abstract((1000,), dtype)] * num_leaves
        traced = jax.jit(lambda g: clip_updates(g, 1.0, ord=ord)).trace(tree)
        distinct = {id(equation) for equation in oracle.equations(traced.jaxpr.jaxpr)}
        return np.array([len(distinct), len(traced.lower().as_text().splitlines())])

    # For the 2-norm what is done to leaves of one type is traced and lowered once.
    equations, lines = (length(320) - length(160)) / 160
    assert equations < (4 if ord == 2 else 40)
    assert lines < (3 if ord == 2 else 40)


@pytest.mark.slow
def test_many_small_leaves_take_few_reductions():
    whole = NamedSharding(oracle.mesh(AxisType.Explicit), P())
    for place, most in ((None, 100), (whole, 150)):
        tree = [abstract((1000,), sharding=place)] * 2000
        for each in (compiled_clip(tree), jax.jit(global_norm).lower(tree).compile()):
            assert len(re.findall(r" reduce\(", each.as_text())) < most


def test_factors_are_not_worked_out_in_the_kernel_of_every_leaf():
    tree = [abstract((1000 + i,)) for i in range(5)]
    text = jax.jit(lambda g: clip_updates(g, 1.0)).lower(tree).compile().as_text()
    kernels = [
        kernel
        for kernel in re.findall(r"%fused_computation[^{]*\{.*?\n\}", text, re.DOTALL)
        if re.search(r"ROOT \S+ = f32\[100\d\]", kernel.replace("{0}", ""))
        and " select(" in kernel
    ]
    assert len(kernels) == 5
    for kernel in kernels:
        assert len(re.findall(r" multiply\(", kernel)) == 2
        assert len(re.findall(r" select\(", kernel)) == 1
        assert not re.findall(r" (?:divide|is-finite|sqrt)\(", kernel)


def test_norm_reads_each_leaf_once_where_nothing_overflowed():
    for size in (10_000, 2**20):
        entry = entry_of(jax.jit(global_norm).lower(abstract((size,))).compile())
        assert entry.count(" conditional(") == 1
        (leaf,) = re.findall(rf"(%\S+) = f32\[{size}\]\S* parameter", entry)
        readers = re.findall(rf" ([a-z-]+)\([^()]*{re.escape(leaf)}[,)]", entry)
        # The sum of squares, and the operands of the branch.
        assert sorted(readers) in (["fusion", "tuple"], ["conditional", "fusion"])


def test_neither_a_given_norm_nor_metrics_nor_a_skip_measures_again():
    tree = [abstract((100_000 + i,)) for i in range(3)]
    state = jax.eval_shape(SKIP.init, tree)

    def text(function, *args):
        return jax.jit(function).lower(*args).as_text()

    def step(grads, state):
        updates, state = SKIP.update(grads, state)
        return updates, metrics(state)

    def compiled_reductions(function, *args):
        return jax.jit(function).lower(*args).compile().as_text().count(" reduce(")

    given = text(lambda g, norm: clip_updates(g, 1.0, use_norm=norm)[0], tree, 2.0)
    assert "stablehlo.reduce" not in given
    assert "callback" not in text(step, tree, state)
    measured = compiled_reductions(global_norm, tree)
    assert compiled_reductions(step, tree, state) == measured > 0


# --- No collective but the one that adds up the devices' sums.

COLLECTIVE = r"= (.*?) (all-\w+|reduce-scatter|collective-\w+)(?:-start)?\("


def all_reduces(compiled):
    """How many numbers each all-reduce adds up; and there is no other collective."""
    found = re.findall(COLLECTIVE, compiled.as_text())
    assert {kind for _, kind in found} <= {"all-reduce"}
    for shape, _ in found:
        assert not re.search(r"\[\d*,|\[\d\d", shape)
    return [shape.count("[") for shape, _ in found]


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("spec", [P("x"), P(None, "x"), P("x", "y"), P()])
@pytest.mark.parametrize("declared", ["by the leaves", "by in_shardings", "by numpy"])
def test_norm_needs_no_collective_but_all_reduces(axis_type, spec, declared):
    sharding = NamedSharding(oracle.mesh(axis_type), spec)
    norm = jax.jit(global_norm, in_shardings=sharding)
    tree = [abstract((16, 8))] * 80
    if declared == "by numpy":
        tree = [np.ones((16, 8), np.float32)] * 80
    elif declared == "by the leaves":
        norm, tree = jax.jit(global_norm), [abstract((16, 8), sharding=sharding)] * 80
    assert any(all_reduces(norm.lower(tree).compile())) == (spec != P())


SPECS = [P("x", "y"), P("y", "x"), P("x"), P("y"), P(None, ("x", "y")), P()]


def lowered_on_a_mesh(mode, tx):
    """For leaves of every spec, small, large and in half precision."""
    mesh = oracle.mesh(AxisType.Explicit if mode == "explicit" else AxisType.Auto)
    shapes = [((8, 16), "float32"), ((512, 1024), "bfloat16"), ((2**19, 2), "float16")]
    tree = [
        abstract(shape, dtype, NamedSharding(mesh, spec))
        for spec in SPECS
        for shape, dtype in shapes * 3
        if shape[-1] > 2 or spec == P("x")
    ]
    update = lambda updates: tx.update(updates, tx.init(updates))[0]  # noqa: E731
    if mode == "shard_map":
        specs = [leaf.sharding.spec for leaf in tree]
        update = jax.shard_map(update, mesh=mesh, in_specs=(specs,), out_specs=specs)
    return jax.jit(update, donate_argnums=0).lower(tree)


ours, theirs = clip_by_global_norm, optax.clip_by_global_norm


@pytest.mark.parametrize("mode", ["shard_map", "explicit", "auto"])
def test_clip_and_skip_take_no_more_all_reduces_than_optax(mode, optax_promotes):
    """In shard_map one for each of the three sets of axes; there Optax reduces none."""
    most = len(all_reduces(lowered_on_a_mesh("auto", theirs(1.0)).compile()))
    clip, skip = (all_reduces(lowered_on_a_mesh(mode, tx).compile()) for tx in OURS)
    # XLA merges the sums of both, but reduces over devices what each takes of them.
    assert sum(skip) <= 2 * sum(clip)
    for found in (clip, skip):
        assert len(found) == 3 if mode == "shard_map" else 0 < len(found) <= most


@pytest.mark.parametrize("ord", [3, math.inf])
def test_other_orders_take_one_more_for_the_largest_entry(ord):
    compiled = lowered_on_a_mesh("shard_map", ours(1.0, ord=ord)).compile()
    assert all_reduces(compiled) == [1] * (3 if ord == math.inf else 6)


# --- One branch and one loop on one CPU device, none elsewhere.


def num_branches(text):
    """How many branches depend on data; not those that select a platform's code.

    JAX lowers ``lax.platform_dependent`` to branches of a constant index, each with the
    code for the platform alone, and XLA inlines them.
    """
    selects = re.compile(r" = (stablehlo.constant|\"stablehlo.case\")")
    branches = re.finditer(r'"stablehlo.case"\((%\w+)\)', text)
    definitions = [
        text[text.rindex(f" {each[1]} = ", 0, each.start()) :] for each in branches
    ]
    return sum(not selects.match(each[each.index(" =") :]) for each in definitions)


def lowered(platform, tx):
    """For leaves of every dtype that XLA on CPU is helped with, small and large."""
    tree = [
        abstract((size,), dtype)
        for size in (1000, 2**20)
        for dtype in ("float16", "bfloat16", "float32")
    ]
    traced = jax.jit(tx.update).trace(tree, jax.eval_shape(tx.init, tree))
    return traced.lower(lowering_platforms=(platform,)).as_text()


DETOURS = ["stablehlo.while", "dynamic_slice", "ui16", "shift_left"]


def test_one_cpu_device_rescues_in_a_branch_and_reads_in_chunks():
    text = lowered("cpu", CLIP)
    assert num_branches(text) == 1
    assert all(detour in text for detour in DETOURS)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("tx", [CLIP, SKIP, ours(1.0, ord=3), ours(1.0, ord=math.inf)])
def test_accelerators_get_no_control_flow_and_no_detours(platform, tx):
    text = lowered(platform, tx)
    assert "stablehlo.reduce" in text
    assert num_branches(text) == 0
    assert not any(detour in text for detour in DETOURS)


@pytest.mark.parametrize("mode", ["shard_map", "explicit", "auto"])
@pytest.mark.parametrize("ord", [2, 3, math.inf])
def test_no_branch_and_so_no_collective_in_one_on_a_mesh(mode, ord):
    # Devices that disagree on the condition would wait for each other for ever.
    text = lowered_on_a_mesh(mode, ours(1.0, ord=ord)).as_text()
    assert (num_branches(text), text.count("stablehlo.while")) == (0, 0)
