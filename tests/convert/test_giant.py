"""A network of 7 billion parameters, of which only names and shapes are read."""

import json
import struct

import pytest

from fd_jax.convert import cli, identifying, importing
from fd_jax.convert.containers import tensors
from fd_jax.convert.containers.opening import open_container
from fd_jax.errors import ConversionError

WIDTH, DEPTH, HIDDEN = 4096, 40, 8192
CONFIG = {
    "model_type": "dinov3_vit",
    "architectures": ["DINOv3ViTModel"],
    "hidden_size": WIDTH,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 32,
    "intermediate_size": HIDDEN,
    "num_register_tokens": 4,
    "use_gated_mlp": True,
    "hidden_act": "silu",
    "query_bias": False,
    "key_bias": False,
    "value_bias": False,
    "rope_theta": 100.0,
    "image_size": 224,
    "patch_size": 16,
}


def shapes():
    """Of facebook/dinov3-vit7b16-pretrain-lvd1689m, as transformers' class has them."""
    found = {
        "embeddings.cls_token": (1, 1, WIDTH),
        "embeddings.register_tokens": (1, 4, WIDTH),
        "embeddings.mask_token": (1, 1, WIDTH),
        "embeddings.patch_embeddings.weight": (WIDTH, 3, 16, 16),
        "embeddings.patch_embeddings.bias": (WIDTH,),
        "norm.weight": (WIDTH,),
        "norm.bias": (WIDTH,),
    }
    for i in range(DEPTH):
        layer = f"layer.{i}"
        for name in ("norm1", "norm2"):
            found |= {f"{layer}.{name}.{leaf}": (WIDTH,) for leaf in ("weight", "bias")}
        found |= {f"{layer}.layer_scale{n}.lambda1": (WIDTH,) for n in (1, 2)}
        found |= {f"{layer}.attention.{p}_proj.weight": (WIDTH, WIDTH) for p in "qkvo"}
        found[f"{layer}.attention.o_proj.bias"] = (WIDTH,)
        for name, size in {"gate": (HIDDEN, WIDTH), "up": (HIDDEN, WIDTH)}.items():
            found |= {f"{layer}.mlp.{name}_proj.weight": size}
            found |= {f"{layer}.mlp.{name}_proj.bias": size[:1]}
        found |= {f"{layer}.mlp.down_proj.weight": (WIDTH, HIDDEN)}
        found |= {f"{layer}.mlp.down_proj.bias": (WIDTH,)}
    return found


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A repository whose file is 13 GB long and takes no room: it is a hole after the header."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes().items():
        size = 2
        for side in shape:
            size *= side
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with open(tmp_path / "model.safetensors", "wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + end)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    statistics = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(statistics))

    def read(*_):
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(tensors.MappedFile, "array", read)
    return tmp_path


def test_a_giant_is_recognised_by_names_and_shapes_alone(folder):
    assert identifying.described(open_container(folder)) == ["hf_dinov3: fits completely"]


@pytest.mark.slow
def test_inspect_describes_a_giant_without_reading_a_tensor(folder, capsys):
    assert cli.main(["inspect", f"--input={folder}"]) == 0
    out = capsys.readouterr().out
    assert "hf_dinov3: fits completely" in out
    assert "bfloat16: 687 tensors, 6,716,035,072 numbers, 13,432,070,144 bytes" in out


def test_what_no_tensor_tells_of_a_giant_is_asked_for_before_anything_is_read(folder):
    (folder / "config.json").unlink()
    with pytest.raises(ConversionError, match="DINOv3ViTModel, 4096 x 40, patch 16. No tensor"):
        importing.read("auto", folder)
