"""The demo: a recurrent network on real data, trained with and without the clip.

``python -m optax_globalclip`` reads scikit-learn's handwritten digits one pixel at a
time, 64 in a row, as in the sequential-image task of Le, Jaitly and Hinton
(arXiv 1504.00941). Gradients through 64 steps explode now and then; one such step
undoes all the training before it, unless it is clipped.
"""

import argparse
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ._metrics import metrics
from ._transform import clip_by_global_norm

try:
    import rich.console
    import rich.progress
    import rich.table
    from flax import nnx
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
except ImportError as error:
    raise SystemExit(
        f"The demo needs {error.name}: pip install 'optax_globalclip[demo]'"
    ) from error

BATCH_SIZE = 50
HIDDEN = 256

# All figures: each colour is readable on white and on black, and the background is
# transparent.
TEXT, BLUE, ORANGE = "#768390", "#2f81f7", "#db6d28"
COLOURS = {"no clipping": ORANGE, "clipped": BLUE}
STYLE: dict[Any, Any] = {
    "savefig.transparent": True,
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": TEXT,
    "axes.labelcolor": TEXT,
    "axes.titlecolor": TEXT,
    "text.color": TEXT,
    "xtick.color": TEXT,
    "ytick.color": TEXT,
}

USAGE = """\
In your own loop:

    import optax
    from optax_globalclip import clip_by_global_norm, metrics

    tx = optax.chain(clip_by_global_norm({max_norm:g}), optax.sgd({learning_rate:g}))
    ...
    updates, opt_state = tx.update(grads, opt_state, params)
    log(metrics(opt_state))  # global_norm, clip_scale, clip_fraction, ...
"""


class Digits(NamedTuple):
    """Images as sequences of 64 pixels in [0, 1], shape [n, 64, 1]; labels, [n]."""

    images: np.ndarray
    labels: np.ndarray


class Run(NamedTuple):
    """What one training run recorded; the arrays have one entry per step."""

    norms: np.ndarray
    losses: np.ndarray
    clip_fraction: float
    accuracy: float


class Network(nnx.Module):
    """A plain tanh recurrent network with an orthogonal recurrent matrix."""

    def __init__(self, rngs: nnx.Rngs):
        self.read = nnx.Linear(1, HIDDEN, rngs=rngs)
        self.recur = nnx.Linear(
            HIDDEN,
            HIDDEN,
            use_bias=False,
            kernel_init=nnx.initializers.orthogonal(),
            rngs=rngs,
        )
        self.classify = nnx.Linear(HIDDEN, 10, rngs=rngs)

    def __call__(self, images: jax.typing.ArrayLike) -> jax.Array:
        """Maps pixels of shape [batch, 64, 1] to logits of shape [batch, 10]."""
        kernel = self.recur.kernel[...]

        def step(hidden: jax.Array, pixel: jax.Array) -> tuple[jax.Array, None]:
            return jnp.tanh(pixel + hidden @ kernel), None

        # Four pixels per iteration are a little faster on a CPU.
        pixels = self.read(jnp.asarray(images)).swapaxes(0, 1)
        hidden, _ = jax.lax.scan(step, jnp.zeros(pixels.shape[1:]), pixels, unroll=4)
        return self.classify(hidden)


def main(arguments: list[str] | None = None) -> dict[str, Run]:
    """Trains both ways, prints the table, and draws the picture if asked to."""
    options = _parser().parse_args(arguments)
    console = rich.console.Console()
    train_set, test_set = load_sequences(options.seed)
    clips = {"no clipping": None, "clipped": options.max_norm}
    runs = {}
    with _progress(console) as progress:
        for name, max_norm in clips.items():
            tx = optax.chain(
                clip_by_global_norm(max_norm), optax.sgd(options.learning_rate)
            )
            batches = draw_batches(train_set, options.steps, options.seed)
            advance = _advance(progress, name, options.steps)
            runs[name] = train(tx, batches, test_set, options.seed, advance)
    console.print(_table(runs, options.max_norm))
    console.print(USAGE.format(**vars(options)), highlight=False)
    if options.plot:
        plot(runs, options.max_norm, options.plot)
        console.print(f"Norm and loss over the steps: {options.plot}")
    return runs


def load_sequences(seed: int) -> tuple[Digits, Digits]:
    """The 1,797 digits, four fifths of them to train on, one fifth to test on."""
    images, labels = map(np.asarray, load_digits(return_X_y=True))
    images = (images / 16).astype(np.float32)[:, :, None]
    train, test = train_test_split(
        np.arange(len(labels)), test_size=0.2, random_state=seed, stratify=labels
    )
    return Digits(images[train], labels[train]), Digits(images[test], labels[test])


def draw_batches(digits: Digits, steps: int, seed: int) -> Iterator[Digits]:
    """Yields ``steps`` batches, drawn with replacement."""
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        drawn = rng.integers(len(digits.labels), size=BATCH_SIZE)
        yield Digits(digits.images[drawn], digits.labels[drawn])


