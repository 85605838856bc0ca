r"""Weights of public models in and out of fd_jax model folders.

    python convert_checkpoints.py import --source=dino_vitb16 \
        --input=dino_vitbase16_pretrain.pth --output=models/dino_vitb16

Commands: sources, inspect, import, export, verify; `COMMAND --help` lists the options of each.
The same without a checkout: `python -m fd_jax.convert`.
"""

from fd_jax.convert import cli

if __name__ == "__main__":
    cli.run_as_script("convert_checkpoints.py")
