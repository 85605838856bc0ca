"""The models of a command: their names, their weights and what figures.json says about them."""

from collections.abc import Sequence
import hashlib
from typing import Any

from etils import epath
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from fd_jax.errors import ConfigError
from fd_jax.inference import Model, load_model
from fd_jax.models import sizes
from fd_jax.models.sizes import ImageSize


def folders(arguments: Sequence[str]) -> dict[str, str]:
    """The folders by name; an argument is a folder, whose last part is the name, or NAME=FOLDER.

    Raises:
      ConfigError: two folders have the same name.
    """
    named: dict[str, str] = {}
    for argument in arguments:
        name, separator, folder = argument.partition("=")
        if not separator or "/" in name:
            name, folder = epath.Path(argument).name, argument
        if name in named:
            raise ConfigError(
                f"--model={argument}: {named[name]} has the name {name!r} as well; give each a "
                f"name of its own, as in --model=student={folder}"
            )
        named[name] = folder
    return named


def load(named: dict[str, str], *, image_size: ImageSize | None) -> dict[str, Model]:
    """Reads the model folders.

    Args:
      named: folders by name.
      image_size: size in pixels to which all networks are resized; None to keep their own.

    Raises:
      ModelFolderError: a folder does not exist or is damaged.
      ConfigError: the networks have different input sizes.
    """
    models = {name: load_model(folder, image_size=image_size) for name, folder in named.items()}
    found = {name: sizes.sides(model.spec.arch["image_size"]) for name, model in models.items()}
    if len(set(found.values())) > 1:
        listed = ", ".join(f"{name} has {h}x{w}" for name, (h, w) in found.items())
        raise ConfigError(
            f"the models have different input sizes ({listed}), so that they cannot see the same "
            "images; add --image_size=N to resize all of them, or measure them one by one"
        )
    return models


def digest(model: Model) -> str:
    """A fingerprint of a network's description and of all its weights."""
    hashed = hashlib.blake2b(model.spec.to_json().encode(), digest_size=16)
    for path, leaf in jax.tree_util.tree_leaves_with_path(model.params):
        hashed.update(jax.tree_util.keystr(path).encode())
        hashed.update(np.ascontiguousarray(leaf).data)
    return hashed.hexdigest()


def about(model: Model) -> dict[str, Any]:
    """What figures.json says about a network: its family and, for each layer, its attention.

    A network without attention has no heads and no windows.
    """
    definition, shapes = model.spec.abstract()
    attends = model.spec.has_attention

    def layers(params, images):
        network: Any = nnx.merge(definition, params)
        blocks = range(network.depth)
        maps = network.attention_maps(images, blocks) if attends else []
        return network.intermediates(images, blocks), maps

    size, patch = (model.spec.arch[name] for name in ("image_size", "patch_size"))
    images = jax.ShapeDtypeStruct((1, *sizes.sides(size), 3), jnp.float32)
    features, maps = jax.eval_shape(layers, shapes, images)
    return {
        "family": model.spec.family,
        "source": model.spec.source,
        "layers": len(features),
        "heads": [layer.inputs.q.shape[2] for layer in maps] if attends else [0] * len(features),
        "grid": [list(layer.grid) for layer in features],
        "patch": [sizes.token_side(size, patch, layer.grid) for layer in features],
        "window": [layer.window for layer in maps] if attends else [None] * len(features),
        "prefix": features[0].cls + features[0].registers,
    }
