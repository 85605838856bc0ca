"""Stored targets of data in which a file is skipped that is only known once it is read."""

import numpy as np
import pytest

from fd_jax.data import datasets, feed
from fd_jax.data.stored import records, replay
from fd_jax.targets import cli
from tests import tiny
from tests.data.conftest import PICTURES_EACH, SKIPPED

COUNT = 2 * PICTURES_EACH


def test_a_skipped_file_has_no_map_and_is_no_unreadable_picture(teacher, imagenet, tmp_path):
    flags = [f"--teacher={teacher}", "--data=imagenet2012", f"--data_dir={imagenet}"]
    flags += [f"--output={tmp_path / 'targets'}", "--batch_size=8", "--skip_official"]
    assert cli.main(flags) == 0
    store = replay.Store(tmp_path / "targets")
    plain = datasets.open_dataset("imagenet2012", "train", data_dir=imagenet)
    (skipped,) = [i for i in range(COUNT) if SKIPPED in plain.describe(i)]
    for index in range(COUNT):
        if index == skipped:
            with pytest.raises(datasets.SkippedError):
                store.read(index, 0)
        else:
            assert store.read(index, 0)[0].state == records.WHOLE
    (shard,) = store.description.shards
    assert (shard.records, shard.maps, shard.unreadable) == (COUNT, COUNT - 1, 0)

    data = dict(tiny.config().data)
    data.update(name="imagenet2012", data_dir=imagenet, eval_split="", skip_official=True)
    opened = feed.Feed(**data, targets={"": str(tmp_path / "targets")})
    loader = opened.train(batch_size=COUNT, seed=0, rows=np.arange(COUNT), start_step=0)
    batch = next(loader)
    loader.close()
    assert skipped not in batch["index"] and not loader.replaced
    assert len(set(batch["index"].tolist())) == COUNT - 1
