r"""Fine-tunes or probes a model folder by classification, or measures one that was.

    python finetune.py --config=configs/finetune_clip_vit_b16.py \
      --config.init_from=runs/distill_clip_vit_b16/model --workdir=runs/finetune_clip_vit_b16

The same command on the same workdir resumes. With --eval_only nothing is trained: the classifier
in WORKDIR/model, or else the one in --config.init_from, is measured on the held-out split; a
folder without a head by its nearest neighbours (--config.eval.knn=20).
"""

from absl import flags

from fd_jax.cli import measure, scripts
from fd_jax.tasks import registry
from fd_jax.typing import Config

_EVAL_ONLY = flags.DEFINE_bool(
    "eval_only", False, "Measure WORKDIR/model, or else init_from, instead of training."
)
_PER_CLASS = flags.DEFINE_bool(
    "per_class", False, "With --eval_only: also a table per class and a picture of the confusions."
)
_THROUGHPUT = flags.DEFINE_bool(
    "throughput", False, "With --eval_only: images per second of the forward pass, data left out."
)


def main(config: Config, workdir: str) -> int:
    """Trains, or measures where --eval_only asks for it."""
    if _EVAL_ONLY.value:
        measure.measure(config, workdir, per_class=_PER_CLASS.value, throughput=_THROUGHPUT.value)
        return 0
    return scripts.train(registry.make)(config, workdir)


if __name__ == "__main__":
    scripts.run(main)
