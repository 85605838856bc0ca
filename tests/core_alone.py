"""The core of fd_jax where nothing of the extra `train` but optax is installed.

    python -m tests.core_alone --write     # in the environment of the tests: renews the figures
    python -m tests.core_alone             # elsewhere (make core): the same losses, within rounding

Models, losses, tasks, program and step, on a toy distillation and a toy fine-tuning with drop path,
mixing and erasing, so that a change in how another jax draws random numbers shows as well.
"""

import json
import os
import pathlib
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np

from fd_jax import sharding
from fd_jax.tasks.classify import ClassifyTask
from fd_jax.tasks.distill import DistillTask
from fd_jax.training.program import build
from tests import tiny

FIGURES = pathlib.Path(__file__).with_name("core_alone.json")
TOLERANCE = 2e-5
STEPS = 3
# Packages of the extra "train" and of the tests: none of them may be needed.
OTHERS = ("array_record", "clu", "cv2", "grain", "matplotlib", "tensorflow", "tensorflow_datasets")


def losses(task, config, batch):
    """Of three steps on one device."""
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    program = build(task, config, mesh, steps_per_epoch=10, total_steps=20)
    state = program.create(jax.random.key(0), {})
    frozen = task.abstract_frozen()
    frozen = program.place_frozen(tiny.randomize(jax.tree.map(_zeros, frozen), 1, scale=0.1))
    batch = {**batch, "stop": np.zeros(len(batch["label"]), np.int32)}
    batch = jax.device_put(batch, sharding.batch_sharding(mesh))
    step, found = program.compile_train_step(), []
    for _ in range(STEPS):
        state, metrics = step(state, frozen, batch, program.place_seed(0))
        total, count = metrics["loss"]
        found.append(float(total / count))
    return found


def measure():
    """Losses by task."""
    distill, fine_tune = tiny.config(), tiny.fine_tuning()
    fine_tune.model.update(family="vit", arch=tiny.teacher_spec().arch)
    distilled = DistillTask(distill, teacher_spec=tiny.teacher_spec())
    return {
        "distillation": losses(distilled, distill, tiny.batch()),
        "fine-tuning": losses(ClassifyTask(fine_tune), fine_tune, tiny.labelled_batch()),
    }


def _zeros(leaf):
    return np.zeros(leaf.shape, leaf.dtype)


def main():
    found = measure()
    if "--write" in sys.argv:
        FIGURES.write_text(json.dumps(found, indent=2) + "\n")
        return
    imported = sorted(set(OTHERS) & set(sys.modules))
    if imported:
        raise SystemExit(f"the core imports {', '.join(imported)}")
    want = json.loads(FIGURES.read_text())
    for name, values in want.items():
        np.testing.assert_allclose(found[name], values, rtol=TOLERANCE, err_msg=name)
        print(f"{name}: losses {found[name]}, as in the environment of the tests")
    print(f"Python {sys.version.split()[0]}, jax {jax.__version__}")


if __name__ == "__main__":
    main()
