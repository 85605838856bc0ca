"""Weights & Biases: what a run logs there, read back by wandb's own reader of offline files."""

import gc
import http.server
import json
import os
import subprocess
import sys
import threading

from etils import epath
import pytest

from fd_jax.cli import next_steps
from fd_jax.errors import CheckpointError, ConfigError
from fd_jax.report import cli
from fd_jax.tasks.distill import DistillTask
from fd_jax.training import loop, metric_writer, tracking
from tests import tiny
from tests.training.wandb_records import of_kind, parts, rows

KEY = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory):
    """A fresh home and wandb's offline mode, with a key that must not be written."""
    # Failed tasks of earlier tests are logged when they are collected, and the log parses source
    # for its tracebacks. CPython 3.11 cannot do that while wandb's import parses some itself.
    gc.collect()
    import wandb

    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_API_KEY", KEY)
        wandb.teardown()  # of earlier tests, since its settings are read once
        yield home
        wandb.teardown()


class Stop(Exception):
    """Ends a run in the middle, as an error would."""


@pytest.fixture(scope="module")
def config(teacher, embedded_data):
    return tiny.config(teacher, **{"data.data_dir": embedded_data, "profile_steps": 0})


@pytest.fixture(scope="module")
def tracked(config, tmp_path_factory):
    """A run that breaks off at step 4 and goes on, and its report."""
    workdir = tmp_path_factory.mktemp("tracked")
    save = loop.Run._save

    def save_and_stop(run, step, state):
        save(run, step, state)
        if step == 4:
            run.checkpoints.wait()
            raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Run, "_save", save_and_stop)
        with pytest.raises(Stop):
            loop.fit(DistillTask(config), config, workdir, wandb=True)
    loop.fit(DistillTask(config), config, workdir, wandb=True)
    assert cli.main([f"--workdir={workdir}", "--wandb"]) == 0
    return workdir


@pytest.fixture(scope="module")
def recorded(tracked):
    return parts(tracked)


@pytest.mark.slow
def test_wandb_has_the_rows_of_the_metrics(tracked, recorded):
    written = metric_writer.read(tracked)
    training, resumed, _ = recorded
    assert rows(training) + rows(resumed) == written
    assert {row["step"] for row in written} == set(range(1, 7))
    assert any("eval_loss" in row for row in written)


@pytest.mark.slow
def test_wandb_has_the_config(tracked, recorded):
    for records in recorded[:2]:
        (run,) = of_kind(records, "run")
        settings = {k: v for k, v in run["config"]["update"].items() if k != "_wandb"}
        assert settings == json.loads((tracked / "config.json").read_text())


@pytest.mark.slow
def test_all_parts_are_one_run_of_wandb(tracked, recorded):
    known = json.loads((tracked / "wandb.json").read_text())
    for records in recorded:
        (run,) = of_kind(records, "run")
        assert run["run_id"] == known["id"] and run["project"] == known["project"] == "fd_jax"
        assert run["resume"]
    exits = [of_kind(records, "exit")[0]["exit_code"] for records in recorded]
    assert exits == [1, 0, 0]


@pytest.mark.slow
def test_the_report_adds_its_pictures(tracked, recorded):
    (row,) = rows(recorded[2])
    assert row.pop("step") == 6
    (files,) = (tracked / "wandb").glob("offline-run-*/files/media/..")
    written = {f"report/{path.stem}": path for path in (tracked / "report").glob("*.png")}
    assert {name.split(".")[0] for name in row} == set(written) == {"report/loss", "report/maps"}
    for name, path in written.items():
        assert row[f"{name}._type"] == "image-file"
        assert (files / row[f"{name}.path"]).read_bytes() == path.read_bytes()


@pytest.mark.slow
def test_the_key_is_written_nowhere(tracked, offline):
    files = [path for root in (tracked, offline) for path in root.rglob("*") if path.is_file()]
    assert len(files) > 20
    assert not [path for path in files if KEY.encode() in path.read_bytes()]


@pytest.mark.slow
def test_nothing_is_tracked_unless_asked_for(finished):
    workdir, _ = finished
    assert not (workdir / "wandb").exists() and not (workdir / "wandb.json").exists()


