"""What the compiled code must not hold: copies, and what depends on them.

Times are for the benchmarks. These are their causes, read off what XLA compiled.
"""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from benchmarks.measure import collectives
from optax_globalclip import (
    clip_by_global_norm,
    clip_updates,
    global_norm,
    skip_by_global_norm,
    zscore_threshold,
)

# Nothing but the memory depends on it, which is then that of optax's clip.
fuses_sums = pytest.mark.skipif(
    not oracle.RECENT_JAX, reason="XLA on CPU wrote the squares of a sum out"
)


def adamw_after(clip):
    return optax.chain(clip, optax.adamw(1e-3))


def compiled_step(clip, params):
    return compiled_with(adamw_after(clip), params)


def compiled_with(tx, params, donate=(0, 1)):
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.eval_shape(tx.init, params)
    step = jax.jit(step, donate_argnums=donate)
    return step.lower(params, state, params).compile()


def compiled_clip(clip, updates):
    state = clip.init(updates)
    return jax.jit(clip.update, donate_argnums=0).lower(updates, state).compile()


def temporary(compiled):
    memory = compiled.memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes


def abstract(shape, dtype=jnp.float32, sharding=None):
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding)


def entry_of(compiled):
    """What the compiled program runs first; fusions and branches left out."""
    text = compiled.as_text()
    return text[text.index("\nENTRY ") :]


def names_of_collectives(compiled):
    return [name for name, _ in collectives(compiled)]


# --- No copy of the gradients.


@fuses_sums
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_step_holds_no_copy_of_the_gradients(dtype, optax_promotes):
    params = [abstract((1024, 1024), dtype)] * 8
    size = 8 * 2**20 * 4
    # Optax's shows what a copy looks like. (In float32 whatever the dtype.)
    assert temporary(compiled_step(optax.clip_by_global_norm(1.0), params)) > 0.9 * size
    assert temporary(compiled_step(clip_by_global_norm(1.0), params)) < 0.1 * size


@fuses_sums
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scaled_leaf_is_not_written_before_the_optimizer_reads_it(
    dtype, optax_promotes
):
    params = [abstract((1000 + i, 1024), dtype) for i in range(4)]

    def arrays_written(clip):
        entry = entry_of(compiled_step(clip, params))
        written = re.findall(r"= \w+\[100\d,1024\]\S* (?!parameter)\S+\(", entry)
        return len(written) / len(params)

    # Parameters and two moments.
    assert arrays_written(clip_by_global_norm(1.0)) == 3
    assert arrays_written(optax.clip_by_global_norm(1.0)) > 3


@fuses_sums
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "complex64"])
@pytest.mark.parametrize("size", [2**22, 2**22 + 12345])
def test_clip_in_place_holds_no_copy(dtype, size):
    compiled = compiled_clip(clip_by_global_norm(1.0), abstract((size,), dtype))
    assert temporary(compiled) < 2**20 < size


@fuses_sums
def test_clip_in_place_holds_no_copy_in_float64():
    with jax.enable_x64(True):
        leaf = abstract((2**21,), jnp.float64)
        compiled = compiled_clip(clip_by_global_norm(1.0), leaf)
    assert temporary(compiled) < 2**20


@fuses_sums
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_medium_leaves_are_not_copied(dtype):
    tree = [abstract((200, 300), dtype)] * 40
    compiled = compiled_clip(clip_by_global_norm(1.0), tree)
    assert temporary(compiled) < 0.1 * 40 * 60000 * 4


def guarded(tx):
    return skip_by_global_norm(tx, zscore_threshold(6.0))


@pytest.mark.slow
@fuses_sums
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_skip_adds_no_temporary(dtype, optax_promotes):
    params = [abstract((1000 + i, 1024), dtype) for i in range(8)]
    plain = adamw_after(clip_by_global_norm(1.0))

    def temporary_of(tx, donate):
        return temporary(compiled_with(tx, params, donate=donate))

    assert temporary_of(guarded(plain), ()) <= temporary_of(plain, ()) + 1000
    # In place XLA on CPU copies moments that it would overwrite before their last use.
    copy = sum(math.prod(leaf.shape) * 4 for leaf in params)
    assert temporary_of(guarded(plain), (0, 1)) < 1.1 * copy


