"""The readers: equal to torch's and numpy's own, and one clear error for everything else."""

import bz2
import collections
import gzip
import io
import json
import lzma
import os
import pathlib
import pickle
import struct
import subprocess
import sys
import tarfile
import zipfile

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
import torch

from fd_jax.convert.containers import safetensors_io
from fd_jax.convert.containers.opening import open_container
from fd_jax.errors import ConversionError
from tests.convert import synthetic

TORCH_SOURCES = (
    "dino_vitb16_full_checkpoint",
    "mae_vit_base_full",
    "fd_official_distilled_clip_vit_b",
    "openai_clip_vit_b16",
)


def assert_equals_torch(container, expected):
    """Same names, shapes, dtypes and bits as a flat dictionary of torch tensors."""
    assert set(container.tensors) == set(expected)
    for name, tensor in container.tensors.items():
        want = expected[name].detach()
        assert tensor.shape == tuple(want.shape), name
        assert f"torch.{tensor.dtype}" == str(want.dtype), name
        np.testing.assert_array_equal(tensor.load(), want.numpy(), err_msg=name)


def flattened(tree, prefix=""):
    """Tensors of nested dictionaries by "a/b" name."""
    out = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            out |= flattened(value, f"{prefix}{key}/")
        elif isinstance(value, torch.Tensor):
            out[f"{prefix}{key}"] = value
    return out


@pytest.mark.parametrize("name", TORCH_SOURCES)
@pytest.mark.parametrize("legacy", [False, True])
def test_torch_files_equal_torch_load(name, legacy, tmp_path):
    given = synthetic.structure(name)
    trees = synthetic.values(given)
    if given.container == "torchscript":
        path = synthetic.write(given, trees, tmp_path)
        expected = dict(torch.jit.load(path).state_dict())
        kind = "TorchScript archive"
    else:
        path = synthetic.write_torch(
            given, trees, tmp_path / "f.pth", _use_new_zipfile_serialization=not legacy
        )
        # torch needs to be told about classes that are not installed; fd_jax does not.
        aliases = [
            (collections.OrderedDict, "yacs.config.CfgNode"),
            (collections.OrderedDict, "argparse.Namespace"),
        ]
        with torch.serialization.safe_globals(aliases):
            expected = flattened(torch.load(path, weights_only=True))
        kind = "torch legacy" if legacy else "torch zip"
    container = open_container(path)
    assert container.kind == kind
    assert_equals_torch(container, expected)


def test_entries_beside_the_weights_are_named_and_not_loaded(tmp_path):
    given = synthetic.structure("fd_official_distilled_clip_vit_b")
    container = open_container(synthetic.write(given, synthetic.values(given), tmp_path))
    assert container.entries["config"] == "yacs.config.CfgNode"
    assert container.entries["epoch"] == "int 299"
    assert container.entries["scaler/scale"] == "float 65536.0"
    assert "yacs" not in sys.modules


def test_tensors_that_are_views_or_share_a_storage_are_read_right(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    tree = {
        "turned": base.T,
        "part": base[1:3, ::2],
        "empty": torch.zeros(0, 3),
        "half": base.bfloat16(),
        "parameter": torch.nn.Parameter(base[0]),
        "expanded": torch.ones(1).expand(5, 7),
    }
    torch.save(tree, tmp_path / "v.pt")
    container = open_container(tmp_path / "v.pt")
    for name, want in tree.items():
        ours = container.tensors[name].load()
        assert ours.shape == tuple(want.shape)
        np.testing.assert_array_equal(ours.astype(np.float32), want.detach().float().numpy())


def test_a_file_saved_without_checksums_is_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"w": torch.ones(3)}, tmp_path / "f.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    np.testing.assert_array_equal(open_container(tmp_path / "f.pt").tensors["w"].load(), 1)


@pytest.mark.parametrize("compressed", [False, True])
def test_npz_equals_numpy(compressed, tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        "params/img/kernel": rng.standard_normal((3, 4)).astype(np.float32),
        "fortran": np.asfortranarray(rng.standard_normal((3, 4))),
        "scalar": np.array(7),
        "bf16": rng.standard_normal(5).astype(ml_dtypes.bfloat16),
    }
    (np.savez_compressed if compressed else np.savez)(tmp_path / "f.npz", **arrays)
    tensors = open_container(tmp_path / "f.npz").tensors
    assert tensors["bf16"].dtype == "bfloat16"
    for name, want in arrays.items():
        ours = tensors[name].load()
        assert ours.dtype == want.dtype and ours.shape == want.shape
        np.testing.assert_array_equal(ours, want)


