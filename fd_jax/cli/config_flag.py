"""The flag that names a config, which is checked as it is read."""

from absl import flags
import ml_collections

from fd_jax import settings
from fd_jax.errors import ConfigError
from fd_jax.typing import Config


def read(flag: flags.FlagHolder) -> Config:
    """Returns the config that a flag of config_flags names, after `settings.check`.

    Every command that takes a config reads it here, before it does anything else.

    Raises:
      ConfigError: the file does not exist or cannot be read, or settings in it are wrong.
    """
    try:
        config = ml_collections.FrozenConfigDict(flag.value)
    except OSError as error:  # raised when a field is read for the first time
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"--{flag.name}: cannot read the config ({reason}); name a file such as configs/NAME.py"
        ) from None
    settings.check(config)
    return config
