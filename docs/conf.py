"""Sphinx configuration."""

import importlib

import torch
from matplotlib._pylab_helpers import Gcf
from matplotlib.backends.backend_agg import FigureCanvasAgg
from sphinx import addnodes

import pyro_snf.plotting

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
    "sphinx.ext.intersphinx",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
templates_path = ["_templates"]
exclude_patterns = ["_build", "_templates"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

autosummary_generate = True
autosummary_ignore_module_all = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_default_options = {"show-inheritance": True}
# The API pages are about this library: what torch's and Pyro's classes have is in their docs.
autodoc_inherit_docstrings = False
add_module_names = False
python_use_unqualified_type_names = True
# A signature that does not fit into a line of a page has a line for each parameter.
maximum_signature_line_length = 80

# Without a network, the names of a short list are linked; with one, all of them.
intersphinx_mapping = {
    "torch": ("https://docs.pytorch.org/docs/stable/", (None, "inventories/torch.txt")),
    "pyro": ("https://docs.pyro.ai/en/stable/", (None, "inventories/pyro.txt")),
}
intersphinx_timeout = 5

# What is copied can be pasted: no prompts, no output.
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True

# The code of a page is run when it is built; a picture is all that it leaves.
plot_html_show_source_link = False
plot_html_show_formats = False
plot_formats = [("png", 150)]
torch.set_num_threads(1)  # models are small: several threads would wait for each other

html_theme = "furo"
html_title = "pyro-snf"
html_static_path = ["_static"]
html_css_files = ["wide.css"]


def show(make_panels):
    """The library's figures are made without pyplot, where the build looks for them."""

    def make_and_show(*args, **options):
        figure, panels = make_panels(*args, **options)
        Gcf._set_new_active_manager(FigureCanvasAgg.new_manager(figure, len(Gcf.figs) + 1))
        return figure, panels

    return make_and_show


def add_ids(app, doctree):
    """Let viewcode's links back to the documentation end at what they name.

    It has one module name for all objects of a source file. A public class is documented as one of
    ``pyro_snf``, and its file's internals as of their own module: each gets the other's name, too.
    """
    for signature in doctree.findall(addnodes.desc_signature):
        module, name = signature.get("module"), signature.get("fullname")
        if module and name:
            public = f"{pyro_snf.__name__}.{name}"
            own = f"{source_module(module, name) or module}.{name}"
            signature["ids"] += [one for one in (public, own) if one not in signature["ids"]]


def source_module(module, name):
    """The module in which an object says that it is defined; None if it does not say it."""
    found = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return getattr(found, "__module__", None)


def keep_out_builtins(app, module, name):
    """An alias of a builtin type has no source to show; None leaves all others to viewcode."""
    return module if source_module(module, name) == "builtins" else None


def setup(app):
    pyro_snf.plotting._panels = show(pyro_snf.plotting._panels)
    app.connect("doctree-read", add_ids)
    app.connect("viewcode-follow-imported", keep_out_builtins)
