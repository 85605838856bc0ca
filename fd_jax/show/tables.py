"""Tables of results: Markdown for people, CSV for programs."""

from collections.abc import Iterable, Sequence
import csv
import io

from etils import epath
import numpy as np

from fd_jax.errors import UserError
from fd_jax.show import html

CONFUSION = "confusion.csv"  # file in a workdir with the text of `confusion`
MOST_ROWS = 100  # classes up to which people are shown all of them
CLASSES = ("class", "images", "accuracy", "most often taken for")  # heads of `class_rows`


def per_class(matrix: np.ndarray, class_names: Sequence[str] | None = None) -> str:
    """Markdown table of images, accuracy and most frequent mistake per class.

    Args:
      matrix: confusion matrix [K, K], a row for each label.
      class_names: name of each class; None to call them by their numbers.
    """
    return markdown(CLASSES, class_rows(matrix, class_names)) + "\n"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown, without a line break at its end."""
    cells = ([cell.replace("|", r"\|") for cell in row] for row in (head, *rows))
    first, *others = ("| " + " | ".join(row) + " |" for row in cells)
    return "\n".join([first, "|" + "---|" * len(head), *others])


def class_rows(matrix: np.ndarray, class_names: Sequence[str] | None = None) -> list[list[str]]:
    """The rows of `per_class`."""
    names = [
        html.printable(name) or str(k) for k, name in enumerate(class_names or [""] * len(matrix))
    ]
    rows = []
    for label, row in enumerate(matrix):
        count, right = row.sum(), row[label]
        wrong = np.where(np.arange(len(row)) == label, -1.0, row)
        mistake = f"{names[wrong.argmax()]} ({int(wrong.max())})" if wrong.max() > 0 else ""
        rows.append(
            [names[label], str(int(count)), f"{right / count:.4f}" if count else "", mistake]
        )
    return rows


def confusion(matrix: np.ndarray, class_names: Sequence[str] | None = None) -> str:
    """CSV table: a row for each label, a column for each prediction.

    Args:
      matrix: counts [K, K] of any dtype, a row for each label.
      class_names: name of each class; None to call them by their numbers.
    """
    names = class_names or [str(k) for k in range(len(matrix))]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("label", *names))
    for name, row in zip(names, matrix.astype(np.int64).tolist(), strict=True):
        writer.writerow((name, *row))
    return text.getvalue()


def read_confusion(path: epath.Path) -> tuple[list[str], np.ndarray]:
    """Class names and counts [K, K] of a file with the text of `confusion`.

    Raises:
      UserError: the file is damaged.
    """
    try:
        (_, *names), *rows = csv.reader(io.StringIO(path.read_text()))
        matrix = np.array([[int(cell) for cell in cells] for _, *cells in rows])
        if matrix.shape != (len(names), len(names)) or [row[0] for row in rows] != names:
            raise ValueError(f"{len(names)} names, {len(rows)} rows")
    except (ValueError, csv.Error) as error:
        raise UserError(
            f"{path} is no table of labels and predictions ({error}); delete "
            "it, and write it again with --eval_only --per_class"
        ) from None
    return names, matrix
