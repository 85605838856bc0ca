"""Start-up time: imports, and the first step with a cold and a warm compilation cache.

    make quickstart-data
    python -m benchmarks.startup

Every figure comes from a new process with the quickstart's config. "Cold" starts with an empty
compilation cache, "warm" with the cache that the cold run filled (JAX_COMPILATION_CACHE_DIR). The
first step ends when its line is printed.
"""

import argparse
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

IMPORTS = {
    "import jax": "import jax",
    "import fd_jax": "import fd_jax",
    "import fd_jax, all of training": "import fd_jax.training.loop, fd_jax.tasks.distill",
}
FLAGS = (
    "--config=configs/quickstart.py",
    "--config.steps=2",
    "--config.log_every=1",
    "--config.optim.warmup_epochs=0",
    "--config.eval.every=0",
    "--config.checkpoint.every=0",
)


def import_seconds(code: str, rounds: int) -> float:
    """Median seconds of a new process that only imports."""
    taken = []
    for _ in range(rounds):
        began = time.monotonic()
        subprocess.run([sys.executable, "-c", code], check=True, stderr=subprocess.DEVNULL)
        taken.append(time.monotonic() - began)
    return statistics.median(taken)


def first_step_seconds(cache: pathlib.Path) -> tuple[float, str]:
    """Seconds from the start of `train.py` to its first step, and its line about compiling."""
    with tempfile.TemporaryDirectory() as workdir:
        env = {
            **os.environ,
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        began = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-u", "train.py", *FLAGS, f"--workdir={workdir}/run"],
            env=env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert process.stdout is not None
        compiled = ""
        for line in process.stdout:
            if line.startswith("compiled"):
                compiled = line.strip()
            if line.startswith("step 1/"):
                taken = time.monotonic() - began
                process.communicate()
                return taken, compiled
        raise SystemExit("train.py did not reach its first step; run make quickstart-data first")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    for name, code in IMPORTS.items():
        print(f"{name:32s} {import_seconds(code, args.rounds):.1f} s")
    with tempfile.TemporaryDirectory() as cache:
        for name in ("cold", "warm"):
            seconds, compiled = first_step_seconds(pathlib.Path(cache))
            print(f"first step, {name:20s} {seconds:.1f} s ({compiled})")


if __name__ == "__main__":
    main()
