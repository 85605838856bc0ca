"""The site of the documentation: what `make docs` refuses, on pages of a few lines."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow  # every build is a process that imports Sphinx

ROOT = pathlib.Path(__file__).parent.parent
FIRST = "../README.md"  # not in one piece with an anchor: tests/test_docs_links.py follows those
LINKS = "# Project\n\n[a]({0}#here), [b]({0}#a-heading), [c](docs/notebook.ipynb)\n"
README = LINKS.format("docs/page.md")
PAGE = f"""# Page

<a id="here"></a>
**Anchors** of pages written as HTML, and in lists:

- <a id="there"></a>a point

## A heading

[up]({FIRST}#project) [within](#there) [changes](../CHANGELOG.md) [file](../setup.py)
"""
API = "\n```{eval-rst}\n.. autofunction:: fd_jax.load_model\n.. autoclass:: fd_jax.Model\n```\n"


def build(folder, page=PAGE):
    """Builds the site of a README and two pages; returns the finished process."""
    docs = folder / "docs"
    docs.mkdir()
    for name in ("docs/conf.py", "docs/notebook.ipynb", "setup.py"):
        shutil.copy(ROOT / name, folder / name)
    notebook = (docs / "notebook.ipynb").read_text().replace("](", "](https://example.org/")
    (docs / "notebook.ipynb").write_text(notebook)
    (folder / "README.md").write_text(README)
    (folder / "CHANGELOG.md").write_text("# Changelog\n")
    (docs / "page.md").write_text(page)
    (folder / "data").mkdir()
    (folder / "data" / "other.md").write_text("[not a page](nowhere.md)")
    return subprocess.run(
        [sys.executable, *("-m", "sphinx", "-W", "-q", "-c", "docs", ".", "site")],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


def test_pages_keep_their_anchors_and_show_docstrings_and_notebooks(tmp_path):
    done = build(tmp_path, PAGE + API)
    assert done.returncode == 0, done.stderr
    site = tmp_path / "site"
    first = (site / "index.html").read_text()
    assert 'href="docs/page.html#here"' in first and 'href="docs/page.html#a-heading"' in first
    page = (site / "docs" / "page.html").read_text()
    assert '<a id="here">' in page and 'href="#there"' in page
    assert "Opens a model folder for use in Python" in page
    (example,) = [block for block in page.split("<pre>") if "features = model(images)" in block]
    assert "load_model" in example.partition("</pre>")[0]
    assert "Feature distillation in a few minutes" in (site / "docs" / "notebook.html").read_text()
    assert not list(site.rglob("other*"))


@pytest.mark.parametrize(
    "added,message",
    [
        ("[x](missing.md)", "missing.md"),
        ("[x](#nowhere)", "nowhere"),
        (f"[x]({FIRST}#nowhere)", "nowhere"),
        (API.replace("load_model", "no_such_function"), "no_such_function"),
    ],
)
def test_a_broken_link_or_name_is_an_error(added, message, tmp_path):
    done = build(tmp_path, f"{PAGE}\n{added}\n")
    assert done.returncode != 0
    assert message in done.stderr
