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


@pytest.mark.parametrize("page", [page for page in PAGES if blocks_of(page)])
def test_python_blocks_print_what_they_say(page, capsys):
    namespace, said = {}, []
    with as_users_have_it():
        for block in blocks_of(page):
            exec(compile(block, page, "exec"), namespace)
            prints = re.findall(r"^ *print\(.*$", block, re.MULTILINE)
            assert all(re.search(r"\)  # .", line) for line in prints)
            said += [line.split("  # ", 1)[1] for line in prints]
    assert capsys.readouterr().out.splitlines() == said


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
    assert ran.stdout == "30.0 1.0 1.0\n"


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


WRONG_ELSEWHERE = rows_of(README.split("## What goes wrong")[1].split("\n## ")[0], 4)[
    1:
]


def test_five_cases_are_compared_in_the_readme():
    written = {row["case"]: row for row in tables.read("compare")["rows"]}
    assert len(WRONG_ELSEWHERE) == 5
    for case, optax, _, ours in WRONG_ELSEWHERE:
        assert (optax, ours) == (written[case]["optax"], written[case]["ours"])


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


def test_five_lines_by_hand_flush_subnormal_entries():
    assert "subnormal entries" in README
    tiny = np.float32([1e-40, 0.5])
    np.testing.assert_array_equal(clipped_by_hand(tiny, 1.0), np.float32([0, 0.5]))
    clipped, _ = optax_globalclip.clip_updates(tiny, 1.0)
    np.testing.assert_array_equal(clipped, tiny)


def test_measured_costs_are_those_that_were_written():
    results = tables.read("cpu-2-cores")
    written = tables.measured_lines(results)
    claimed = re.findall(r"^\| .* \| [\d.]+ m?s \| .* \|$", README, re.MULTILINE)
    assert len(claimed) >= 6
    assert set(claimed) <= set(written)
    # Every case in which Optax's clip is ahead is shown.
    behind = [line for line in written if float(line.split(" | ")[5].split()[0]) > 1]
    assert set(behind) <= set(claimed)
    assert "Measured on 2 CPU cores" in README
    assert not [line for line in written if line not in BENCHMARKS]
    assert f"jax {results['versions']['jax']}" in BENCHMARKS


COMPILED = {results["target"]: results for results in tables.compiled()}


def test_compiled_costs_are_those_that_were_written():
    assert "Compiled, not measured" in README
    written = [
        line for results in COMPILED.values() for line in tables.compiled_lines(results)
    ]
    claimed = re.findall(r"^\| .* GB, .* \|$", README, re.MULTILINE)
    assert len(claimed) >= 3
    assert set(claimed) <= set(written)


@pytest.mark.parametrize("target", COMPILED)
def test_page_about_cost_has_every_contender_of_what_was_compiled(target):
    assert COMPILED[target]["what"] == "Compiled, not measured"
    assert target in DOCS["cost.md"]
    claimed = re.findall(rf"^\| {target}: .* GB \| .* \|$", DOCS["cost.md"], re.M)
    programs = tables.compiled_long_lines(COMPILED[target]).values()
    shown = [lines for lines in programs if set(lines) & set(claimed)]
    assert len(shown) >= 3
    assert sorted(claimed) == sorted(sum(shown, []))


def compared(target):
    """Our rows, each with that of a peer in the same program."""
    programs = {}
    for row in COMPILED[target]["rows"]:
        programs.setdefault((row["case"], row["dtype"]), {})[row["contender"]] = row
    return [
        (rows["ours"], rows[peer])
        for rows in programs.values()
        for peer in tables.PEERS
    ]


def test_clips_compiled_for_a_gpu_differ_as_the_page_about_cost_says():
    page = " ".join(DOCS["cost.md"].split())
    assert "up to 3% more bytes" in page
    for ours, theirs in compared("H100"):
        bytes_ = ours["hbm_gb"] / theirs["hbm_gb"]
        if "auto" in ours["case"]:
            needed = f"{ours['kernels']} kernels and Optax's clip {theirs['kernels']}"
            assert needed in page
        else:
            assert ours["kernels"] < theirs["kernels"]
        if "2,000" in ours["case"]:
            assert f"{bytes_ - 1:.0%} more bytes" in page
        else:
            assert bytes_ < 1.03


def test_clips_compiled_for_tpus_differ_as_the_page_about_cost_says():
    page = DOCS["cost.md"]
    claimed = re.findall(r"^\| .* \| .*[-+][\d.]+%.* \|$", page, re.MULTILINE)
    assert claimed == tables.cycles_lines(list(COMPILED.values()))
    on_tpus = [
        pair for target in COMPILED if "TPU" in target for pair in compared(target)
    ]
    bytes_ = [ours["hbm_gb"] / theirs["hbm_gb"] - 1 for ours, theirs in on_tpus]
    assert f"up to {max(bytes_):.0%} more in the network of two layers" in page
    v5e, v6e = added_to_a_training_step("TPU v5e"), added_to_a_training_step("TPU v6e")
    assert f"adds {v5e['ours']:.1%} of the cycles" in page
    assert f"{-v6e['ours']:.1%} and the other two" in page
    for peer in tables.PEERS:
        assert f"the other two add {v5e[peer]:.1%}" in page
        assert f"the other two {-v6e[peer]:.1%}" in page


def added_to_a_training_step(target):
    """The share of cycles that each clip adds to those of no clip."""
    cycles = {
        row["contender"]: row["cycles"]
        for row in COMPILED[target]["rows"]
        if row["case"] == "whole training step"
    }
    return {name: count / cycles["none"] - 1 for name, count in cycles.items()}


def test_study_of_spikes_is_the_one_that_was_written():
    study = tables.read("spikes")
    assert [line[0] for line in spikes.lines(study["rows"])] == list(spikes.METHODS)
    assert not [line for line in tables.spikes_lines(study) if line not in STUDIES]
    assert f"{study['tested_on']} seeds" in STUDIES


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
    headings = re.findall(r"^#+ (.*)$", PAGES[page], re.MULTILINE)
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
            assert section in slugs(path.relative_to(ROOT).as_posix()), section


@each_page
def test_pictures_have_a_text(page):
    for text in re.findall(r"!\[(.*?)\]", PAGES[page]):
        assert len(text.split()) >= 5


def test_readme_and_contributing_are_short():
    assert len(README.splitlines()) <= 120
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
