"""Evaluation without training: accuracy of a classifier folder, and how fast it runs."""

import json
import time

from etils import epath
import jax
from jax.experimental import multihost_utils
import ml_collections
import numpy as np

from fd_jax import files, model_folder, sharding
from fd_jax.console import say
from fd_jax.data.feed import Feed
from fd_jax.errors import ConfigError
from fd_jax.evaluation import classification, evaluators, passes
from fd_jax.show import pictures, tables
from fd_jax.tasks.classify import ClassifyTask
from fd_jax.training.program import build
from fd_jax.typing import Config

THROUGHPUT_SECONDS = 10.0


def measure(
    config: Config, workdir: epath.PathLike, *, per_class: bool = False, throughput: bool = False
) -> dict[str, float]:
    """Evaluates the classifier in `workdir`/model, or else the one in `config.init_from`.

    With `config.eval.knn` the nearest neighbours of its features are measured as well, and a
    folder without a head by them alone. Writes evaluation.json into the workdir; per_class.md and
    confusion.png where asked.

    Args:
      config: of fine-tuning; its data, evaluation and mesh fields count.
      workdir: receives the results.
      per_class: also a table per class and a picture of the confusion matrix.
      throughput: also images per second of the compiled forward pass on batches that are there.

    Returns:
      Loss, top-1 and top-5 accuracy over the held-out split, and what was asked for.

    Raises:
      UserError: no such folder, no head in it where one is needed, or one for other classes.
    """
    workdir = epath.Path(workdir)
    config, has_head = _as_classifier(config, workdir)
    if not has_head and (per_class or throughput or not config.eval.knn):
        raise ConfigError(
            f"--eval_only: {config.init_from} has no classifier head; fine-tune or probe it first, "
            "or measure its features alone with --config.eval.knn=20"
        )
    mesh = sharding.make_mesh(**config.mesh)
    sharding.check_batch(config.batch_size, 1, mesh)
    task = ClassifyTask(config)
    # The training split need not be there, unless its pictures are the neighbours.
    split = config.data.split if config.eval.knn else config.data.eval_split
    feed = Feed(**{**config.data.to_dict(), "split": split})
    task.check_data(feed)
    program = build(task, config, mesh, steps_per_epoch=1, total_steps=1, elements=feed.elements)
    state = program.create(jax.random.key(0), task.load_initial())

    found: dict[str, float] = {}
    weights = evaluators.Weights(state.params, state.extra, frozen={})
    neighbours = evaluators.Neighbours(config.eval.knn, config.batch_size)
    for evaluator in task.evaluators() if has_head else [neighbours]:
        found |= evaluator(program, weights, feed)
    if throughput:
        found["images_per_second"] = _throughput(program, feed, config, state)
    say("  ".join(f"{name} {value:.5f}" for name, value in found.items()))
    if per_class:
        matrix = _confusion(program, task, feed, config, state)
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        record = {
            "init_from": config.init_from,
            "data": f"{config.data.name}/{config.data.eval_split}",
            **found,
        }
        files.write_text(workdir / "evaluation.json", json.dumps(record, indent=2) + "\n")
        if per_class:
            files.write_text(workdir / "per_class.md", tables.per_class(matrix))
            pictures.confusion(matrix, workdir / "confusion.png")
    say(f"written to {workdir}")
    return found


def _as_classifier(config: Config, workdir: epath.Path) -> tuple[Config, bool]:
    """The config with the folder named and its own head kept; whether it has one."""
    config = ml_collections.ConfigDict(config.to_dict())
    if not config.data.eval_split:
        raise ConfigError("--eval_only measures data.eval_split, which is empty; name a split")
    if (workdir / "model").exists():
        config.init_from = str(workdir / "model")
    if not config.init_from:
        raise ConfigError(
            f"--eval_only needs a trained classifier: there is no {workdir / 'model'}; "
            "name its folder in --config.init_from"
        )
    spec = model_folder.load_spec(config.init_from)
    config.model.update(
        trains="all",
        final_norm=spec.arch.get("final_norm", True),
        untie_positions=False,
    )
    if spec.classes:
        config.model.update(head="keep", pooling=spec.pooling, classes=spec.classes)
    config.ema_decay = 0.0
    return ml_collections.FrozenConfigDict(config), bool(spec.classes)


def _throughput(program, feed, config, state) -> float:
    """Images per second of the forward pass alone, compilation left out."""
    batch = next(iter(passes.batches(program.mesh, feed, "eval", config.batch_size, limit=1)))

    def seconds(steps: int) -> float:
        began = time.monotonic()
        for _ in range(steps):
            jax.block_until_ready(program.eval_step(state.params, state.extra, {}, batch))
        return time.monotonic() - began

    seconds(1)  # compiles
    # The first process decides for all how often: a step waits for every one of them.
    steps = int(multihost_utils.broadcast_one_to_all(np.int32(THROUGHPUT_SECONDS / seconds(1)) + 1))
    return steps * config.batch_size / seconds(steps)


def _confusion(program, task, feed, config, state) -> np.ndarray:
    """[K, K] counts, row = label, column = prediction."""

    def predict(params, extra, batch):
        logits = task.logits(params, extra, {}, batch)
        return classification.confusion(logits, batch["label"], batch["weight"])

    step = jax.jit(predict, out_shardings=sharding.replicated(program.mesh))
    batches = passes.batches(
        program.mesh, feed, "eval", config.batch_size, limit=config.eval.batches
    )
    counts = [np.asarray(step(state.params, state.extra, batch)) for batch in batches]
    return np.sum(counts, axis=0)
