"""GLaD's students (Cazenavette et al. 2023), from its networks/: `cross_arch_glad`.

All start from PyTorch's default initialisation.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eval.students.norm import instance_norm
from eval.students.resnet import resnet_in

_VGG11 = (64, "pool", 128, "pool", 256, 256, "pool", 512, 512, "pool", 512, 512, "pool")
_DIM, _DEPTH, _HEADS, _DROPOUT = 512, 10, 8, 0.1


def alexnet_glad(num_classes: int, image_size: int) -> nn.Module:
    """Five convolutions, three poolings, one Linear; no norm, no dropout."""
    side = image_size // 8
    return nn.Sequential(
        nn.Conv2d(3, 128, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(128, 192, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(192, 256, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(256, 192, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(192, 192, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(192 * side * side, num_classes),
    )


def vgg11_glad(num_classes: int) -> nn.Module:
    """VGG-11's convolutions with instance norm, adaptive max pooling to 7x7, one Linear.

    Below 224 px that pooling repeats: at 128 px it makes 7x7 of 4x4.
    """
    layers: list[nn.Module] = []
    inputs = 3
    for outputs in _VGG11:
        if isinstance(outputs, str):
            layers.append(nn.MaxPool2d(2))
            continue
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), instance_norm(outputs), nn.ReLU()]
        inputs = outputs
    head = (nn.AdaptiveMaxPool2d(7), nn.Flatten(), nn.Linear(512 * 7 * 7, num_classes))
    return nn.Sequential(*layers, *head)


def resnet18_glad(num_classes: int) -> nn.Module:
    """ResNet-18 with instance norm and the stem of small images, 3x3 of stride 1, at every size."""
    net = resnet_in(18, num_classes, image_size=32)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            module.reset_parameters()
    return net


class Block(nn.Module):
    """Self-attention, then an MLP as wide as its input, each added to what it reads; no norm."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(_DIM, 3 * _DIM, bias=False)
        self.out = nn.Sequential(nn.Linear(_DIM, _DIM), nn.Dropout(_DROPOUT))
        self.mlp = nn.Sequential(
            nn.Linear(_DIM, _DIM),
            nn.GELU(),
            nn.Dropout(_DROPOUT),
            nn.Linear(_DIM, _DIM),
            nn.Dropout(_DROPOUT),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, N, 512) to the same."""
        q, k, v = self.qkv(x).unflatten(2, (3, _HEADS, -1)).permute(2, 0, 3, 1, 4)  # (B, 8, N, 64)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(x)


class ViT(nn.Module):
    """Vision transformer on a class token, of width 512 and depth 10, without any LayerNorm.

    GLaD took the norms out of a library's pre-norm ViT. Without them SGD at the hard-label
    protocol's rate 0.01 diverges on digits; theirs is 0.001, warmed up over half of the epochs.
    """

    def __init__(self, num_classes: int, image_size: int, patch: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, _DIM, patch, stride=patch)
        self.token = nn.Parameter(torch.randn(1, 1, _DIM))
        self.position = nn.Parameter(torch.randn(1, (image_size // patch) ** 2 + 1, _DIM))
        self.dropout = nn.Dropout(_DROPOUT)
        self.blocks = nn.Sequential(*(Block() for _ in range(_DEPTH)))
        self.head = nn.Linear(_DIM, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, num_classes) of images (B, 3, H, W)."""
        x = self.patches(x).flatten(2).transpose(1, 2)  # (B, N, 512)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.position
        return self.head(self.blocks(self.dropout(x))[:, 0])
