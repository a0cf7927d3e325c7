"""What XLA compiles the clip to on TPUs and GPUs, which need not be there.

Their compilers must: ``pip install -e '.[test,tpu]'``, and for GPUs, in an environment
of its own, ``pip install -e '.[test]' 'jax[cuda12]'``. Run it by itself, as
``JAX_PLATFORMS=cpu python -m pytest tests/test_accelerators.py``.
"""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from benchmarks import accelerators, by_hand, cases, networks, targets
from optax_globalclip import (
    clip_by_global_norm,
    quantile_threshold,
    skip_by_global_norm,
    zscore_threshold,
)

AVAILABLE = [name for name, each in targets.TARGETS.items() if each.is_available]
if not AVAILABLE:
    pytest.skip("no compiler: pip install -e '.[tpu]'", allow_module_level=True)

pytestmark = [pytest.mark.usefixtures("optax_promotes"), pytest.mark.whole]

# Steps compile for seconds: of the dtypes, those with a rescue from overflow.
DTYPES = ["float32", "bfloat16"]

CLIPS = {
    "none": optax.identity,
    "by hand": lambda: by_hand.clip_by_global_norm(1.0),
    "optax": lambda: optax.clip_by_global_norm(1.0),
    "ours": lambda: clip_by_global_norm(1.0),
    "z-score": lambda: clip_by_global_norm(zscore_threshold()),
    "quantile": lambda: clip_by_global_norm(quantile_threshold(0.9, window=100)),
    "zeros": lambda: clip_by_global_norm(1.0, nonfinite="zero"),
}

SHARDED = {
    "both axes": {"up": P("x", "y"), "down": P("y", "x")},
    "both axes, and whole": {"up": P("x", "y"), "down": P("y", "x"), "scale": P()},
    "one axis and the other": {"up": P("x"), "down": P("y")},
}
DISTINCT_SETS = {"both axes": 1, "both axes, and whole": 1, "one axis and the other": 2}


@pytest.fixture(params=AVAILABLE)
def target(request):
    return targets.TARGETS[request.param]


def leaf(*shape, dtype="float32", sharding=None):
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding)


def four_blocks(dtype):
    """52 of GPT-2's leaves: too large for the VMEM of a TPU."""
    shapes = networks.gpt2_small()
    return networks.abstract(shapes | {"blocks": shapes["blocks"][:4]}, dtype)


