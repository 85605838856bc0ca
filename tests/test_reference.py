"""Citations of the original system name anchors that docs/reference.md defines."""

import collections
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
FOLDERS = ("fd_jax", "configs", "tests", "benchmarks", "docs")
PAGE = "docs/reference.md"

DEFINED = re.compile(r'<a id="([^"]*)"></a>')
CITED = re.compile(r"reference\.md#([\w-]*)")
LINKED = re.compile(r"\]\(#([\w-]*)\)")  # from the page to itself

GAP = r"[\s#]+"  # a citation may go on in the next line of a comment
NUMBERED = re.compile(
    rf"\breference,?{GAP}(?:section{GAP}|quirk{GAP})?\d"
    rf"|\breference,{GAP}[A-Z]{{2,}}_"
    rf"|\bquirks?{GAP}(?:\d|per{GAP}source)"
    rf"|\bpaper,?{GAP}(?:section|table|text{GAP}of)\b",
    re.IGNORECASE,
)


def texts():
    """Every Python and Markdown file of the project: path from the root -> text."""
    paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    paths += ROOT.iterdir()
    return {
        path.relative_to(ROOT).as_posix(): path.read_text("utf-8")
        for path in sorted(paths)
        if path.suffix in (".py", ".md") and path.is_file()
    }


def anchors(page):
    return collections.Counter(DEFINED.findall(page))


def citations(name, text):
    """(line, anchor) of each."""
    found = [*CITED.finditer(text), *(LINKED.finditer(text) if name == PAGE else ())]
    return [(line_of(text, match), match[1]) for match in found]


def line_of(text, match):
    return text.count("\n", 0, match.start()) + 1


def unknown(files, known):
    """Citations of anchors that are not among `known`."""
    return [
        f"{name}:{line}: #{anchor} is not defined in {PAGE}"
        for name, text in files.items()
        for line, anchor in citations(name, text)
        if anchor not in known
    ]


def numbered(files):
    """Citations by a number of a section or quirk, or of the paper's tables without an anchor."""
    return [
        f"{name}:{line_of(text, match)}: {match[0]!r}; cite {PAGE}#anchor instead"
        for name, text in files.items()
        for match in NUMBERED.finditer(text)
    ]


def ill_defined(page):
    """Anchors that are defined more than once or that a citation could not name."""
    return [
        f"{anchor!r}, defined {count} times"
        for anchor, count in anchors(page).items()
        if count > 1 or not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", anchor)
    ]


FILES = texts()


def test_the_walk_sees_the_project():
    tops = {name.split("/")[0] for name in FILES}
    assert {*FOLDERS, "README.md", "train.py"} <= tops
    for folder in ("fd_jax", "configs", "tests", "benchmarks", "docs"):
        inside = [citations(n, t) for n, t in FILES.items() if n.startswith(folder) and n != PAGE]
        assert any(inside), f"no citation in {folder}"


def test_every_citation_names_an_anchor():
    assert unknown(FILES, anchors(FILES[PAGE])) == []


def test_every_anchor_is_defined_once():
    assert len(anchors(FILES[PAGE])) > 80
    assert ill_defined(FILES[PAGE]) == []


def test_no_citation_by_number_is_left():
    assert numbered(FILES) == []


def test_an_invented_anchor_is_reported():
    known = anchors(FILES[PAGE])
    cited = "reference.md" + "#{}"
    text = f"Decays by layer ({cited.format('layer-decay')}).\nSee {cited.format('layer-decayed')}."
    (found,) = unknown({"fd_jax/invented.py": text}, known)
    assert found.startswith("fd_jax/invented.py:2: #layer-decayed ")
    assert len(unknown({"docs/invented.md": f"[x]({cited.format('')})"}, known)) == 1
    assert len(unknown({PAGE: "[here](#layer-decay), [there](#nowhere)"}, known)) == 1


@pytest.mark.parametrize(
    ("page", "reported"),
    [
        ('<a id="one"></a><a id="two-3"></a>', 0),
        ('<a id="one"></a>\n<a id="one"></a>', 1),
        ('<a id="One two"></a>', 1),
    ],
)
def test_a_badly_defined_anchor_is_reported(page, reported):
    assert len(ill_defined(page)) == reported


@pytest.mark.parametrize(
    "template",
    [
        "layer ids ({R} 5.2)",
        "{R} section 3: decay",
        "({R} {Q} 5)",
        "({R}, PRED_FEAT_S3)",
        "as in the original ({Q} 6)",
        "{Q}s 3 and 4",
        "({Q}s per source)",
        "({P}, Table 7)",
        "({P} section 3.2)",
        "# cut by the window ({R}\n    # 2.2)",
    ],
)
def test_a_citation_by_number_is_reported(template):
    text = template.format(R="reference", Q="quirk", P="paper")
    assert len(numbered({"fd_jax/invented.py": text})) == 1
    assert len(numbered({"fd_jax/invented.py": text.capitalize()})) == 1


@pytest.mark.parametrize(
    "text",
    ["assert losses[0] == reference[0]", "the reference implementation", "a quirk of the code"],
)
def test_other_uses_of_the_words_are_left_alone(text):
    assert numbered({"fd_jax/invented.py": text}) == []
