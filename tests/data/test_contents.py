"""Data that change under a run are noticed, and what changed is said."""

import json
import pathlib
import shutil

from etils import epath
import numpy as np
import PIL.Image
import pytest

from fd_jax.data import contents, datasets
from fd_jax.errors import CheckpointError, DataError
from fd_jax.training import workdir as workdirs


@pytest.fixture
def folder(tmp_path):
    for name in ("cats/a", "cats/b", "dogs/a"):
        path = tmp_path / "pictures" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(path)
    return tmp_path / "pictures"


def found(folder):
    dataset = datasets.FolderDataset(folder)
    return contents.of_files(dataset.files(), len(dataset))


def test_a_folder_is_described_by_the_names_and_sizes_below_it(folder, tmp_path):
    size = (folder / "cats" / "a.png").stat().st_size
    described = found(folder)
    assert (described["examples"], described["files"]) == (3, 3)
    assert described["sizes"] == {"cats/a.png": size, "cats/b.png": size, "dogs/a.png": size}
    shutil.copytree(folder, tmp_path / "elsewhere")
    assert found(tmp_path / "elsewhere") == described


@pytest.mark.parametrize(
    "change, lines",
    [
        (
            lambda f: (f / "cats/a.png").unlink(),
            ["examples: 3 -> 2", "files: 3 -> 2", "1 removed: cats/a.png"],
        ),
        (
            lambda f: shutil.copy(f / "cats/a.png", f / "dogs/z.png"),
            ["examples: 3 -> 4", "files: 3 -> 4", "1 added: dogs/z.png"],
        ),
        (
            lambda f: (f / "cats/a.png").rename(f / "dogs/b.png"),
            ["1 added: dogs/b.png", "1 removed: cats/a.png"],
        ),
        (lambda f: (f / "cats/b.png").write_bytes(b"other"), ["1 of another size: cats/b.png"]),
    ],
    ids=["removed", "added", "moved", "changed"],
)
def test_a_change_is_named(folder, change, lines):
    before = json.loads(json.dumps(found(folder)))
    assert contents.changes(before, found(folder)) == []
    change(folder)
    assert contents.changes(before, found(folder)) == lines


def test_a_large_split_keeps_no_names(folder, monkeypatch):
    monkeypatch.setattr(contents, "LISTED", 2)
    before = found(folder)
    assert before["sizes"] is None
    (folder / "cats/a.png").rename(folder / "dogs/b.png")
    assert contents.changes(before, found(folder)) == [
        "the same number of files, with other names or sizes"
    ]


def test_a_file_without_a_size_is_refused(folder):
    dataset = datasets.FolderDataset(folder)
    (folder / "cats/b.png").unlink()
    with pytest.raises(DataError, match="cats/b.png: No such file or directory.*make it readable"):
        contents.of_files(dataset.files(), len(dataset))


def test_a_prepared_dataset_is_described_by_its_shards(embedded_data):
    whole = datasets.TfdsDataset("digits", "train", data_dir=embedded_data)
    part = datasets.TfdsDataset("digits", "train[:100]", data_dir=embedded_data)
    for dataset, examples in ((whole, 1442), (part, 100)):
        (name, path), *_ = dataset.files()
        assert pathlib.Path(path).is_file() and name.startswith("digits-train.array_record")
        assert contents.of_files(dataset.files(), len(dataset))["examples"] == examples
    ours, theirs = (contents.of_files(d.files(), len(d)) for d in (whole, part))
    assert contents.changes(theirs, ours)[0] == "examples: 100 -> 1442"


@pytest.mark.parametrize(
    "changed,what", [(["eval"], "figures"), (["train"], "batches"), (["eval", "train"], "batches")]
)
def test_a_refusal_says_what_would_differ(folder, tmp_path, changed, what):
    workdir, before = epath.Path(tmp_path), found(folder)
    workdirs.claim_data(workdir, {"train": before, "eval": before})
    (tmp_path / "checkpoints" / "2").mkdir(parents=True)
    (folder / "cats/a.png").unlink()
    now = {"train": before, "eval": before} | dict.fromkeys(changed, found(folder))
    with pytest.raises(CheckpointError, match=f"Later {what} would differ") as refused:
        workdirs.check_data(workdir, now, accept=False)
    assert str(refused.value).count("1 removed") == len(changed)


def test_a_resumed_run_refuses_other_data_unless_they_are_accepted(folder, tmp_path):
    workdir = epath.Path(tmp_path)
    before = {"train": found(folder)}
    workdirs.claim_data(workdir, before)
    (folder / "cats/a.png").unlink()
    now = {"train": found(folder)}
    workdirs.check_data(workdir, now, accept=False)  # nothing to resume from
    (tmp_path / "checkpoints" / "2").mkdir(parents=True)
    with pytest.raises(
        CheckpointError,
        match=r"train: examples: 3 -> 2\n(.*\n)*.*1 removed: cats/a.png\n.*--accept_d",
    ):
        workdirs.check_data(workdir, now, accept=False)
    workdirs.check_data(workdir, before, accept=False)
    workdirs.check_data(workdir, now, accept=True)
    workdirs.claim_data(workdir, now)
    workdirs.check_data(workdir, now, accept=False)
    for content in (b"", b"{", b'{"train": 3}', b"\xff"):
        (tmp_path / "data.json").write_bytes(content)
        with pytest.raises(
            CheckpointError, match="data.json .*damaged. Delete it, or add --accept"
        ):
            workdirs.check_data(workdir, now, accept=False)
