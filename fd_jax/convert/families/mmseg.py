"""Checkpoints of mmsegmentation: a UPerNet on a BEiT or a Swin V1, its own or the authors'.

mmsegmentation's own backbones compute the same as those of unilm and Microsoft, under other names
(`OWN_BEIT`, `OWN_SWIN`). Its Swin takes four neighbours together by `torch.nn.Unfold`, so the
channels that a merging reads are in another order.

These files have no config that this converter reads; all sizes follow from shapes. A BEiT's maps
are those of `models.segmenter.levels`, as in its published configs. The input size of a Swin is
chosen as in `upernet_swin.py`.
"""

from collections.abc import Mapping
import dataclasses
import math
import re

from fd_jax.convert import networks
from fd_jax.convert.containers.tensors import Container
from fd_jax.convert.families import beit, swin
from fd_jax.convert.family import Family, SelfDescribed
from fd_jax.convert.networks import segmenter
from fd_jax.convert.rules.tables import Rule, Table, prefixed, renamed
from fd_jax.convert.rules.transforms import UNFOLDED, UNFOLDED_LINEAR
from fd_jax.convert.source import Part, Source
from fd_jax.errors import ConversionError, UserError
from fd_jax.models.spec import ModelSpec

NAME = "mmseg"
STATE = "state_dict/"
_CLASSIFIER = "decode_head.conv_seg"
_READS = (
    "its own BEiT (backbone.layers.0.ln1) and Swin V1 (backbone.stages), BEiT's of unilm "
    "(backbone.blocks) and Microsoft's Swin V1 (backbone.layers.0.blocks)"
)

# The authors' words, in the order in which its own stand for them.
OWN_BEIT = {
    "backbone.fpn1.": "neck.upsample_4x.",
    "backbone.fpn2.": "neck.upsample_2x.",
    "patch_embed.proj.": "patch_embed.projection.",
    ".blocks.": ".layers.",
    ".norm1.": ".ln1.",
    ".norm2.": ".ln2.",
    ".mlp.fc1.": ".ffn.layers.0.0.",
    ".mlp.fc2.": ".ffn.layers.1.",
}
OWN_SWIN = {
    "patch_embed.proj.": "patch_embed.projection.",
    ".layers.": ".stages.",
    ".attn.": ".attn.w_msa.",
    ".mlp.fc1.": ".ffn.layers.0.0.",
    ".mlp.fc2.": ".ffn.layers.1.",
}

Shapes = Mapping[str, tuple[int, ...]]

_HEADS = segmenter.upernet(norm="bn", classifier="conv_seg") + segmenter.auxiliary(
    norm="bn", classifier="conv_seg"
)
_BEIT_TABLE = prefixed(beit.TIMM, "backbone.") + segmenter.pyramid("backbone.") + _HEADS
_SWIN_TABLE = prefixed(swin.TABLE + segmenter.stage_norms("norm", first=0), "backbone.") + _HEADS


def _unfolded(rule: Rule) -> Rule:
    """The rule for a file whose mergings use Unfold."""
    if "downsample" not in str(rule.names):
        return rule
    reads = "reduction" in str(rule.names)
    return dataclasses.replace(rule, transform=UNFOLDED_LINEAR if reads else UNFOLDED)


_UNFOLDED_TABLE = dataclasses.replace(_SWIN_TABLE, rules=tuple(map(_unfolded, _SWIN_TABLE.rules)))


@dataclasses.dataclass(frozen=True)
class Naming:
    """One of the ways in which a backbone is named.

    Attributes:
      mark: a tensor that no other way has.
      table: of the authors' names.
      words: those of mmsegmentation for the authors', see `rules.tables.renamed`.
    """

    mark: str
    table: Table
    words: Mapping[str, str]

    def authors(self, name: str) -> str:
        """The authors' name of a tensor."""
        for word, own in reversed(tuple(self.words.items())):
            name = name.replace(own, word)
        return name


_BEITS = (
    Naming("backbone.fpn1.0.weight", _BEIT_TABLE, {}),
    Naming("neck.upsample_4x.0.weight", _BEIT_TABLE, OWN_BEIT),
)
_SWINS = (
    Naming("backbone.layers.0.downsample.reduction.weight", _SWIN_TABLE, {}),
    Naming("backbone.stages.0.downsample.reduction.weight", _UNFOLDED_TABLE, OWN_SWIN),
)


