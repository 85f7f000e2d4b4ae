"""How a distilled set compares with the real one in a feature space.

Features are one (images, D) tensor per class, in label order: (N, D) real, (K, D) made. Distances
are Euclidean, in the features' unit.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from eval.metrics.distances import (
    checked,
    distances_to_real,
    nearer_than,
    nearest_distances,
)
from eval.metrics.planes import TsneScores
from eval.results.layout import NONE, Layout
from mgd3.runtime import checks

_ROWS = 1024  # of a matrix of distances or kernel values held at once
_ROUNDING = 1e-6  # of a norm; distances by matrix products are off by some 1e-8 of it


@dataclass(frozen=True, kw_only=True)
class SetMetrics:
    """One distilled set in one feature space.

    From `precision` on, but for `modes_shown`, all classes are pooled. All but `mmd` depend on how
    many images there are (a few made ones cannot cover many real ones, nor show their covariance):
    compare sets of one size with the same real images.
    """

    num_real: int
    num_made: int
    diversity: list[float | None]  # by class; None for a class of one image
    representativeness: list[float]  # by class; a distance, so lower is more representative
    diversity_mean: float | None  # over samples, those alone in their class left out
    representativeness_mean: float  # over samples
    pairwise: float | None  # mean distance of a class's pairs, mean over classes that have pairs
    precision: float  # share of the made inside the real images' balls
    recall: float  # share of the real inside the made images' balls
    density: float  # real balls around a made image, per k; may exceed 1
    coverage: float  # share of the real whose ball holds a made image
    modes_shown: float | None  # share of a class's modes that have an image; None without two
    frechet: float  # squared, as FID is
    mmd: float  # squared and unbiased, so it may fall below 0
    nearer: float | None  # share of pairs in which a made image is nearer to a real than an unseen


class RealFeatures:
    """Real features by class, and what of them alone every set's metrics need: computed once."""

    def __init__(self, features: Sequence[Tensor]) -> None:
        """Raises `UserError` for features that cannot be compared."""
        self.by_class = checked(features, "real features", like=features)
        self.all = torch.cat(self.by_class)
        self.center = self.all.mean(dim=0)
        self._radii: dict[int, Tensor] = {}
        self._modes: dict[tuple[int, int], Tensor] = {}

    def radii(self, k: int) -> Tensor:
        """Distance of each image to its k-th nearest other, (N,)."""
        if k not in self._radii:
            self._radii[k] = _radii(self.all - self.center, k)
        return self._radii[k]

    def modes(self, label: int, k: int) -> Tensor:
        """Centres (k, D) of a class, found as MGD3 finds them in latents (its section 4.1)."""
        from sklearn.cluster import KMeans  # a second to import

        if (label, k) not in self._modes:
            found = KMeans(k, random_state=0, n_init="auto").fit(self.by_class[label].numpy())
            self._modes[label, k] = torch.from_numpy(found.cluster_centers_)
        return self._modes[label, k]

    @cached_property
    def root(self) -> Tensor:
        """Of the covariance, as `_root`."""
        return _root(self.all)

    @cached_property
    def within(self) -> float:
        """Mean kernel of two different images."""
        return _within(self.all)


def measure(
    real: Sequence[Tensor] | RealFeatures,
    made: Sequence[Tensor],
    neighbors: int = 50,
    k: int = 5,
    unseen: Sequence[Tensor] | None = None,
) -> SetMetrics:
    """All metrics of one set; features are compared as they are, not normalised.

    Diversity of a sample: distance to the nearest other made sample of its class.
    Representativeness: mean distance to the `neighbors` nearest real samples of its class (the
    paper's section 5.2 leaves the class open), to all of them in a smaller class. Precision to
    coverage: balls that reach to the `k`-th nearest neighbour, or to the last where there are
    fewer. Modes: as many of a class as it has made images, by k-means of its real ones; one is
    shown if it is the nearest mode of some made image. `unseen` are images that no generator was
    trained on, by which copies are told (`nearer_than`). Raises `UserError` for features that
    cannot be compared.
    """
    checks.integer("neighbors", neighbors, minimum=1)
    checks.integer("k", k, minimum=1)
    known = real if isinstance(real, RealFeatures) else RealFeatures(real)
    own = known.by_class
    made = checked(made, "made features", like=own)
    nearest = [nearest_distances(m) for m in made]
    to_real = [distances_to_real(m, r, neighbors) for m, r in zip(made, own, strict=True)]
    pairs = [torch.pdist(m).mean().item() for m in made if len(m) > 1]
    all_made = torch.cat(made)
    precision, recall, density, coverage = _balls(known, all_made, k)
    return SetMetrics(
        num_real=len(known.all),
        num_made=len(all_made),
        diversity=[_mean(d) for d in nearest],
        representativeness=[d.mean().item() for d in to_real],
        diversity_mean=_mean(torch.cat(nearest)),
        representativeness_mean=torch.cat(to_real).mean().item(),
        pairwise=statistics.fmean(pairs) if pairs else None,
        precision=precision,
        recall=recall,
        density=density,
        coverage=coverage,
        modes_shown=_modes_shown(known, made),
        frechet=_frechet(known, all_made),
        mmd=_mmd(known, all_made),
        nearer=None
        if unseen is None
        else nearer_than(made, checked(unseen, "unseen features", like=own), own),
    )


_COLUMNS = {
    "diversity_mean": "diversity ↑",
    "representativeness_mean": "distance to real ↓",
    "pairwise": "pairwise distance ↑",
    "precision": "precision ↑",
    "recall": "recall ↑",
    "density": "density ↑",
    "coverage": "coverage ↑",
    "modes_shown": "modes shown ↑",
    "frechet": "Fréchet ↓",
    "mmd": "MMD² ↓",
    "nearer": "nearer than unseen (copies: 1)",
}


