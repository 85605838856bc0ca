"""Our parameters, or their gradients, under the names of a torch model that is filled with them."""

import re

import numpy as np
import torch

from fd_jax.convert import trees

KINDS = {"kernel": "weight", "scale": "weight", "bias": "bias"}


def renamed(tree, names):
    """The arrays of a tree by the names of a torch model; every path has to have one.

    Args:
      tree: nested dict of arrays, as in a model folder's part.
      names: from a pattern of a path, or of one without its last step, to their name; with {} for
        the letter of q, k and v where our kernel holds all three.
    """
    out = {}
    for path, leaf in trees.flat(tree).items():
        module, _, kind = path.rpartition("/")
        array = np.asarray(leaf)
        if (whole := expanded(path, names)) is not None:
            if path.endswith("qkv/kernel"):
                for index, letter in enumerate("qkv"):
                    out[whole.format(letter)] = array[:, index].T
            else:
                out[whole] = array
        else:
            theirs = expanded(module, names)
            assert theirs is not None, f"no name for {path}"
            out[f"{theirs}.{KINDS[kind]}"] = turned(array) if kind == "kernel" else array
    return out


def expanded(path, names):
    for pattern, theirs in names.items():
        if match := re.fullmatch(pattern, path):
            return match.expand(theirs)
    return None


def turned(kernel):
    """A kernel as torch has it: of a linear layer [out, in], of a convolution [out, in, h, w]."""
    return kernel.transpose(3, 2, 0, 1) if kernel.ndim == 4 else kernel.T


def filled(model, tensors):
    """The torch model with these arrays by name; no tensor of it may be missing or left over."""
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    assert shapes.keys() == tensors.keys(), shapes.keys() ^ tensors.keys()
    state = {
        name: torch.from_numpy(np.array(value, np.float32).reshape(shapes[name]))
        for name, value in tensors.items()
    }
    model.load_state_dict(state)
    return model.eval()
