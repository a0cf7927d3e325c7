"""Classes of numbers: each test draws its members, beside an oracle in long doubles."""

import collections
import functools
import itertools
import math

import flax.struct
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
    leaf_norms,
    skip_by_global_norm,
)

ORDS = [1, 1.01, 1.5, 2, 2.5, 3, 1e6, math.inf]
each_ord = pytest.mark.parametrize("ord", ORDS)

# --- What is not finite on one device is known on all.

SPECS = {
    "float32": P("x"),
    "bfloat16": P("x", "y"),
    "float16": P(None, ("y", "x")),
    "complex64": P("y"),
    "whole": P(),
}
NAMES = {key: tuple(jax.tree.leaves(tuple(spec))) for key, spec in SPECS.items()}
TREE = {
    key: np.full((8, 8), 0.5, jnp.float32 if key == "whole" else jnp.dtype(key))
    for key in SPECS
}


def by_jit(function, *types):
    mesh = oracle.mesh(*types)
    shardings = {key: NamedSharding(mesh, spec) for key, spec in SPECS.items()}
    compiled = jax.jit(function)
    return lambda tree: compiled(jax.device_put(tree, shardings))


def by_shard_map(function, manual=("x", "y"), **options):
    def part(entry):
        return tuple(axis for axis in jax.tree.leaves(entry) if axis in manual)

    specs = {key: P(*map(part, spec)) for key, spec in SPECS.items()}
    if options:
        function = functools.partial(function, axis_name=NAMES)
    mapped = jax.shard_map(
        function,
        mesh=oracle.mesh(),
        in_specs=(specs,),
        out_specs=((specs,) * 4, P()),
        axis_names=set(manual),
        **options,
    )
    return jax.jit(mapped)


