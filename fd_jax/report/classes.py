"""What a report of a classifier shows of each class."""

from etils import epath

from fd_jax.show import document, pictures, tables


def blocks(workdir: epath.Path, folder: epath.Path) -> list[document.Block]:
    """The confusion matrix and a table of the classes, or how to get them.

    Args:
      workdir: of the run; `--eval_only --per_class` writes its confusion matrix.
      folder: existing folder that receives the picture.

    Raises:
      UserError: the file of the matrix is damaged.
    """
    heading = document.Heading("Classes")
    path = workdir / tables.CONFUSION
    if not path.exists():
        return [
            heading,
            document.Paragraph(
                "Not measured: the command of the run with --eval_only --per_class measures each "
                "class on the held-out pictures, and the next report shows the result."
            ),
        ]
    names, matrix = tables.read_confusion(path)
    pictures.confusion(matrix, folder / "confusion.png", names)
    rows = tables.class_rows(matrix, names)
    text = ""
    if len(rows) > tables.MOST_ROWS:
        rows = sorted(rows, key=lambda row: float(row[2] or "inf"))[: tables.MOST_ROWS]
        text = f"The {len(rows)} of {len(names)} classes with the lowest accuracy. "
    return [
        heading,
        document.Paragraph(
            f"{text}Held-out pictures, measured by --eval_only --per_class. One picture of "
            f"{int(matrix.sum())} is {100 / max(matrix.sum(), 1):.2g} points of top-1."
        ),
        document.Picture("confusion.png", "confusion matrix: labels by rows"),
        document.Table(tables.CLASSES, rows),
    ]
