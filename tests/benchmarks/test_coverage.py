"""The page docs/teachers.md, and what it says of a run."""

import json
import pathlib

from benchmarks.coverage import backbones, page

ROOT = pathlib.Path(__file__).parent.parent.parent
RESULTS = ROOT / "benchmarks/coverage/results.json"
MORE = ROOT / "benchmarks/coverage/more.json"


def row(kind, **more):
    return {"is": kind, "says": "it has RMSNorm | and more", "source": "timm_vit", **more}


EQUAL = {"224": 1e-7, "256": 2e-7}


def rendered(folder, **forms):
    made = {"library": "timm", "lacked": "names", "code": "0fb79a2", "folder": folder, **forms}
    rows = {"a_network": made}
    results = {"versions": {"timm": "1.0.31"}, "runs": {"now": {"rows": rows}}}
    return page.render(results, json.loads(MORE.read_text()))


def test_the_page_is_made_of_the_results():
    results = json.loads(RESULTS.read_text())
    assert (ROOT / "docs/teachers.md").read_text() == page.render(
        results, json.loads(MORE.read_text())
    )


def test_rows_are_of_the_backbones_in_their_order():
    rows = json.loads(RESULTS.read_text())["runs"]["now"]["rows"]
    names = backbones.names()
    assert len(set(names)) == 162
    assert list(rows) == [name for name in names if name in rows]


# Equal at its own size. transformers keeps the window that its last stage had at that size.
OTHER_AT_ANOTHER_SIZE = {"microsoft/swinv2-base-patch4-window12to16-192to256-22kto1k-ft"}


def test_nothing_else_is_taken_with_other_features():
    rows = json.loads(RESULTS.read_text())["runs"]["now"]["rows"]
    forms = [(name, row[form]) for name, row in rows.items() for form in ("folder", "file")]
    assert {name for name, found in forms if found["is"] == "other"} <= OTHER_AT_ANOTHER_SIZE
    native = [
        min(rows[n]["folder"].get(s, 1) for s in ("224", "256")) for n in OTHER_AT_ANOTHER_SIZE
    ]
    assert max(native) < 1e-5


def test_a_row_has_both_sizes_and_the_other_forms():
    text = rendered(row("equal", **EQUAL), file=row("asked"), named=row("equal", **EQUAL))
    assert "| a_network | names | equal, 224 px: 1e-07 | 256 px: 2e-07 | asks | equal |" in text


def test_other_features_stand_out_and_are_counted():
    text = rendered(row("other", **EQUAL), file=row("other", **EQUAL))
    assert "**other features**, 224 px" in text
    assert "| folder | 0 | 1 | 0 | 0 |" in text


def test_a_refusal_keeps_its_reason_in_one_cell():
    text = rendered(row("refused"), file=row("failed"))
    assert "refused: it has RMSNorm / and more" in text
    assert "**fails**: it has RMSNorm / and more" in text
