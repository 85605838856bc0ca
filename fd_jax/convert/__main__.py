"""`python -m fd_jax.convert`: `convert_checkpoints.py` where there is only the package."""

from typing import NoReturn

from fd_jax import console
from fd_jax.convert import cli


def run() -> NoReturn:
    """The console script `fd-jax-convert`."""
    cli.run_as_script(console.called("python -m fd_jax.convert"))


if __name__ == "__main__":
    run()
