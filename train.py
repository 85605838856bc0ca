"""Distils a frozen teacher into a student with random initial weights.

    python train.py --config=configs/quickstart.py --workdir=runs/quickstart

The same command on the same workdir resumes. Any field of the config can be set on the command
line (`--config.batch_size=1024`).
"""

from fd_jax.cli import scripts
from fd_jax.tasks import registry

if __name__ == "__main__":
    scripts.run(scripts.train(registry.make))
