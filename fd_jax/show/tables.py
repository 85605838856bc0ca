"""Results as Markdown."""

import numpy as np


def per_class(matrix: np.ndarray) -> str:
    """Markdown: images, accuracy and most frequent mistake of each class of a confusion matrix."""
    lines = ["| class | images | accuracy | most often taken for |", "|---|---|---|---|"]
    for label, row in enumerate(matrix):
        count, right = row.sum(), row[label]
        wrong = np.where(np.arange(len(row)) == label, -1.0, row)
        mistake = f"{wrong.argmax()} ({int(wrong.max())})" if wrong.max() > 0 else ""
        accuracy = f"{right / count:.4f}" if count else ""
        lines.append(f"| {label} | {int(count)} | {accuracy} | {mistake} |")
    return "\n".join(lines) + "\n"
