"""Starts the command line, see `fd_jax.report.cli`."""

import sys

from fd_jax.report.cli import main

sys.exit(main())
