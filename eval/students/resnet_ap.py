"""ResNetAP: a ResNet whose strides are average pooling (IDC; Minimax; MGD3)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from eval.students.norm import initialise_convolutions, instance_norm

LAYERS = {10: [1, 1, 1, 1], 18: [2, 2, 2, 2]}


class BasicBlock(nn.Module):
    """Two 3x3 convs, all of stride 1; where it halves, a 2x2 average pool follows the first."""

    def __init__(self, inputs: int, outputs: int, halves: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.bn1 = instance_norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = instance_norm(outputs)
        self.pool = nn.AvgPool2d(2) if halves else nn.Identity()
        self.downsample: nn.Module = nn.Identity()
        if halves or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, bias=False), self.pool, instance_norm(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, outputs, H, W), or half of H and W."""
        out = self.pool(F.relu(self.bn1(self.conv1(x))))
        return F.relu(self.bn2(self.conv2(out)) + self.downsample(x))


class Stem(nn.Module):
    """7x7 conv of *stride 1* and 4x4 average pooling above 128 px; 3x3 and 2x2 above 64."""

    def __init__(self, outputs: int, image_size: int) -> None:
        super().__init__()
        kernel, pool = (7, 4) if image_size > 128 else (3, 2) if image_size > 64 else (3, 1)
        self.conv1 = nn.Conv2d(3, outputs, kernel, padding=kernel // 2, bias=False)
        self.bn1 = instance_norm(outputs)
        self.pool = nn.AvgPool2d(pool)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, outputs, H/pool, W/pool)."""
        return self.pool(F.relu(self.bn1(self.conv1(x))))


class ResNetAP(nn.Module):
    """ResNetAP-10 or -18 with instance norm; parameter names are the original's."""

    def __init__(self, depth: int, width: int, num_classes: int, image_size: int) -> None:
        super().__init__()
        self.layer0 = Stem(width, image_size)
        blocks = LAYERS[depth]
        self.layer1 = _stage(width, width, blocks[0])
        self.layer2 = _stage(width, 2 * width, blocks[1])
        self.layer3 = _stage(2 * width, 4 * width, blocks[2])
        self.layer4 = _stage(4 * width, 8 * width, blocks[3])
        self.fc = nn.Linear(8 * width, num_classes)
        initialise_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, num_classes) of images (B, 3, H, W)."""
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.layer0(x)))))
        return self.fc(x.mean(dim=(2, 3)))


def _stage(inputs: int, outputs: int, blocks: int) -> nn.Sequential:
    first = BasicBlock(inputs, outputs, halves=inputs != outputs)
    rest = (BasicBlock(outputs, outputs, halves=False) for _ in range(blocks - 1))
    return nn.Sequential(first, *rest)