def source(container: Container) -> Source:
    """The source of this one file.

    Raises:
      ConversionError: it has no such decoder, another backbone, or sizes that do not fit together.
    """
    shapes = {n.removeprefix(STATE): t.shape for n, t in container.tensors.items()}
    if f"{_CLASSIFIER}.weight" not in shapes:
        raise ConversionError(
            f"{container.path}: no {_CLASSIFIER}.weight; expected a checkpoint of mmsegmentation"
        )
    try:
        spec, table = _described(shapes)
        table = networks.segmenter_table(table, spec, container)
    except UserError as error:
        raise ConversionError(f"{container.path}: {error}") from error
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise ConversionError(
            f"{container.path}: its shapes are those of no segmenter ({error!s:.80})"
        ) from error
    return Source(
        NAME,
        "checkpoint of mmsegmentation",
        {"segmenter": Part(table, spec, (STATE, ""))},
        "transformers' modules with the same weights",
    )


def _described(shapes: Shapes) -> tuple[ModelSpec, Table]:
    for namings, read in ((_BEITS, _beit_spec), (_SWINS, _swin_spec)):
        for naming in namings:
            if naming.mark in shapes:
                spec = read({naming.authors(name): shape for name, shape in shapes.items()})
                return spec, renamed(naming.table, naming.words)
    raise ConversionError(f"it has another backbone; those that can be read are {_READS}")


def _beit_spec(shapes: Shapes) -> ModelSpec:
    if "backbone.pos_embed" in shapes:
        raise ConversionError(
            "it has absolute positions (backbone.pos_embed) beside position biases, as the MAE of "
            "mmsegmentation; no network here has both"
        )
    depth = _count(shapes, r"backbone\.blocks\.(\d+)\.")
    shared = "backbone.rel_pos_bias.relative_position_bias_table" in shapes
    where = "rel_pos_bias" if shared else "blocks.0.attn"
    rows, heads = shapes[f"backbone.{where}.relative_position_bias_table"]
    width, _, patch_size, _ = shapes["backbone.patch_embed.proj.weight"]
    arch = {
        **beit.arch("B", patch_size, shared=shared),
        "image_size": patch_size * _side(rows - 3),  # three rows concern the class token
        "width": width,
        "depth": depth,
        "heads": heads,
        "mlp_width": shapes["backbone.blocks.0.mlp.fc1.weight"][0],
        "final_norm": False,
        "layer_scale": 0.1 if "backbone.blocks.0.gamma_1" in shapes else None,
    }
    blocks = [depth // 3 - 1, depth // 2 - 1, 2 * depth // 3 - 1, depth - 1]
    return ModelSpec("vit", arch, segmenter=_segmenter(shapes, "pyramid", blocks))


def _swin_spec(shapes: Shapes) -> ModelSpec:
    stages = range(segmenter.STAGES)
    tables = [
        shapes[f"backbone.layers.{s}.blocks.0.attn.relative_position_bias_table"] for s in stages
    ]
    width, _, patch_size, _ = shapes["backbone.patch_embed.proj.weight"]
    window = _side(tables[0][0])
    depths = [_count(shapes, rf"backbone\.layers\.{s}\.blocks\.(\d+)\.") for s in stages]
    arch = {
        **swin.arch("B", segmenter.windowed_size(patch_size, window), window),
        "patch_size": patch_size,
        "embed_width": width,
        "depths": depths,
        "heads": [heads for _, heads in tables],
        "mlp_ratio": shapes["backbone.layers.0.blocks.0.mlp.fc1.weight"][0] // width,
        "final_norm": False,
    }
    blocks = [sum(depths[: s + 1]) - 1 for s in stages]
    return ModelSpec("swin", arch, segmenter=_segmenter(shapes, "stage_norms", blocks))


def _segmenter(shapes: Shapes, neck: str, blocks: list[int]) -> dict:
    side = shapes.get("auxiliary_head.convs.0.conv.weight", (0,))
    return {
        "classes": shapes[f"{_CLASSIFIER}.weight"][0],
        "neck": neck,
        "decoder": "upernet",
        "channels": shapes["decode_head.fpn_bottleneck.conv.weight"][0],
        "auxiliary_channels": side[0],
        "dropout": 0.1,
        "blocks": blocks,
    }


def _side(offsets: int) -> int:
    """The side of a square of tokens whose table has a row for every offset, (2 * side - 1)^2."""
    side = (math.isqrt(offsets) + 1) // 2
    if (2 * side - 1) ** 2 != offsets:
        raise ValueError(f"a table of {offsets} offsets belongs to no square")
    return side


def _count(shapes: Shapes, pattern: str) -> int:
    """One more than the highest number that a pattern finds in the names."""
    found = (re.match(pattern, name) for name in shapes)
    return 1 + max((int(match[1]) for match in found if match), default=-1)


FAMILY = Family(
    "mmseg",
    described=SelfDescribed(
        NAME,
        f"upernet_*.pth of mmsegmentation and of the code around it, with the backbones {_READS}",
        lambda container: any(
            f"{start}{_CLASSIFIER}.weight" in container.tensors for start in (STATE, "")
        ),
        source,
    ),
)
