"""Which threshold survives bad batches: ``python -m studies.spikes``.

Trains a small recurrent network on handwritten digits, some of whose batches are bad:
scaled, in bursts, with wrong labels, or with a NaN. Each method drops updates that are
not finite. First the learning rate and the value of each method (its threshold, z or q)
are chosen on a grid, by the mean accuracy over all kinds of bad batches. Then each
method, as chosen, trains on other seeds. Ten minutes on one core.

Writes the tables, a figure of each, and the norms that tests and a notebook play back.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.progress

from benchmarks import results
from optax_globalclip import (
    clip_by_global_norm,
    metrics,
    quantile_threshold,
    skip_by_global_norm,
    zscore_threshold,
)
from optax_globalclip._demo import BATCH_SIZE, Digits, load_sequences

from . import common, figures

UNITS = 64
PIXELS = 4  # That a step of the sequence reads: 16 steps for the 64 pixels.
STEPS = 1000
LEARNING_RATES = (0.03, 0.1, 0.3, 1.0)
# By method: the values of the grid. None: there is nothing to choose.
VALUES: dict[str, tuple[float | None, ...]] = {
    "no clipping": (None,),
    "constant": (0.1, 0.3, 1.0, 3.0),
    "z-score": (1.5, 2.5, 4.0, 6.0),
    "quantile": (0.1, 0.5, 0.9, 0.99),
    "skip": (2.5, 4.0, 6.0, 12.0),
}
METHODS = tuple(VALUES)
TITLE = "Test accuracy in %, mean and 95% interval"
KINDS = {
    "clean": "no bad batch",
    "scaled": "1 in 100 has its gradient times 1,000",
    "bursts": "1 in 500 starts a burst of 10 with random labels, gradient times 100",
    "labels": "1 in 20 has random labels",
    "NaN": "1 in 100 has a NaN in it",
}
FIRST_BAD = 50  # No adaptive threshold clips before it has seen 25 norms.
BURST = 10
LOST = 0.2  # An accuracy below this is a lost run: twice that of guessing.
TUNED_ON, TESTED_ON = 2, 10  # Seeds, no two the same.


class Faults(NamedTuple):
    """What is wrong with the batch of each step; arrays are [steps].

    Attributes:
      factor: of the loss, float32.
      random: whether the labels are drawn at random, bool.
      nan: whether there is a NaN in the images, bool.
    """

    factor: np.ndarray
    random: np.ndarray
    nan: np.ndarray


class Setting(NamedTuple):
    """A method, and what the grid varies."""

    method: str
    value: float | None
    learning_rate: float


class Run(NamedTuple):
    """What became of one network: [] arrays, but for the norms, [steps].

    Attributes:
      accuracy: on the test set in the end.
      touched: the share of the steps that were clipped, or skipped.
      norms: of the gradients, before any clip.
    """

    accuracy: jax.Array
    touched: jax.Array
    norms: jax.Array


Params = Any  # A dict of arrays.
# By setting and kind of bad batches, a run for each seed.
Runs = dict[tuple[Setting, str], list[Run]]


def main(arguments: list[str] | None = None) -> None:
    """Tunes and tests every method, prints the table, writes all and the figures."""
    parser = results.parser("studies.spikes", __doc__, common.FOLDER)
    parser.add_argument("--steps", type=int, default=STEPS, help="of each run")
    parser.add_argument("--tuned-on", type=int, default=TUNED_ON, help="how many seeds")
    parser.add_argument("--tested-on", type=int, default=TESTED_ON, help="how many")
    args = parser.parse_args(arguments)
    tuning = range(args.tuned_on)
    testing = range(args.tuned_on, args.tuned_on + args.tested_on)
    with rich.progress.Progress() as progress:
        tuned = train_all(grid(), tuning, args.steps, progress, "Tuning")
        chosen = best(tuned)
        tested = train_all(chosen, testing, args.steps, progress, "Testing")
    written = {
        "versions": results.versions(),
        "steps": args.steps,
        "tuned_on": args.tuned_on,
        "tested_on": args.tested_on,
        "kinds": KINDS,
        "grid": grid_rows(tuned, chosen),
        "rows": rows(tested),
    }
    common.show(TITLE, ["method", "tuned to", *KINDS], lines(written["rows"]))
    results.write(written, args.out / "spikes.json")
    np.save(args.out / "spikes-norms.npy", recorded())
    figures.draw_spikes(written, args.out / "spikes.png")
    figures.draw_grid(written, args.out / "spikes-grid.png")
    print(f"Written to {args.out}: spikes.json, two figures and spikes-norms.npy")


def grid() -> list[Setting]:
    """Every setting that is tried."""
    return [
        Setting(method, value, learning_rate)
        for method, values in VALUES.items()
        for value, learning_rate in itertools.product(values, LEARNING_RATES)
    ]


def train_all(
    settings: list[Setting],
    seeds: range,
    steps: int,
    progress: rich.progress.Progress,
    what: str,
) -> Runs:
    """Trains a network for each setting, kind of bad batches, and seed."""
    pairs = list(itertools.product(settings, KINDS))
    task = progress.add_task(what, total=len(pairs) * len(seeds))
    found = {}
    for setting, kind in pairs:
        found[setting, kind] = []
        for seed in seeds:
            run = train(setting, seed, faults(kind, steps, seed))
            found[setting, kind].append(jax.device_get(run._replace(norms=None)))
            progress.advance(task)
    return found


def train(
    setting: Setting, seed: int, faults: Faults, *, leave_out: bool = False
) -> Run:
    """Trains one network; ``leave_out`` drops the updates of bad batches."""
    # The one value that is no array: quantile_threshold takes its q from Python.
    q = setting.value if setting.method == "quantile" else None
    value = math.inf if setting.value is None else setting.value
    return _train(
        initial(seed),
        digits(seed),
        faults,
        seed,
        setting.learning_rate,
        value,
        method=setting.method,
        q=q,
        leave_out=leave_out,
    )


@functools.partial(jax.jit, static_argnames=("method", "q", "leave_out"))
def _train(
    params, data, faults, seed, learning_rate, value, *, method, q, leave_out
) -> Run:
    tx = transformation(method, value if q is None else q, learning_rate)
    train_set, test_set = data
    keys = jax.random.split(jax.random.key(seed), faults.nan.shape[0])

    def step(carry, inputs):
        params, opt_state = carry
        key, fault = inputs
        images, labels = drawn(key, train_set, fault)
        grads = jax.grad(loss_of)(params, images, labels, fault.factor)
        updates, opt_state = tx.update(grads, opt_state, params)
        bad = fault.nan | fault.random | (fault.factor != 1)
        new = optax.apply_updates(params, updates)
        if leave_out:
            new = jax.tree.map(lambda n, p: jnp.where(bad, p, n), new, params)
        return (new, opt_state), metrics(opt_state)["global_norm"]

    carry = params, tx.init(params)
    (params, opt_state), norms = jax.lax.scan(step, carry, (keys, faults))
    right = logits_of(params, test_set.images).argmax(axis=1) == test_set.labels
    logs = metrics(opt_state)
    touched = logs["skip_fraction" if method == "skip" else "clip_fraction"]
    return Run(right.mean(), touched, norms)


def transformation(
    method: str, value: Any, learning_rate: Any
) -> optax.GradientTransformation:
    """The method in front of SGD. Each drops updates that are not finite."""
    sgd = optax.sgd(learning_rate)
    if method == "skip":
        return skip_by_global_norm(sgd, zscore_threshold(value))
    thresholds: dict[str, Callable[[Any], Any]] = {
        "z-score": zscore_threshold,
        "quantile": functools.partial(quantile_threshold, window=200),
    }
    max_norm = thresholds.get(method, lambda value: value)(value)
    return optax.chain(clip_by_global_norm(max_norm, nonfinite="zero"), sgd)


def faults(kind: str, steps: int, seed: int) -> Faults:
    """Which batches are bad, and how; the same ones for every method."""
    lots = np.random.default_rng(seed).random(steps)
    lots[:FIRST_BAD] = 1
    starts = np.flatnonzero(lots < 1 / 500)[:, None] + np.arange(BURST)
    burst = np.isin(np.arange(steps), starts)
    none = np.zeros(steps, bool)
    one_in_100 = lots < 1 / 100
    factor = {"scaled": (one_in_100, 1000), "bursts": (burst, 100)}
    where, by = factor.get(kind, (none, 1))
    random = {"labels": lots < 1 / 20, "bursts": burst}
    return Faults(
        factor=np.where(where, by, 1).astype(np.float32),
        random=random.get(kind, none),
        nan=one_in_100 if kind == "NaN" else none,
    )


@functools.cache
def digits(seed: int) -> tuple[Digits, Digits]:
    """The demo's digits to train and to test on, as sequences of some pixels each."""
    train_set, test_set = (
        Digits(each.images.reshape(len(each.images), -1, PIXELS), each.labels)
        for each in load_sequences(seed)
    )
    return train_set, test_set


