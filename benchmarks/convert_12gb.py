"""Memory needed to import a 12 GB file: a ViT of 3.0 billion float32 parameters as safetensors.

    python -m benchmarks.convert_12gb --folder=/folder/with/30/GB/free

The network has DINOv2's structure, but is wider and deeper, with random weights. The file and the
model folder are removed afterwards.
"""

import argparse
import dataclasses
from pathlib import Path
import tempfile

import numpy as np

from benchmarks.convert_clip_l14 import measure
from fd_jax.convert import families
from fd_jax.convert.containers import safetensors_io
from fd_jax.convert.networks import shapes
from fd_jax.convert.rules.matching import invert

NAME = "dinov2_vits14_hf"
ARCH = {"width": 2560, "depth": 38, "heads": 40, "mlp_width": 10240}

SETUP = "from benchmarks import convert_12gb; convert_12gb.install()"
IMPORT = "importing.import_file({name!r}, {path!r}, {output!r})"


def install() -> None:
    """Gives the source the size of the large network."""
    source = families.SOURCES[NAME]
    (part,) = source.parts.values()
    spec = dataclasses.replace(part.spec, arch={**part.spec.arch, **ARCH})
    part = dataclasses.replace(part, spec=spec)
    families.SOURCES[NAME] = dataclasses.replace(source, parts={source.default_part: part})


def write(path: Path) -> None:
    """Writes the file; every tensor is a view of the same random numbers."""
    (part,) = families.SOURCES[NAME].parts.values()
    sizes = {k: v for k, v in shapes(part.spec).items() if k.startswith("encoder/")}
    noise = np.random.default_rng(0).standard_normal(1 << 27, np.float32)
    params = {k: noise[: np.prod(size)].reshape(size) for k, size in sizes.items()}
    tensors = dict(invert(part.table, params, part.spec.arch, derived=False))
    safetensors_io.write(path, tensors, {"format": "pt"})


def main() -> None:
    """Measures and prints the figures in the docs."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", help="where to write; default: a temporary folder")
    arguments = parser.parse_args()
    install()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        path = Path(folder) / "model.safetensors"
        write(path)
        print(f"file: {path.stat().st_size:,} bytes")
        base = measure("pass", SETUP)
        code = IMPORT.format(name=NAME, path=str(path), output=str(Path(folder) / "model"))
        cost = measure(code, SETUP)
        resident, anonymous = cost.resident - base.resident, cost.anonymous - base.anonymous
        print(
            f"import: {cost.seconds:.0f} s; above the imports: resident {resident / 1e9:.2f} GB, "
            f"mapped pages included; anonymous {anonymous / 1e9:.2f} GB"
        )


if __name__ == "__main__":
    main()
