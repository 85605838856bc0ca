"""`python -m fd_jax.targets`."""

import sys

from fd_jax.targets.cli import main

if __name__ == "__main__":
    sys.exit(main())