def train(
    tx: optax.GradientTransformation,
    batches: Iterator[Digits],
    test_set: Digits,
    seed: int,
    advance: Callable[[], None],
) -> Run:
    """Trains a new network with ``tx``, and tests it."""
    network = Network(nnx.Rngs(seed))
    optimizer = nnx.Optimizer(network, tx, wrt=nnx.Param)
    norms, losses = [], []
    for batch in batches:
        loss, norm = train_step(network, optimizer, batch)
        losses.append(loss)
        norms.append(norm)
        advance()
    accuracy = (network(test_set.images).argmax(axis=1) == test_set.labels).mean()
    return Run(
        np.array(norms),
        np.array(losses),
        float(metrics(optimizer.opt_state)["clip_fraction"]),
        float(accuracy),
    )


@nnx.jit
def train_step(
    network: Network, optimizer: "nnx.Optimizer[Network]", batch: Digits
) -> tuple[jax.Array, jax.Array]:
    """One step; returns the loss, and the norm of the gradients before the clip."""

    def loss_of(network: Network) -> jax.Array:
        logits = network(batch.images)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
        return losses.mean()

    loss, grads = nnx.value_and_grad(loss_of)(network)
    optimizer.update(network, grads)
    return loss, metrics(optimizer.opt_state)["global_norm"]


def plot(runs: dict[str, Run], max_norm: float, path: str) -> None:
    """Draws the loss and the norms over the steps into a file."""
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE):
        figure, panels = plt.subplot_mosaic(
            [["loss", "loss"], list(runs)],
            figsize=(8, 6),
            height_ratios=(3, 2),
            layout="constrained",
        )
        _draw_losses(panels["loss"], runs)
        for name, run in runs.items():
            _draw_norms(panels[name], name, run, max_norm)
        lows, highs = zip(*(panels[name].get_ylim() for name in runs), strict=True)
        for name in runs:
            panels[name].set_ylim(min(lows), max(highs))
        figure.savefig(path, dpi=150)
        plt.close(figure)


def _draw_losses(axes: Any, runs: dict[str, Run]) -> None:
    axes.axhline(math.log(10), color=TEXT, lw=1, ls=":")
    axes.annotate("guessing", (1, math.log(10)), (3, 4), textcoords="offset points")
    smooth = {name: _smooth(run.losses) for name, run in runs.items()}
    lowest = -math.inf
    for name in sorted(runs, key=lambda name: np.nan_to_num(smooth[name][-1])):
        losses = smooth[name]
        axes.plot(np.arange(1, len(losses) + 1), losses, color=COLOURS[name], lw=2)
        # One above the other, however close the lines end.
        height = max(np.nan_to_num(losses[-1]), lowest)
        lowest = height + 0.2 * axes.get_ylim()[1]
        axes.annotate(
            f"{name}:\n{runs[name].accuracy:.0%} accuracy",
            (len(losses), height),
            (8, 0),
            textcoords="offset points",
            color=COLOURS[name],
            weight="bold",
        )
    axes.set(ylim=(0, None), xlabel="step")
    axes.set_title("Training loss (mean of 25 steps), and final test accuracy")


def _draw_norms(axes: Any, name: str, run: Run, max_norm: float) -> None:
    axes.plot(np.arange(1, len(run.norms) + 1), run.norms, color=COLOURS[name], lw=0.7)
    axes.set(yscale="log", xlabel="step", ylabel="global norm")
    if run.clip_fraction:
        axes.axhline(max_norm, color=TEXT, lw=1, ls="--")
        axes.annotate(
            f"clipped to {max_norm:g}",
            (1, max_norm),
            (0, -12),
            textcoords="offset points",
        )
        axes.set_title("Norm before the clip")
    else:
        axes.set_title(f"Norm, {name}")


def _smooth(losses: np.ndarray, window: int = 25) -> np.ndarray:
    sums = np.cumsum(losses)
    counts = np.minimum(np.arange(1, len(losses) + 1), window)
    return (sums - np.concatenate([np.zeros(window), sums])[: len(sums)]) / counts


def _table(runs: dict[str, Run], max_norm: float) -> rich.table.Table:
    columns = ["", "test accuracy", "largest norm", "median norm", "steps clipped"]
    table = rich.table.Table(
        title="Handwritten digits, pixel by pixel",
        caption="Figures vary with the versions installed.",
    )
    for column in columns:
        table.add_column(column, justify="right" if column else "left")
    for name, run in runs.items():
        table.add_row(
            f"{name} to {max_norm:g}" if name == "clipped" else name,
            f"{run.accuracy:.1%}",
            f"{run.norms.max():.1f}",
            f"{np.median(run.norms):.2f}",
            f"{run.clip_fraction:.0%}",
        )
    return table


def _progress(console: rich.console.Console) -> rich.progress.Progress:
    return rich.progress.Progress(
        "{task.description:>12}",
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeRemainingColumn(),
        console=console,
    )


def _advance(
    progress: rich.progress.Progress, name: str, steps: int
) -> Callable[[], None]:
    task = progress.add_task(name, total=steps)
    return lambda: progress.advance(task)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m optax_globalclip",
        description="Trains a recurrent network with and without gradient clipping.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--max-norm", type=float, default=1.0, help="what to clip to")
    parser.add_argument("--learning-rate", type=float, default=0.1, help="of SGD")
    parser.add_argument("--steps", type=int, default=1500, help="of each run")
    parser.add_argument("--seed", type=int, default=0, help="of data and network")
    parser.add_argument(
        "--plot",
        metavar="FILE",
        help="draw norm and loss over the steps (png, svg, pdf)",
    )
    return parser