LAYOUTS = {
    "auto": lambda f: by_jit(f, AxisType.Auto),
    "explicit": lambda f: by_jit(f, AxisType.Explicit),
    "mixed": lambda f: by_jit(f, AxisType.Explicit, AxisType.Auto),
    "shard_map": by_shard_map,
    "shard_map, y auto": lambda f: by_shard_map(f, ("x",)),
    "unchecked": lambda f: by_shard_map(f, check_vma=False),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@each_ord
def test_entries_that_are_not_finite_are_known_on_every_device(layout, ord):
    def step(tree, axis_name=None):
        options = {"ord": ord, "axis_name": axis_name}
        clipped, norm = clip_updates(tree, 0.1, **options)
        clip = clip_by_global_norm(0.1, nonfinite="zero", **options)
        zeros, clip_state = clip.update(tree, None)
        skip = skip_by_global_norm(optax.trace(0.5), **options)
        taken, state = skip.update(tree, skip.init(tree))
        trees = clipped, zeros, taken, state.inner_state.trace
        counts = clip_state.num_nonfinite, state.num_skipped
        return trees, (norm, counts, leaf_norms(tree, **options))

    run = LAYOUTS[layout](step)
    _, (norm, counts, _) = run(TREE)
    assert (math.isfinite(norm), counts) == (True, (0, 0))
    for key, place, bad in itertools.product(TREE, (0, -1), (math.nan, math.inf)):
        tree = TREE | {key: TREE[key].copy()}
        tree[key].flat[place] = bad
        (clipped, zeros, taken, moments), (norm, counts, each) = run(tree)
        np.testing.assert_equal(np.asarray(norm), bad)
        assert counts == (1, 1)
        assert all(np.isnan(leaf).all() for leaf in jax.tree.leaves(clipped))
        assert not any(map(np.any, jax.tree.leaves((zeros, taken, moments))))
        finite = {other: bool(np.isfinite(each[other])) for other in TREE}
        assert finite == {other: other != key for other in TREE}


# --- No two constant factors beside a leaf make a third that is not a normal number.


def pairs_of(double):
    """Pairs of max_norm and use_norm, to both ends of the range."""
    largest = 1.7e308 if double else 3.4e38
    small = [x ** (8 if double else 1) for x in (1e-37, 1e-20)]
    given = [*small, 1.0, 1e9, *(largest / f for f in (4.2, 3.4, 1))]
    clipped = [0.0, small[0] / 5, 1e-30, 1.0, 1e20, largest / 40]
    return [(c, n) for c in clipped for n in given if c < n]


HOW = {
    "eager": lambda f, leaf, pairs: f(leaf, pairs),
    "constants": lambda f, leaf, pairs: jax.jit(lambda x: f(x, pairs))(leaf),
    "captured": lambda f, leaf, pairs: jax.jit(
        functools.partial(f, pairs=jax.tree.map(number, pairs))
    )(leaf),
    "all constant": lambda f, leaf, pairs: jax.jit(lambda: f(leaf, pairs))(),
    "arguments": lambda f, leaf, pairs: jax.jit(f)(leaf, jax.tree.map(number, pairs)),
    "scan": lambda f, leaf, pairs: jax.lax.scan(
        lambda x, _: (x, f(x, pairs)), leaf, length=1
    )[1],
}


def number(value):
    return jnp.asarray(value, jnp.float64 if jax.config.jax_enable_x64 else jnp.float32)


def entries_of(dtype):
    """A leaf of the dtype with entries of every magnitude."""
    info = jnp.finfo(dtype)
    powers = np.linspace(int(info.minexp) + 1, int(info.maxexp) - 1, 24).round()
    entries = np.ldexp(1.37, powers.astype(int)) * np.where(powers % 2, 1, -1)
    return jnp.asarray(entries.astype(np.dtype(dtype)))


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(
    "dtype", ["float32", "bfloat16", "float16", "complex64", "float64", "complex128"]
)
def test_a_norm_given_scales_right_whatever_is_constant(dtype, how):
    double = dtype in ("float64", "complex128")
    with jax.enable_x64(double):
        leaf, pairs = entries_of(dtype), pairs_of(double)

        def clip(x, pairs):
            return [
                clip_updates(x, max_norm, use_norm=use_norm)[0]
                for max_norm, use_norm in pairs
            ]

        found = HOW[how](clip, leaf, pairs)
    wide = np.float64 if double else np.float32
    for (max_norm, use_norm), values in zip(pairs, found, strict=True):
        ratio = np.longdouble(wide(max_norm)) / np.longdouble(wide(use_norm))
        assert_entries(np.ravel(values), as_long(leaf) * ratio, dtype)


def as_long(leaf):
    leaf = np.asarray(leaf)
    if np.iscomplexobj(leaf):
        return leaf.astype(np.clongdouble)
    return leaf.astype(np.float64).astype(np.longdouble)


def assert_entries(found, right, dtype):
    """Rounded once to the dtype; 0 counts where the result is no normal number."""
    info, single = jnp.finfo(dtype), jnp.finfo("float32")
    half = info.dtype == np.float16
    flushed = 2**-24 if half else 20 * float(info.tiny)  # 2e-37, as documented.
    eps = float(info.eps) / 2 + (0 if info.bits == 64 else float(single.eps))
    allowed = (eps + 3 * float(info.eps) * (info.bits > 16)) * abs(right) + flushed
    wrong = ~(abs(as_long(found) - right) <= allowed)
    assert not wrong.any(), (found[wrong], right[wrong])


# --- Values and derivatives by every argument, over the whole range.


def parts_of(x, ord):
    """The norm n, x/n, its slope s, and n times its Hessian."""
    modulus = abs(x)
    largest = modulus.max()
    share = modulus / largest
    if ord == math.inf:
        ties = share == 1
        slope = np.sign(x) * ties / ties.sum()
        return largest, x / largest, slope, np.zeros((x.size,) * 2, x.dtype)
    p = np.longdouble(ord)
    root = np.sum(share**p) ** (1 / p)
    share = share / root
    slope = np.sign(x) * share ** (p - 1)
    hessian = (p - 1) * (np.diag(share ** (p - 2)) - np.outer(slope, slope))
    return largest * root, np.sign(x) * share, slope, hessian


def norm_oracle(z, ord):
    norm, _, slope, hessian = parts_of(z, ord)
    size = max(ord - 1, 1) if ord < math.inf else 1
    return Derivatives(norm, slope, hessian / norm), Derivatives(norm, 1, size / norm)


Derivatives = collections.namedtuple("Derivatives", "value first second")


def clip_oracle(z, ord):
    """``c x/n`` and its derivatives by x and c, and the sizes of their terms."""
    x, c = z[:-1], z[-1]
    n, u, s, h = parts_of(x, ord)
    one = np.eye(x.size, dtype=x.dtype)
    by_x = one - np.outer(u, s)  # Times c/n.
    by_xx = 2 * np.einsum("i,j,k->ijk", u, s, s) - np.einsum("i,jk->ijk", u, h)
    by_xx -= np.einsum("ij,k->ijk", one, s) + np.einsum("ik,j->ijk", one, s)
    second = np.zeros((x.size, x.size + 1, x.size + 1), x.dtype)
    second[:, :-1, :-1] = by_xx * (c / n / n)
    second[:, :-1, -1] = second[:, -1, :-1] = by_x / n
    first = np.concatenate([by_x * (c / n), u[:, None]], axis=1)
    size = max(ord, 1) if ord < math.inf else 1
    sizes = np.ones_like(second) / n
    sizes[:, :-1, :-1] = size * c / n / n
    by_z = np.append(np.full(x.size, c / n), 1)
    return Derivatives(c * u, first, second), Derivatives(c * abs(u), by_z, sizes)


def given_oracle(z, ord):
    """``c x/n`` with n given, and its derivatives by x, c and n."""
    del ord
    x, c, n = z[:-2], z[-2], z[-1]
    one = np.eye(x.size, dtype=x.dtype)
    columns = one * (c / n), x[:, None] / n, -x[:, None] * (c / n / n)
    second = np.zeros((x.size, x.size + 2, x.size + 2), x.dtype)
    second[:, :-2, -2] = second[:, -2, :-2] = one / n
    second[:, :-2, -1] = second[:, -1, :-2] = -one * (c / n / n)
    second[:, -2, -1] = second[:, -1, -2] = -x / n / n
    second[:, -1, -1] = 2 * x / n * c / n / n
    result = Derivatives(x * (c / n), np.concatenate(columns, axis=1), second)
    return result, Derivatives(*map(abs, result))


BASES = {
    "mixed": [1.0, -0.25, 0.5, 0.0625],
    "ties": [1.0, 1.0, -1.0, 0.5],
    "one": [0.5],
}


def magnitudes(info):
    """From the smallest entries that count to the largest there are."""
    root = float(info.tiny) ** 0.5 * 1e-3
    largest = float(info.max)
    return [root, 1.0, largest**0.5, *(largest * f for f in (0.12, 0.24, 0.5, 0.99))]


def clips(info):
    scales = magnitudes(info)
    for base, scale in itertools.product(BASES.values(), scales):
        for max_norm in (scale / 3, scale * 1e-6, 1.0, scales[0]):
            if max_norm < max(base) * scale * 0.9:
                yield [*(x * scale for x in base), max_norm]


def norms_given(info):
    scales = magnitudes(info)
    for scale, use_norm, ratio in itertools.product(scales, scales, (0.4, 1e-12)):
        yield [x * scale for x in BASES["mixed"]] + [use_norm * ratio, use_norm]


CASES = {
    "norm": (
        lambda z, ord: global_norm(z, ord=ord),
        norm_oracle,
        lambda info: (
            [x * scale for x in base]
            for base in BASES.values()
            for scale in magnitudes(info)
        ),
    ),
    "clip": (
        lambda z, ord: clip_updates(z[:-1], z[-1], ord=ord)[0],
        clip_oracle,
        clips,
    ),
    "norm given": (
        lambda z, ord: clip_updates(z[:-2], z[-2], use_norm=z[-1], ord=ord)[0],
        given_oracle,
        norms_given,
    ),
}
ROWS = [(case, ord) for case in ("norm", "clip") for ord in ORDS] + [("norm given", 2)]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("case", "ord"), ROWS)
def test_derivatives_over_the_whole_range(case, ord, dtype):
    function, oracle_of, members = CASES[case]
    with jax.enable_x64(dtype == "float64"):
        info = np.finfo(dtype)
        f = functools.partial(function, ord=ord)
        modes = {
            "forward": lambda z: (f(z), jax.jacfwd(f)(z), jax.jacfwd(jax.jacrev(f))(z)),
            # Not twice: the cotangents of a subnormal quotient underflow.
            "reverse": lambda z: (f(z), jax.jacrev(f)(z)),
        }
        for mode, derive in modes.items():
            derive, faults = jax.jit(derive), []
            for member in members(info):
                z = np.asarray(member, dtype)
                found, right = derive(z), oracle_of(z.astype(np.longdouble), ord)
                faults += differences(found, *right, info, ord, f"{mode} at {z}")
            assert not faults, f"{len(faults)}, such as {faults[0]}"


