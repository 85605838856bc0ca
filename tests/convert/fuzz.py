"""Damaged weight files of every container: each is read, or refused with one ConversionError.

    python -m tests.convert.fuzz --count=20000

Prints how many were tried and what came of them; fails on any other exception, on a file that takes
much more memory than its own size, and on a refusal that takes two seconds of the processor.
"""

import argparse
import collections
import io
import json
from pathlib import Path
import random
import sys
import tempfile
import time
import tracemalloc
import zipfile

from absl import logging
import numpy as np

from fd_jax.convert import families, formats, importing, inspecting
from fd_jax.convert.containers import safetensors_io
from fd_jax.convert.trees import flat
from fd_jax.errors import ConversionError
from tests.convert import synthetic
from tests.convert.families import test_dinov2_onnx

SECONDS = 2.0
WARM_UP = 20  # files whose time is not looked at: the first of a container imports its packages
BYTES = 32 << 20

# Container -> (source that fits the undamaged file, name of the file).
SEEDS = {
    "torch zip": ("fd_official_finetuned_clip_vit_b", "f.pth"),
    "torch legacy": ("dino_vitb16", "f.pth"),
    "TorchScript": ("openai_clip_vit_b16", "f.pt"),
    "safetensors": ("dinov2_vitb14_hf", "f.safetensors"),
    "npz": ("siglip2_base_patch16_224_bigvision", "f.npz"),
    "compressed npz": ("siglip2_base_patch16_224_bigvision", "f.npz"),
    "onnx": ("dinov2_vits14_onnx", "f.onnx"),
    "own safetensors": ("fd_jax", "f.safetensors"),
    "sharded folder": ("dinov2_vitb14_hf", "folder.zip"),
}
EXTREMES = (b"\x00", b"\xff", b"\x7f", b"\x80", b"\xff" * 8, b"\x00" * 8, b"\xff\xff\xff\x7f")


def seed_file(container: str, folder: Path) -> bytes:
    """An undamaged shrunk file."""
    name, _ = SEEDS[container]
    if container == "onnx":
        return test_dinov2_onnx.write_graph(folder, test_dinov2_onnx.hub_tensors()).read_bytes()
    if container == "own safetensors":
        (folder / "f.pth").write_bytes(seed_file("torch legacy", folder))
        result = importing.read("dino_vitb16", folder / "f.pth")
        path = folder / "own.safetensors"
        formats.FORMATS["safetensors"].write(result.spec, flat(result.params), path)
        return path.read_bytes()
    given = synthetic.structure(name)
    trees = synthetic.values(given)
    if container == "sharded folder":
        return sharded(trees[""], folder)
    if container == "torch legacy":
        path = synthetic.write_torch(
            given, trees, folder / "legacy.pth", _use_new_zipfile_serialization=False
        )
    elif container == "compressed npz":
        path = folder / "compressed.npz"
        np.savez_compressed(path, **trees[""])
    else:
        path = synthetic.write(given, trees, folder)
    return path.read_bytes()


