r"""Fine-tunes or probes a model folder by classification or segmentation, or measures the result.

    python finetune.py --config=configs/finetune_clip_vit_b16.py \
      --config.init_from=runs/distill_clip_vit_b16/model --workdir=runs/finetune_clip_vit_b16

The same command on the same workdir resumes. With --eval_only nothing is trained: the classifier or
segmenter in WORKDIR/model or, if there is none, in --config.init_from is measured on the held-out
split. A folder without a head is measured by nearest neighbours (--config.eval.knn=20).
"""

from absl import flags

from fd_jax.cli import measure, scripts
from fd_jax.tasks import registry
from fd_jax.typing import Config

_EVAL_ONLY = flags.DEFINE_bool(
    "eval_only", False, "Measure WORKDIR/model, or init_from if there is none, without training."
)
_PER_CLASS = flags.DEFINE_bool(
    "per_class",
    False,
    "With --eval_only: also write a table per class, and a confusion plot or a page of pictures.",
)
_THROUGHPUT = flags.DEFINE_bool(
    "throughput", False, "With --eval_only: also measure images per second, without data loading."
)


def main(config: Config, workdir: str) -> int:
    """Trains, or only measures with --eval_only."""
    if _EVAL_ONLY.value:
        measure.measure(config, workdir, per_class=_PER_CLASS.value, throughput=_THROUGHPUT.value)
        return 0
    return scripts.train(registry.make)(config, workdir)


if __name__ == "__main__":
    scripts.run(main)