def drawn(
    key: jax.Array, train_set: Digits, fault: Faults
) -> tuple[jax.Array, jax.Array]:
    """Images and labels of one batch, spoiled as the fault says."""
    keys = jax.random.split(key)
    chosen = jax.random.randint(keys[0], (BATCH_SIZE,), 0, len(train_set.labels))
    images = jnp.asarray(train_set.images)[chosen]
    labels = jnp.asarray(train_set.labels, jnp.int32)[chosen]
    wrong = jax.random.randint(keys[1], (BATCH_SIZE,), 0, 10)
    first = jnp.where(fault.nan, jnp.nan, images[0, 0, 0])
    return images.at[0, 0, 0].set(first), jnp.where(fault.random, wrong, labels)


def initial(seed: int) -> dict[str, np.ndarray]:
    """A new network of tanh units, with an orthogonal recurrent matrix."""
    rng = np.random.default_rng(seed)
    params = {
        "read": rng.standard_normal((PIXELS, UNITS)) / math.sqrt(PIXELS),
        "recur": np.linalg.qr(rng.standard_normal((UNITS, UNITS)))[0],
        "hidden_bias": np.zeros(UNITS),
        "write": rng.standard_normal((UNITS, 10)) / math.sqrt(UNITS),
        "bias": np.zeros(10),
    }
    return {name: value.astype(np.float32) for name, value in params.items()}