def test_a_report_of_a_run_that_was_not_tracked_is_refused(tmp_path, capsys):
    assert cli.main([f"--workdir={tmp_path}", "--wandb"]) == 2
    assert "its run was not logged to wandb; run the command" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_run_that_is_asked_to_stop_is_marked(tmp_path):
    with metric_writer.Writer(
        epath.Path(tmp_path),
        resume_step=0,
        tracker=tracking.start(epath.Path(tmp_path), {"a": {"b": 1.5}}),
    ) as writer:
        writer.write(1, {"loss": float("nan"), "x": 1e-30})
        writer.preempted = True
    (records,) = parts(tmp_path)
    assert rows(records) == [{"step": 1, "loss": "NaN", "x": 1e-30}]
    assert of_kind(records, "preempting") and of_kind(records, "exit")[0]["exit_code"] == 1


def test_a_failure_of_wandb_is_noted_once_and_ends_nothing(tmp_path, capsys):
    tracker = tracking.Tracker(epath.Path(tmp_path), {})
    tracker._run.finish()  # as if it had ended by itself
    for step in (1, 2):
        tracker.log({"step": step})
    tracker.finish()
    assert capsys.readouterr().out.count("wandb records nothing more of this run") == 1


def test_a_damaged_record_is_one_message(tmp_path):
    for text in ('{"id": ', '{"id": 3, "project": "p"}', "[]"):
        (tmp_path / "wandb.json").write_text(text)
        with pytest.raises(CheckpointError, match="wandb.json .* is damaged. Delete it"):
            tracking.Tracker(epath.Path(tmp_path), {})


def test_only_the_first_process_tracks(tmp_path, monkeypatch):
    monkeypatch.setattr(tracking.jax, "process_index", lambda: 1)
    assert tracking.start(epath.Path(tmp_path), {}) is None
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'fd_jax\[wandb\]'"):
        loop.fit(None, None, tmp_path / "run", wandb=True)
    assert not list(tmp_path.iterdir())


def test_the_commands_of_a_tracked_run_track_its_report_and_no_evaluation(tmp_path):
    command = ["finetune.py", "--wandb", "--workdir=w"]
    report, *_, measured = next_steps.commands(tiny.fine_tuning(), epath.Path("w"), command)
    assert report == "python -m fd_jax.report --workdir=w --wandb"
    assert measured == "python finetune.py --workdir=w --eval_only --per_class"


SCRIPT = """
import sys
from etils import epath
from fd_jax.cli import next_steps
from fd_jax.errors import ConfigError
from fd_jax.training import tracking

try:
    tracking.check()
    tracker = tracking.start(epath.Path(sys.argv[1]), {"a": 1})
    tracker.log({"step": 1, "loss": 0.5})
    tracker.finish()
except ConfigError as error:
    sys.exit(f"error: {error}")
"""


def track(workdir, **environment):
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, str(workdir)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def server():
    """The address of a server that refuses everything, and the list of what it was asked."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append(self.requestline)
            self.send_response(401)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_CONNECT = do_POST

    with http.server.ThreadingHTTPServer(("localhost", 0), Handler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://localhost:{listening.server_port}", asked
        listening.shutdown()


@pytest.mark.slow
def test_the_network_is_not_asked_offline(server, tmp_path):
    address, asked = server
    ways = {"HTTPS_PROXY": address, "HTTP_PROXY": address, "WANDB_BASE_URL": address}
    done = track(tmp_path, **ways)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"  wandb      offline in {tmp_path}/wandb/offline-run-")
    assert not done.stderr and not asked
    # Negative control: the same run, online.
    done = track(tmp_path, **ways, WANDB_MODE="online")
    assert done.returncode == 1
    assert "error: --wandb: wandb cannot start a run" in done.stderr
    assert "WANDB_MODE=offline" in done.stderr and "Traceback" not in done.stderr
    assert any(line.startswith("POST /graphql") for line in asked), done.stderr


@pytest.mark.parametrize(
    "environment,message",
    [
        ({"WANDB_MODE": "online", "WANDB_API_KEY": ""}, "wandb has no API key; run `wandb login`"),
        ({"WANDB_MODE": "online", "WANDB_API_KEY": "short"}, "wandb refuses its settings"),
        ({"WANDB_MODE": "somewhere"}, "wandb refuses its settings"),
    ],
    ids=str,
)
def test_wrong_settings_of_wandb_are_refused_before_any_work(environment, message, monkeypatch):
    import wandb

    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    wandb.teardown()  # it has read its settings
    with pytest.raises(ConfigError, match=message):
        tracking.check()
    monkeypatch.undo()
    wandb.teardown()
