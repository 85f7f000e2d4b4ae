"""Modes that a method could not know: the hidden subclasses of digits_parity."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from mgd3.data.digits import Digits
from mgd3.data.pixels import to_pixels
from mgd3.modes.finders import KMeansModes, Modes, modes_at
from mgd3.runtime import checks
from mgd3.runtime.errors import UserError


class TrueDigitModes:
    """K modes shared out among the digits that a class holds, by k-means within each.

    With K = 5 they are the means of the five digits of a parity. Of what does not divide evenly
    the digits with most images take one more each; with fewer modes than digits the largest stay.
    """

    def __init__(self, random_state: int = 0) -> None:
        self.random_state = checks.integer("modes.random_state", random_state, minimum=0)

    def __call__(self, latents: Tensor, num_modes: int) -> Modes:
        """Modes of latents (N, 1, 8, 8), which are digits' own pixels; `UserError` for others."""
        digits = torch.tensor([self._digit(pixels) for pixels in to_pixels(latents)])  # (N,)
        known, counts = digits.unique(return_counts=True)
        by_size = counts.argsort(descending=True, stable=True)
        shares = torch.full((len(known),), num_modes // len(known))
        shares[by_size[: num_modes % len(known)]] += 1
        centers: list[Tensor] = []
        assignment = torch.zeros(len(latents), dtype=torch.long)
        for digit, share in zip(known.tolist(), shares.tolist(), strict=True):
            rows = (digits == digit).nonzero().flatten()
            if share:
                of_digit = KMeansModes(self.random_state)(latents[rows], share)
                assignment[rows] = len(centers) + of_digit.assignment
                centers += list(of_digit.centers)
            else:
                assignment[rows] = -1
        made = torch.stack(centers)
        lost = assignment < 0
        assignment[lost] = torch.cdist(latents[lost].flatten(1), made.flatten(1)).argmin(dim=1)
        return modes_at(latents, made, assignment)

    def _digit(self, pixels: Tensor) -> int:
        try:
            return self._known[pixels[0].numpy().tobytes()]
        except KeyError:
            raise UserError(
                "modes=true_digits knows scikit-learn's digits alone, in pixel space: use it with "
                "dataset=digits_parity and backbone.vae=null, or choose another modes="
            ) from None

    @cached_property
    def _known(self) -> dict[bytes, int]:
        dataset = Digits(8)
        return {
            image.content(): label
            for label in range(10)
            for image in dataset.images("train", label)
        }
