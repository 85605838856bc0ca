"""Flipped bits in stored weights: none is silent. Digests against sums in plain Python."""

import json
import shutil

from etils import epath
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from fd_jax import digests, model_folder, sharding
from fd_jax.checkpoint import Checkpoints
from fd_jax.errors import DamagedCheckpointError, ModelFolderError
from tests import tiny
from tests.models.arrays import rand

FLIPS = 60


@pytest.mark.parametrize(
    "dtype", [np.float32, ml_dtypes.bfloat16, np.float16, np.int8, np.int32, bool], ids=str
)
def test_a_digest_is_the_sum_of_the_words(dtype):
    array = (100 * rand(3, 5, 7)).astype(dtype)
    width = array.dtype.itemsize
    content = array.tobytes()
    words = [content[i : i + width] for i in range(0, len(content), width)]
    want = sum(int.from_bytes(word, "little") for word in words) % 2**32
    assert digests.of_array(array) == want
    assert digests.of_array(array.transpose(2, 0, 1)) == want
    assert digests.of_array(array[:0]) == 0


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float64, np.int32], ids=str)
def test_every_flipped_bit_changes_it(dtype):
    array = (100 * rand(4)).astype(dtype)
    before = digests.of_array(array)
    for bit in range(8 * array.nbytes):
        flipped = bytearray(array.tobytes())
        flipped[bit // 8] ^= 1 << bit % 8
        assert digests.of_array(np.frombuffer(bytes(flipped), dtype)) != before


def test_it_does_not_depend_on_devices():
    host = {"a": rand(8, 16), "b": {"c": rand(16, seed=1)}}
    mesh = sharding.make_mesh(data=2, fsdp=4)
    specs = {"a": jax.P("fsdp", None), "b": {"c": jax.P()}}  # one in parts, one in copies
    placed = jax.tree.map(
        lambda array, spec: jax.device_put(array, jax.NamedSharding(mesh, spec)), host, specs
    )
    assert digests.of_tree(placed) == digests.of_own(host)
    assert set(digests.of_own(host)) == {"a", "b/c"}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=str)
def test_arrays_that_are_not_finite_are_named(value, dtype):
    mesh = sharding.make_mesh(data=2, fsdp=4)
    large = np.full((8, 16), 1e38, dtype)  # finite, but not its sum in its own dtype
    bad = large.copy()
    bad[5, 3] = value
    placed = jax.device_put(bad, jax.NamedSharding(mesh, jax.P("fsdp", None)))
    tree = {"a": large, "b": {"c": placed, "d": bad}, "count": np.int32(3), "empty": large[:0]}
    assert digests.not_finite(tree) == ["b/c", "b/d"]


def flip(file, rng):
    """Flips one bit of a file; returns what undoes it."""
    content = bytearray(file.read_bytes())
    position, bit = int(rng.integers(len(content))), 1 << int(rng.integers(8))
    content[position] ^= bit
    file.write_bytes(bytes(content))
    content[position] ^= bit
    return lambda: file.write_bytes(bytes(content))


def outcomes(folder, read, error):
    """How many of FLIPS bits in all files of a folder are refused, change nothing, are silent."""
    rng = np.random.default_rng(0)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    sizes = np.array([file.stat().st_size for file in files], float)
    counts = {"refused": 0, "harmless": 0, "silent": 0}
    whole = read()
    for file in rng.choice(np.array(files, object), FLIPS, p=sizes / sizes.sum()):
        undo = flip(file, rng)
        try:
            same = jax.tree.map(np.array_equal, read(), whole)
            counts["harmless" if all(jax.tree.leaves(same)) else "silent"] += 1
        except error:
            counts["refused"] += 1
        undo()
    return counts


@pytest.mark.slow
def test_no_flipped_bit_in_a_model_folder_is_silent(tmp_path):
    folder = tmp_path / "model"
    tiny.save_teacher(folder)

    def read():
        spec, params = model_folder.load(folder)
        return {"params": params, "spec": np.frombuffer(spec.to_json().encode(), np.uint8)}

    counts = outcomes(folder, read, ModelFolderError)
    assert counts["silent"] == 0 and counts["refused"] > FLIPS / 2
    (folder / model_folder.DIGESTS).unlink()  # control: a folder of an earlier version
    assert outcomes(folder, read, ModelFolderError)["silent"] > FLIPS / 3


def test_a_changed_description_is_refused_until_the_digests_are_deleted(tmp_path):
    folder = tmp_path / "model"
    tiny.save_teacher(folder)
    description = json.loads((folder / "model.json").read_text())
    description["mean"].reverse()  # the same characters at other places
    (folder / "model.json").write_text(json.dumps(description, indent=2) + "\n")
    with pytest.raises(ModelFolderError, match="not what was written.*delete .*digests.json"):
        model_folder.load_spec(folder)
    (folder / model_folder.DIGESTS).unlink()
    assert list(model_folder.load_spec(folder).mean) == description["mean"]


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b'{"arrays": 3}'], ids=str)
def test_damaged_digests_are_one_message(tmp_path, content):
    tiny.save_teacher(tmp_path / "model")
    (tmp_path / "model" / model_folder.DIGESTS).write_bytes(content)
    with pytest.raises(ModelFolderError, match="digests.json is damaged; delete it"):
        model_folder.load(tmp_path / "model")


@pytest.fixture
def saved(tmp_path):
    state = {"params": {"kernel": jnp.asarray(rand(64, 96))}, "count": jnp.int32(70000)}
    with_checkpoint = Checkpoints(epath.Path(tmp_path / "checkpoints"), keep=2, keep_every=None)
    with_checkpoint.save(3, state, {"step": 3})
    with_checkpoint.wait()
    yield tmp_path / "checkpoints" / "3", with_checkpoint, state
    with_checkpoint.close()


def test_no_flipped_bit_in_the_state_of_a_checkpoint_is_silent(saved):
    folder, checkpoints, state = saved
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    counts = outcomes(folder / "state", lambda: checkpoints.restore(3, like)[0], Exception)
    assert counts["silent"] == 0 and counts["refused"] > FLIPS / 2


def test_a_damaged_array_of_a_checkpoint_is_named(saved):
    folder, checkpoints, state = saved
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    largest = max((folder / "state").rglob("*"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    shutil.copy(largest, folder.parent.parent / "whole")
    largest.write_bytes(bytes(content))
    with pytest.raises(DamagedCheckpointError, match=r"params/kernel.*\n.*--fall_back"):
        checkpoints.restore(3, like)
    shutil.copy(folder.parent.parent / "whole", largest)
    assert checkpoints.restore(3, like)[1] == {"step": 3}
