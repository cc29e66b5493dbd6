"""k-means++ on unit vectors, in slices that leave the thread to others every few milliseconds."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ruvllm_core.protocols import FloatArray

Vectors = npt.NDArray[np.floating]  # [n, C], of norm 1 or, where nothing is known, 0
Sliced = Generator[None, None, "Clusters"]

_SLICE_VALUES = 1 << 18  # values of the data that are looked at between two yields


@dataclass(frozen=True, eq=False)
class Clusters:
    """What k-means found.

    Attributes:
        sums: float32 ``[k, C]``, of each cluster's vectors; its centroid is this at norm 1.
        labels: int64 ``[n]``, the cluster of each vector.
        inertia: the sum of squared distances to the centroids, after each round; it never grows.
    """

    sums: FloatArray
    labels: npt.NDArray[np.int64]
    inertia: tuple[float, ...]


def kmeans(vectors: Vectors, k: int, rng: np.random.Generator, rounds: int = 12) -> Sliced:
    """Spherical k-means (Dhillon & Modha 2001) from k-means++ seeds (Arthur & Vassilvitskii 2007).

    Centroids are unit vectors, so that the nearest one is that of the largest cosine, by which prompts are routed. Each
    round assigns every vector to its nearest centroid and puts centroids where they are nearest to their own: neither
    can make the squared distances grow. Ends when no label changes, or after `rounds`. A cluster that has lost all its
    vectors is left out, so there may be fewer than `k`.
    """
    centroids = np.asarray(vectors[(yield from seeds(vectors, k, rng))], np.float32)
    labels, inertia = np.full(len(vectors), -1), list[float]()
    for _ in range(rounds):
        sums, before, total = np.zeros_like(centroids), labels.copy(), 0.0
        for part in parts_of(vectors):
            rows = np.asarray(vectors[part], np.float32)
            cosines = rows @ centroids.T
            labels[part] = cosines.argmax(axis=1)
            own = labels[part] == np.arange(len(centroids))[:, None]
            sums += own.astype(np.float32) @ rows
            # |x - c|² in double: its sum must not grow by rounding.
            total += float(np.square(rows.astype(np.float64) - centroids[labels[part]]).sum())
            yield
        inertia.append(total)
        if (labels == before).all():
            break
        centroids = unit(sums, otherwise=centroids)
    used, labels = np.unique(labels, return_inverse=True)
    return Clusters(sums[used], labels, tuple(inertia))


def seeds(vectors: Vectors, k: int, rng: np.random.Generator) -> Generator[None, None, list[int]]:
    """Rows of `k` vectors to start from: each drawn with a probability as its squared distance to those before it.

    Fewer, if there are fewer that differ.
    """
    chosen = [int(rng.integers(len(vectors)))]
    distances = np.full(len(vectors), np.inf)
    while len(chosen) < k:
        last = np.asarray(vectors[chosen[-1]], np.float64)
        for part in parts_of(vectors):
            away = np.square(np.asarray(vectors[part], np.float64) - last).sum(axis=1)
            distances[part] = np.minimum(distances[part], away)
            yield
        total = distances.sum()
        if total <= 0.0:
            break
        chosen.append(int(rng.choice(len(vectors), p=distances / total)))
    return chosen


def unit(vectors: FloatArray, otherwise: FloatArray | None = None) -> FloatArray:
    """Rows at norm 1; one of zeros stays, or becomes that of `otherwise`."""
    norms = np.sqrt(np.einsum("nc,nc->n", vectors, vectors))[:, None]
    kept = vectors if otherwise is None else otherwise
    return np.asarray(np.where(norms > 0, vectors / np.where(norms > 0, norms, 1), kept), np.float32)


def parts_of(vectors: Vectors) -> Iterator[slice]:
    step = max(_SLICE_VALUES // vectors.shape[1], 1)
    return (slice(start, start + step) for start in range(0, len(vectors), step))
