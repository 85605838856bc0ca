"""The script for a GPU, on this CPU at toy size: what a run leaves, also where it is cut short."""

import json
import subprocess
import sys

import pytest

from benchmarks import gpu, gpu_worker


def run(output, *args):
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", f"--output={output}", "--toy", *args],
        text=True,
        capture_output=True,
        timeout=600,
    )


def rows_of(output, part):
    rows = json.loads(output.read_text())["rows"]
    return {row.get("choice", ""): row for row in rows if row["part"] == part}


@pytest.mark.slow
def test_accuracy_of_every_choice_is_measured_or_refused_by_name(tmp_path):
    output = tmp_path / "toy.json"
    done = run(output, "--parts=accuracy")
    assert done.returncode == 0, done.stderr
    rows = rows_of(output, "accuracy")
    assert 0 < rows["xla"]["gradient_error"] < 0.05  # bfloat16
    assert 0 < rows["xla"]["bias_gradient_error"] < 0.05
    assert rows["cudnn"]["status"].startswith("refused: attention='cudnn' needs an NVIDIA GPU")
    assert "accuracy b 4 xla: loss off by" in done.stdout


@pytest.mark.slow
def test_steps_of_both_sides_are_timed_and_traced(tmp_path):
    output = tmp_path / "toy.json"
    args = ("--parts=fd_jax,torch,flags", "--models=b", "--first", "--flags=cublas")
    done = run(output, *args, f"--profile={tmp_path / 'traces'}")
    assert done.returncode == 0, done.stderr
    rows = json.loads(output.read_text())["rows"]
    measured = [(row["part"], row.get("choice")) for row in rows if "images_per_second" in row]
    assert {("fd_jax", "xla"), ("torch", "compile"), ("torch", "eager"), ("flags", "xla")} == {
        *measured
    }
    assert all(
        row["least"] <= row["images_per_second"] <= row["most"] for row in rows if "least" in row
    )
    assert next(row["profile"] for row in rows if "profile" in row)[0]["ms"] > 0
    assert list((tmp_path / "traces").glob("*.trace.json.gz"))
    shown = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--table", f"--output={output}"],
        text=True,
        capture_output=True,
        check=True,
    ).stdout
    assert "| ViT-B | 8 | PyTorch, compile |" in shown
    assert "ViT-L: not yet run" in shown


def test_what_there_is_no_time_for_is_named(tmp_path):
    output = tmp_path / "toy.json"
    done = run(output, "--parts=fd_jax", "--models=l", "--seconds=0")
    assert done.returncode == 0, done.stderr
    statuses = [row["status"] for row in json.loads(output.read_text())["rows"]]
    assert len(statuses) == 2 * len(gpu.CHOICES)
    assert all(status.startswith("not yet run: 0 s were left") for status in statuses)


def test_a_run_adds_to_the_file_of_the_one_before(tmp_path):
    output = tmp_path / "toy.json"
    chosen = ("--first", "--choices=xla,eager", "--seconds=0")
    for parts in ("fd_jax", "torch"):
        done = run(output, f"--parts={parts}", "--models=b", "--append", *chosen)
        assert done.returncode == 0, done.stderr
    rows = json.loads(output.read_text())["rows"]
    got = [(row["part"], row["batch"], row["choice"]) for row in rows]
    assert got == [("fd_jax", 8, "xla"), ("torch", 8, "eager")]
    # A file of another environment is left alone.
    report = json.loads(output.read_text())
    report["environment"]["device"] = "another"
    output.write_text(json.dumps(report))
    done = run(output, "--append", *chosen)
    assert done.returncode == 1 and "measured in another environment" in done.stderr
    assert json.loads(output.read_text()) == report


def test_a_measurement_that_outlasts_its_time_is_cut_off(tmp_path):
    job = gpu_worker.Job("fd_jax", "b", 8, "xla", toy=True, round_seconds=60.0)
    rows = list(gpu.measure(job, 3.0, str(tmp_path)))
    assert rows == [{"status": "cut off after 3 s"}]


def test_a_crash_is_a_row_with_its_message(tmp_path):
    job = gpu_worker.Job("fd_jax", "no such model", 8, "xla", toy=True)
    (row,) = gpu.measure(job, 100.0, str(tmp_path))
    assert row["status"].startswith("failed: KeyError: 'no such model'")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--parts=speed",), "--parts=speed is unknown; expected some of"),
        (("--models=h",), "--models=h is unknown; expected some of"),
        (("--choices=flash",), "--choices=flash is unknown; expected some of"),
        (("--flags=fast",), "--flags=fast is unknown; expected some of"),
        (("--table",), "there is no such file to make a table of"),
    ],
)
def test_unknown_names_are_refused(tmp_path, args, message):
    done = run(tmp_path / "toy.json", *args)
    assert done.returncode == 2 and message in done.stderr
    assert not (tmp_path / "toy.json").exists()


def test_without_a_gpu_nothing_of_full_size_is_begun(tmp_path):
    output = tmp_path / "full.json"
    command = [sys.executable, "-m", "benchmarks.gpu", f"--output={output}"]
    done = subprocess.run(command, text=True, capture_output=True, timeout=100)
    assert done.returncode == 1 and "jax finds no GPU here (cpu)" in done.stderr
    assert not output.exists()


def rate(part, choice, value, *, batch=512, model="b", **fields):
    rates = {"images_per_second": value, "least": value - 1, "most": value + 1}
    row = {"part": part, "model": model, "batch": batch, "choice": choice, "status": "ok"}
    return {**row, **rates, "compile_seconds": 9.0, "device": "H", **fields}


def test_the_table_compares_with_torch_compile_at_the_same_batch():
    rows = [
        rate("fd_jax", "cudnn", 2600.0, mfu=0.42, peak_gib=30.0),
        rate("fd_jax", "xla", 2000.0, mfu=0.32),
        rate("torch", "compile", 2000.0),
        rate("torch", "compile", 1000.0, batch=128),
        {"part": "fd_jax", "model": "l", "batch": 128, "choice": "xla", "status": "failed: x" * 90},
    ]
    report = {"environment": {"date": "d", "python": "3", "versions": {"jax": "1"}}, "rows": rows}
    rows.append({**rows[-1], "status": "not yet run: 3 s were left"})
    lines = gpu.table({"card.json": report}).splitlines()
    assert lines[0].startswith("`card.json`: H, d, ")
    assert (
        "| ViT-B | 512 | fd_jax, cudnn | 2600 (2599 to 2601) | 42.0% | 1.30 | 30.0 | 9 |" in lines
    )
    assert any(line.startswith("| ViT-L | 128 | fd_jax, xla | failed: x") for line in lines)
    assert "ViT-B: MFU 42.0% (target 40%), 1.30 of torch.compile (target 1.3)." in lines
    assert lines.count("Not yet run: ViT-L 128 fd_jax, xla.") == 1
    assert max(map(len, lines)) < 200


def test_without_a_run_the_table_says_so():
    assert gpu.table({}).startswith("Not yet run on a GPU")