def metrics_layout(
    measured: Mapping[str, Sequence[SetMetrics]],
    space: str,
    tsne: Mapping[str, TsneScores] | None = None,
) -> Layout:
    """A line per method: mean ± population deviation over its n sets, an arrow towards better.

    `space` names the features' network; `tsne`, where given, adds the dataset scores of these
    methods' planes. A cell is empty where a set has no such value.
    """
    columns = {
        "method": list(measured),
        "images": [", ".join(map(str, sorted({s.num_made for s in m}))) for m in measured.values()],
        "n": [str(len(sets)) for sets in measured.values()],
    }
    for name, header in _COLUMNS.items():
        if all(getattr(s, name) is None for m in measured.values() for s in m):
            continue
        columns[header] = [_cell([getattr(s, name) for s in m]) for m in measured.values()]
    if tsne is not None:
        for what in ("diversity", "representativeness"):
            scores = [getattr(tsne.get(method), f"{what}_mean", None) for method in measured]
            columns[f"t-SNE {what} ↑"] = ["" if s is None else f"{s:.4g}" for s in scores]
    return Layout.of_columns(f"sets in the feature space of {space}", columns)


def _cell(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return ""
    spread = f"{statistics.pstdev(known):.2g}" if len(known) > 1 else NONE
    return f"{statistics.fmean(known):.4g} ± {spread}"


def _mean(values: Tensor) -> float | None:
    return values.mean().item() if len(values) else None


def _balls(known: RealFeatures, made: Tensor, k: int) -> tuple[float, float, float, float]:
    """Precision, recall (arXiv 1904.06991), density, coverage (arXiv 2002.09797).

    A point on a ball's surface is inside, as in the first paper; the second's released code leaves
    it out, which shows only where made images are real ones.
    """
    real, made = known.all - known.center, made - known.center  # rounding grows with the norms
    k_real, k_made = min(k, len(real) - 1), min(k, len(made) - 1)
    real_radii, made_radii = known.radii(k_real), _radii(made, k_made)  # (N,), (K,)
    balls = torch.zeros(len(made), dtype=torch.int64)  # real ones around each made image
    covered = recalled = 0
    for rows, radii in zip(real.split(_ROWS), real_radii.split(_ROWS), strict=True):
        distances = torch.cdist(rows, made)  # (rows, K)
        inside = distances <= radii[:, None]
        balls += inside.sum(dim=0)
        covered += int(inside.any(dim=1).sum())
        recalled += int((distances <= made_radii).any(dim=1).sum())
    return (
        (balls > 0).double().mean().item(),
        recalled / len(real),
        balls.double().mean().item() / k_real,
        covered / len(real),
    )


def _modes_shown(known: RealFeatures, made: Sequence[Tensor]) -> float | None:
    """Mean over the classes that have two made images and as many real ones as made."""
    shares = []
    for label, points in enumerate(made):
        k = len(points)
        if 2 <= k <= len(known.by_class[label]):
            nearest = torch.cdist(points, known.modes(label, k)).argmin(dim=1)  # (k,)
            shares.append(len(nearest.unique()) / k)
    return statistics.fmean(shares) if shares else None


def _radii(points: Tensor, k: int) -> Tensor:
    """Distance of each of (N, D) to its k-th nearest other, (N,), and what rounding may add."""
    from sklearn.neighbors import NearestNeighbors

    distances, _ = NearestNeighbors(n_neighbors=k).fit(points.numpy()).kneighbors()
    radii = torch.from_numpy(distances[:, -1])
    return radii + _ROUNDING * (radii + points.norm(dim=1))


def _frechet(known: RealFeatures, made: Tensor) -> float:
    """|m - m'|² + tr(C + C' - 2 (C C')^½) of the sample means and covariances (arXiv 1706.08500).

    With C = AᵀA and C' = BᵀB the last trace is the sum of the singular values of A Bᵀ: exact for
    covariances of few images too, whose product has no reliable matrix root.
    """
    shift = (known.center - made.mean(dim=0)).square().sum()
    a, b = known.root, _root(made)
    common = torch.linalg.matrix_norm(a @ b.T, "nuc")
    distance = shift + a.square().sum() + b.square().sum() - 2 * common
    return max(0.0, distance.item())  # rounding takes equal sets below 0


def _root(points: Tensor) -> Tensor:
    """A, (at most D, D), whose AᵀA is the covariance of (N, D)."""
    centered = (points - points.mean(dim=0)) / (len(points) - 1) ** 0.5
    return torch.linalg.qr(centered, mode="r").R


def _mmd(known: RealFeatures, made: Tensor) -> float:
    """Unbiased MMD² under the kernel of KID (arXiv 1801.01401).

    Of whole sets, where KID is the mean over random subsets: the same expectation, less noise.
    """
    cross = _kernel_sum(known.all, made) / (len(known.all) * len(made))
    return known.within + _within(made) - 2 * cross


def _kernel_sum(some: Tensor, others: Tensor) -> float:
    """Sum of (x·y / D + 1)³ over all pairs."""
    parts = (rows @ others.T / others.shape[1] + 1 for rows in some.split(_ROWS))
    return sum(part.pow(3).sum().item() for part in parts)


def _within(points: Tensor) -> float:
    """Mean kernel of two different points."""
    own = (points.square().sum(dim=1) / points.shape[1] + 1).pow(3).sum().item()
    return (_kernel_sum(points, points) - own) / (len(points) * (len(points) - 1))