def logits_of(params: Params, images: jax.typing.ArrayLike) -> jax.Array:
    """[batch, length, pixels] to [batch, 10]."""
    read = jnp.asarray(images).swapaxes(0, 1) @ params["read"]
    hidden = common.last_hidden(
        params["recur"], read + params["hidden_bias"][None, None]
    )
    return hidden @ params["write"] + params["bias"][None]


def loss_of(
    params: Params, images: jax.Array, labels: jax.Array, factor: jax.Array
) -> jax.Array:
    """The mean cross-entropy, times the factor."""
    logits = logits_of(params, images)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return factor * losses.mean()


def best(tuned: Runs) -> list[Setting]:
    """Of each method the setting that did best, on the mean over kinds and seeds."""
    means = grid_means(tuned)
    return [
        max((s for s in means if s.method == method), key=means.__getitem__)
        for method in METHODS
    ]


def grid_means(tuned: Runs) -> dict[Setting, float]:
    """The mean accuracy of each setting, over all kinds and seeds."""
    found: dict[Setting, list[float]] = {}
    for (setting, _), runs in tuned.items():
        found.setdefault(setting, []).extend(float(run.accuracy) for run in runs)
    return {setting: float(np.mean(each)) for setting, each in found.items()}


def grid_rows(tuned: Runs, chosen: list[Setting]) -> list[dict[str, Any]]:
    """A row for each setting of the grid."""
    return [
        {**setting._asdict(), "accuracy": round(mean, 4), "chosen": setting in chosen}
        for setting, mean in grid_means(tuned).items()
    ]


def rows(tested: Runs) -> list[dict[str, Any]]:
    """A row for each method and kind of bad batches."""
    constant = {kind: r for (s, kind), r in tested.items() if s.method == "constant"}
    return [
        {**setting._asdict(), "kind": kind, **row(runs, constant[kind])}
        for (setting, kind), runs in tested.items()
    ]


def row(runs: list[Run], constant: list[Run]) -> dict[str, Any]:
    """Of one method at all seeds, beside the constant threshold at the same seeds.

    The mean, and the difference from the constant, are over the seeds at which no run
    is lost.
    """
    accuracies = np.array([run.accuracy for run in runs])
    kept = accuracies >= LOST
    others = np.array([run.accuracy for run in constant])
    both = kept & (others >= LOST)
    return {
        "lost": int((~kept).sum()),
        **_with_interval("accuracy", accuracies[kept]),
        **_with_interval("more_than_constant", (accuracies - others)[both]),
        "touched": round(float(np.mean([run.touched for run in runs])), 4),
        "accuracies": [round(float(each), 4) for each in accuracies],
    }


def _with_interval(name: str, values: np.ndarray) -> dict[str, Any]:
    if len(values) < 2:
        return {name: None, f"{name}_interval": None}
    interval = common.interval_of_mean(values)
    return {
        name: round(float(values.mean()), 4),
        f"{name}_interval": [round(each, 4) for each in interval],
    }


def recorded(steps: int = 2000) -> np.ndarray:
    """The norms of a run without a clip, float32 [steps].

    Batches are scaled as in the kind of that name, and 1 in 200 has a NaN. The updates
    of bad batches are left out: they would end the run.
    """
    bad = faults("scaled", steps, seed=0)
    nan = np.random.default_rng(1).random(steps) < 1 / 200
    nan[:FIRST_BAD] = False
    setting = Setting("no clipping", None, learning_rate=0.03)
    run = train(setting, 0, bad._replace(nan=nan), leave_out=True)
    return np.asarray(run.norms)


def lines(rows: list[dict[str, Any]]) -> list[list[str]]:
    """The table's cells, here and where it is shown."""
    methods = dict.fromkeys(row["method"] for row in rows)
    found = []
    for method in methods:
        own = [row for row in rows if row["method"] == method]
        found.append([method, _setting(own[0]), *map(_cell, own)])
    return found


def _setting(row: dict[str, Any]) -> str:
    rate = f"rate {row['learning_rate']:g}"
    name = figures.VALUE_NAMES.get(row["method"])
    return f"{name} {row['value']:g}, {rate}" if name else rate


def _cell(row: dict[str, Any]) -> str:
    """The mean with its interval, or without one where runs are lost."""
    lost = f"{row['lost']} of {len(row['accuracies'])} lost"
    if row["accuracy"] is None:
        return lost
    mean = f"{100 * row['accuracy']:.1f}"
    if row["lost"]:
        return f"{lost}, else {mean}"
    low, high = row["accuracy_interval"]
    return f"{mean} ({100 * low:.1f} to {100 * high:.1f})"


if __name__ == "__main__":
    main()