def test_safetensors_equal_the_reference_implementation(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        "b": rng.standard_normal((3, 4)).astype(np.float16),
        "a": rng.integers(0, 9, 5),
        "none": np.zeros((0, 2), np.float32),
        "scalar": np.array(1.5, np.float32),
    }
    save_file(arrays, tmp_path / "theirs.safetensors", {"format": "pt"})
    safetensors_io.write(tmp_path / "ours.safetensors", arrays, {"format": "pt"})
    from safetensors.numpy import load_file

    back = load_file(tmp_path / "ours.safetensors")
    for name, want in arrays.items():
        np.testing.assert_array_equal(back[name], want)
        ours = open_container(tmp_path / "theirs.safetensors").tensors[name]
        assert ours.dtype == want.dtype.name
        np.testing.assert_array_equal(ours.load(), want)


def test_sharded_folders_are_read_and_wrong_indexes_refused(tmp_path):
    save_file({"a": np.ones(2, np.float32)}, tmp_path / "model-1.safetensors")
    save_file({"b": np.zeros(3, np.float32)}, tmp_path / "model-2.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    index_file = tmp_path / "model.safetensors.index.json"
    index_file.write_text(json.dumps(index))
    container = open_container(tmp_path)
    assert list(container.tensors) == list(open_container(index_file).tensors) == ["a", "b"]
    assert container.kind == "safetensors in 2 shards"
    assert [t.shape for t in container.tensors.values()] == [(2,), (3,)]
    index["weight_map"]["c"] = "../../secret.safetensors"
    index_file.write_text(json.dumps(index))
    with pytest.raises(ConversionError, match="not in the folder"):
        open_container(tmp_path)
    index["weight_map"]["c"] = "model-2.safetensors"
    index_file.write_text(json.dumps(index))
    with pytest.raises(ConversionError, match=r"disagree about \['c'\]"):
        open_container(tmp_path)


class Evil:
    """Its pickle runs a command when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


class Instance:
    """A class of the user's own."""


def malicious(tmp_path):
    """Pickles that would run code or import something, and the name each must be refused by."""
    mark = tmp_path / "ran"
    yield Evil(mark), "posix.system"
    yield Instance(), f"{Instance.__module__}.Instance"
    yield torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear"
    yield pathlib.PurePath, None  # named, never called: harmless


@pytest.mark.parametrize("legacy", [False, True])
def test_pickles_that_run_code_are_refused_by_name_and_nothing_runs(legacy, tmp_path):
    for value, name in malicious(tmp_path):
        path = tmp_path / "evil.pth"
        tree = {"model": {"w": torch.ones(2)}, "extra": value}
        torch.save(tree, path, _use_new_zipfile_serialization=not legacy)
        if name is None:
            assert open_container(path).entries["extra"] == "pathlib.PurePath"
            continue
        with pytest.raises(ConversionError, match=f"refused: its pickle names {name}"):
            open_container(path)
    assert not (tmp_path / "ran").exists()
    # The test would see it: torch, told to trust the file, runs the command.
    torch.save(Evil(tmp_path / "ran"), path)
    torch.load(path, weights_only=False)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("code", "what"),
    [
        (b"cposix\nsystem\n(S'touch ran'\ntR.", "posix.system"),
        (b"(S'touch ran'\niposix\nsystem\n.", "opcode INST"),
        (b"(cposix\nsystem\nS'touch ran'\no.", "opcode OBJ"),
        (b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x09touch ran\x85R.", "posix.system"),
        (b"\x80\x02cbuiltins\neval\nX\x03\x00\x00\x001+1\x85\x81.", "builtins.eval"),
        (b"\x80\x02cbuiltins\ngetattr\n)}\x92.", "opcode NEWOBJ_EX"),
        (b"\x80\x02ctorch.storage\n_load_from_bytes\nC\x01x\x85R.", "_load_from_bytes"),
        (b"\x80\x02\x82\x01.", "opcode EXT1"),
        (b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x7f.", "damaged"),
        (b"\x80\x02})" + b"2\x86" * 60 + b"K\x01s.", "dictionary key"),  # exponential to hash
        (b"\x80\x02X\x01\x00\x00\x00x]b.", "attributes set on a str"),
    ],
)
def test_no_pickle_opcode_calls_a_function(code, what, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "f.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("f/data.pkl", code)
        archive.writestr("f/version", "3")
    with pytest.raises(ConversionError, match=what):
        open_container(path)
    assert not (tmp_path / "ran").exists()


def test_references_that_expand_without_bound_are_refused(tmp_path):
    level = {"w": torch.ones(1)}
    for _ in range(30):
        level = {"a": level, "b": level}  # 2**30 paths in a kilobyte
    torch.save(level, tmp_path / "bomb.pt")
    with pytest.raises(ConversionError, match="nested without bound"):
        open_container(tmp_path / "bomb.pt")


def torch_bytes(tree):
    stream = io.BytesIO()
    torch.save(tree, stream)
    return stream.getvalue()


def numpy_bytes(**arrays):
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


def safetensors_bytes(header, data=b""):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


RECORD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
BAD_FILES = {
    "empty": (b"", "empty"),
    "text": (b"hello world, this is text", "not a weights file"),
    "zip of text": (None, "neither data.pkl"),
    "truncated torch": (torch_bytes({"w": torch.ones(9)})[:-100], "zip directory"),
    "truncated npz": (numpy_bytes(a=np.ones(3))[:-40], "zip directory"),
    "object npz": (numpy_bytes(a=np.array([{}], object)), "dtype object"),
    "header past the end": (struct.pack("<Q", 10**7) + b"{", "bytes 8 to"),
    "header not JSON": (struct.pack("<Q", 4) + b"{abc", "not valid JSON"),
    "header twice": (struct.pack("<Q", 13) + b'{"a":1,"a":2}', "stands twice"),
    "overlap": (
        safetensors_bytes({"a": RECORD, "b": RECORD}, bytes(8)),
        "a gap or an overlap",
    ),
    "size": (safetensors_bytes({"a": {**RECORD, "shape": [3]}}, bytes(8)), "needs 12 bytes"),
    "negative": (safetensors_bytes({"a": {**RECORD, "shape": [-2]}}, bytes(8)), "has the shape"),
    "huge": (
        safetensors_bytes({"a": {**RECORD, "shape": [1 << 40, 1 << 40]}}, bytes(8)),
        "needs 4835703278458516698824704 bytes",
    ),
    "float8": (safetensors_bytes({"a": {**RECORD, "dtype": "F8_E4M3"}}, bytes(8)), "F8_E4M3"),
    "trailing": (safetensors_bytes({"a": RECORD}, bytes(9)), "the file has"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_give_one_error_that_names_them(case, tmp_path):
    data, message = BAD_FILES[case]
    path = tmp_path / "weights.bin"
    if data is None:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("readme.txt", "x")
    else:
        path.write_bytes(data)
    with pytest.raises(ConversionError, match=message) as caught:
        open_container(path)
    assert str(path) in str(caught.value)


def tar_bytes():
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("weights.pth"))
    return out.getvalue()


FOREIGN = {
    "lfs": (b"version https://git-lfs.github.com/spec/v1\n", "run `git lfs pull`"),
    "gzip": (gzip.compress(b"x"), "compressed with gzip; unpack it first: gunzip"),
    "bzip2": (bz2.compress(b"x"), "compressed with bzip2"),
    "xz": (lzma.compress(b"x"), "compressed with xz"),
    "tar": (tar_bytes(), "a tar archive; unpack it first"),
    "web page": (b"<!DOCTYPE html><title>404</title>", "the download failed; fetch the file"),
    "json": (b'{"error": "gated"}', "JSON text, not weights"),
    "keras": (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    "gguf": (b"GGUF\x03\0\0\0", "a GGUF file"),
    "array": (b"\x93NUMPY\x01\0", "a single numpy array"),
    "pickle": (pickle.dumps({"w": 1}), "a Python pickle that torch.save did not write"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_files_of_other_kinds_are_named_with_what_to_do(case, tmp_path):
    data, message = FOREIGN[case]
    path = tmp_path / "weights.bin"
    path.write_bytes(data)
    with pytest.raises(ConversionError, match=message) as caught:
        open_container(path)
    assert str(path) in str(caught.value)


def test_a_folder_says_what_to_name_instead(tmp_path):
    (tmp_path / "a.pth").write_bytes(b"")
    with pytest.raises(ConversionError, match="name one of the files in it: a.pth$"):
        open_container(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.json").write_text("{}")
    with pytest.raises(ConversionError, match=f"model folder of this run is {tmp_path}/model"):
        open_container(tmp_path)
    with pytest.raises(ConversionError, match="it is a model folder already"):
        open_container(tmp_path / "model")


def test_devices_and_impossible_names_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConversionError, match="a device or pipe"):
        open_container(tmp_path / "pipe")
    for name in ("x" * 5000, "a\0b"):
        with pytest.raises(ConversionError, match="no such file or folder"):
            open_container(tmp_path / name)


def test_a_hugging_face_cache_is_read_at_its_newest_version(tmp_path):
    for version in ("old", "new"):
        folder = tmp_path / "snapshots" / version
        folder.mkdir(parents=True)
        save_file({version: np.ones(2)}, folder / "model.safetensors")
    (tmp_path / "refs").mkdir()
    (tmp_path / "refs" / "main").write_text("new")
    assert list(open_container(tmp_path).tensors) == ["new"]


def test_missing_files_and_folders_without_weights_are_refused(tmp_path):
    with pytest.raises(ConversionError, match="no such file or folder"):
        open_container(tmp_path / "nothing.pt")
    with pytest.raises(ConversionError, match="a folder without model.safetensors"):
        open_container(tmp_path)
    (tmp_path / "not.onnx").write_bytes(b"\x0a\xff\xff\xff\xff\xff\xff\xff")
    with pytest.raises(ConversionError, match="not an ONNX graph"):
        open_container(tmp_path / "not.onnx")


def test_damage_inside_a_tensor_is_found_by_its_checksum(tmp_path):
    path = tmp_path / "f.pt"
    torch.save({"w": torch.ones(1000)}, path)
    data = bytearray(path.read_bytes())
    data[data.index(np.ones(8, np.float32).tobytes()) + 40] ^= 1
    path.write_bytes(data)
    tensor = open_container(path).tensors["w"]
    with pytest.raises(ConversionError, match="does not match its checksum"):
        tensor.load()


def test_a_tensor_that_reaches_past_its_storage_is_refused(tmp_path):
    path = tmp_path / "f.pt"
    torch.save({"w": torch.ones(4, 4)}, path)
    data = path.read_bytes()
    shape = b"K\x04K\x04\x86"  # (4, 4)
    path.write_bytes(
        data.replace(shape, b"K\x04K\x05\x86", 1).replace(b"PK\x01\x02", b"PK\x01\x02")
    )
    _without_checksums(path)
    with pytest.raises(ConversionError, match="reaches item"):
        open_container(path).tensors["w"].load()


def _without_checksums(path):
    """Clears the CRC fields of a zip directory, as writers that skip them do."""
    data = bytearray(path.read_bytes())
    at = data.find(b"PK\x01\x02")
    while at >= 0:
        data[at + 16 : at + 20] = bytes(4)
        at = data.find(b"PK\x01\x02", at + 4)
    path.write_bytes(data)


def test_reading_needs_no_torch_onnx_or_tensorflow(tmp_path):
    """Torch files included: `torch` is for the tests and for writing its files."""
    torch.save({"w": torch.ones(2)}, tmp_path / "f.pt")
    np.savez(tmp_path / "f.npz", w=np.ones(2))
    save_file({"w": np.ones(2)}, tmp_path / "f.safetensors")
    code = (
        "import sys\n"
        "from fd_jax.convert import cli\n"
        "from fd_jax.convert.containers import opening\n"
        f"for end in ('pt', 'npz', 'safetensors'):\n"
        f"    opening.open_container('{tmp_path}/f.' + end).tensors['w'].load()\n"
        "heavy = {'torch', 'onnx', 'tensorflow', 'cv2', 'safetensors', 'transformers', 'grain',\n"
        "         'tensorflow_datasets', 'clu', 'matplotlib'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])  # the latter in CPython 3.13
@pytest.mark.parametrize("legacy", [False, True])
def test_harmless_values_beside_the_weights_do_not_stop_a_file(
    legacy, module, tmp_path, monkeypatch
):
    """torch's own safe mode refuses most of these; none is needed, and none is made."""
    monkeypatch.setitem(sys.modules, module, pathlib)
    monkeypatch.setattr(pathlib.PurePosixPath, "__module__", module)
    tree = {
        "w": torch.ones(2),
        "accuracy": np.float64(84.9),
        "array": np.ones(3),
        "path": pathlib.PurePosixPath("/data"),
        "counts": collections.defaultdict(int, {"a": 1}),
        "ordered": collections.OrderedDict(a=1),
        "set": {1, 2},
        "size": torch.Size([2, 3]),
        "device": torch.device("cpu"),
        "dtype": torch.float16,
        "complex": 2**100,
    }
    torch.save(tree, tmp_path / "f.pt", _use_new_zipfile_serialization=not legacy)
    container = open_container(tmp_path / "f.pt")
    assert list(container.tensors) == ["w"]
    assert container.entries["accuracy"].endswith("multiarray.scalar")
    assert container.entries["path"] == "pathlib.PurePosixPath"
    assert container.entries["complex"] == "int of many digits"
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "f.pt", weights_only=True)
