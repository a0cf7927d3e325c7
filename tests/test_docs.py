"""The pages run as pasted, and their figures are those that the benchmarks wrote."""

import contextlib
import json
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec as P

import optax_globalclip
from benchmarks import by_hand
from docs import tables
from studies import locks, spikes, temporal_order

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BENCHMARKS = (ROOT / "benchmarks" / "README.md").read_text()
STUDIES = (ROOT / "studies" / "README.md").read_text()
DOCS = {path.name: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
PAGES = {"README.md": README, "CONTRIBUTING.md": (ROOT / "CONTRIBUTING.md").read_text()}
PAGES |= {"CHANGELOG.md": (ROOT / "CHANGELOG.md").read_text()}
PAGES |= {"benchmarks/README.md": BENCHMARKS, "studies/README.md": STUDIES}
PAGES |= {f"docs/{name}": text for name, text in DOCS.items()}
each_page = pytest.mark.parametrize("page", PAGES)


# --- The code.


def blocks_of(page):
    """The code, after as many empty lines as stand above it: errors show the line."""
    found = re.finditer(r"(?<=^```python\n).*?(?=^```$)", PAGES[page], re.S | re.M)
    return ["\n" * PAGES[page].count("\n", 0, m.start()) + m[0] for m in found]


@contextlib.contextmanager
def as_users_have_it():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def printed_by(page):
    """What the blocks say that they print: after a print, or in a block of text."""
    said = []
    for block, output in re.findall(
        r"^```python\n(.*?)^```$(?:\n\n```text\n(.*?)^```$)?", PAGES[page], re.S | re.M
    ):
        prints = re.findall(r"^ *print\(.*$", block, re.MULTILINE)
        assert output or all(re.search(r"\)  # .", line) for line in prints)
        comments = [line.split("  # ", 1)[1] for line in prints if not output]
        said += comments + output.splitlines()
    return said


@pytest.mark.parametrize("page", [page for page in PAGES if blocks_of(page)])
def test_python_blocks_print_what_they_say(page, capsys):
    namespace = {}
    with as_users_have_it():
        for block in blocks_of(page):
            exec(compile(block, page, "exec"), namespace)
    assert capsys.readouterr().out.splitlines() == printed_by(page)


def test_pages_have_code():
    pages = [page for page in PAGES if blocks_of(page)]
    assert len(pages) >= 9
    assert sum(len(blocks_of(page)) for page in pages) >= 30


def test_first_block_of_the_readme_runs_by_itself():
    ran = subprocess.run(
        [sys.executable, "-c", blocks_of("README.md")[0]],
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout.splitlines() == printed_by("README.md")
    assert len(ran.stdout.splitlines()) == 6


# --- The figures.


def rows_of(text, columns):
    """The cells of the rows of tables with so many columns."""
    rows = [line[2:-2].split(" | ") for line in re.findall(r"^\| .* \|$", text, re.M)]
    return [row for row in rows if len(row) == columns]


def test_comparison_with_optax_is_the_one_that_was_written():
    written = tables.read("compare")
    page = DOCS["coming-from.md"]
    assert not [line for line in tables.compare_lines(written) if line not in page]
    versions = written["versions"]
    assert f"optax {versions['optax']}, jax {versions['jax']}" in page


WRONG_ELSEWHERE = rows_of(README.split("## Why not")[1].split("\n## ")[0], 4)[1:]


def test_five_cases_are_compared_in_the_readme():
    written = tables.read("compare")["rows"]
    assert len(WRONG_ELSEWHERE) == 5
    for case, optax, _, ours in WRONG_ELSEWHERE:
        (row,) = [row for row in written if case.startswith(row["case"])]
        assert (optax, ours) == (row["optax"], row["ours"])


@pytest.mark.parametrize("page", ["README.md", "docs/half-precision.md"])
def test_norm_of_bfloat16_leaves_is_the_one_that_was_written(page):
    written = tables.read("half-precision")
    last = written["rows"][-1]
    assert f"falls to {last['optax']:.0%} at {last['leaves']:,}" in PAGES[page]
    gpt2 = next(r for r in tables.read("compare")["rows"] if "GPT-2" in r["case"])
    assert f"is {float(gpt2['optax']) / float(gpt2['ours']) - 1:.1%} off" in PAGES[page]
    for row in written["rows"]:
        assert row["ours"] == pytest.approx(1, rel=1e-6)
        # What the picture's text calls right.
        assert row["leaves"] > 200 or row["optax"] == pytest.approx(1, abs=0.02)


def clipped_by_hand(updates, max_norm):
    return by_hand.clip_by_global_norm(max_norm).update(updates, None)[0]


def norm_by_hand():
    """Of the leaves of ``benchmarks.compare``: told by what becomes of a small one."""
    rng = np.random.default_rng(0)
    leaves = [rng.standard_normal(1000, np.float32) for _ in range(1000)]
    small = np.float32(1e-3)
    tree = [small, *(jnp.asarray(leaf).astype(jnp.bfloat16) for leaf in leaves)]
    return f"{float(small / clipped_by_hand(tree, 1.0)[0]):.1f}"


def norm_by_hand_in_shard_map():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    clip = jax.shard_map(
        lambda x: clipped_by_hand(x, 1.0),
        mesh=mesh,
        in_specs=P("data"),
        out_specs=P("data"),
    )
    return f"{jnp.linalg.norm(clip(jnp.ones(800))):.3g}"


def entries_by_hand(updates, max_norm):
    found = np.asarray(clipped_by_hand(updates, max_norm), np.float64)
    return f"[{', '.join(f'{entry:.3g}' for entry in found)}]"


BY_HAND = {
    "norm of 1,000 bfloat16 leaves": norm_by_hand,
    "float16 [300": lambda: entries_by_hand(jnp.full(3, 300, jnp.float16), 1.0),
    "float32 [1e20": lambda: entries_by_hand(jnp.full(3, 1e20), 1.0),
    "[0, 0], clipped to 0": lambda: entries_by_hand(jnp.zeros(2), 0.0),
    "norm after clipping to 1 on 8 devices": norm_by_hand_in_shard_map,
}


@pytest.mark.parametrize("case", BY_HAND)
def test_five_lines_by_hand_do_what_the_readme_says(case):
    ((_, _, said, _),) = [row for row in WRONG_ELSEWHERE if row[0].startswith(case)]
    with as_users_have_it():
        assert BY_HAND[case]() == said


def test_measured_costs_are_those_that_were_written():
    results = tables.read("cpu-2-cores")
    lines = tables.measured_lines(results) + tables.every_clip_lines(results)
    assert not [line for line in lines if line not in BENCHMARKS]
    assert f"jax {results['versions']['jax']}" in BENCHMARKS
    rows = {(r["case"], r["dtype"], r["contender"]): r for r in results["rows"]}

    def of(case, field, form):
        found = (rows[case, "float32", who][field] for who in ("ours", "optax"))
        return tuple(format(value, form) for value in found)

    page = " ".join(DOCS["cost.md"].split())
    ours, optax = of("added to AdamW", "added_milliseconds", ".0f")
    assert f"adds {ours} ms to an AdamW step" in page
    assert f"Optax's adds {optax} ms" in page
    ours, optax = of("added to AdamW", "build_seconds", ".1f")
    assert f"step of GPT-2 small {ours} s for {optax} s" in page
    ours, optax = of("2,000 leaves of 1,000", "build_seconds", ".2g")
    assert f"2,000 small leaves takes {ours} s for {optax} s" in page
    ours, optax = of("added to SGD with momentum", "milliseconds", "")
    assert float(ours) == pytest.approx(float(optax), rel=0.05)


COMPILED = tables.compiled()


def test_page_about_cost_has_what_was_compiled():
    assert {each["what"] for each in COMPILED.values()} == {"Compiled, not measured"}
    for lines in (tables.summary_lines, tables.ratio_lines, tables.detail_lines):
        assert "\n".join(lines(COMPILED)) in DOCS["cost.md"]


def test_whole_training_steps_cost_what_they_cost_with_optax():
    page, readme = (" ".join(text.split()) for text in (DOCS["cost.md"], README))
    lines = "\n".join(tables.summary_lines(COMPILED))
    (line,) = re.findall(".*one device, cost: ours to optax.*", lines)
    means, worst = zip(*re.findall(r"(\d\.\d\d) \((\d\.\d\d)\)", line), strict=True)
    said = f"between {min(means)} and {max(means)} of their cost with Optax's clip"
    assert said in page
    assert said in readme
    assert f"at worst {max(worst)}" in page


def test_study_of_spikes_is_the_one_that_was_written():
    study = tables.read("spikes")
    lines = spikes.lines(study["rows"])
    assert [line[0] for line in lines] == list(spikes.METHODS)
    assert not [line for line in lines if f"| {' | '.join(line)} |" not in STUDIES]
    assert f"{study['tested_on']} seeds" in STUDIES


def test_recommended_thresholds_are_the_robust_ones_of_the_study():
    """Those within half a point of the best of their method at every rate."""
    grid = tables.read("spikes")["grid"]
    recommended = {"z-score": 2.5, "quantile": 0.5}
    for method, value in recommended.items():
        accuracy = {
            (row["value"], row["learning_rate"]): row["accuracy"]
            for row in grid
            if row["method"] == method and row["learning_rate"] < 1
        }
        values, rates = ({key[i] for key in accuracy} for i in (0, 1))
        best = {rate: max(accuracy[v, rate] for v in values) for rate in rates}
        robust = [
            v for v in values if all(accuracy[v, r] > best[r] - 0.005 for r in rates)
        ]
        assert robust == [value]
    for name in ("thresholds.md", "index.md"):
        assert "zscore_threshold(2.5)" in DOCS[name]
    assert "`quantile_threshold(0.5)`" in README


def test_histories_that_lock_zclip_are_those_that_were_written(tmp_path):
    locks.main(["--out", str(tmp_path)])
    rows = json.loads((tmp_path / "locks.json").read_text())["rows"]
    assert rows == tables.read("locks")["rows"]
    for row in rows:
        assert f"| {row['history']} | {row['zclip']} | {row['ours']} |" in STUDIES


def test_study_of_the_paper_is_the_one_that_was_written():
    study = tables.read("temporal-order")
    assert f"at most {study['steps']:,} updates" in STUDIES
    lines = temporal_order.lines(study["rows"])
    assert len(lines) == len(temporal_order.LENGTHS)
    for line in lines:
        assert f"| {' | '.join(line)} |" in STUDIES
    notebook = (ROOT / "notebooks" / "5-recurrent-networks.ipynb").read_text()
    for method in temporal_order.METHODS:
        solved = [row["solved"] for row in study["rows"] if row["method"] == method]
        printed = " ".join(f"{count:4}" for count in solved)
        assert f"{method.ljust(12)} {printed}" in notebook


# --- The pages.


def slugs(page):
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    words = [re.sub(r"[^\w -]", "", each.lower()) for each in headings]
    return [each.replace(" ", "-") for each in words]


@each_page
def test_links_lead_somewhere(page):
    for link, section in re.findall(r"\]\(([^)#]*)(?:#([^)]+))?\)", PAGES[page]):
        if link.startswith("http"):
            continue
        path = ((ROOT / page).parent / link).resolve() if link else ROOT / page
        assert path.exists(), link
        if section:
            assert section in slugs(path), section


@each_page
def test_pictures_have_a_text(page):
    for text in re.findall(r"!\[(.*?)\]", PAGES[page]):
        assert len(text.split()) >= 5


def test_readme_and_contributing_are_short():
    assert len(README.splitlines()) <= 100
    assert len(PAGES["CONTRIBUTING.md"].splitlines()) <= 45


def test_readme_leads_to_every_guide():
    reference = {"api.md", "index.md"}
    assert not [name for name in set(DOCS) - reference if f"docs/{name}" not in README]


PUBLIC = [
    "ClipByGlobalNormState",
    "SkipByGlobalNormState",
    "Threshold",
    "clip_by_global_norm",
    "clip_updates",
    "global_norm",
    "leaf_norms",
    "metrics",
    "quantile_threshold",
    "skip_by_global_norm",
    "zscore_threshold",
]


def test_nothing_else_is_public():
    assert [name for name in dir(optax_globalclip) if name[0] != "_"] == PUBLIC


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_are_documented(name):
    documentation = getattr(optax_globalclip, name).__doc__
    assert any(section in documentation for section in ("Example:", "Attributes:"))


def test_every_public_name_has_a_line_in_the_readme():
    table = README.split("## API")[1].split("\n## ")[0]
    assert sorted(re.findall(r"^\| `(\w+)", table, re.MULTILINE)) == PUBLIC


def test_every_public_name_is_on_the_page_of_the_api():
    named = re.findall(
        r"^\.\. auto\w+:: optax_globalclip\.(\w+)$", DOCS["api.md"], re.M
    )
    assert sorted(named) == PUBLIC


def test_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+", optax_globalclip.__version__)
    assert f"[{optax_globalclip.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
