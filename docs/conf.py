"""Sphinx configuration."""

import pyro_snf

project = "pyro-snf"
author = "the pyro-snf developers"
copyright = "the pyro-snf developers"
release = version = pyro_snf.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "matplotlib.sphinxext.plot_directive",
    "sphinx-mathjax-offline",  # formulas without a network
    "sphinx.ext.viewcode",
]
templates_path = ["_templates"]
exclude_patterns = ["_build", "_templates"]
myst_enable_extensions = ["dollarmath"]

autosummary_generate = True
autosummary_ignore_module_all = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"show-inheritance": True}
# The API pages are about this library: what torch's and Pyro's classes have is in their docs.
autodoc_inherit_docstrings = False

# The code of a page is run when it is built; a picture is all that it leaves.
plot_html_show_source_link = False
plot_html_show_formats = False
plot_formats = [("png", 150)]

html_theme = "furo"
html_title = "pyro-snf"
