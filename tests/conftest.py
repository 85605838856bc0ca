"""Every test runs on eight fake CPU devices, in float32 with exact matmuls."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture(scope="session")
def embedded_data(tmp_path_factory):
    """A data_dir with photos and digits, prepared once."""
    from fd_jax.data import prepare

    folder = str(tmp_path_factory.mktemp("data"))
    for name in ("photos", "digits"):
        prepare.prepare(name, data_dir=folder)
    return folder
