"""What a subject is made of.

Making it may copy what stays on the device (networks, whole sets); the work does so many steps and
gives values, wherever they are. The folder lies in one that all share, with the networks' files.
"""

from collections.abc import Callable
from pathlib import Path

import torch

Values = dict[str, torch.Tensor]
Make = Callable[[str, int, Path], Callable[[], Values]]  # of (device, amount, folder)
