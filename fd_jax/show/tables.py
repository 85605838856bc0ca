"""Tables of results in Markdown."""

from collections.abc import Sequence

import numpy as np

from fd_jax.show import html


def per_class(matrix: np.ndarray, class_names: Sequence[str] | None = None) -> str:
    """Markdown table of images, accuracy and most frequent mistake per class.

    Args:
      matrix: confusion matrix [K, K], a row for each label.
      class_names: name of each class; None to call them by their numbers.
    """
    names = [_cell(name) or str(k) for k, name in enumerate(class_names or [""] * len(matrix))]
    lines = ["| class | images | accuracy | most often taken for |", "|---|---|---|---|"]
    for label, row in enumerate(matrix):
        count, right = row.sum(), row[label]
        wrong = np.where(np.arange(len(row)) == label, -1.0, row)
        mistake = f"{names[wrong.argmax()]} ({int(wrong.max())})" if wrong.max() > 0 else ""
        accuracy = f"{right / count:.4f}" if count else ""
        lines.append(f"| {names[label]} | {int(count)} | {accuracy} | {mistake} |")
    return "\n".join(lines) + "\n"


def _cell(name: str) -> str:
    """A name as the text of a cell."""
    return html.printable(name).replace("|", r"\|")
