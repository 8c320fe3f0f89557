"""k-means: centres of clusters of points, by k-means++ and Lloyd's algorithm.

Letters: N points, K clusters, D width.
"""

import torch

ROWS = 4096  # points whose distances to all centres are held at a time


def k_means(
    points: torch.Tensor, count: int, generator: torch.Generator, attempts: int = 4, iterations: int = 100
) -> torch.Tensor:
    """(K, D) centres that locally minimise the summed squared distance of every point to the nearest one.

    Args:
        points: (N, D) in float32 or float64, at least `count` of them.
        count: K.
        generator: makes it deterministic.
        attempts: from other first centres, drawn by k-means++; the best result is kept.
        iterations: at most so many rounds each.
    """
    assert len(points) >= count, "fewer points than clusters"
    middle = points.mean(0)
    points = points - middle  # distances to a far origin would lose digits
    results = [lloyd(points, first_centres(points, count, generator), iterations) for _ in range(attempts)]
    return min(results, key=lambda result: result[1])[0] + middle


def lloyd(points: torch.Tensor, centres: torch.Tensor, iterations: int) -> tuple[torch.Tensor, float]:
    """Centres become the means of their points until no point moves; one without points takes the furthest point.

    Returns:
        The centres, and the summed squared distance to them.
    """
    count, labels = len(centres), torch.full((len(points),), -1)
    for _ in range(iterations):
        distances, found = nearest(points, centres)
        if torch.equal(found, labels):
            break
        labels = found
        sizes = torch.bincount(labels, minlength=count)
        for empty in (sizes == 0).nonzero().flatten().tolist():
            crowded = sizes[labels] > 1
            furthest = int(distances.masked_fill(~crowded, -1).argmax())
            sizes[labels[furthest]] -= 1
            labels[furthest], sizes[empty], distances[furthest] = empty, 1, 0
        sums = torch.zeros(count, points.shape[1], dtype=torch.float64)
        sums.index_add_(0, labels, points.double())
        centres = (sums / sizes[:, None]).to(points.dtype)
    return centres, nearest(points, centres)[0].double().sum().item()


def first_centres(points: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """(K, D) points by k-means++ (https://dl.acm.org/doi/10.5555/1283383.1283494).

    Each is drawn with a probability in proportion to its squared distance to the nearest of those before it.
    """
    first = int(torch.randint(len(points), (1,), generator=generator))
    chosen = [first]
    distances = (points - points[first]).square().sum(-1).double()
    while len(chosen) < count:
        # all remaining points may coincide with centres
        weights = distances if distances.sum() > 0 else torch.ones_like(distances)
        chosen.append(int(torch.multinomial(weights, 1, generator=generator)))
        distances = torch.minimum(distances, (points - points[chosen[-1]]).square().sum(-1).double())
    return points[chosen]


def nearest(points: torch.Tensor, centres: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(N,) squared distance to the nearest centre, and (N,) its number."""
    parts = [torch.cdist(part, centres).min(-1) for part in points.split(ROWS)]
    return torch.cat([part.values for part in parts]).square(), torch.cat([part.indices for part in parts])
