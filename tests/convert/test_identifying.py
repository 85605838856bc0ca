"""`--source=auto` on files of the real sizes: the right source, or a question that names it."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from fd_jax.convert import families, identifying
from fd_jax.convert.containers.tensors import Container, Tensor
from fd_jax.errors import ConversionError
from tests.convert import synthetic

# Files whose names only one publisher gives; all others lack facts that no tensor tells.
CERTAIN = {
    "fd_official_distilled_clip_vit_b",
    "fd_official_distilled_clip_vit_l",
    "fd_official_distilled_esvit_swin_b",
    "fd_official_finetuned_clip_vit_l",
    "fd_official_finetuned_swin_b",
    "swinv2_giant",
}


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
def test_auto_takes_the_source_of_a_public_file_or_asks_for_it(name):
    if name in CERTAIN:
        assert identifying.identify(unread(name)).name == name
        return
    with pytest.raises(ConversionError) as caught:
        identifying.identify(unread(name))
    assert f"{name}:" in str(caught.value) or f"--source={name}" in str(caught.value)


def test_a_question_has_every_source_with_the_same_names_and_the_published_networks():
    with pytest.raises(ConversionError) as caught:
        identifying.identify(unread("openai_clip_vit_b16"))
    message = str(caught.value)
    assert "768 x 12, patch 16, 224 px. No tensor, and no file beside it, tells heads" in message
    assert "--source=openai_clip_vit_b16: heads 12, quick_gelu, eps 1e-05" in message
    assert "--source=open_clip_vit_b16_laion2b: heads 12, gelu_erf" in message
    assert "--arch=ViT-B-16" in message


def test_a_published_hash_answers_for_the_names():
    file = unread("openai_clip_vit_b16")
    published = families.SOURCES["openai_clip_vit_b16"].published
    found = identifying.identify(file, digest=lambda: published)
    assert found.name == "openai_clip_vit_b16"
    with pytest.raises(ConversionError, match="Say which network it is"):
        identifying.identify(file, digest=lambda: "0" * 64)


def test_the_name_of_a_public_file_is_a_hint_and_no_proof():
    file = dataclasses.replace(unread("dino_vitb16"), path=Path("dino_vitbase16_pretrain.pth"))
    with pytest.raises(ConversionError, match=r"Its file name is that of --source=dino_vitb16\."):
        identifying.identify(file)


def test_a_published_name_answers_with_the_facts_of_its_library():
    given = identifying.published_claims("vit_base_patch16_224.dino")
    found = identifying.identify(unread("dino_vitb16"), given)
    spec = found.parts[found.default_part].spec
    assert found.name == "timm_vit" and spec.arch["heads"] == 12
    assert (
        spec.position_resize == "antialias"
    )  # the hub's code, whose facts the source has, differs
    assert spec.origins["heads"].startswith("--arch=vit_base_patch16_224.dino (timm")


def test_the_facts_of_a_source_serve_files_of_other_sizes():
    """A network of DINO that was trained on at another size has other positions, and its facts."""
    file = unread("dino_vitb16")
    table = dataclasses.replace(file.tensors["pos_embed"], shape=(1, 1 + 24**2, 768))
    file = dataclasses.replace(file, tensors={**file.tensors, "pos_embed": table})
    found = identifying.identify(file, identifying.published_claims("dino_vitb16"))
    spec = found.parts[found.default_part].spec
    assert spec.arch["image_size"] == 384 and spec.position_resize == "offset_0.1"


def test_an_arch_of_other_widths_is_refused():
    given = identifying.published_claims("vit_small_patch16_224.dino")
    with pytest.raises(ConversionError, match=r"width is 768 \(the tensors\), but 384 \(--arch"):
        identifying.identify(unread("dino_vitb16"), given)
