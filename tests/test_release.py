"""What is uploaded holds what it should, and works by itself."""

import email
import importlib.util
import os
import pathlib
import re
import subprocess
import sys
import tarfile
import zipfile

import pytest

import optax_globalclip
from docs.absolute import absolute

ROOT = pathlib.Path(__file__).parent.parent
VERSION = optax_globalclip.__version__
TOOLS = ("build", "hatchling", "twine")

needs_tools = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, TOOLS)),
    reason="pip install -e '.[release]' installs what builds a release",
)


def run(*arguments, directory):
    """Runs Python without the paths that this test was started with."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, *arguments]
    ran = subprocess.run(
        command, cwd=directory, env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder with the sdist, and the wheel built from it."""
    folder = tmp_path_factory.mktemp("dist")
    out = "--outdir", str(folder)
    run("-m", "build", "--no-isolation", *out, str(ROOT), directory=folder)
    return folder


@pytest.fixture(scope="module")
def unpacked(built, tmp_path_factory):
    """The sdist by itself."""
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(built / f"optax_globalclip-{VERSION}.tar.gz") as sdist:
        sdist.extractall(folder, filter="data")
    return folder / f"optax_globalclip-{VERSION}"


def modules():
    return {path.name for path in (ROOT / "optax_globalclip").glob("*.py")}


@needs_tools
def test_wheel_holds_the_package_alone(built):
    wheel = built / f"optax_globalclip-{VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as opened:
        names = set(opened.namelist())
    info = f"optax_globalclip-{VERSION}.dist-info"
    expected = {f"optax_globalclip/{name}" for name in modules() | {"py.typed"}}
    about = {"METADATA", "RECORD", "WHEEL", "licenses/LICENSE"}
    assert names == expected | {f"{info}/{name}" for name in about}


@needs_tools
def test_metadata_passes_and_says_what_the_package_says(built):
    files = [str(path) for path in built.iterdir()]
    assert len(files) == 2
    checked = run("-m", "twine", "check", "--strict", *files, directory=built)
    assert checked.count("PASSED") == 2
    wheel = built / f"optax_globalclip-{VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as opened:
        info = f"optax_globalclip-{VERSION}.dist-info"
        metadata = email.message_from_bytes(opened.read(f"{info}/METADATA"))
    assert metadata["Version"] == VERSION
    assert metadata["License-Expression"] == "Apache-2.0"
    needed = [each for each in metadata.get_all("Requires-Dist", []) if ";" not in each]
    assert [re.split(r"[^\w-]", each)[0] for each in needed] == ["jax", "optax"]


@needs_tools
@pytest.mark.slow
def test_sdist_holds_all_that_its_tests_need(unpacked):
    names = {path.relative_to(unpacked).parts[0] for path in unpacked.rglob("*")}
    for folder in ("optax_globalclip", "tests", "examples", "notebooks"):
        assert folder in names
    assert {"benchmarks", "studies"} < names
    assert {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE"} < names
    assert {"CITATION.cff", "SECURITY.md", "pyproject.toml"} < names
    assert not names & {".ci", ".git", ".github", "dist"}
    assert not list(unpacked.rglob("__pycache__"))
    collected = run(
        *("-m", "pytest", "-q", "--collect-only", "-m", "slow or not slow"),
        *("-p", "no:cacheprovider"),
        directory=unpacked,
    )
    assert "error" not in collected.splitlines()[-1]


@needs_tools
@pytest.mark.slow
def test_tests_of_the_sdist_pass_by_themselves(unpacked):
    """Those that read files beside the package, and one that does not."""
    files = ["test_docs.py", "test_notebooks.py", "test_threshold.py"]
    ran = run(
        *("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not test_runs"),
        *(f"tests/{name}" for name in files),
        directory=unpacked,
    )
    assert "passed" in ran
    where = "import optax_globalclip; print(optax_globalclip.__file__)"
    assert str(unpacked) in run("-c", where, directory=unpacked)


def test_readme_links_are_absolute_on_the_package_index():
    repository = "https://github.com/owner/name"
    text = absolute((ROOT / "README.md").read_text(), repository, "v1.0")
    links = re.findall(r"\]\(([^)]*)\)", text)
    assert len(links) > 10
    for link in links:
        assert link.startswith("https://")
    for link in re.findall(r"!\[[^\]]*\]\(([^)]*)\)", text):
        path = link.removeprefix(f"{repository}/raw/v1.0/")
        assert (ROOT / path).is_file()
    # Only links change, and what is absolute stays.
    assert (
        re.sub(rf"{repository}/(raw|blob)/v1.0/", "", text)
        == (ROOT / "README.md").read_text()
    )
    assert absolute(text, repository, "v2.0") == text


def test_version_needs_no_installed_metadata(tmp_path):
    """As in a folder on PYTHONPATH, or in an archive."""
    program = (
        "import importlib.metadata, sys\n"
        "def missing(name): raise importlib.metadata.PackageNotFoundError(name)\n"
        "importlib.metadata.version = importlib.metadata.distribution = missing\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import optax_globalclip\n"
        "print(optax_globalclip.__version__, optax_globalclip.__file__)\n"
    )
    version, where = run("-c", program, directory=tmp_path).split(maxsplit=1)
    assert (version, str(ROOT) in where) == (VERSION, True)


def test_version_stands_in_one_place():
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert 'dynamic = ["version"]' in pyproject
    assert VERSION not in pyproject
    assert f"## [{VERSION}]" in (ROOT / "CHANGELOG.md").read_text()
