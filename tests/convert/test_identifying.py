"""`--source=auto` on files of the real sizes: the right source, or a question that names it."""

from pathlib import Path

import numpy as np
import pytest

from fd_jax.convert import identifying
from fd_jax.convert.containers.tensors import Container, Tensor
from fd_jax.errors import ConversionError
from tests.convert import synthetic

# What no key tells: the activation, the teacher's training, the statistics.
ALIKE = (
    {"openai_clip_vit_b16", "open_clip_vit_b16_laion2b"},
    {"fd_official_distilled_dino_vit_b", "fd_official_distilled_deit_vit_b"},
)


def unread(name):
    """A file of a source's real structure, whose values are made only where a rule looks."""
    tensors = {}
    given = synthetic.structure(name, small=False)
    for tree, held in given.trees.items():
        for key, (shape, dtype) in held.items():
            full = f"{tree}/{key}" if tree else key

            def load(key=key, shape=shape, dtype=dtype):
                return synthetic.value(np.random.default_rng(0), key, shape, dtype, given.arch)

            tensors[full] = Tensor(full, shape, dtype, load)
    return Container(Path(name), "synthetic", (), tensors)


@pytest.mark.parametrize("name", synthetic.names())
def test_auto_never_takes_another_source(name):
    asked = next((group for group in ALIKE if name in group), None)
    if name == "fd_official_finetuned_clip_vit_b":  # BEiT's own files have its index buffers too
        asked = {name, "timm_beit_base_patch16_224"}
    if asked is None:
        assert identifying.identify(unread(name)).name == name
        return
    with pytest.raises(ConversionError, match="fit several sources; say which") as caught:
        identifying.identify(unread(name))
    lines = str(caught.value).splitlines()[1:]
    assert {line.split(":")[0].strip() for line in lines} == asked
