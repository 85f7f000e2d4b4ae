"""Planes of real and distilled images: t-SNE and PCA maps, and the paper's scores in them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from eval.metrics.distances import checked, distances_to_real, nearest_distances
from mgd3.runtime import checks
from mgd3.runtime.errors import UserError
from mgd3.storage.cache import TENSORS, found
from mgd3.storage.tensors import tensors_digest

_PERPLEXITY = 30  # scikit-learn's default, which the released script leaves
_SEED = 42  # the released script's
CENTERS = "k-means centres"


@dataclass(frozen=True, kw_only=True)
class Plane:
    """Two coordinates of every image, in a map that all methods share."""

    real: list[Tensor]  # (N, 2) by class
    made: dict[str, list[Tensor]]  # by method: (K, 2) by class


@dataclass(frozen=True, kw_only=True)
class TsneScores:
    """One method's class scores (as in the paper's Table 9) and dataset scores (Figure 9).

    In [0, 1], higher is better. None: a class of one image, or nothing to scale against.
    """

    diversity: list[float | None]  # by class
    representativeness: list[float | None]  # by class
    diversity_mean: float | None  # over samples
    representativeness_mean: float | None  # over samples


def tsne_plane(
    real: Sequence[Tensor],
    made: Mapping[str, Sequence[Tensor]],
    most_real: int | None = None,
    seed: int = _SEED,
    keep: Path | None = None,
) -> Plane:
    """One t-SNE of real images and all methods', with the released script's settings.

    Those are scikit-learn's own with a learning rate of «auto»: features as they are, Euclidean,
    perplexity 30. Of each class's real images all are taken (3000 points take 15 s on one core), or
    a seeded choice of `most_real`, and only these are in the plane.
    Distances in it depend on the seed and on every method that is in it: trust `measure` instead.
    A map of the same features is not fitted twice where there is a folder to `keep` it in.
    Raises `UserError` for 30 images or fewer (the perplexity) and as `measure` does.
    """
    real = checked(real, "real features", like=real)
    if most_real is not None:
        checks.integer("most_real", most_real, minimum=1)
        draw = torch.Generator().manual_seed(seed)
        real = [r[torch.randperm(len(r), generator=draw)[:most_real]] for r in real]

    def fitted(_: np.ndarray, everything: np.ndarray) -> np.ndarray:
        if len(everything) <= _PERPLEXITY:
            raise UserError(
                f"t-SNE with perplexity {_PERPLEXITY} needs more than {_PERPLEXITY} images, these "
                f"are {len(everything)}; add real images (most_real={most_real})"
            )
        settings = {"perplexity": _PERPLEXITY, "learning_rate": "auto"}
        key = {"settings": f"{settings}, {seed}", "scikit-learn": version("scikit-learn")}
        key |= {"features": tensors_digest({"all": torch.from_numpy(everything)})}
        path = keep / f"{key['features'][:16]}.safetensors" if keep else None
        if path and (kept := found(path, key)):
            return kept["points"].numpy()
        from sklearn.manifold import TSNE

        points = TSNE(2, **settings, random_state=seed).fit_transform(everything)
        if path:
            with suppress(UserError):  # a folder of somebody else's: fitted again the next time
                TENSORS.write(path, {"points": torch.from_numpy(points)}, key)
        return points

    return _plane(fitted, real, made)


def class_planes(
    real: Sequence[Tensor],
    made: Mapping[str, Sequence[Tensor]],
    labels: Mapping[str, int],
    keep: Path | None = None,
) -> dict[str, Plane]:
    """A t-SNE of each of some classes alone, by name: real images, methods' and k-means centres.

    As many centres as the first method has images, in these features (released tsne_plots.py: in
    latents). Raises `UserError` as `tsne_plane`.
    """
    from sklearn.cluster import KMeans

    planes = {}
    for name, label in labels.items():
        own = {method: [by_class[label]] for method, by_class in made.items()}
        count = min(len(next(iter(own.values()))[0]), len(real[label]))
        fit = KMeans(count, random_state=0, n_init="auto").fit(real[label].double().numpy())
        own[CENTERS] = [torch.from_numpy(fit.cluster_centers_)]
        planes[name] = tsne_plane([real[label]], own, keep=keep)
    return planes


def pca_plane(real: Sequence[Tensor], made: Mapping[str, Sequence[Tensor]]) -> Plane:
    """The real images' first two principal components, whatever methods are compared."""
    from sklearn.decomposition import PCA

    return _plane(
        lambda r, everything: PCA(2, random_state=0).fit(r).transform(everything), real, made
    )


