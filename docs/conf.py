"""Builds the site: ``python -m sphinx -W --keep-going -c docs . docs/_build/html``.

The source directory is the repository, so that links between pages, notebooks and
benchmarks are the same files on the site and in a clone.
"""

from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx

import optax_globalclip

project = "optax_globalclip"
author = copyright = "The optax_globalclip authors"
version = release = optax_globalclip.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
root_doc = "docs/index"
include_patterns = [
    "docs/*.md",
    "notebooks/*.ipynb",
    "benchmarks/README.md",
    "studies/README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
]

# Warnings are errors, and every reference has to resolve.
nitpicky = True

# The notebooks keep their outputs, which the tests reproduce.
nb_execution_mode = "off"
nb_render_image_options = {"alt": "The plot that the code above draws"}
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

# Types are in the text of each docstring, in words.
autodoc_typehints = "none"
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
napoleon_attr_annotations = False

# The prompts of examples are not part of what is copied.
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True

html_theme = "furo"
pygments_dark_style = "github-dark"
html_math_renderer = "mathml"
html_title = f"optax_globalclip {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_extra_path = ["_root"]  # Leads from the top of the site to docs/index.html.

# ``python -m sphinx -b linkcheck -c docs . docs/_build/linkcheck`` needs the network.
linkcheck_anchors = False
linkcheck_timeout = 20


def setup(app: Sphinx) -> None:
    """Writes formulas as MathML, so that the site loads nothing from elsewhere."""
    app.add_html_math_renderer(
        "mathml", inline_renderers=(_inline, None), block_renderers=(_block, None)
    )


def _inline(writer: Any, node: nodes.math) -> None:
    writer.body.append(_mathml(node, "inline"))
    raise nodes.SkipNode


def _block(writer: Any, node: nodes.math_block) -> None:
    formula = _mathml(node, "block")
    writer.body.append(f'<div class="formula">{formula}</div>')
    raise nodes.SkipNode


def _mathml(node: nodes.Element, display: str) -> str:
    # The converter leaves the backslash of an escaped underscore in text as it is.
    return convert(node.astext().replace(r"\_", "_"), display=display)
