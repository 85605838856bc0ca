"""A ResNet in plain PyTorch, of the parameters of ours: [B, 3, H, W] -> [B, D, h, w].

Written from the papers and torchvision's source, without our modules.
"""

import torch.nn.functional as F


class Run:
    """One forward pass; in training the running statistics are updated as BatchNorm2d does."""

    def __init__(self, arch, tensors, *, training):
        """`tensors`: by the paths of our encoder, kernels [h, w, in, out]."""
        self.arch, self.tensors, self.training = arch, tensors, training
        self.running = {
            name: tensor.detach().clone()
            for name, tensor in tensors.items()
            if name.endswith(("/mean", "/var"))
        }

    def __call__(self, images):
        x = self.stem(images)
        for stage, depth in enumerate(self.arch["depths"]):
            for index in range(depth):
                x = self.block(x, f"stages/{stage}/blocks/{index}", 2 if stage and not index else 1)
        return x

    def stem(self, images):
        count = len(self.arch["stem_widths"])
        x = self.normed(self.conv(images, "patch_embed", 2), "patch_norm")
        for index in range(count - 1):
            x = self.both(self.act(x), f"stem/{index}", 1)
        return F.max_pool2d(self.act(x), 3, 2, 1)

    def block(self, x, at, stride):
        count = 3 if self.arch["bottleneck"] else 2
        strided = 1 if self.arch["stride_at"] == "second" else 0
        y = x
        for index in range(count):
            y = self.both(y, f"{at}/branch/{index}", stride if index == strided else 1)
            y = self.act(y) if index < count - 1 else y
        if f"{at}/shortcut/conv/kernel" in self.tensors:
            if self.arch["shortcut"] == "pooled" and stride == 2:
                x = F.avg_pool2d(x, 2, 2, ceil_mode=True, count_include_pad=False)
                stride = 1
            x = self.both(x, f"{at}/shortcut", stride)
        return self.act(x + y)

    def both(self, x, at, stride):
        return self.normed(self.conv(x, f"{at}/conv", stride), f"{at}/norm")

    def conv(self, x, at, stride):
        kernel = self.tensors[f"{at}/kernel"].permute(3, 2, 0, 1)
        return F.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2)

    def normed(self, x, at):
        return F.batch_norm(
            x,
            self.running[f"{at}/mean"],
            self.running[f"{at}/var"],
            self.tensors[f"{at}/scale"],
            self.tensors[f"{at}/bias"],
            training=self.training,
            momentum=0.1,
            eps=self.arch["norm_eps"],
        )

    def act(self, x):
        return {"relu": F.relu, "silu": F.silu}[self.arch["activation"]](x)


def tokens(x):
    """[B, D, H, W] -> [B, H * W, D]."""
    return x.flatten(2).transpose(1, 2)
