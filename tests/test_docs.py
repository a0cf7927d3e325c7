"""The README runs as pasted, and its figures are those that the benchmarks wrote."""

import json
import pathlib
import re
import subprocess
import sys

import jax
import pytest

import optax_globalclip
from benchmarks import locks, report, spikes, temporal_order

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
RESULTS = ROOT / "benchmarks" / "results"


def test_python_blocks_run_in_order(capsys):
    blocks = re.findall(r"^```python\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 2
    namespace = {}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for block in blocks:
            exec(compile(block, "README.md", "exec"), namespace)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "30.0 1.0 1.0"
    assert "# 30.0 1.0 1.0" in README


def test_first_block_runs_by_itself():
    block = re.search(r"^```python\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    assert block is not None
    ran = subprocess.run(
        [sys.executable, "-c", block[1]], capture_output=True, text=True, check=True
    )
    assert ran.stdout == "30.0 1.0 1.0\n"


def test_comparison_with_optax_is_the_one_that_was_written():
    written = json.loads((RESULTS / "compare.json").read_text())
    for row in written["rows"]:
        assert f"| {row['case']} | {row['optax']} | {row['ours']} |" in README
    versions = written["versions"]
    assert f"optax {versions['optax']}, jax {versions['jax']}" in README


def test_costs_are_those_that_were_written():
    results = json.loads((RESULTS / "cpu-2-cores.json").read_text())
    written = report.lines(results)
    claimed = re.findall(r"^\| .* \| [\d.]+ m?s \| .* \|$", README, re.MULTILINE)
    assert len(claimed) >= 6
    assert set(claimed) <= set(written)
    page = (ROOT / "benchmarks" / "README.md").read_text()
    assert not [line for line in written if line not in page]
    assert f"jax {results['versions']['jax']}" in page


def test_sharded_programs_are_those_that_were_written():
    results = json.loads((RESULTS / "llama-70b.json").read_text())
    page = (ROOT / "benchmarks" / "README.md").read_text()
    lines = report.sharding_lines(results)
    assert len(lines) == 12
    assert not [line for line in lines if line not in page]


def test_study_of_spikes_is_the_one_that_was_written():
    study = json.loads((RESULTS / "spikes.json").read_text())
    page = (ROOT / "benchmarks" / "README.md").read_text()
    lines = spikes.lines(study["rows"])
    assert [line[0] for line in lines] == list(spikes.METHODS)
    for line in lines:
        assert f"| {' | '.join(line)} |" in page
    assert f"{study['tested_on']} seeds" in page


def test_histories_that_lock_zclip_are_those_that_were_written(tmp_path):
    locks.main(["--out", str(tmp_path)])
    rows = json.loads((tmp_path / "locks.json").read_text())["rows"]
    assert rows == json.loads((RESULTS / "locks.json").read_text())["rows"]
    page = (ROOT / "benchmarks" / "README.md").read_text()
    for row in rows:
        assert f"| {row['history']} | {row['zclip']} | {row['ours']} |" in page


def test_study_of_the_paper_is_the_one_that_was_written():
    study = json.loads((RESULTS / "temporal-order.json").read_text())
    page = (ROOT / "benchmarks" / "README.md").read_text()
    assert f"at most {study['steps']:,} updates" in page
    lines = temporal_order.lines(study["rows"])
    assert len(lines) == len(temporal_order.LENGTHS)
    for line in lines:
        assert f"| {' | '.join(line)} |" in page
    notebook = (ROOT / "notebooks" / "5-recurrent-networks.ipynb").read_text()
    for method in temporal_order.METHODS:
        solved = [row["solved"] for row in study["rows"] if row["method"] == method]
        printed = " ".join(f"{count:4}" for count in solved)
        assert f"{method.ljust(12)} {printed}" in notebook


def test_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#]*)(?:#([^)]+))?\)", README)
    assert len(links) >= 4
    for link, section in links:
        if not link.startswith("http"):
            page = ROOT / (link or "README.md")
            assert page.exists(), link
            if section:
                headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
                words = [re.sub(r"[^\w -]", "", each.lower()) for each in headings]
                slugs = [each.replace(" ", "-") for each in words]
                assert section in slugs


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


def test_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+", optax_globalclip.__version__)
    assert f"[{optax_globalclip.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