# --- Few operations.


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "complex64"])
def test_leaf_adds_few_equations_and_lines_to_the_program(dtype):
    def length(num_leaves):
        tree = [abstract((1000,), dtype)] * num_leaves
        traced = jax.jit(lambda g: clip_updates(g, 1.0)).trace(tree)
        distinct = {id(equation) for equation in oracle.equations(traced.jaxpr.jaxpr)}
        return np.array([len(distinct), len(traced.lower().as_text().splitlines())])

    # What is done to leaves of one type is traced, and lowered, once for all of them.
    equations, lines = (length(320) - length(160)) / 160
    assert equations < 4
    assert lines < 3


@pytest.mark.slow
@pytest.mark.parametrize("transform", [False, True])
def test_many_small_leaves_take_few_reductions(transform):
    tree = [abstract((1000,))] * 2000
    tx = clip_by_global_norm(1.0)
    if transform:
        compiled = jax.jit(tx.update).lower(tree, tx.init(tree)).compile()
    else:
        compiled = jax.jit(global_norm).lower(tree).compile()
    assert len(re.findall(r" reduce\(", compiled.as_text())) < 100


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


def test_plain_norm_reads_each_leaf_once_where_nothing_overflowed():
    entry = entry_of(jax.jit(global_norm).lower(abstract((2**20,))).compile())
    (leaf,) = re.findall(r"(%\S+) = f32\[1048576\]\S* parameter", entry)
    readers = re.findall(rf" ([a-z-]+)\([^()]*{re.escape(leaf)}[,)]", entry)
    # The sum of squares, and the operands of the branches.
    assert sorted(readers) in (["fusion", "tuple"], ["conditional", "fusion"])


# --- No collective but the one that adds up the devices' sums.


def sharded_tree(shape, sharding):
    return [abstract(shape, sharding=sharding)] * 80


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("spec", [P("data"), P(None, "data"), P("data", "model"), P()])
@pytest.mark.parametrize("declared", ["by the leaves", "by in_shardings", "by numpy"])
def test_norm_needs_no_collective_but_all_reduces(axis_type, spec, declared):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)
    sharding = NamedSharding(mesh, spec)
    if declared == "by the leaves":
        tree, norm = sharded_tree((16, 8), sharding), jax.jit(global_norm)
    else:
        tree = [abstract((16, 8))] * 80
        if declared == "by numpy":
            tree = [np.ones((16, 8), np.float32)] * 80
        norm = jax.jit(global_norm, in_shardings=sharding)
    compiled = norm.lower(tree).compile()
    assert set(names_of_collectives(compiled)) <= {"all-reduce"}
    assert ("all-reduce" in names_of_collectives(compiled)) == (spec != P())


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_large_sharded_leaf_is_not_gathered(dtype):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    leaf = abstract((2**20,), dtype, NamedSharding(mesh, P("data")))
    compiled = compiled_clip(clip_by_global_norm(1.0), leaf)
    assert set(names_of_collectives(compiled)) == {"all-reduce"}


SPECS = [P("x", "y"), P("y", "x"), P("x"), P("y"), P(None, ("x", "y")), P()]


def sharded_leaves(mesh, num_leaves):
    """Leaves of every spec, small, large and in half precision."""
    shapes = [((8, 16), "float32"), ((512, 1024), "bfloat16"), ((512, 1024), "float16")]
    return [
        abstract(shape, dtype, NamedSharding(mesh, spec))
        for spec in SPECS
        for shape, dtype in shapes
        for _ in range(num_leaves)
    ]


def clip_lowered_on_a_mesh(mode, num_leaves, **options):
    mesh = oracle.mesh(AxisType.Explicit if mode == "explicit" else AxisType.Auto)
    tree = sharded_leaves(mesh, num_leaves)
    clip = functools.partial(clip_updates, max_norm=1.0, **options)
    if mode == "shard_map":
        specs = [leaf.sharding.spec for leaf in tree]
        clip = jax.shard_map(clip, mesh=mesh, in_specs=(specs,), out_specs=(specs, P()))
    return jax.jit(clip, donate_argnums=0).lower(tree)


