"""Progress messages on the terminal."""

import jax


def say(line: str) -> None:
    """Prints a line; with several processes, only the first one does."""
    if jax.process_index() == 0:
        print(line, flush=True)
