"""The flags by which commands that compute with a teacher alone are told which one, and how."""

import argparse

from fd_jax.console import at_least
from fd_jax.tasks.teacher import Teacher


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of which `teacher` takes the values, and `--before_norm`."""
    parser.add_argument("--teacher", required=True, help="model folder")
    parser.add_argument(
        "--image_size", type=at_least(0), default=0, help="input size of the teacher in the run"
    )
    parser.add_argument("--stages", type=at_least(0), default=0, help="teacher.stages of the run")
    parser.add_argument("--before_norm", action="store_true", help="for target.after_norm=False")
    parser.add_argument(
        "--dtype", default="auto", help="dtype of the teacher, as in the run: auto, float32, ..."
    )


def teacher(args: argparse.Namespace, *, matmuls: str = "") -> Teacher:
    """The teacher of these flags.

    Args:
      args: their values.
      matmuls: what its linear layers multiply, see `Teacher`.

    Raises:
      ConfigError, ModelFolderError: see `Teacher.of_folder`.
    """
    return Teacher.of_folder(
        args.teacher,
        image_size=args.image_size,
        stages=args.stages,
        dtype=args.dtype,
        matmuls=matmuls,
    )