def differences(found, right, sizes, info, ord, where):
    """What is wrong, as far as no lower derivative leaves the range of the dtype."""
    for order, each in enumerate(zip(found, right, sizes, strict=False)):
        value, expected, size = (np.asarray(x).astype(np.longdouble) for x in each)
        if size.max() > float(info.max) / 4:
            return
        flushed = 20 * info.tiny * (min(ord, 1e6) if order == 2 else 1)
        wrong = ~(abs(value - expected) <= 60 * info.eps * size + flushed)
        if wrong.any():
            pair = value[wrong][0], expected[wrong][0]
            yield "{}, derivative {}: {:.8g}, not {:.8g}".format(where, order, *pair)


# --- A tree of axis names is a tree prefix, and nothing else.

Params = collections.namedtuple("Params", "w b")
One = collections.namedtuple("One", "w")


class Weights(flax.struct.PyTreeNode):
    """A node that is no container of Python's."""

    w: object
    b: object


W, B = np.arange(1.0, 13, dtype=np.float32).reshape(4, 3), np.ones((2, 5), np.float32)
# Updates, names that fit, and names of which one has no leaf.
NAMED = {
    "NamedTuple": (Params(W, B), Params("x", "y"), [*"xyx"]),
    "one field": (One(W), One("x"), Params("x", "y")),
    "NamedTuple of tuples": (Params(W, B), Params(("x",), ("y",)), {"w": "x"}),
    "dict": ({"w": W, "b": B}, {"w": "x", "b": "y"}, {"w": "x", "b": "y", "c": "x"}),
    "list": ([W, B], ["x", "y"], ["x", "y", "x"]),
    "node": (Weights(W, B), Weights("x", "y"), Weights("x", {"b": "y"})),
    "NamedTuple within": ([Params(W, B)], [Params("x", "y")], [Params("x", ["y"])]),
    "dict within": (({"w": W}, B), ({"w": "x"}, "y"), ({"w": "x", "b": "y"}, "y")),
    "prefix": ({"w": One(W), "b": [B]}, {"w": "x", "b": "y"}, {"w": "x", "d": "y"}),
    "tuple of names": ((W, W), ("x",), ("x", ["y"])),
    "without leaves": ({"w": W, "b": {}}, {"w": "x", "b": {}}, {"w": "x", "b": ["y"]}),
}


def stepped_norm(tree, names):
    clip = clip_by_global_norm(1e3, axis_name=names)
    tx = skip_by_global_norm(clip, axis_name=names)
    tree, state = tx.update(tree, tx.init(None))
    norms = global_norm(tree, axis_name=names), state.inner_state.global_norm
    return jnp.stack([state.global_norm, *norms])


@pytest.mark.whole
@pytest.mark.parametrize("case", NAMED)
def test_axis_names_are_a_tree_prefix(case):
    tree, names, wrong = NAMED[case]
    specs = jax.tree.map(lambda leaf: P("x" if leaf is W else "y"), tree)

    def measure(names):
        return jax.shard_map(
            functools.partial(stepped_norm, names=names),
            mesh=oracle.mesh(),
            in_specs=(specs,),
            out_specs=P(),
            check_vma=False,
        )(tree)

    np.testing.assert_allclose(measure(names), oracle.norm(tree), 1e-6)
    with pytest.raises(ValueError, match="axis_name"):
        measure(wrong)
