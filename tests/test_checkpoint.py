"""Checkpoints are restored as what they are, and nothing is cast from one kind to another."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fd_jax.checkpoint import Checkpoints
from fd_jax.errors import CheckpointError, DamagedCheckpointError, StorageError
from tests import ports

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture
def saved(tmp_path):
    checkpoints = Checkpoints(epath.Path(tmp_path / "checkpoints"), keep=1, keep_every=None)
    checkpoints.save(3, {"weight": jnp.arange(4.0) / 3, "count": jnp.int32(70000)}, {"step": 3})
    checkpoints.wait()
    yield checkpoints
    checkpoints.close()


def like(**dtypes):
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    sharding = jax.NamedSharding(mesh, jax.P())
    shapes = {"weight": (4,), "count": ()}
    return {
        name: jax.ShapeDtypeStruct(shapes[name], dtype, sharding=sharding)
        for name, dtype in dtypes.items()
    }


def test_arrays_come_back_as_they_were(saved):
    state, record = saved.restore(3, like(weight=jnp.float32, count=jnp.int32))
    np.testing.assert_array_equal(state["weight"], np.arange(4, dtype=np.float32) / 3)
    assert state["count"] == 70000 and record == {"step": 3}


@pytest.mark.parametrize(
    "dtypes, line",
    [
        ({"weight": jnp.int32, "count": jnp.int32}, r"weight: 'float \[4\]' -> 'int32 \[4\]'"),
        ({"weight": jnp.float32, "count": jnp.int8}, r"count: 'int32 \[\]' -> 'int8 \[\]'"),
    ],
    ids=["floats into integers", "integers into smaller ones"],
)
def test_another_kind_of_numbers_is_refused(saved, dtypes, line):
    with pytest.raises(CheckpointError, match=line):
        saved.restore(3, like(**dtypes))


def test_floats_of_another_width_are_restored(saved):
    state, _ = saved.restore(3, like(weight=jnp.bfloat16, count=jnp.int32))
    assert state["weight"].dtype == jnp.bfloat16


LIKE = {"weight": jnp.float32, "count": jnp.int32}


@pytest.fixture
def stranger(tmp_path):
    """A user who may not look into the folder of the checkpoints."""
    folder, is_root = tmp_path / "checkpoints", os.geteuid() == 0
    mode = folder.stat().st_mode
    folder.chmod(0)
    if is_root:
        os.seteuid(65534)
    yield
    if is_root:
        os.seteuid(0)
    folder.chmod(mode)


def test_a_checkpoint_that_the_system_does_not_let_us_read_is_not_damaged(saved, stranger):
    with pytest.raises(StorageError, match="Permission denied; let the user of this process read"):
        saved.restore(3, like(**LIKE))


@pytest.mark.parametrize("name, raised", [("array_metadata", "Attribute"), ("param_name", "Key")])
def test_metadata_that_orbax_stumbles_over_is_damage(saved, tmp_path, name, raised):
    path = tmp_path / "checkpoints" / "3" / "state" / "array_metadatas" / "process_0"
    path.write_text(path.read_text().replace(f'"{name}"', f'"{name[:-1]}"', 1))
    with pytest.raises(DamagedCheckpointError, match=f"checkpoints/3 cannot be read: {raised}Err"):
        saved.restore(3, like(**LIKE))


def test_what_says_nothing_about_files_is_no_damage(saved):
    for error in (MemoryError(), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED")):
        with pytest.raises(type(error)):
            saved._refuse_other_reasons(error)
    saved._refuse_other_reasons(ValueError("a wrong checksum"))


def test_a_missing_file_is_damage(saved, tmp_path):
    shutil.rmtree(tmp_path / "checkpoints" / "3" / "state")
    with pytest.raises(DamagedCheckpointError, match="cannot be read"):
        saved.restore(3, like(**LIKE))


def test_files_that_vanish_while_they_are_written_are_an_error_of_the_storage(saved):
    message = "No ArrayMetadata found for process_index=0 in the checkpoint directory"
    with pytest.raises(StorageError, match="its files were moved or deleted meanwhile"):
        with saved._writing():
            raise ValueError(message)
    with pytest.raises(ValueError, match="shapes"), saved._writing():
        raise ValueError("shapes differ")


def test_a_bug_while_a_checkpoint_is_written_keeps_its_traceback(tmp_path):
    checkpoints = Checkpoints(epath.Path(tmp_path / "checkpoints"), keep=1, keep_every=None)
    used = jnp.ones(3)
    used.delete()
    with pytest.raises(RuntimeError, match="deleted"):
        checkpoints.save(3, {"weight": used}, {}, known={"weight": 0})


READ = """
import pathlib
import sys

from etils import epath
import jax

from fd_jax.checkpoint import Checkpoints
from fd_jax.errors import DamagedCheckpointError
from tests.test_checkpoint import LIKE, like

process, port, answers, *folders = sys.argv[1:]
jax.distributed.initialize(f"localhost:{port}", 2, int(process))
checkpoints = Checkpoints(epath.Path(folders[int(process)]), keep=1, keep_every=None)
lines = []
for step in checkpoints.steps():
    try:
        checkpoints.restore(step, like(**LIKE))
    except DamagedCheckpointError as error:
        lines.append(f"{step} {str(error).splitlines()[0]}")
    else:
        lines.append(f"{step} whole")
pathlib.Path(answers, process).write_text("\\n".join(lines))
"""


@pytest.mark.slow
def test_all_processes_agree_on_what_is_damaged(tmp_path):
    """A file that one of them reads differently, as from a cache of a file server.

    The processes write their answers to files, since Gloo writes to stdout from threads of its own.
    """
    one, other = (tmp_path / name / "checkpoints" for name in ("one", "other"))
    with Checkpoints(epath.Path(one), keep=2, keep_every=None) as checkpoints:
        for step in (3, 4):
            checkpoints.save(step, {"weight": jnp.ones(4), "count": jnp.int32(7)}, {"step": step})
    shutil.copytree(one, other)
    record = next((other / "4" / "record").iterdir())
    record.write_text(json.dumps({**json.loads(record.read_text()), "step": 5}))
    port = ports.free()
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                READ,
                str(process),
                str(port),
                str(tmp_path),
                str(one),
                str(other),
            ],
            cwd=ROOT,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for process in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    lines = [(tmp_path / str(process)).read_text().splitlines() for process in range(2)]
    assert lines[0] == ["3 whole", f"4 checkpoint {one / '4'} cannot be read by another process"]
    assert lines[1][0] == "3 whole" and "its record is not what was written" in lines[1][1]
