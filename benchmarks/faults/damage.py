"""Damage to stored files: flipped bits in model folders and checkpoints, mutated model.json."""

from collections.abc import Callable
import copy
import json
import pathlib
import random
from typing import Any

COUNTS = {"refused": 0, "harmless": 0, "silent": 0, "tracebacks": 0}
STRANGE: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 2, 3, 7, 10_000, 2**31, 2**63, 10**30, 0.5, -0.5, 1e-86, 1e300),
    *(float("nan"), float("inf"), "", "vit", "x" * 1000, [], {}, [1], [0.5] * 3, [0.5] * 4),
    *([[]], {"a": 1}, [None], "ape", "rope", [2, 2], [0, 0, 0]),
)


def flip_bits(folder: pathlib.Path, count: int, seed: int, log: Callable[[str], None]) -> dict:
    """Flips bits in every file of a checkpoint and of model folders, one at a time.

    Files are taken in turn, and bits at random within each, so that small files are not left out.
    A flip is refused, or provably without effect (all that is read is equal), or silent.

    Args:
      folder: new folder to work in.
      count: number of bits.
      seed: of the bits.
      log: receives the counts from time to time.

    Returns:
      The counts by what was damaged.
    """
    rng = random.Random(seed)
    found = {}
    targets = {"model folder": _model(folder), "checkpoint": _checkpoint(folder)}
    for name, (root, read) in targets.items():
        counts = dict(COUNTS)
        whole = read()
        files = sorted(p for p in root.rglob("*") if p.is_file() and p.stat().st_size)
        for number in range(count // len(targets)):
            outcome = _flip(files[number % len(files)], rng, read, whole)
            counts[outcome] += 1
            if number % 100 == 99:
                log(f"{name}: {counts}")
        found[name] = {**counts, "files": len(files)}
    return found


def _flip(path: pathlib.Path, rng: random.Random, read: Callable[[], Any], whole: Any) -> str:
    from fd_jax.errors import UserError

    content = path.read_bytes()
    damaged = bytearray(content)
    damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
    path.write_bytes(bytes(damaged))
    try:
        return "harmless" if read() == whole else "silent"
    except UserError:
        return "refused"
    except Exception as error:
        print(f"{path}: {error!r}")
        return "tracebacks"
    finally:
        path.write_bytes(content)


def _spec() -> Any:
    from benchmarks.faults.config import STUDENT
    from configs import base
    from fd_jax.models.spec import ModelSpec

    return ModelSpec("vit", base.student(STUDENT, image_size=32), source="random")


def _bits(tree: Any) -> dict[str, bytes]:
    """The bits of every array, by path, which are equal only if the arrays are."""
    import numpy as np

    from fd_jax import digests

    return {name: np.asarray(leaf).tobytes() for name, leaf in digests.by_path(tree).items()}


def _model(folder: pathlib.Path) -> tuple[pathlib.Path, Callable[[], Any]]:
    from flax import nnx

    from fd_jax import model_folder
    from fd_jax.models.spec import split

    path, spec = folder / "model", _spec()
    model_folder.save(path, spec, {"encoder": split(spec.build(rngs=nnx.Rngs(0)))[1]})

    def read() -> Any:
        stored, params = model_folder.load(path)
        return stored.to_json(), _bits(params)

    return path, read


def _checkpoint(folder: pathlib.Path) -> tuple[pathlib.Path, Callable[[], Any]]:
    from etils import epath
    from flax import nnx
    import jax

    from fd_jax.checkpoint import Checkpoints
    from fd_jax.models.spec import split

    state = {"params": split(_spec().build(rngs=nnx.Rngs(0)))[1]}
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    where = epath.Path(folder / "checkpoints")
    with Checkpoints(where, keep=1, keep_every=None) as checkpoints:
        checkpoints.save(7, state, {"data": {"epoch": 0, "batch": 7}, "nonfinite_in_a_row": 0})

    def read() -> Any:
        # Opened anew, as by a run that resumes.
        with Checkpoints(where, keep=1, keep_every=None) as checkpoints:
            restored, record = checkpoints.restore(7, like)
        return _bits(restored), json.dumps(record, sort_keys=True)

    return folder / "checkpoints" / "7", read


def mutate_descriptions(count: int, seed: int, log: Callable[[str], None]) -> dict[str, int]:
    """Changes model.json in one to three places; each is a valid network or one clear error.

    Returns:
      How many were refused, define a network, are equal to the original, or end in a traceback.
    """
    from fd_jax.errors import UserError
    from fd_jax.models.spec import ModelSpec

    rng = random.Random(seed)
    original = _spec().to_json()
    found = {"refused": 0, "equal": 0, "valid": 0, "tracebacks": 0}
    for number in range(count):
        text = _mutated(original, rng)
        try:
            spec = ModelSpec.from_json(text, where="model.json")
            if spec.to_json() == original:
                found["equal"] += 1
            else:
                spec.abstract()
                found["valid"] += 1
        except UserError:
            found["refused"] += 1
        except Exception as error:
            print(f"{text[:2000]}\n{error!r}")
            found["tracebacks"] += 1
        if number % 1000 == 999:
            log(str(found))
    return found


def _mutated(original: str, rng: random.Random) -> str:
    if rng.random() < 0.3:  # the text itself
        text = bytearray(original.encode())
        for _ in range(rng.randint(1, 3)):
            text[rng.randrange(len(text))] = rng.randrange(128)
        return text.decode()[: rng.choice((None, None, rng.randrange(len(text))))]
    fields = json.loads(original)
    for _ in range(rng.randint(1, 3)):
        section = rng.choice((fields, fields.get("arch")))
        if not isinstance(section, dict) or not section:
            continue
        name = rng.choice(sorted(section))
        kind = rng.randrange(3)
        if kind == 0:
            del section[name]
        elif kind == 1:
            section[name] = copy.deepcopy(rng.choice(STRANGE))
        else:
            section[rng.choice((name + "x", "segmenter", ""))] = copy.deepcopy(rng.choice(STRANGE))
    return json.dumps(fields)
