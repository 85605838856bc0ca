"""One feature-distillation step in eager PyTorch, written plainly: the yardstick of step_vs_torch.

CLIP ViT-B/16 as teacher, a ViT-B/16 with a shared position bias as student, the whole map,
whitening, smooth-L1, clipping and AdamW; float32, nothing compiled.
"""

import math

import torch
from torch import nn
from torch.nn import functional

IMAGE, PATCH, WIDTH, DEPTH, HEADS = 224, 16, 768, 12, 12
SIDE = IMAGE // PATCH
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class QuickGelu(nn.Module):
    """The activation of OpenAI's CLIP."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """X * sigmoid(1.702 x)."""
        return x * torch.sigmoid(1.702 * x)


class Block(nn.Module):
    """A pre-norm block; layer scale and drop path where the student has them."""

    def __init__(self, *, activation: nn.Module, eps: float, scale: float | None, drop: float):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH, eps=eps), nn.LayerNorm(WIDTH, eps=eps)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), activation, nn.Linear(4 * WIDTH, WIDTH)
        )
        self.drop = drop
        self.gamma = None
        if scale is not None:
            self.gamma = nn.ParameterList(
                [nn.Parameter(torch.full((WIDTH,), scale)) for _ in range(2)]
            )

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """[B, N, D] -> [B, N, D]."""
        batch, tokens, _ = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, tokens, 3, HEADS, WIDTH // HEADS)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        logits = (q * (WIDTH // HEADS) ** -0.5) @ k.transpose(-2, -1)
        if bias is not None:
            logits = logits + bias
        out = (logits.softmax(-1) @ v).transpose(1, 2).reshape(batch, tokens, WIDTH)
        x = x + self._branch(self.proj(out), 0)
        return x + self._branch(self.mlp(self.norm2(x)), 1)

    def _branch(self, y: torch.Tensor, index: int) -> torch.Tensor:
        if self.gamma is not None:
            y = self.gamma[index] * y
        if self.drop and self.training:
            keep = 1 - self.drop
            y = y * torch.floor(keep + torch.rand(len(y), 1, 1)) / keep
        return y


class ViT(nn.Module):
    """CLIP's image tower, or the student with its projector."""

    def __init__(self, *, student: bool):
        super().__init__()
        self.student = student
        eps = 1e-6 if student else 1e-5
        self.patches = nn.Conv2d(3, WIDTH, PATCH, PATCH, bias=student)
        self.cls = nn.Parameter(torch.zeros(1, 1, WIDTH))
        activation = nn.GELU() if student else QuickGelu()
        rates = [0.2 * i / (DEPTH - 1) if student else 0.0 for i in range(DEPTH)]
        self.blocks = nn.ModuleList(
            Block(activation=activation, eps=eps, scale=0.1 if student else None, drop=rate)
            for rate in rates
        )
        self.norm = nn.LayerNorm(WIDTH, eps=eps)
        if student:
            self.table = nn.Parameter(torch.zeros((2 * SIDE - 1) ** 2 + 3, HEADS))
            self.register_buffer("index", _bias_index())
            self.projector = nn.Conv1d(WIDTH, WIDTH, 1)
        else:
            self.positions = nn.Parameter(torch.randn(1, 1 + SIDE**2, WIDTH) * 0.02)
            self.pre = nn.LayerNorm(WIDTH, eps=eps)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W] -> [B, N, D]."""
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1)
        bias = None
        if self.student:
            bias = self.table[self.index].permute(2, 0, 1)
        else:
            x = self.pre(x + self.positions)
        for block in self.blocks:
            x = block(x, bias)
        x = self.norm(x)
        return self.projector(x.transpose(1, 2)).transpose(1, 2) if self.student else x


def _bias_index() -> torch.Tensor:
    """Row of the table for each pair of tokens, the class token's three kinds last."""
    at = torch.stack(torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij"))
    at = at.flatten(1)
    apart = at[:, :, None] - at[:, None, :] + SIDE - 1
    last = (2 * SIDE - 1) ** 2
    index = torch.empty(1 + SIDE**2, 1 + SIDE**2, dtype=torch.long)
    index[1:, 1:] = apart[0] * (2 * SIDE - 1) + apart[1]
    index[0, :], index[:, 0], index[0, 0] = last, last + 1, last + 2
    return index


class Step:
    """The train step: call it with uint8 images [B, H, W, 3]."""

    def __init__(self):
        self.student, self.teacher = ViT(student=True).train(), ViT(student=False).eval()
        matrices = [p for p in self.student.parameters() if p.ndim > 1]
        vectors = [p for p in self.student.parameters() if p.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors}]
        self.optimizer = torch.optim.AdamW(groups, lr=1.2e-3, weight_decay=0.0)
        self.scale = {"student": _statistics(IMAGENET), "teacher": _statistics(CLIP)}

    def __call__(self, images: torch.Tensor) -> float:
        """One update; its loss."""
        pixels = images.permute(0, 3, 1, 2).float() / 255
        with torch.no_grad():
            mean, std = self.scale["teacher"]
            target = functional.layer_norm(self.teacher((pixels - mean) / std), (WIDTH,))
        mean, std = self.scale["student"]
        prediction = self.student((pixels - mean) / std)
        loss = functional.smooth_l1_loss(prediction, target, beta=2.0)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), 3.0)
        self.optimizer.step()
        assert math.isfinite(loss.item())
        return loss.item()


def _statistics(values: tuple) -> tuple[torch.Tensor, torch.Tensor]:
    mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in values)
    return mean, std
