"""ConvNet-D (Gidaris & Komodakis 2018; as used by DC, IDC, Minimax and MGD3)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from eval.students.norm import instance_norm


class Layers(nn.Module):
    """The convolutions and their norms, under the original's parameter names."""

    def __init__(self, depth: int, width: int) -> None:
        super().__init__()
        channels = [3] + [width] * depth
        self.conv = nn.ModuleList(nn.Conv2d(c, width, 3, padding=1) for c in channels[:-1])
        self.norm = nn.ModuleList(instance_norm(width) for _ in range(depth))


class ConvNet(nn.Module):
    """`depth` times: 3x3 conv with bias, instance norm, ReLU, 2x2 average pooling; then Linear.

    PyTorch's default initialisation. Parameter names are the original's.
    """

    def __init__(self, depth: int, width: int, num_classes: int, image_size: int) -> None:
        super().__init__()
        self.layers = Layers(depth, width)
        side = image_size // 2**depth
        self.classifier = nn.Linear(width * side * side, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, num_classes) of images (B, 3, H, W)."""
        for conv, norm in zip(self.layers.conv, self.layers.norm, strict=True):
            x = F.avg_pool2d(F.relu(norm(conv(x))), 2)
        return self.classifier(x.flatten(1))
