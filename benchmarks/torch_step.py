"""One feature-distillation step in plain PyTorch, with which the benchmarks compare fd_jax's step.

The teacher is CLIP's image tower, the student a ViT with a shared position bias. The step has the
full map as its target, whitening, smooth L1, clipping and AdamW. On a CPU it computes in float32.
On a GPU it uses bfloat16 autocast, fused AdamW and scaled-dot-product attention, which takes the
same trainable bias.
"""

import contextlib
import dataclasses

import torch
from torch import nn
from torch.nn import functional

CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclasses.dataclass(frozen=True)
class Shape:
    """Shape of student and teacher, in pixels, channels and counts."""

    image: int = 224
    patch: int = 16
    width: int = 768
    depth: int = 12
    heads: int = 12
    drop_path: float = 0.2

    @property
    def side(self) -> int:
        """Patches along one side."""
        return self.image // self.patch


VIT_B16 = Shape()
VIT_L14 = Shape(patch=14, width=1024, depth=24, heads=16, drop_path=0.3)


class QuickGelu(nn.Module):
    """The activation of OpenAI's CLIP."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """X * sigmoid(1.702 x)."""
        return x * torch.sigmoid(1.702 * x)


class Block(nn.Module):
    """A pre-norm block, with layer scale and drop path for the student."""

    def __init__(
        self,
        shape: Shape,
        *,
        activation: nn.Module,
        eps: float,
        scale: float | None,
        drop: float,
        fused: bool,
    ):
        super().__init__()
        width = shape.width
        self.heads, self.fused = shape.heads, fused
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=eps), nn.LayerNorm(width, eps=eps)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), activation, nn.Linear(4 * width, width)
        )
        self.drop = drop
        self.gamma = None
        if scale is not None:
            self.gamma = nn.ParameterList(
                [nn.Parameter(torch.full((width,), scale)) for _ in range(2)]
            )

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """[B, N, D] -> [B, N, D]."""
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        out = self._attend(q, k, v, bias).transpose(1, 2).reshape(batch, tokens, width)
        x = x + self._branch(self.proj(out), 0)
        return x + self._branch(self.mlp(self.norm2(x)), 1)

    def _attend(self, q, k, v, bias):
        if self.fused:
            bias = None if bias is None else bias.to(q.dtype)
            return functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        if bias is not None:
            logits = logits + bias
        return logits.softmax(-1) @ v

    def _branch(self, y: torch.Tensor, index: int) -> torch.Tensor:
        if self.gamma is not None:
            y = self.gamma[index] * y
        if self.drop and self.training:
            keep = 1 - self.drop
            y = y * torch.floor(keep + torch.rand(len(y), 1, 1, device=y.device)) / keep
        return y


class ViT(nn.Module):
    """CLIP's image tower, or the student with its projector."""

    def __init__(self, shape: Shape, *, student: bool, fused: bool):
        super().__init__()
        width, depth, side = shape.width, shape.depth, shape.side
        eps = 1e-6 if student else 1e-5
        self.patches = nn.Conv2d(3, width, shape.patch, shape.patch, bias=student)
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        activation = nn.GELU() if student else QuickGelu()
        rates = [shape.drop_path * i / (depth - 1) if student else 0.0 for i in range(depth)]
        scale = 0.1 if student else None
        self.blocks = nn.ModuleList(
            Block(shape, activation=activation, eps=eps, scale=scale, drop=rate, fused=fused)
            for rate in rates
        )
        self.norm = nn.LayerNorm(width, eps=eps)
        self.table = None
        if student:
            self.table = nn.Parameter(torch.zeros((2 * side - 1) ** 2 + 3, shape.heads))
            self.register_buffer("index", _bias_index(side))
            self.projector = nn.Conv1d(width, width, 1)
        else:
            self.positions = nn.Parameter(torch.randn(1, 1 + side**2, width) * 0.02)
            self.pre = nn.LayerNorm(width, eps=eps)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W] -> [B, N, D]."""
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1).to(x.dtype), x], 1)
        bias = None
        if self.table is not None:
            bias = self.table[self.index].permute(2, 0, 1)
        else:
            x = self.pre(x + self.positions)
        for block in self.blocks:
            x = block(x, bias)
        x = self.norm(x)
        return x if self.table is None else self.projector(x.transpose(1, 2)).transpose(1, 2)


def _bias_index(side: int) -> torch.Tensor:
    """Row of the table for each pair of tokens; the class token's three rows are last."""
    at = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"))
    at = at.flatten(1)
    apart = at[:, :, None] - at[:, None, :] + side - 1
    last = (2 * side - 1) ** 2
    index = torch.empty(1 + side**2, 1 + side**2, dtype=torch.long)
    index[1:, 1:] = apart[0] * (2 * side - 1) + apart[1]
    index[0, :], index[:, 0], index[0, 0] = last, last + 1, last + 2
    return index


class Step:
    """The train step: call it with uint8 images [B, H, W, 3] on its device.

    Args:
      shape: shape of student and teacher.
      device: "cpu" computes in float32 with explicit attention; "cuda" uses bfloat16 autocast,
        `scaled_dot_product_attention` and fused AdamW.
      compiled: whether `torch.compile` compiles networks and loss, forward and backward.
    """

    def __init__(self, shape: Shape = VIT_B16, *, device: str = "cpu", compiled: bool = False):
        on_gpu = device != "cpu"
        self.student = ViT(shape, student=True, fused=on_gpu).to(device).train()
        self.teacher = ViT(shape, student=False, fused=on_gpu).to(device).eval()
        self.width, self.device = shape.width, device
        matrices = [p for p in self.student.parameters() if p.ndim > 1]
        vectors = [p for p in self.student.parameters() if p.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors}]
        self.optimizer = torch.optim.AdamW(groups, lr=1.2e-3, weight_decay=0.0, fused=on_gpu)
        self.scale = {
            "student": _statistics(IMAGENET, device),
            "teacher": _statistics(CLIP, device),
        }
        self.loss = torch.compile(self._loss) if compiled else self._loss

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Does one update and returns its loss, still on the device."""
        autocast = (
            torch.autocast(self.device, torch.bfloat16)
            if self.device != "cpu"
            else contextlib.nullcontext()
        )
        with autocast:
            loss = self.loss(images)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), 3.0)
        self.optimizer.step()
        return loss.detach()

    def _loss(self, images: torch.Tensor) -> torch.Tensor:
        pixels = images.permute(0, 3, 1, 2).float() / 255
        with torch.no_grad():
            mean, std = self.scale["teacher"]
            target = self.teacher((pixels - mean) / std).float()
            target = functional.layer_norm(target, (self.width,))
        mean, std = self.scale["student"]
        prediction = self.student((pixels - mean) / std).float()
        return functional.smooth_l1_loss(prediction, target, beta=2.0)


def _statistics(values: tuple, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    mean, std = (torch.tensor(value, device=device).view(1, 3, 1, 1) for value in values)
    return mean, std
