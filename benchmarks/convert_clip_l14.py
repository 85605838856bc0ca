"""Peak memory and time of importing CLIP ViT-L/14, compared with read + hash + write alone.

    python -m benchmarks.convert_clip_l14

Writes a synthetic `ViT-L-14.pt` with the real structure and size (0.93 GB, TorchScript, float16)
into a temporary folder, then measures in new processes: (a) the Python imports alone; (b) the
import command; (c) reading the file, computing its SHA-256, and writing the same float32 tensors
with Orbax. Memory is the peak resident set, which includes mapped pages of the file, and its
anonymous part.
"""

import argparse
import json
from pathlib import Path
import subprocess
import sys
import tempfile

SOURCE = "openai_clip_vit_l14"

WRITE = """
from tests.convert import synthetic
from pathlib import Path
given = synthetic.structure({source!r}, small=False)
synthetic.write(given, synthetic.values(given), Path({folder!r}))
"""

# Runs the code below it and prints seconds, highest resident bytes and highest anonymous bytes.
MEASURED = """
import json, re, resource, threading, time
from fd_jax.convert import cli, importing
from fd_jax.convert.containers import opening
from fd_jax import checkpoint
from etils import epath
import jax
jax.config.update("jax_platforms", "cpu")
jax.devices()
anonymous, done = 0, threading.Event()
def watch():
    global anonymous
    while not done.wait(0.01):
        text = open("/proc/self/status").read()
        anonymous = max(anonymous, int(re.search(r"RssAnon:\\s+(\\d+)", text)[1]) * 1024)
thread = threading.Thread(target=watch)
thread.start()
{setup}
start = time.perf_counter()
{code}
seconds = time.perf_counter() - start
time.sleep(0.05)
done.set(); thread.join()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps([seconds, peak, anonymous]))
"""

IMPORT = "importing.import_file({source!r}, {path!r}, {output!r})"
# For the yardstick, converting the tensors is not timed; reading, hashing and writing are.
YARDSTICK_SETUP = "params = importing.read({source!r}, {path!r}).params"
YARDSTICK = """
with open({path!r}, "rb") as stream:
    while stream.read(1 << 22):
        pass
opening.open_container({path!r}).sha256()
checkpoint.save_tree(epath.Path({output!r}), params)
"""


def measure(code: str, setup: str = "") -> tuple[float, int, int]:
    """Runs code in a new process: seconds, peak resident bytes, peak anonymous bytes."""
    script = MEASURED.format(setup=setup, code=code)
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(run.stderr)
    return tuple(json.loads(run.stdout.splitlines()[-1]))


def main() -> None:
    """Measures and prints the figures in the docs."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", help="where to write; default: a temporary folder")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        script = WRITE.format(source=SOURCE, folder=folder)
        subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
        path = str(Path(folder) / "model.pt")
        size = Path(path).stat().st_size
        print(f"file: {size:,} bytes")
        _, base, base_anonymous = measure("pass")
        print(f"imports alone: {base:,} bytes resident, {base_anonymous:,} anonymous")
        for name, code, setup in (
            ("import", IMPORT, ""),
            ("yardstick", YARDSTICK, YARDSTICK_SETUP),
        ):
            rows = []
            for repeat in range(arguments.repeats):
                names = {
                    "source": SOURCE,
                    "path": path,
                    "output": str(Path(folder) / f"{name}{repeat}"),
                }
                rows.append(measure(code.format(**names), setup.format(**names)))
            seconds = sorted(row[0] for row in rows)[len(rows) // 2]
            peak = max(row[1] for row in rows) - base
            anonymous = max(row[2] for row in rows) - base_anonymous
            print(
                f"{name}: median {seconds:.1f} s; above the imports: resident {peak / size:.2f} x "
                f"file, anonymous {anonymous / size:.2f} x file"
            )


if __name__ == "__main__":
    main()
