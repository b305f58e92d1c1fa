"""How `make docs` builds these pages: Markdown by MyST, and the API from the docstrings."""

from polycom_ext import __version__

project = "PolyCom for pre-training"
version = release = __version__
project_copyright = "the contributors, Apache-2.0"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["**/.*"]
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!polycom_ext).*")]  # other projects' pages are not asked for

myst_heading_anchors = 3
default_role = "code"
add_module_names = False
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints_format = "short"

html_theme = "furo"
html_title = f"PolyCom {version}"
html_copy_source = False
html_show_sphinx = False
