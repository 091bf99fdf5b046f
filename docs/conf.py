# SPDX-License-Identifier: MIT OR Apache-2.0
"""Configuration of the documentation, which Sphinx builds; see CONTRIBUTING.md."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

from docutils import nodes
from pygments.lexers.rust import RustLexer
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).resolve().parent.parent

project = "ublk"
author = "the ublk authors"
copyright = author
release = tomllib.loads((ROOT / "Cargo.toml").read_text())["workspace"]["package"]["version"]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_build"]

myst_enable_extensions = ["colon_fence", "deflist", "fieldlist", "substitution"]
myst_heading_anchors = 3

# A name in single backquotes in a docstring is a Python object.
default_role = "py:obj"
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = True
# Every reference has to resolve, except those to the standard library and to private types.
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(os|asyncio|sys|signal|errno|collections|pathlib|datetime)\..*"),
    ("py:class", r"(MaybeAsync|Buffer|FileDescriptorLike|LoopFactory|NativeDisk|PullQueue|Unpack|StartOptions)"),
]

html_theme = "furo"
html_title = f"ublk {release}"
html_theme_options = {"source_edit_link": ""}
html_show_copyright = False
html_static_path = ["_static"]
html_css_files = ["custom.css"]


class HelpText(SphinxDirective):
    """The `--help` of a command, as the installed package prints it: `{ublk-help} add`."""

    required_arguments = 0
    optional_arguments = 1

    def run(self) -> list[nodes.Node]:
        command = [sys.executable, "-m", "ublk", *self.arguments, "--help"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": "100"})
        return [nodes.literal_block(done.stdout, done.stdout, language="text")]


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("ublk-help", HelpText)
    # Rust with the attributes of documentation tests (ublk-core/src/pages.rs).
    for attribute in ("no_run", "ignore"):
        app.add_lexer(f"rust,{attribute}", RustLexer)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
