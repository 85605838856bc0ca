"""Pictures for reports; matplotlib is imported only where one is drawn."""

from typing import Any

from etils import epath


def pyplot() -> Any:
    """matplotlib.pyplot without a screen."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save(figure: Any, path: epath.Path) -> None:
    """Writes a figure as PNG and closes it."""
    with path.open("wb") as file:
        figure.savefig(file, format="png", dpi=120)
    pyplot().close(figure)