def sharded(arrays: dict[str, np.ndarray], folder: Path) -> bytes:
    """A Hugging Face folder of two shards, index and config.json, as a zip file to carry it."""
    names = sorted(arrays)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, held in shards.items():
        safetensors_io.write(folder / shard, {name: arrays[name] for name in held}, {})
    index = {"weight_map": {name: shard for shard, held in shards.items() for name in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({"hidden_act": "gelu", "layer_norm_eps": 1e-6}))
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name in (*shards, "model.safetensors.index.json", "config.json"):
            archive.write(folder / name, name)
    return out.getvalue()


def damage_folder(data: bytes, other: bytes, rng: random.Random, folder: Path) -> Path:
    """Unpacks `sharded` and damages one of its files."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        archive.extractall(folder)
    path = rng.choice(sorted(folder.iterdir()))
    path.write_bytes(damage(path.read_bytes(), other, rng))
    return folder


def seed_files() -> dict[str, bytes]:
    """One undamaged file per container."""
    with tempfile.TemporaryDirectory() as folder:
        return {container: seed_file(container, Path(folder)) for container in SEEDS}


def damage(data: bytes, other: bytes, rng: random.Random) -> bytes:
    """One to four changes; most hit the first and last kilobytes, where the structure stands."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        if not out:
            break
        at = _position(len(out), rng)
        kind = rng.randrange(6)
        if kind == 0:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            value = rng.choice(EXTREMES)
            out[at : at + len(value)] = value
        elif kind == 2:
            del out[at:]  # truncated
        elif kind == 3:
            del out[at : at + rng.choice((1, 8, 100))]
        elif kind == 4:
            length = rng.choice((1, 8, 100))
            out[at:at] = out[at : at + length]
        else:
            start = _position(len(other), rng)
            out[at : at + 64] = other[start : start + 64]
    return bytes(out)


def _position(length: int, rng: random.Random) -> int:
    near = min(length, 4096)
    return rng.choice(
        (rng.randrange(length), rng.randrange(near), length - 1 - rng.randrange(near))
    )


def misnest(rng: random.Random, folder: Path) -> Path:
    """A well-formed torch file whose dictionary is not what it should be."""
    import torch

    given = synthetic.structure("deit_base_patch16_224")
    tree: dict = {
        name: torch.from_numpy(np.array(value))
        for name, value in synthetic.values(given)["model"].items()
    }
    strange = (None, 3, "text", [tree["cls_token"]], {}, {1: {2: tree["norm.bias"]}}, (), 2.5)
    for _ in range(rng.randint(0, 3)):
        name = rng.choice(list(tree))
        kind = rng.randrange(4)
        if kind == 0:
            del tree[name]
        elif kind == 1:
            tree[name] = rng.choice(strange)
        elif kind == 2:
            tree[f"{rng.choice(('module.', 'x/', ''))}{name}x"] = tree[name]
        elif isinstance(tree[name], torch.Tensor):
            tree[name] = rng.choice((tree[name].double(), tree[name][None], tree[name].long()))
    for _ in range(rng.randint(0, 3)):
        tree = {rng.choice(("model", "state_dict", "teacher", 7)): tree}
    torch.save(rng.choice((tree, tree, tree, [tree], "text")), folder / "f.pth")
    return folder / "f.pth"


def attempt(path: Path, source: str, output: Path) -> str:
    """Tries to import and inspect a file; returns what came of it, raises on a fault."""
    tracemalloc.start()
    try:
        importing.import_file(source, path, output, allow_other_hash=True, overwrite=True)
        outcome = "imported"
    except ConversionError as error:
        assert str(path) in str(error), f"the message does not name the file: {error}"
        assert not output.exists(), "a refused file left a folder"
        outcome = "refused"
    try:
        inspecting.inspect(path)
    except ConversionError as error:
        assert str(path) in str(error), f"the message does not name the file: {error}"
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    size = sum(file.stat().st_size for file in (path.iterdir() if path.is_dir() else [path]))
    assert peak < BYTES + 20 * size, f"took {peak:,} bytes"
    return outcome


def one(container: str, seeds: dict[str, bytes], rng: random.Random, folder: Path) -> str:
    """Makes one damaged file of a container, or one that is nested wrongly, and tries it."""
    output = folder / "model"
    if container == "misnested":
        return attempt(misnest(rng, folder), "deit_base_patch16_224", output)
    source, name = SEEDS[container]
    path = folder / name
    other = rng.choice(list(seeds.values()))
    if container == "sharded folder":
        path.mkdir()
        damage_folder(seeds[container], other, rng, path)
        return attempt(path, source, output)
    path.write_bytes(damage(seeds[container], other, rng))
    return attempt(path, source, output)


def install() -> None:
    """Puts shrunk sources in the place of the real ones."""
    for name in [*synthetic.names(), test_dinov2_onnx.NAME]:
        families.SOURCES[name] = synthetic.small_source(name)
    importing._LAZY_SIZE = 1000  # as large tensors are: read when their turn to be written comes


def main() -> None:
    """Tries many and prints the counts."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    install()
    logging.set_verbosity(logging.FATAL)  # Orbax logs what it then raises
    seeds = seed_files()
    outcomes: collections.Counter = collections.Counter()
    containers = [*SEEDS, "misnested"]
    slowest = 0.0  # refusal; a good file's time is Orbax's
    for index in range(arguments.count):
        container = containers[index % len(containers)]
        rng = random.Random(f"{arguments.seed}/{index}")
        with tempfile.TemporaryDirectory() as folder:
            try:
                start = time.process_time()
                outcome = one(container, seeds, rng, Path(folder))
                seconds = time.process_time() - start
                if outcome == "refused" and index >= WARM_UP:
                    assert seconds < SECONDS, f"took {seconds:.1f} s"
                    slowest = max(slowest, seconds)
                outcomes[container, outcome] += 1
            except Exception:
                print(f"--seed={arguments.seed}, file {index} ({container})", file=sys.stderr)
                raise
    for (container, outcome), count in sorted(outcomes.items()):
        print(f"{container:15} {outcome:9} {count}")
    print(f"{sum(outcomes.values())} files, no other outcome; slowest refusal {slowest:.2f} s")


if __name__ == "__main__":
    main()
