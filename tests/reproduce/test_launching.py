"""Refusals before the first command, commands that fail, and a real grid, killed and continued."""

import dataclasses
import fcntl
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

from etils import epath
import numpy as np
import pytest

from fd_jax.errors import CheckpointError, ConfigError, ModelFolderError
from fd_jax.reproduce import __main__ as command_line
from fd_jax.reproduce import cells, launching, results, small
from tests import tiny, xla

ROOT = pathlib.Path(__file__).parent.parent.parent


@pytest.fixture(autouse=True)
def in_checkout(monkeypatch):
    monkeypatch.chdir(ROOT)


def one(scale, **given):
    return cells.commands(command_line.select(scale, everything=False, seeds=1, **given))


def test_commands_are_printed_as_users_type_them(capsys):
    flags = ["--scale=full", "--table=3", "--teacher=dino", "--workdir=W", "--print"]
    assert command_line.main([*flags, "--", "--config.data.data_dir=my data"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 6
    assert printed[2] == (
        "python train.py --config=configs/ablations.py:table=3,row=l2,teacher=dino "
        "--config.seed=0 '--config.data.data_dir=my data' "
        "--workdir=W/dino/table3_l2/seed0/distill"
    )
    assert printed[3] == (
        "python finetune.py --config=configs/finetune_dino_vit_b16.py "
        "--config.init_from=W/dino/table3_l2/seed0/distill/model --config.seed=0 "
        "'--config.data.data_dir=my data' --workdir=W/dino/table3_l2/seed0/finetune"
    )


def test_missing_teachers_are_listed_once_with_the_commands_that_make_them(tmp_path, monkeypatch):
    chosen = [*one("full", teacher="clip"), *one("full", teacher="dino,esvit")]
    monkeypatch.chdir(tmp_path)
    for name in ("configs", "train.py", "finetune.py"):
        os.symlink(ROOT / name, tmp_path / name)
    with pytest.raises(ModelFolderError) as error:
        launching.check(chosen, epath.Path(tmp_path / "W"))
    message = str(error.value)
    for source in ("openai_clip_vit_b16", "dino_vitb16", "esvit_swin_base_w14"):
        assert message.count(f"import --source={source} --input=FILE") == 1
    assert message.startswith("3 teachers are missing") and "--teacher" in message
    assert not (tmp_path / "W").exists()


def test_a_workdir_of_another_run_is_refused(tmp_path):
    chosen = one("cpu", teacher="contrastive_1000", table="3")
    workdir = chosen[0].workdir(tmp_path)
    workdir.mkdir(parents=True)
    config = launching.read_config(chosen[0], tmp_path).to_dict()
    (workdir / "config.json").write_text(json.dumps({**config, "attention": "xla"}))
    launching.check(chosen, epath.Path(tmp_path))
    config["contrast"]["temperature"] = 0.5
    (workdir / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        CheckpointError, match="another config:\n  contrast.temperature: 0.5 -> 0.2"
    ):
        launching.check(chosen, epath.Path(tmp_path))


@pytest.mark.parametrize(
    "extra,message",
    [
        ("--config.colour=red", "does not accept .*--config.colour=red.*colour"),
        ("--config.batch_size=many", "does not accept .*batch_size=many"),
    ],
)
def test_flags_that_a_config_does_not_have_are_refused(tmp_path, extra, message):
    chosen = one("cpu", teacher="contrastive_1000", table="3")
    with pytest.raises(ConfigError, match=message):
        launching.check(chosen, epath.Path(tmp_path), [extra])


def test_buckets_and_folders_without_the_scripts_are_refused(tmp_path, monkeypatch):
    chosen = one("cpu", teacher="contrastive_1000", table="3")
    with pytest.raises(ConfigError, match="--workdir=gs://x: .* --print"):
        launching.check(chosen, epath.Path("gs://x"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="there is no train.py and no configs/base.py in"):
        launching.check(chosen, epath.Path(tmp_path))


def test_a_second_launcher_is_refused(tmp_path):
    chosen = one("cpu", teacher="contrastive_1000", table="3")
    with (tmp_path / launching.LOCK).open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(CheckpointError, match="another process works in"):
            next(launching.launch(chosen, epath.Path(tmp_path)))


@pytest.mark.parametrize(
    "flags,message",
    [
        ([], "--scale is missing"),
        (["--scale=cpu"], "--workdir is missing"),
        (["--scale=full", "--table=6", "--print"], "--table='6' is unknown"),
    ],
)
def test_wrong_flags_give_one_clear_error(flags, message, capsys):
    assert command_line.main(flags) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1


# Digits instead of Fashion-MNIST, small batches and a few steps.
TOY = (
    "--config.data.name=digits",
    "--config.data.eval_split=test[:32]",
    "--config.batch_size=16",
    "--config.steps=3",
    "--config.optim.warmup_epochs=0.0",
    "--config.checkpoint.every=1",
)
# Two cells of Table 1, with what the command does once it has read its flags.
TWO_CELLS = """
import sys
from etils import epath
from fd_jax.reproduce import __main__ as command_line

cells = command_line.select("cpu", teacher="contrastive_100", seeds=2, everything=False)
cells = [cell for cell in cells if cell.row in ("before", "after")]
command_line.run("cpu", cells, cells, epath.Path(sys.argv[1]), sys.argv[2:])
"""


def start(*arguments, **environment):
    """Starts Python in the checkout, with this machine's devices."""
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": xla.FAST, **environment},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def wait_for(condition, process=None):
    deadline = time.monotonic() + 300
    while not condition():
        assert process is None or process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
def test_a_command_that_fails_is_named_with_its_log(tmp_path):
    """The launcher itself never starts JAX, which would take the chips from its commands."""
    flags = ["--scale=cpu", "--teacher=contrastive_100", "--table=1", f"--workdir={tmp_path}"]
    process = start("-m", "fd_jax.reproduce", *flags, JAX_PLATFORMS="nosuch")
    output, _ = process.communicate()
    assert process.returncode == 2
    assert output.startswith("[1/19] python train.py --config=")
    assert "error: contrastive/teacher ended with status 1. Its command was\n  python" in output
    assert f"the end of its log {tmp_path}/contrastive/teacher/log.txt is\n" in output
    assert "Unable to initialize backend 'nosuch'" in output
    assert [path.name for path in (tmp_path / "contrastive").iterdir()] == ["teacher"]


@pytest.mark.slow
def test_two_cells_are_killed_and_continued(embedded_data, tmp_path):
    """SIGTERM in the first command, SIGKILL in a later one, then to the end."""
    root = epath.Path(tmp_path)
    chosen = command_line.select("cpu", teacher="contrastive_100", seeds=2, everything=False)
    chosen = [cell for cell in chosen if cell.row in ("before", "after")]
    teacher, tuned, *others = cells.commands(chosen)
    assert len(others) == 5
    arguments = ["-c", TWO_CELLS, str(root), *TOY, f"--config.data.data_dir={embedded_data}"]

    process = start(*arguments)
    wait_for(lambda: (teacher.workdir(root) / "config.json").exists(), process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate()
    assert process.returncode == 75, output
    assert "contrastive/teacher was stopped by SIGTERM" in output
    assert not teacher.finished(root)

    process = start(*arguments)
    wait_for(lambda: (tuned.workdir(root) / "config.json").exists(), process)
    process.kill()  # the running command goes on alone, and holds the workdir
    process.communicate()
    made = (teacher.model(root) / "model.json").stat().mtime
    with pytest.raises(CheckpointError, match="another process works in"):
        next(launching.launch([tuned], root))
    wait_for(lambda: not locked(root))

    process = start(*arguments)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert (teacher.model(root) / "model.json").stat().mtime == made
    found = results.read(root / results.JSON)
    values = [value for cell in found["cells"] for value in cell["figures"].values()]
    assert len(values) == 4 and all(0 <= value <= 100 for value in values)
    assert re.search(r"`after` \| student, fine-tuned \| [\d.]+ ± [\d.]+ \| [+-]", output)
    launches = (root / launching.LAUNCHES).read_text().splitlines()
    assert [json.loads(line)["status"] for line in launches] == [75, 0, 0, 0, 0, 0, 0]


@pytest.mark.slow
def test_attention_distances_are_measured_and_collected(embedded_data, tmp_path):
    root = epath.Path(tmp_path)
    grid = [cell for cell in small.cells([0]) if cell.table == small.HEADS]
    run = dataclasses.replace(grid[0].runs[0], data="digits:test", images=16)
    (diagnosed,) = run.needs
    tiny.save_student(diagnosed.model(root))
    extra = [f"--config.data.data_dir={embedded_data}"]
    assert list(launching.launch([run], root, extra)) == [run]
    grid = [dataclasses.replace(grid[0], runs=(run,))]
    (cell,) = results.collect("cpu", grid, root, command_line.SETTINGS["cpu"])["cells"]
    distances = json.loads(run.figures(root).read_text())["models"]["network"]["distance"]
    assert np.shape(distances) == (tiny.STUDENT["depth"], tiny.STUDENT["heads"])
    assert cell["figures"]["0"] == pytest.approx(np.std(distances[1], ddof=1), abs=1e-4)
    assert cell["figures"]["0"] > 0


def locked(root):
    with (root / launching.LOCK).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False
