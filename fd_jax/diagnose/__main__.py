"""Starts the command line, see `fd_jax.diagnose.cli`."""

import sys

from fd_jax.diagnose.cli import main

sys.exit(main())