def size_of(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def compile_step(target, tx, params):
    """A step that updates parameters and state in place."""

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = target.place(params)
    state = target.place(jax.eval_shape(tx.init, params))
    return target.compile(step, params, state, params, donate=(0, 1))


@functools.cache
def adamw_after(target_name, clip, dtype):
    tx = optax.chain(CLIPS[clip](), optax.adamw(1e-3))
    return compile_step(targets.TARGETS[target_name], tx, four_blocks(dtype))


def compile_clip(target, tx, updates):
    updates = target.place(updates)
    state = target.place(jax.eval_shape(tx.init, updates))
    return target.compile(tx.update, updates, state, donate=(0,))


@functools.cache
def sharded_clip(target_name, clip, mode, layout, dtype):
    """The clip for eight devices, compiled."""
    target = targets.TARGETS[target_name]
    tx, specs = CLIPS[clip](), SHARDED[layout]
    kind = AxisType.Explicit if mode == "explicit" else AxisType.Auto
    mesh = target.mesh((4, 2), ("x", "y"), (kind,) * 2)
    shapes = {"up": (512, 1024), "down": (1024, 512), "scale": (512,)}
    updates = {
        name: leaf(*shapes[name], dtype=dtype, sharding=NamedSharding(mesh, spec))
        for name, spec in specs.items()
    }
    state = jax.tree.map(
        lambda x: leaf(*x.shape, dtype=x.dtype, sharding=NamedSharding(mesh, P())),
        jax.eval_shape(tx.init, updates),
    )
    update = lambda updates, state: tx.update(updates, state)  # noqa: E731
    if mode == "shard_map":
        update = jax.shard_map(
            update, mesh=mesh, in_specs=(specs, P()), out_specs=(specs, P())
        )
    with jax.set_mesh(mesh):
        return target.compile(update, updates, state, donate=(0,))


def assert_straight(compiled):
    """No branch to wait for, and no loop: both cost traffic even if not taken."""
    assert compiled.program.conditionals == 0
    assert compiled.program.whiles == 0


# --- No control flow.


@pytest.mark.parametrize("clip", ["ours", "z-score", "quantile", "zeros"])
def test_clip_has_no_control_flow(target, clip):
    for dtypes in ([*DTYPES, "float16"], ["float32"] * 3, ["float16"] * 3):
        updates = [leaf(1024, 512, dtype=dtype) for dtype in dtypes]
        assert_straight(compile_clip(target, CLIPS[clip](), updates))


@pytest.mark.parametrize("max_norm", [1.0, zscore_threshold()], ids=["1", "z-score"])
def test_skipped_step_has_no_control_flow(target, max_norm):
    tx = skip_by_global_norm(optax.adamw(1e-3), max_norm)
    params = [leaf(1024, 512), leaf(512)]
    assert_straight(compile_step(target, tx, params))


# --- What a step costs.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("peer", ["optax", "by hand"])
def test_step_costs_one_read_of_the_gradients_and_no_more_than_peers(
    target, peer, dtype
):
    none, theirs, ours = (
        adamw_after(target.name, clip, dtype) for clip in ("none", peer, "ours")
    )
    assert_straight(ours)
    read = ours.program.hbm_bytes - none.program.hbm_bytes
    assert read <= 1.05 * size_of(four_blocks(dtype))
    assert cost_of(ours.program) <= cost_of(theirs.program)
    # Those of the clip by hand are 13% below Optax's on a v5e, with the same squares:
    # that is the compiler's choice of layouts. So Optax's are the bound.
    if peer == "optax":
        assert ours.temporary_bytes <= 1.1 * theirs.temporary_bytes + 2**20


@pytest.mark.parametrize(
    "case",
    [
        cases.training_step("dense", "float32"),
        pytest.param(
            cases.on_eight("stacked decoder", "explicit"), marks=pytest.mark.slow
        ),
    ],
    ids=str,
)
def test_training_step_costs_no_more(case, target):
    if target.name == "v6e":
        pytest.skip("compiles for a minute, and the sums are those of a v5e")
    # The sums must fuse with the backward pass. If not, they cost up to half the step.
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        theirs, ours = (
            accelerators.compiled(target, case, clip).program
            for clip in ("optax", "ours")
        )
    assert cost_of(ours) <= 1.02 * cost_of(theirs)


def cost_of(program):
    """A TPU's cycles hold what its kernels cost. A GPU's compiler estimates none."""
    return program.kernels if program.cycles is None else program.cycles


# --- What devices exchange.


@pytest.mark.parametrize("mode", ["auto", "explicit", "shard_map"])
@pytest.mark.parametrize("layout", SHARDED)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_sharded_clip_exchanges_one_complex_number_for_each_set_of_axes(
    target, mode, layout, dtype
):
    """Where axes are not manual XLA may take more, but as few as for a plain sum."""
    program = sharded_clip(target.name, "ours", mode, layout, dtype).program
    assert program.conditionals == program.whiles == 0
    assert {each.kind for each in program.collectives} == {"all-reduce"}
    if mode == "shard_map":
        assert len(program.collectives) == DISTINCT_SETS[layout]
        assert all(each.numbers <= 2 for each in program.collectives)
        return
    theirs = sharded_clip(target.name, "by hand", mode, layout, dtype).program
    assert len(program.collectives) <= len(theirs.collectives)
    # On a TPU these are rows of eight complex numbers, which are added up after that.
    numbers = sum(each.numbers for each in theirs.collectives)
    assert sum(each.numbers for each in program.collectives) <= 16 * numbers
