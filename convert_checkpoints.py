r"""Weights of public models in and out of fd_jax model folders.

    python convert_checkpoints.py import --source=dino_vitb16 \
        --input=dino_vitbase16_pretrain.pth --output=models/dino_vitb16

Commands: sources, inspect, import, export, verify; `COMMAND --help` lists the options of each.
"""

import sys

from fd_jax.convert import cli

if __name__ == "__main__":
    # A write that fails (a full disk) leaves callbacks behind; `main` prints the one message.
    sys.unraisablehook = lambda _: None
    sys.exit(cli.main())
