"""Small files that are damaged, or are no files: one message that names file, fault and remedy."""

import json
import os

from etils import epath
import numpy as np
import pytest

from fd_jax import checkpoint, files, model_folder
from fd_jax.errors import CheckpointError, ModelFolderError
from fd_jax.training import metric_writer
from fd_jax.training import workdir as workdirs
from tests import tiny

DAMAGED = {
    b"": "is empty",
    b'{"seed": 0, "opt': r"is not JSON \(",
    b"\xff\xfe{}": "is not UTF-8 at byte 0",
    b"[1, 2]": "holds a list, not an object in braces",
    b"null": "holds a NoneType, not an object",
    b"[" * 100_000: r"is not JSON \(",
    b"\x00" * 64: r"is not JSON \(",
}


@pytest.mark.parametrize("content", DAMAGED, ids=lambda content: repr(content[:12]))
def test_a_damaged_config_is_one_message(content, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(
        CheckpointError, match=f"config.json {DAMAGED[content]}.*damaged. Delete it if"
    ):
        workdirs.check(epath.Path(tmp_path), tiny.config(), accept=False)


def test_a_whole_config_is_read(tmp_path):
    workdirs.claim(epath.Path(tmp_path), tiny.config(), accept=False)
    workdirs.check(epath.Path(tmp_path), tiny.config(), accept=False)
    assert workdirs.read_config(epath.Path(tmp_path))["batch_size"] == 16


ROW = b'{"step": 1, "loss": 0.5}\n'


@pytest.mark.parametrize(
    "content, message",
    [
        (ROW + b"{}\n" + ROW, "line 2 has no step"),
        (ROW + b'{"step": "2"}\n', "line 2 has no step"),
        (ROW + b'{"step": 2, "loss": [1]}\n', r"line 2 has loss=\[1\], which is no number"),
        (b"\n" + ROW, "line 1 is empty"),
        (ROW + b"[3]\n", "line 2 holds a list"),
        (ROW + b'{"step": 2, "lo\n' + ROW, "line 2 is not JSON"),
        (ROW + b"\xff\xfe\n", "is not UTF-8 at byte 25"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_damaged_row_of_metrics_is_named(content, message, tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(content)
    with pytest.raises(CheckpointError, match=f"metrics.jsonl {message}.*damaged. Delete what is"):
        metric_writer.read(tmp_path)


def test_the_log_of_a_run_may_be_larger_than_a_small_file(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LARGEST", 2 * len(ROW))
    (tmp_path / "metrics.jsonl").write_bytes(3 * ROW)
    assert len(metric_writer.read(tmp_path)) == 3
    with pytest.raises(ValueError, match="has 75 bytes; expected at most 50"):
        files.read_text(epath.Path(tmp_path / "metrics.jsonl"))


@pytest.mark.parametrize("rest", [b"", b'{"step": 2, "lo', b"{", b'{"step": 2, "loss": 1.0}'])
def test_a_last_row_without_its_end_is_what_an_interrupted_run_leaves(rest, tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(ROW + rest)
    assert metric_writer.read(tmp_path) == [{"step": 1, "loss": 0.5}]
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "loss": NaN}\n')
    assert np.isnan(metric_writer.read(tmp_path)[0]["loss"])


def test_pipes_and_devices_are_refused_instead_of_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name, message in {"pipe": "is a pipe, socket or device", "folder": "is a folder"}.items():
        with pytest.raises(ValueError, match=message):
            files.read_bytes(epath.Path(tmp_path / name))
    with pytest.raises(ValueError, match="is a pipe, socket or device"):
        files.read_bytes(epath.Path("/dev/zero"))
    (tmp_path / "link").symlink_to(tmp_path / "text")
    (tmp_path / "text").write_text("ü")
    assert files.read_text(epath.Path(tmp_path / "link")) == "ü"


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    with open(tmp_path / "large", "wb") as file:
        file.truncate(files.LARGEST + 1)  # takes no space
    with pytest.raises(ValueError, match=r"has 268,435,457 bytes; expected at most 268,435,456"):
        files.read_bytes(epath.Path(tmp_path / "large"))


@pytest.fixture
def folder(tmp_path):
    tiny.save_teacher(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("name", ["model.json", "digests.json", "params/pipe", "params/d/pipe"])
def test_a_pipe_in_a_model_folder_is_named(folder, name):
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(ModelFolderError, match=f"{name} is a pipe, socket or device"):
        model_folder.load(folder)


def save_with(folder, **parts):
    """A model folder whose arrays are others than its description says."""
    spec, params = model_folder.load(folder)
    (folder / model_folder.DIGESTS).unlink(missing_ok=True)
    epath.Path(folder / "params").rmtree()
    checkpoint.save_tree(epath.Path(folder / "params"), {**params, **parts})
    return spec, params


def test_shapes_are_compared_before_anything_is_read(folder, monkeypatch):
    _, params = model_folder.load(folder)
    encoder = {**params["encoder"], "cls_token": np.zeros((1, 1000, 48), np.float32)}
    save_with(folder, encoder=encoder)

    def read(path):
        raise AssertionError("values are read before their shapes are compared")

    monkeypatch.setattr(checkpoint, "load_tree", read)
    with pytest.raises(ModelFolderError, match=r"cls_token has shape \(1, 1000, 48\), expected"):
        model_folder.load(folder)


def test_arrays_beside_the_description_are_few_and_bounded(folder, monkeypatch):
    save_with(folder, head={"kernel": np.zeros((48, 100), np.float32)})
    model_folder.load(folder)
    with monkeypatch.context() as patch:
        patch.setattr(model_folder, "MOST_VALUES", 4799)
        with pytest.raises(ModelFolderError, match=r"announces 4,800 numbers.*\(head/kernel\)"):
            model_folder.load(folder)
    save_with(folder, wings={"kernel": np.zeros((2, 2), np.float32)})
    with pytest.raises(ModelFolderError, match=r"has the parts \['wings'\]; a model folder has"):
        model_folder.load(folder)


def test_sizes_that_do_not_fit_together_name_the_description(folder):
    found = json.loads((folder / "model.json").read_text())
    found["arch"]["heads"] = 5
    (folder / "model.json").write_text(json.dumps(found))
    (folder / model_folder.DIGESTS).unlink()
    with pytest.raises(ModelFolderError, match="model.json describes no network: .*heads"):
        model_folder.load(folder)


@pytest.fixture
def started(tmp_path):
    """A workdir with a config and some rows, of a run that saves every two steps."""
    workdirs.claim(epath.Path(tmp_path), tiny.config(), accept=False)
    (tmp_path / "checkpoints").mkdir()
    return tmp_path


def rows(workdir, last):
    lines = [json.dumps({"step": step, "loss": 0.5}) for step in range(1, last + 1)]
    (workdir / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(started):
    rows(started, 4)
    workdirs.check_checkpoints(epath.Path(started))
    workdirs.check_checkpoints(epath.Path(started) / "new")


def test_checkpoints_that_were_taken_away_are_noticed(started):
    (started / "checkpoints").rmdir()
    with pytest.raises(CheckpointError, match="no checkpoint, although the run had that folder"):
        workdirs.check_checkpoints(epath.Path(started))
    (started / "checkpoints").mkdir()
    rows(started, 5)
    with pytest.raises(CheckpointError, match="although the run has reached step 5. Put the fold"):
        workdirs.check_checkpoints(epath.Path(started))
    rows(started, 1)
    (started / "model").mkdir()
    with pytest.raises(CheckpointError, match="although the run has exported its model"):
        workdirs.check_checkpoints(epath.Path(started))
    (started / "checkpoints" / "2").mkdir()
    workdirs.check_checkpoints(epath.Path(started))
