"""The site of the documentation, which Sphinx builds from the Markdown as it is (`make docs`).

The root of the sources is the project's folder, so that links between README.md and docs/ mean the
same here as in the repository.
"""

import json
import pathlib
import re
import shutil

from docutils import nodes
from myst_parser.parsers.sphinx_ import MystParser
from sphinx.transforms import SphinxTransform

from fd_jax import __version__

ROOT = pathlib.Path(__file__).parent.parent
PAGES = {"README.md", "CHANGELOG.md", "docs"}
LINKED = re.compile(r"\]\((docs/\w+)\.(?:md|ipynb)[#)]")
ANCHOR = re.compile(r'<a id="([^"]*)">')

project = "fd_jax"
copyright = "the fd_jax authors"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "README"
include_patterns = ["README.md", "CHANGELOG.md", "docs/*.md", "docs/*.ipynb"]
# Sphinx does not enter what is excluded; data and environments may hold a million files.
exclude_patterns = [path.name for path in ROOT.iterdir() if path.name not in PAGES]

html_theme = "furo"
html_title = f"fd_jax {__version__}"
highlight_language = "none"  # of blocks that name no language, which are mostly commands
default_role = "code"  # docstrings write `name`, as Markdown does
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
myst_heading_anchors = 4  # with the names that GitHub gives them


def add_contents(app, docname, source):
    """Gives the first page a table of contents: the pages in the order in which it links them."""
    if docname != root_doc:
        return
    pages = dict.fromkeys([*LINKED.findall(source[0]), "CHANGELOG"])
    listed = "\n".join(f"/{page}" for page in pages)
    source[0] += f"\n```{{toctree}}\n:hidden:\n\n{listed}\n```\n"


class Anchors(SphinxTransform):
    """Makes anchors that are written as HTML known to links, which otherwise know only headings."""

    default_priority = 800  # before MyST resolves the links within a page

    def apply(self):
        """Adds the anchors of one page to those that MyST has found."""
        known = self.env.metadata[self.env.docname].setdefault("myst_slugs", {})
        for raw in self.document.findall(nodes.raw):
            for name in ANCHOR.findall(raw.astext()):
                known[name] = (raw.line or 0, name, name)
        self.document.myst_slugs = known


class NotebookParser(MystParser):
    """Shows the cells of a notebook as a page."""

    supported = ("notebook",)

    def parse(self, inputstring, document):
        """Joins the cells to one Markdown text; outputs are not stored in our notebooks."""
        cells = json.loads(inputstring)["cells"]
        super().parse("\n\n".join(map(_markdown, cells)), document)


def _markdown(cell):
    text = "".join(cell["source"])
    return text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```"


def mark_code(app, what, name, obj, options, lines):
    """Marks the indented examples of docstrings as code, as reStructuredText wants it."""
    for i in reversed(range(2, len(lines))):
        before = lines[i - 2]
        if lines[i].startswith("    ") and not lines[i - 1] and before and not before[0].isspace():
            lines[i - 1 : i - 1] = ["", "::"]


def add_index(app, exception):
    """Makes the first page the one that a server shows for the folder."""
    if exception is None and app.builder.format == "html":
        shutil.copy(app.outdir / "README.html", app.outdir / "index.html")


def setup(app):
    """Called by Sphinx."""
    app.connect("source-read", add_contents)
    app.connect("autodoc-process-docstring", mark_code, priority=400)  # before napoleon
    app.connect("build-finished", add_index)
    app.add_transform(Anchors)
    app.add_source_suffix(".ipynb", "notebook")
    app.add_source_parser(NotebookParser)