def tsne_scores(plane: Plane, neighbors: int = 50) -> dict[str, TsneScores]:
    """Diversity and representativeness by method as the paper plots them (section 5.2).

    Both as in `measure`, in the plane; class scores are scaled so that the least of all methods and
    classes is 0 and the largest 1, and representativeness is 1 minus that. The paper does not
    describe its scaling; a 0.00 and a 1.00 in its Table 9 suggest this one.
    """
    apart, near = _of_images(plane, neighbors)
    diverse, close = _scale(apart.values()), _scale(near.values())
    return {
        m: TsneScores(
            diversity=[diverse(of_class) for of_class in apart[m]],
            representativeness=[close(of_class) for of_class in near[m]],
            diversity_mean=diverse(torch.cat(apart[m])),
            representativeness_mean=close(torch.cat(near[m])),
        )
        for m in plane.made
    }


def tsne_points(plane: Plane, per: str, neighbors: int = 50) -> dict[str, Tensor]:
    """Each method's points (n, 2): representativeness and diversity as in `tsne_scores`.

    `per` «class» has one for each class (Figure 6), «image» one for each image (Figure 8), both
    scaled from the least of all methods' points (0) to the largest (1). A class of one image has no
    diversity and no point. Empty where nothing varies.
    """
    checks.choice("per", per, ["class", "image"])
    apart, near = _of_images(plane, neighbors)
    points = {}
    for method in plane.made:
        pairs = zip(near[method], apart[method], strict=True)
        by_class = [torch.stack(pair, dim=1) for pair in pairs if len(pair[1])]  # (K, 2) each
        if by_class and per == "class":
            by_class = [rows.mean(dim=0, keepdim=True) for rows in by_class]
        points[method] = torch.cat([*by_class, torch.empty(0, 2, dtype=torch.float64)])
    together = torch.cat(list(points.values()))
    if len(together) == 0 or (extent := together.amax(dim=0) - together.amin(dim=0)).min() <= 0:
        return {}
    return {m: (rows - together.amin(dim=0)) / extent for m, rows in points.items()}


def _of_images(
    plane: Plane, neighbors: int
) -> tuple[dict[str, list[Tensor]], dict[str, list[Tensor]]]:
    """By method and class: distances to the nearest of its class; to real images, negated (K,)."""
    checks.integer("neighbors", neighbors, minimum=1)
    apart = {m: [nearest_distances(p) for p in points] for m, points in plane.made.items()}
    near = {  # 1 minus a scaled distance is the scaled distance with its sign turned
        m: [-distances_to_real(p, r, neighbors) for p, r in zip(points, plane.real, strict=True)]
        for m, points in plane.made.items()
    }
    return apart, near


def _plane(
    fitted: Callable[[np.ndarray, np.ndarray], np.ndarray],
    real: Sequence[Tensor],
    made: Mapping[str, Sequence[Tensor]],
) -> Plane:
    """The coordinates that `fitted` finds from the real features for real and made, (N + K, 2)."""
    if not made:
        raise UserError("a map of images needs a method; give its features by its name")
    real = checked(real, "real features", like=real)
    made = {m: checked(rows, f"features of {m}", like=real) for m, rows in made.items()}
    if real[0].shape[1] < 2:
        raise UserError("a plane needs features of 2 numbers or more per image, these have 1")
    sets = [*real, *(rows for by_class in made.values() for rows in by_class)]
    points = fitted(torch.cat(real).numpy(), torch.cat(sets).numpy())
    parts = iter(torch.from_numpy(points).double().split([len(rows) for rows in sets]))
    return Plane(
        real=[next(parts) for _ in real],
        made={m: [next(parts) for _ in by_class] for m, by_class in made.items()},
    )


def _scale(samples: Iterable[Sequence[Tensor]]) -> Callable[[Tensor], float | None]:
    """The mean of some samples on a scale from the least class mean to the largest, 0 to 1."""
    means = [of_class.mean() for by_class in samples for of_class in by_class if len(of_class)]
    low, high = (min(means), max(means)) if means else (0.0, 0.0)

    def scaled(some: Tensor) -> float | None:
        return ((some.mean() - low) / (high - low)).item() if len(some) and high > low else None

    return scaled
