"""The fields of each family's architecture, in configs and in `model.json`, with their bounds.

The bounds are far above any network of today, and so low that defining a network within them takes
seconds and little memory, whoever wrote its description.
"""

from fd_jax.fields import FLAG, Choice, Number, OrNone, Rule, Several, choice, whole
from fd_jax.models import (
    attention,
    layers,
    resnet,
    resnet_blocks,
    rotary,
    sizes,
    swin_v2,
    vit,
)

MOST_BLOCKS = 256
LIFT = OrNone(whole(1, "channels", most=2**16))  # of the features, see `spec.ModelSpec.build`
EPS = Number(above=0, most=1, unit="added to a variance or a root of one")

_SWIN: dict[str, Rule] = {
    "image_size": Several(whole(1, "pixels", most=8192), length=2, single=True),
    "patch_size": whole(1, "pixels", most=1024),
    "embed_width": whole(1, "channels", most=2**13),
    "depths": Several(whole(1, "blocks", most=MOST_BLOCKS), most=8),
    "heads": Several(whole(1, "heads", most=1024), most=8),
    "window": whole(1, "tokens on a side", most=256),
    "mlp_ratio": whole(1, "channels per channel", most=64),
    "activation": Choice(tuple(layers.ACTIVATIONS)),
    "norm_eps": EPS,
    "final_norm": FLAG,
    "lift": LIFT,
}

# The fields of `student.arch`, `model.arch`, `segment.arch` and `contrast.arch`, by family.
ARCHITECTURES: dict[str, dict[str, Rule]] = {
    "vit": {
        "image_size": Several(whole(1, "pixels", most=8192), length=2, single=True),
        "patch_size": whole(1, "pixels", most=1024),
        "width": whole(1, "channels", most=2**16),
        "depth": whole(1, "blocks", most=MOST_BLOCKS),
        "heads": whole(1, "heads", most=1024),
        "mlp_width": whole(1, "channels", most=2**18),
        "position": choice(vit.Position),
        "cls_token": FLAG,
        "registers": whole(0, "tokens", most=1024),
        "ln_pre": FLAG,
        "final_norm": FLAG,
        "activation": Choice(tuple(layers.ACTIVATIONS)),
        "norm_eps": EPS,
        "layer_scale": OrNone(Number(unit="start of the factor of each branch")),
        "qkv_bias": choice(attention.QkvBias),
        "patch_bias": FLAG,
        "rope_theta": Number(above=0, unit="base of the rotary frequencies"),
        "rope_pairs": choice(rotary.RopePairs),
        "rope_reference": OrNone(whole(0, "patches on a side; 0 does not scale", most=2**16)),
        "rope_offset": Number(least=-1024, most=1024, unit="added to the number of a patch"),
        "rope_axes": choice(rotary.RopeAxes),
        "gated_mlp": FLAG,
        "mlp_norm": FLAG,
        "attn_norm": FLAG,
        "last_width": OrNone(whole(1, "channels", most=2**16)),
        "partial_patches": choice(sizes.PartialPatches),
        "lift": LIFT,
    },
    "swin": _SWIN,
    "swin_v2": {
        **_SWIN,
        "position": choice(swin_v2.Position),
        "pretrained_windows": Several(
            whole(0, "tokens on a side; 0 takes the stage's own", most=256), most=8
        ),
        "residual_scale": Number(unit="start of the factor of each branch"),
        "extra_norm_every": whole(0, "blocks; 0 is off"),
        "windows_at": whole(1, "pixels on a side", most=8192),
    },
    "convnext": {
        "image_size": Several(whole(1, "pixels", most=8192), length=2, single=True),
        "patch_size": whole(1, "pixels", most=1024),
        "widths": Several(whole(1, "channels", most=2**16), most=8),
        "depths": Several(whole(1, "blocks", most=MOST_BLOCKS), most=8),
        "kernel_size": whole(1, "tokens on a side, an odd number", most=255),
        "grn": FLAG,
        "layer_scale": OrNone(Number(unit="start of the factor of each branch")),
        "activation": Choice(tuple(layers.ACTIVATIONS)),
        "norm_eps": EPS,
        "final_norm": FLAG,
        "final_norm_eps": OrNone(EPS),
        "lift": LIFT,
    },
    "resnet": {
        "image_size": Several(whole(1, "pixels", most=8192), length=2, single=True),
        "patch_size": whole(resnet.PATCH, "pixels", most=resnet.PATCH),
        "stem_widths": Several(whole(1, "channels", most=2**13), most=3),
        "widths": Several(whole(1, "channels", most=2**16), most=8),
        "inner_widths": Several(whole(1, "channels", most=2**16), most=8),
        "depths": Several(whole(1, "blocks", most=MOST_BLOCKS), most=8),
        "bottleneck": FLAG,
        "stride_at": choice(resnet_blocks.StrideAt),
        "shortcut": choice(resnet_blocks.Shortcut),
        "activation": Choice(tuple(layers.ACTIVATIONS)),
        "norm_eps": EPS,
        "lift": LIFT,
    },
}

# Fields that a description may leave out: few networks have what they are about, and the class has
# the default that says so.
OPTIONAL: dict[str, tuple[str, ...]] = {
    "vit": (
        "rope_theta",
        "rope_pairs",
        "rope_reference",
        "rope_offset",
        "rope_axes",
        "gated_mlp",
        "mlp_norm",
        "attn_norm",
        "last_width",
        "partial_patches",
        "lift",
    ),
    "swin": ("lift",),
    "swin_v2": ("windows_at", "lift"),
    "convnext": ("lift",),
    "resnet": ("lift",),
}