def clip_compiled(mode, num_leaves, **options):
    return clip_lowered_on_a_mesh(mode, num_leaves, **options).compile()


def all_reduced(compiled):
    """How many numbers each all-reduce adds up; and there is no other collective."""
    found = collectives(compiled)
    assert {name for name, _ in found} == {"all-reduce"}
    return [numbers for _, numbers in found]


@pytest.mark.parametrize("mode", ["shard_map", "explicit"])
@pytest.mark.parametrize("num_leaves", [1, 5])
def test_one_all_reduce_of_three_numbers_for_each_set_of_axes(mode, num_leaves):
    assert all_reduced(clip_compiled(mode, num_leaves)) == [3, 3, 3]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["shard_map", "explicit", "auto"])
def test_skip_and_clip_take_the_all_reduces_of_one(mode):
    mesh = oracle.mesh(AxisType.Explicit if mode == "explicit" else AxisType.Auto)
    tree = sharded_leaves(mesh, 1)
    specs = [leaf.sharding.spec for leaf in tree]

    def compiled(tx):
        update = tx.update
        if mode == "shard_map":
            update = jax.shard_map(
                update, mesh=mesh, in_specs=(specs, P()), out_specs=(specs, P())
            )
        return jax.jit(update).lower(tree, jax.eval_shape(tx.init, tree)).compile()

    clip = clip_by_global_norm(1.0)
    once = all_reduced(compiled(clip))
    assert all_reduced(compiled(guarded(clip))) == once
    assert len(once) == (3 if mode != "auto" else len(once)) <= 8


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["shard_map", "explicit"])
@pytest.mark.parametrize(("ord", "expected"), [(3, 6), (math.inf, 3)])
def test_other_orders_take_one_for_the_largest_entry_and_one_for_the_sum(
    mode, ord, expected
):
    assert all_reduced(clip_compiled(mode, 2, ord=ord)) == [1] * expected


def test_auto_mode_takes_no_more_all_reduces_than_the_bare_sum_of_squares():
    def sum_of_squares(tree):
        return sum(jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in tree)

    bare = jax.jit(sum_of_squares).lower(sharded_leaves(oracle.mesh(), 2)).compile()
    ours = clip_compiled("auto", 2)
    assert len(all_reduced(ours)) == len(all_reduced(bare)) <= 8


# --- One branch and one loop on one CPU device, none elsewhere.

LOOP = "stablehlo.while"


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


# Of every dtype that XLA on CPU is helped with, small and large.
DETOURED = [
    abstract((size,), dtype)
    for size in (1000, 2**20)
    for dtype in ("float16", "bfloat16", "float32")
]


def clip_lowered(platform, tx=None):
    tx = tx or clip_by_global_norm(1.0)
    traced = jax.jit(tx.update).trace(DETOURED, jax.eval_shape(tx.init, DETOURED))
    return traced.lower(lowering_platforms=(platform,)).as_text()


def test_one_cpu_device_rescues_in_a_branch_and_reads_in_chunks():
    text = clip_lowered("cpu")
    assert num_branches(text) == 1
    for detour in (LOOP, "dynamic_slice", "ui16", "shift_left"):
        assert detour in text


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize(
    "tx", [None, guarded(clip_by_global_norm(1.0))], ids=["clip", "skip"]
)
def test_accelerators_get_no_control_flow_and_no_detours(platform, tx):
    text = clip_lowered(platform, tx)
    assert "stablehlo.reduce" in text
    assert num_branches(text) == 0
    for detour in (LOOP, "dynamic_slice", "ui16", "shift_", "bitcast"):
        assert detour not in text


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_skip_and_clip_measure_once(platform):
    clip = clip_by_global_norm(1.0)
    once = clip_lowered(platform, clip).count("stablehlo.reduce")
    assert clip_lowered(platform, guarded(clip)).count("stablehlo.reduce") == once > 0


@pytest.mark.parametrize("mode", ["shard_map", "explicit", "auto"])
@pytest.mark.parametrize("ord", [2, 3, math.inf])
def test_no_branch_on_a_mesh(mode, ord):
    text = clip_lowered_on_a_mesh(mode, 2, ord=ord).as_text()
    assert "stablehlo.case" not in text
    assert LOOP not in text
