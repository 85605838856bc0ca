"""Repositories of Hugging Face's hub: from its cache, and by their names."""

import os
from pathlib import Path
import subprocess
import sys

import numpy as np
import pytest

from fd_jax.convert.containers import hub, safetensors_io
from fd_jax.convert.containers.opening import open_container
from fd_jax.errors import ConversionError

FIRST, SECOND = "a" * 40, "b" * 40


def cached(root, *revisions, main=None, name="models--org--net"):
    """A repository as huggingface_hub lays it out in its cache."""
    repository = root / name
    for revision in revisions:
        folder = repository / "snapshots" / revision
        folder.mkdir(parents=True)
        value = np.full(2, float(revisions.index(revision)), np.float32)
        safetensors_io.write(folder / "model.safetensors", {"x": value}, {})
        (folder / "config.json").write_text("{}")
    if main:
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(main)
    return repository


def value(path):
    return float(open_container(path).tensors["x"].load()[0])


def test_a_repository_without_a_main_version_has_the_one_that_is_there(tmp_path):
    repository = cached(tmp_path, FIRST)
    assert value(repository) == value(repository / "snapshots") == 0
    assert value(repository / "snapshots" / FIRST) == 0


def test_the_main_version_counts_where_there_is_one(tmp_path):
    assert value(cached(tmp_path, FIRST, SECOND, main=SECOND)) == 1


def test_of_several_versions_one_has_to_be_named(tmp_path):
    repository = cached(tmp_path, FIRST, SECOND)
    with pytest.raises(ConversionError, match=f"holds 2 versions; name one of .*{FIRST}"):
        open_container(repository)


def test_the_whole_cache_is_answered_with_its_repositories(tmp_path):
    cached(tmp_path, FIRST)
    cached(tmp_path, FIRST, name="models--org--other")
    with pytest.raises(ConversionError, match="models--org--net, models--org--other"):
        open_container(tmp_path)


def test_a_distributed_checkpoint_is_answered_with_its_converter(tmp_path):
    (tmp_path / ".metadata").write_bytes(b"x")
    (tmp_path / "__0_0.distcp").write_bytes(b"x")
    with pytest.raises(ConversionError, match="format_utils dcp_to_torch"):
        open_container(tmp_path)


def opened(name, cache, **environment):
    """The first number in a repository, opened by a process of its own with this cache."""
    code = (
        "import sys; from fd_jax.convert.containers.opening import open_container\n"
        "from fd_jax.errors import ConversionError\n"
        "try: print(open_container(sys.argv[1]).tensors['x'].load()[0])\n"
        "except ConversionError as error: print('refused:', error)"
    )
    root = Path(hub.__file__).parents[3]
    variables = {**os.environ, "HF_HUB_CACHE": str(cache), "PYTHONPATH": str(root), **environment}
    done = subprocess.run(
        [sys.executable, "-c", code, name], env=variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(("name", "number"), [("", "0.0"), (f"@{SECOND}", "1.0")])
def test_a_cached_repository_is_opened_by_its_name_without_network(name, number, tmp_path):
    cached(tmp_path, FIRST, SECOND, main=FIRST)
    assert opened(f"hf-hub:org/net{name}", tmp_path, HF_HUB_OFFLINE="1") == number


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hf-hub:org/net", "not in the cache of huggingface_hub, and it cannot be fetched"),
        ("hf-hub:org/net/more", "expected hf-hub:ORG/NAME"),
    ],
)
def test_what_cannot_be_had_is_one_message(name, message, tmp_path):
    # An address of this machine at which nobody listens: refused at once, as without network.
    found = opened(name, tmp_path, HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="0")
    assert found.startswith(f"refused: {name}: ") and message in found
