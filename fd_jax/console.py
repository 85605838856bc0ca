"""What a run prints for the person at the terminal."""

import jax


def say(line: str) -> None:
    """Prints a line, on the first process only."""
    if jax.process_index() == 0:
        print(line, flush=True)
