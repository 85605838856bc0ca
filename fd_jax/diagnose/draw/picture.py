"""Figures of one picture, which is drawn beside what the models make of it."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from fd_jax.diagnose.draw import names, panels

Record = Mapping[str, Any]


def pca(record: Record) -> Any:
    """The first three principal components of each model's features as colours."""
    caption = "The first three principal components of the features as red, green and blue."
    shown = _models(record, "pca")
    colours = [panels.Panel(title, np.array(model["pca"])) for title, model in shown.items()]
    return panels.draw({"": [*_picture(record), *colours]}, caption, columns=5)


def rollout(record: Record) -> Any:
    """Attention rollout of each model, at the patches' places in the picture."""
    caption = "Attention rollout: the weight of each patch in the output. Linear colours."
    heats = [
        _heat(title, np.array(model["rollout"], dtype=float))
        for title, model in _models(record, "rollout").items()
    ]
    return panels.draw({"": [*_picture(record), *heats]}, caption, columns=5)


def heads(record: Record) -> Any:
    """Attention maps of the heads of one layer: a block for each model."""
    caption = "Attention of each head of one layer to the patches of the picture. Linear colours."
    blocks = {
        f"{name}: {_query(model)}": [
            *_picture(record),
            *(
                _heat(f"head {head}", np.array(values, dtype=float))
                for head, values in enumerate(model["heads"])
            ),
        ]
        for name, model in record["models"].items()
        if "heads" in model
    }
    return panels.draw(blocks, caption)


def _models(record: Record, key: str) -> dict[str, Any]:
    """The models that have `key`, by the title of their panel."""
    models = {name: model for name, model in record["models"].items() if key in model}
    titles = names.titles(models, panels.TITLE)
    return {titles[name]: model for name, model in models.items()}


def _picture(record: Record) -> list[panels.Panel]:
    if "picture" not in record:
        return []
    return [panels.Panel("picture", np.array(record["picture"]["pixels"], dtype=np.uint8))]


def _heat(title: str, values: np.ndarray) -> panels.Panel:
    return panels.Panel(title, values, panels.linear_scale(values))


def _query(model: Mapping[str, Any]) -> str:
    """Which attention the maps of a model's heads show."""
    about = model.get("picture", {})
    token = "class token" if about.get("query") == "class" else "mean of the patches"
    return f"layer {about.get('layer', -1)}, query: {token}"
