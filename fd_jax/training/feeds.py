"""The data that each kind of task trains on; the only place that chooses a feed."""

from collections.abc import Callable
from typing import Any

from fd_jax.data.feed import Feed
from fd_jax.data.segmentation import SegmentationFeed
from fd_jax.tasks import registry, stored
from fd_jax.tasks.base import Task
from fd_jax.tasks.segment import SegmentTask
from fd_jax.typing import Config

AnyFeed = Any  # Feed or SegmentationFeed; a task and its evaluators know which of the two they get


def open_data(config: Config, task: Task) -> AnyFeed:
    """Opens the data of a run.

    Args:
      config: config of the run; `config.data` has the arguments of the feed.
      task: task of the run, with what the data has to know about its network.

    Raises:
      DataError: the data cannot be opened, or does not fit the config.
    """
    return _OPEN[registry.kind_of(config).section](config, task)


def _pictures(config: Config, task: Task) -> Feed:
    del task
    return Feed(**config.data)


def _views(config: Config, task: Task) -> Feed:
    del task
    return Feed(
        **config.data,
        targets=stored.folders(config),
        eval_targets=stored.folders(config, stored.HELD_OUT),
    )


def _labelled_pixels(config: Config, task: SegmentTask) -> SegmentationFeed:
    return SegmentationFeed(**config.data, classes=config.segment.classes, fill=task.fill)


_OPEN: dict[str, Callable[[Config, Any], AnyFeed]] = {
    registry.DISTILLATION.section: _views,
    registry.CLASSIFICATION.section: _pictures,
    registry.SEGMENTATION.section: _labelled_pixels,
    registry.CONTRAST.section: _pictures,
}
