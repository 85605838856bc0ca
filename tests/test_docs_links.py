"""Links in the documentation, and citations of it in the code, lead to files and headings."""

import collections
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PAGES = ["README.md", "CHANGELOG.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
CODE = ("fd_jax", "configs", "tests", "benchmarks")

FENCED = re.compile(r"^ *```.*?^ *```", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^#+ +(.*?) *$", re.MULTILINE)
DEFINED = re.compile(r'<a id="([^"]*)"></a>')
LINK = re.compile(r"\]\(([^()\s]+)\)")
CITATION = re.compile(r"\b((?:docs/\w+|README)\.md#[\w-]+)")


def anchors(text):
    """The anchors of a Markdown page: those it defines, and one per heading, as GitHub forms it."""
    text = FENCED.sub("", text)
    found, seen = set(DEFINED.findall(text)), collections.Counter()
    for heading in HEADING.findall(text):
        words = re.sub(r"<[^>]*>|\[|\]\([^)]*\)", "", heading)
        slug = re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")
        found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return found


def broken(page, links, *, root=ROOT):
    """Links of a page that lead nowhere.

    Args:
      page: path from `root`.
      links: as the page writes them, relative to its folder.
      root: folder of the project.
    """
    missing = []
    for link in links:
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = ((root / page).parent / path) if path else root / page
        if not target.exists():
            missing.append(f"{page}: {link}: no file {path}")
        elif anchor and anchor not in anchors(target.read_text("utf-8")):
            missing.append(f"{page}: {link}: no heading or anchor #{anchor}")
    return missing


def links_of(text):
    return LINK.findall(FENCED.sub("", text))


@pytest.mark.parametrize("page", PAGES)
def test_every_link_resolves(page):
    assert broken(page, links_of((ROOT / page).read_text("utf-8"))) == []


def test_every_citation_in_the_code_resolves():
    files = [path for folder in CODE for path in (ROOT / folder).rglob("*.py")]
    files.remove(pathlib.Path(__file__))
    cited = {link for path in files for link in CITATION.findall(path.read_text("utf-8"))}
    assert "docs/running.md#attention" in cited
    assert broken("README.md", sorted(cited)) == []


def test_every_page_is_linked_from_the_readme():
    linked = {link.partition("#")[0] for link in links_of((ROOT / "README.md").read_text("utf-8"))}
    assert set(PAGES) - {"README.md"} <= linked


def test_broken_links_are_reported(tmp_path):
    (tmp_path / "docs").mkdir()
    text = (
        "# A title, here\n## `--flag` of x_y\n## Again\n## Again\n```\n# no heading\n[a](b)\n```\n"
    )
    (tmp_path / "docs" / "page.md").write_text(text + "[there](other.md)\n")
    sound = ["#a-title-here", "page.md#--flag-of-x_y", "#again", "#again-1", "https://x.example"]
    assert broken("docs/page.md", sound, root=tmp_path) == []
    for link in ("other.md", "#no-heading", "page.md#a-title", "#again-2", "docs/page.md"):
        (message,) = broken("docs/page.md", [link], root=tmp_path)
        assert message.startswith(f"docs/page.md: {link}: no ")
    assert links_of((tmp_path / "docs" / "page.md").read_text()) == ["other.md"]
