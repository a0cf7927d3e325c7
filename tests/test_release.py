"""What is uploaded holds what it should, and works by itself."""

import email
import os
import pathlib
import re
import subprocess
import sys
import tarfile
import zipfile

import pytest

from docs.absolute import absolute
from optax_globalclip import __version__ as VERSION

for _tool in ("build.__main__", "hatchling", "twine"):
    pytest.importorskip(
        _tool, reason="pip install -e '.[release]' installs what builds"
    )

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


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


def test_wheel_holds_the_package_alone_and_says_what_it_says(built):
    files = [str(path) for path in built.iterdir()]
    assert len(files) == 2
    checked = run("-m", "twine", "check", "--strict", *files, directory=built)
    assert checked.count("PASSED") == 2

    info = f"optax_globalclip-{VERSION}.dist-info"
    wheel = built / f"optax_globalclip-{VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as opened:
        names = set(opened.namelist())
        metadata = email.message_from_bytes(opened.read(f"{info}/METADATA"))
    modules = {path.name for path in (ROOT / "optax_globalclip").glob("*.py")}
    expected = {f"optax_globalclip/{name}" for name in modules | {"py.typed"}}
    about = {"METADATA", "RECORD", "WHEEL", "licenses/LICENSE"}
    assert names == expected | {f"{info}/{name}" for name in about}
    assert metadata["Version"] == VERSION
    assert metadata["License-Expression"] == "Apache-2.0"
    needed = [each for each in metadata.get_all("Requires-Dist", []) if ";" not in each]
    assert [re.split(r"[^\w-]", each)[0] for each in needed] == ["jax", "optax"]


def test_sdist_holds_all_that_its_tests_need(unpacked):
    names = {path.relative_to(unpacked).parts[0] for path in unpacked.rglob("*")}
    folders = {path.name for path in ROOT.iterdir() if (path / "__init__.py").exists()}
    assert folders | {"tests", "notebooks"} < names
    assert {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE"} < names
    assert {"CITATION.cff", "SECURITY.md", "pyproject.toml"} < names
    assert not names & {".ci", ".git", ".github", "dist"}
    assert not list(unpacked.rglob("__pycache__"))
    pytest_of = "-m", "pytest", "-q", "-p", "no:cacheprovider"
    every = "-m", "slow or not slow"
    collected = run(*pytest_of, "--collect-only", *every, directory=unpacked)
    assert "error" not in collected.splitlines()[-1]

    # Those that read files beside the package, and one that does not.
    files = [f"tests/test_{name}.py" for name in ("docs", "package", "threshold")]
    assert "passed" in run(*pytest_of, *files, directory=unpacked)
    where = "import optax_globalclip; print(optax_globalclip.__file__)"
    assert str(unpacked) in run("-c", where, directory=unpacked)


def test_readme_links_are_absolute_on_the_package_index():
    repository = "https://github.com/owner/name"
    text = absolute(README, repository, "v1.0")
    links = re.findall(r"\]\(([^)]*)\)", text)
    assert len(links) > 10
    assert all(link.startswith("https://") for link in links)
    for link in re.findall(r"!\[[^\]]*\]\(([^)]*)\)", text):
        path = link.removeprefix(f"{repository}/raw/v1.0/")
        assert (ROOT / path).is_file()
    # Only links change, and what is absolute stays.
    assert re.sub(rf"{repository}/(raw|blob)/v1.0/", "", text) == README
    assert absolute(text, repository, "v2.0") == text
