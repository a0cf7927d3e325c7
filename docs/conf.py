"""Builds the site: ``python -m sphinx -W --keep-going -c docs . docs/_build``.

The source directory is the repository, so that links between pages, notebooks and
benchmarks are the same files on the site and in a clone.
"""

import optax_globalclip

project = "optax_globalclip"
author = "The optax_globalclip maintainers"
version = release = optax_globalclip.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx_copybutton",
]
root_doc = "docs/index"
include_patterns = [
    "docs/*.md",
    "notebooks/*.ipynb",
    "benchmarks/README.md",
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
html_title = f"optax_globalclip {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_extra_path = ["_root"]  # Leads from the top of the site to docs/index.html.

# ``python -m sphinx -b linkcheck -c docs . docs/_build/linkcheck`` needs the network.
linkcheck_anchors = False
