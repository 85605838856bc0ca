"""`python -m fd_jax.convert`: `convert_checkpoints.py` where there is only the package."""

from fd_jax.convert import cli

if __name__ == "__main__":
    cli.run_as_script("python -m fd_jax.convert")
