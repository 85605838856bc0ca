"""Segmenters: what mmsegmentation calls the tensors of a UPerNet, and transformers after it."""

from collections.abc import Set

from fd_jax.convert.networks.network import Arch
from fd_jax.convert.rules.matching import NEEDED
from fd_jax.convert.rules.tables import Drop, Rule, Table, conv, norm, target_paths
from fd_jax.convert.rules.transforms import CONV, DECONV

BINS = (1, 2, 3, 6)
STAGES = 4
LATERALS = STAGES - 1
PUBLISHED_SIZE = 512  # pixels that networks for ADE20K are trained and tested with

_COUNTERS = Table((), (Drop("*.num_batches_tracked", "how many batches a norm has seen"),))


def upernet(*, norm: str, classifier: str) -> Table:
    """The decoder; `norm` and `classifier` are the names of a BatchNorm and of the last layer."""
    head = "decode_head"
    named = [(f"psp_modules.{i}.1", f"pooling/{bins}") for i, bins in enumerate(BINS)]
    named += [(f"lateral_convs.{i}", f"lateral/{i}") for i in range(LATERALS)]
    named += [(f"fpn_convs.{i}", f"output/{i}") for i in range(LATERALS)]
    named += [("bottleneck", "bottleneck"), ("fpn_bottleneck", "fusion")]
    rules = [
        rule
        for name, path in named
        for rule in _conv_norm(f"{head}.{name}", f"decoder/{path}", norm)
    ]
    last = conv(f"{head}.{classifier}", "segmenter/decoder/classifier")
    return Table((*rules, *last)) + _COUNTERS


def auxiliary(*, norm: str, classifier: str) -> Table:
    """The fully convolutional head; arguments as in `upernet`."""
    return Table(
        (
            *_conv_norm("auxiliary_head.convs.0", "auxiliary/hidden", norm),
            *conv(f"auxiliary_head.{classifier}", "segmenter/auxiliary/classifier"),
        )
    )


def pyramid(prefix: str = "") -> Table:
    """The neck of a BEiT, whose names begin with the prefix."""
    neck = "segmenter/neck"
    return Table(
        (
            *_deconv(f"{prefix}fpn1.0", f"{neck}/stride4/deconv1"),
            *_batch_norm(f"{prefix}fpn1.1", "neck/stride4/norm"),
            *_deconv(f"{prefix}fpn1.3", f"{neck}/stride4/deconv2"),
            *_deconv(f"{prefix}fpn2.0", f"{neck}/stride8/deconv"),
        )
    )


def stage_norms(name: str, *, first: int) -> Table:
    """The neck of a Swin: the norm of each stage, whose number follows the name, from `first`."""
    return Table(
        tuple(
            rule
            for stage in range(STAGES)
            for rule in norm(f"{name}{first + stage}", f"segmenter/neck/norms/{stage}")
        )
    )


def narrowed(table: Table, paths: Set[str], arch: Arch) -> Table:
    """The rules of a table that concern the encoder and the segmenter of one network.

    Args:
      table: for networks of several kinds.
      paths: parameters that a folder of the network may hold.
      arch: its architecture.
    """
    own = {path for path in paths if path.startswith(NEEDED)}
    rules = tuple(rule for rule in table.rules if target_paths(Table((rule,)), arch) <= own)
    return Table(rules, table.drops, table.derived)


def windowed_size(patch_size: int, window: int) -> int:
    """The side in pixels nearest to PUBLISHED_SIZE at which windows divide a Swin's grids."""
    unit = patch_size * window << STAGES - 1
    return max(round(PUBLISHED_SIZE / unit), 1) * unit


def _conv_norm(name: str, path: str, norm: str) -> tuple[Rule, ...]:
    kernel = Rule(f"{name}.conv.weight", f"segmenter/{path}/conv/kernel", CONV)
    return (kernel, *_batch_norm(f"{name}.{norm}", f"{path}/norm"))


def _batch_norm(name: str, path: str) -> tuple[Rule, ...]:
    return (
        Rule(f"{name}.weight", f"segmenter/{path}/scale"),
        Rule(f"{name}.bias", f"segmenter/{path}/bias"),
        Rule(f"{name}.running_mean", f"segmenter_statistics/{path}/mean"),
        Rule(f"{name}.running_var", f"segmenter_statistics/{path}/var"),
    )


def _deconv(name: str, path: str) -> tuple[Rule, ...]:
    return Rule(f"{name}.weight", f"{path}/kernel", DECONV), Rule(f"{name}.bias", f"{path}/bias")
