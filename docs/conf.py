"""The site: `make docs`."""

from __future__ import annotations

import re
from typing import Any

import streamrec

project = "streamrec"
author = "the streamrec authors"
copyright = f"2026, {author}"
release = version = streamrec.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"streamrec {release}"

# The public names are loaded on first use, so each is documented where it lives; a room's `__all__` says what.
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100
default_role = "code"  # docstrings write `names` in single backticks


def _from_plain(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are prose for people at a prompt: make valid reStructuredText of them.

    An indented block is a drawing, shown as it stands. In prose, `|` and `*` are themselves outside backticks,
    and letters may follow a closing backtick: `Impression`s.
    """
    blocks = re.split(r"\n(?:[ ]*\n)+", "\n".join(lines).strip("\n"))
    drawing = False
    for n, block in enumerate(blocks):
        was, drawing = drawing, block.startswith("    ")
        if drawing:
            blocks[n] = block if was else f"::\n\n{block}"
        elif not block.lstrip().startswith(">>>"):
            parts = re.split(r"(`+[^`]+`+)", block)
            parts[::2] = [re.sub(r"([|*])", r"\\\1", part) for part in parts[::2]]
            parts[2::2] = [f"\\ {part}" if part[:1].isalnum() else part for part in parts[2::2]]
            blocks[n] = "".join(parts)
    lines[:] = [*"\n\n".join(blocks).split("\n"), ""]


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", _from_plain)
