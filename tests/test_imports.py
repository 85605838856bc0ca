"""The core can be imported and used without the optional packages."""

import subprocess
import sys

# Packages of the extras; none of them is needed to define, compile and run a step.
EXTRAS = ("PIL", "clu", "cv2", "grain", "libtpu", "tensorflow", "tensorflow_datasets", "torch")

SCRIPT = f"""
import sys
sys.modules.update(dict.fromkeys({EXTRAS}))  # importing any of them raises ImportError
import jax
from configs import base
from fd_jax import losses, model_folder, optimizer, sharding
from fd_jax.cost import flops, hardware, utilization
from fd_jax.evaluation import agreement, classification, evaluators, neighbours, passes
from fd_jax.models.spec import ModelSpec
from fd_jax.tasks import registry
from fd_jax.training import program, step

config = base.distillation(teacher="", drop_path=0.1)
config.student.arch.depth = 1
spec = ModelSpec("vit", config.student.arch.to_dict())
task = registry.make(config, {{"teacher": spec}})
mesh = sharding.make_mesh(devices=jax.devices()[:1])
run = program.build(task, config, mesh, steps_per_epoch=1, total_steps=1)
print(run.batch["image"].shape, task.flops().model > 0)
"""


def test_a_step_can_be_built_without_any_package_of_the_extras():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.stdout == "(2048, 224, 224, 3) True\n", done.stderr
