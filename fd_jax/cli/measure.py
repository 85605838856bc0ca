"""Evaluation without training: accuracy and throughput of a classifier, or of a segmenter."""

import time

from etils import epath
import jax
from jax.experimental import multihost_utils
import ml_collections
import numpy as np

from fd_jax import files, model_folder, settings, sharding
from fd_jax.cli import evaluation_only, measure_segmenter
from fd_jax.console import say
from fd_jax.data.feed import Feed
from fd_jax.errors import ConfigError
from fd_jax.evaluation import classification, evaluators, passes
from fd_jax.show import pictures, tables
from fd_jax.tasks import registry
from fd_jax.tasks.classify import ClassifyTask
from fd_jax.training import account
from fd_jax.training.program import build
from fd_jax.typing import Config

THROUGHPUT_SECONDS = 10.0


def measure(
    config: Config, workdir: epath.PathLike, *, per_class: bool = False, throughput: bool = False
) -> dict[str, float]:
    """Evaluates the classifier in `workdir`/model or, if there is none, in `config.init_from`.

    With `config.eval.knn`, the nearest-neighbour accuracy of its features is measured as well; for
    a folder without a head, it is the only measurement. Writes evaluation.json into the workdir,
    and per_class.md, confusion.png and confusion.csv on request.

    Args:
      config: fine-tuning config, of which the data, evaluation and mesh fields are used.
      workdir: folder that receives the results.
      per_class: whether to write a table per class and a plot of the confusion matrix.
      throughput: whether to measure images per second of the compiled forward pass, on a batch
        that is already on the devices.

    Returns:
      Loss, top-1 and top-5 accuracy over the held-out split, and the requested figures.

    Raises:
      UserError: there is no such folder, it has no head although one is needed, or its head has
        other classes.
    """
    if registry.kind_of(config) is registry.SEGMENTATION:
        if throughput:
            raise ConfigError("--throughput measures classifiers; leave it out for a segmenter")
        return measure_segmenter.measure(config, workdir, per_class=per_class)
    workdir = epath.Path(workdir)
    config, has_head = _as_classifier(config, workdir)
    if not has_head and (per_class or throughput or not config.eval.knn):
        raise ConfigError(
            f"--eval_only: {config.init_from} has no classifier head; fine-tune or probe it first, "
            "or measure only its features with --config.eval.knn=20"
        )
    mesh = sharding.make_mesh(**config.mesh)
    sharding.check_batch(config.batch_size, 1, mesh)
    task = ClassifyTask(config)
    # The training split does not have to exist, unless its images are the neighbours.
    split = config.data.split if config.eval.knn else config.data.eval_split
    feed = Feed(**{**config.data.to_dict(), "split": split})
    say(f"data: {account.found(feed) if config.eval.knn else account.held_out(feed)}")
    task.check_data(feed)
    settings.check_neighbours(config, feed.examples("train"))
    program = build(task, config, mesh, steps_per_epoch=1, total_steps=1, elements=feed.elements)
    state = program.create(jax.random.key(0), task.load_initial())

    figures: dict[str, float] = {}
    weights = evaluators.Weights(state.params, state.extra, frozen={})
    neighbours = evaluators.Neighbours(config.eval.knn, config.batch_size)
    for evaluator in task.evaluators() if has_head else [neighbours]:
        figures |= evaluator(program, weights, feed)
    if throughput:
        figures["images_per_second"] = _throughput(program, feed, config, state)
    say("  ".join(f"{name} {value:.5f}" for name, value in figures.items()))
    if per_class:
        matrix = _confusion(program, task, feed, config, state)
    if jax.process_index() == 0:
        measured_on = f"{config.data.name}/{config.data.eval_split}"
        evaluation_only.write_record(
            workdir, folder=config.init_from, data=measured_on, figures=figures
        )
        if per_class:
            table = tables.per_class(matrix, task.spec.class_names)
            files.write_text(workdir / "per_class.md", table)
            pictures.confusion(matrix, workdir / "confusion.png", task.spec.class_names)
            content = tables.confusion(matrix, task.spec.class_names)
            files.write_text(workdir / tables.CONFUSION, content)
            if len(matrix) <= tables.MOST_ROWS:
                say(f"\n{table}")
    written = [
        "evaluation.json",
        *(["per_class.md", "confusion.png", tables.CONFUSION] if per_class else []),
    ]
    say(f"written to {workdir}: {', '.join(written)}")
    return figures


def _as_classifier(config: Config, workdir: epath.Path) -> tuple[Config, bool]:
    """Returns the config set up to evaluate the model folder, and whether that has a head."""
    config = ml_collections.ConfigDict(config.to_dict())
    kind = registry.kind_of(config)
    if kind is not registry.CLASSIFICATION:
        raise ConfigError(
            f"--eval_only measures classifiers and segmenters, and this is a config of "
            f"{kind.name}: leave it out"
        )
    config.init_from = str(evaluation_only.trained(config, workdir, "classifier"))
    spec = model_folder.load_spec(config.init_from)
    config.model.update(
        trains="all",
        final_norm=spec.arch.get("final_norm", True),
        untie_positions=False,
        freeze_blocks=0,
    )
    if "lora" in config:
        config.lora.rank = 0
    config.data.update(sizes=(), phases=())
    if spec.classes:
        config.model.update(head="keep", pooling=spec.pooling, classes=spec.classes)
    config.ema_decay = 0.0
    return ml_collections.FrozenConfigDict(config), bool(spec.classes)


def _throughput(program, feed, config, state) -> float:
    """Images per second of the forward pass alone, without compilation."""
    batch = next(iter(passes.batches(program.mesh, feed, "eval", config.batch_size, limit=1)))

    def seconds(steps: int) -> float:
        start = time.monotonic()
        for _ in range(steps):
            jax.block_until_ready(program.eval_step(state.params, state.extra, {}, batch))
        return time.monotonic() - start

    seconds(1)  # compiles
    # The first process chooses the number of steps for all, because each step needs all of them.
    steps = int(multihost_utils.broadcast_one_to_all(np.int32(THROUGHPUT_SECONDS / seconds(1)) + 1))
    return steps * config.batch_size / seconds(steps)


def _confusion(program, task, feed, config, state) -> np.ndarray:
    """Confusion matrix over the held-out split: counts [K, K], row = label, column = prediction."""

    def predict(params, extra, batch):
        logits = task.logits(params, extra, {}, batch)
        return classification.confusion(logits, batch["label"], batch["weight"])

    step = jax.jit(predict, out_shardings=sharding.replicated(program.mesh))
    batches = passes.batches(
        program.mesh, feed, "eval", config.batch_size, limit=config.eval.batches
    )
    counts = [np.asarray(step(state.params, state.extra, batch)) for batch in batches]
    return np.sum(counts, axis=0)
