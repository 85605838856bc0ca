"""A workdir belongs to one config, whichever version of the package wrote it."""

import json

from etils import epath
import pytest

from configs import (
    distill_clip_dinov2_vit_b16,
    distill_clip_vit_b16,
    finetune_clip_vit_b16,
    segment_clip_vit_b16,
)
from fd_jax import settings
from fd_jax.errors import CheckpointError
from fd_jax.training import workdir as workdirs

CONFIGS = {
    "one teacher": distill_clip_vit_b16,
    "several": distill_clip_dinov2_vit_b16,
    "fine-tuning": finetune_clip_vit_b16,
    "segmentation": segment_clip_vit_b16,
}


def earlier(config):
    """The content of config.json before there were the fields of `settings.NEUTRAL`."""

    def older(tree, prefix=""):
        return {
            name: older(value, f"{prefix}{name}.") if isinstance(value, dict) else value
            for name, value in tree.items()
            if isinstance(value, dict) or not settings.changes_nothing(f"{prefix}{name}", value)
        }

    return older(json.loads(json.dumps(config.to_dict())))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_run_of_an_earlier_version_goes_on_without_the_new_fields(name, tmp_path):
    config = CONFIGS[name].get_config()
    old = earlier(config)
    absent = settings.flat(config.to_dict()).keys() - settings.flat(old).keys()
    of_one = {name.partition(".")[2].partition(".")[2] for name in absent if "teachers." in name}
    assert absent & settings.NEUTRAL.keys() == settings.flat(config.to_dict()).keys() & (
        settings.NEUTRAL.keys()
    )
    added = {"follow", "targets", "eval_targets", "matmuls", "target.blocks"}
    assert of_one == (added if of_one else set())
    (tmp_path / workdirs.CONFIG).write_text(json.dumps(old))
    workdirs.check(epath.Path(tmp_path), config, accept=False)


def test_a_new_field_with_another_value_is_another_config(tmp_path):
    config = distill_clip_vit_b16.get_config()
    (tmp_path / workdirs.CONFIG).write_text(json.dumps(earlier(config)))
    config.student.mask.keep = 0.5
    with pytest.raises(CheckpointError, match=r"student.mask.keep: \(absent\) -> 0.5"):
        workdirs.check(epath.Path(tmp_path), config, accept=False)


def test_a_field_that_an_earlier_run_had_is_compared(tmp_path):
    config = distill_clip_vit_b16.get_config()
    stored = json.loads(json.dumps(config.to_dict()))
    stored["student"]["mask"]["keep"] = 0.5
    (tmp_path / workdirs.CONFIG).write_text(json.dumps(stored))
    with pytest.raises(CheckpointError, match="student.mask.keep: 0.5 -> 1.0"):
        workdirs.check(epath.Path(tmp_path), config, accept=False)
