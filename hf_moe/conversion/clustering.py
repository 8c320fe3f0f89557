"""Equal parts of things that belong together. Every algorithm here keeps all parts at exactly the same size.

Letters: F things (neurons of a feed-forward), E parts, C = F / E the size of a part, D width.
"""

from collections.abc import Callable

import torch

MOST_SWEEPS = 100
CANDIDATES = 64  # neurons per side among which Kernighan-Lin looks for its next swap
TOLERANCE = 1e-9  # of the largest cost: gains below it are rounding


def as_parts(labels: torch.Tensor, num_parts: int) -> torch.Tensor:
    """(E, C) the members of each part, in ascending order, from the part (F,) of each thing."""
    return labels.argsort(stable=True).view(num_parts, -1)


def greedy_assignment(scores: torch.Tensor) -> torch.Tensor:
    """(F,) the part of each thing: the best remaining pair of scores (E, F) is taken until all parts hold F / E.

    Ties go to the later part, as in LLaMA-MoE's independent split (https://arxiv.org/abs/2406.16554), then to the
    earlier thing. The pairs are not walked through one by one: every thing asks the best part that has not refused it,
    and every part refuses all but its best C. Since both sides rank pairs alike, this ends in the same assignment.
    """
    num_parts, num_things = scores.shape
    capacity = num_things // num_parts
    order = scores.flip(0).reshape(-1).argsort(descending=True, stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(order.numel())
    rank = rank.view(num_parts, num_things).flip(0)
    never = order.numel()
    while True:
        best, labels = rank.min(0)
        full = (labels.bincount(minlength=num_parts) > capacity).nonzero()[:, 0].tolist()
        if not full:
            return labels
        for part in full:
            asking = (labels == part).nonzero()[:, 0]
            refused = asking[best[asking].argsort()[capacity:]]
            rank[part, refused] = never


def exchange(costs: torch.Tensor, labels: torch.Tensor) -> bool:
    """Swap things between every two parts where that lowers the sum of costs (F, E); whether anything moved.

    For two parts and fixed costs the result is the best there is: the most willing of both sides change places.
    """
    num_parts, moved = costs.shape[1], False
    least = TOLERANCE * float(costs.abs().max())
    for one in range(num_parts):
        for other in range(one + 1, num_parts):
            mine, theirs = (labels == one).nonzero()[:, 0], (labels == other).nonzero()[:, 0]
            my_gain, my_order = (costs[mine, one] - costs[mine, other]).sort(descending=True, stable=True)
            their_gain, their_order = (costs[theirs, other] - costs[theirs, one]).sort(descending=True, stable=True)
            swaps = int((my_gain + their_gain > least).sum())
            labels[mine[my_order[:swaps]]] = other
            labels[theirs[their_order[:swaps]]] = one
            moved |= swaps > 0
    return moved


def balanced_kmeans(points: torch.Tensor, num_parts: int, generator: torch.Generator) -> torch.Tensor:
    """(E, C) members of size-constrained k-means clusters of points (F, D), squared Euclidean distance.

    Seeds as in k-means++, then `greedy_assignment` to them, then centroids and `exchange` in turn. Neither of the two
    ever raises the sum of squared distances, so it ends, in a local optimum.
    """
    points = points.float()
    squares = points.square().sum(1)

    def distances(index: int) -> torch.Tensor:
        return squares + squares[index] - 2 * points @ points[index]

    def costs(labels: torch.Tensor) -> torch.Tensor:
        centroids = torch.zeros(num_parts, points.shape[1]).index_add_(0, labels, points)
        return costs_to(centroids / (len(points) // num_parts))

    def costs_to(centroids: torch.Tensor) -> torch.Tensor:
        return (centroids.square().sum(1) - 2 * points @ centroids.T).double()

    labels = greedy_assignment(-costs_to(points[seeds(distances, len(points), num_parts, generator)]).T)
    return as_parts(settle(costs, labels), num_parts)


def balanced_graph(weights: torch.Tensor, num_parts: int, generator: torch.Generator) -> torch.Tensor:
    """(E, C) members of parts of a graph with little weight between them; `weights` (F, F) is a Gram matrix.

    For a Gram matrix `X X^T` and parts of one size the least cut is the optimum of balanced k-means on the rows of X,
    which only needs products of rows. So: `balanced_kmeans` in that form, then Kernighan-Lin swaps on the cut itself,
    which a large diagonal does not hold back.
    """
    diagonal, capacity = weights.diagonal(), len(weights) // num_parts

    def distances(index: int) -> torch.Tensor:
        return diagonal + diagonal[index] - 2 * weights[index]

    def costs(labels: torch.Tensor) -> torch.Tensor:
        member = torch.nn.functional.one_hot(labels, num_parts).to(weights.dtype)
        sums = weights @ member  # (F, E)
        inside = (member * sums).sum(0)
        return (inside / capacity**2 - 2 * sums / capacity).double()

    chosen = seeds(distances, len(weights), num_parts, generator)
    labels = greedy_assignment((2 * weights[chosen] - diagonal[chosen, None]).double())
    return as_parts(kernighan_lin(weights, settle(costs, labels), num_parts), num_parts)


def seeds(
    distances: Callable[[int], torch.Tensor], num_things: int, count: int, generator: torch.Generator
) -> torch.Tensor:
    """(count,) different things, each drawn with probability proportional to its squared distance (F,) to the nearest
    one before it (k-means++, Arthur and Vassilvitskii 2007)."""
    chosen = [int(torch.randint(num_things, (1,), generator=generator))]
    nearest = distances(chosen[0]).clamp(min=0)
    while len(chosen) < count:
        nearest[chosen] = 0
        if not bool(nearest.any()):  # all others coincide with one of the chosen
            nearest = torch.ones_like(nearest).index_fill_(0, torch.tensor(chosen), 0)
        chosen.append(int(torch.multinomial(nearest, 1, generator=generator)))
        nearest = torch.minimum(nearest, distances(chosen[-1]).clamp(min=0))
    return torch.tensor(chosen)


def settle(costs: Callable[[torch.Tensor], torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
    """Alternate between new costs (F, E) and `exchange` until nothing moves."""
    for _ in range(MOST_SWEEPS):
        if not exchange(costs(labels), labels):
            break
    return labels


def kernighan_lin(weights: torch.Tensor, labels: torch.Tensor, num_parts: int) -> torch.Tensor:
    """Swap single things (F,) between parts as long as that lowers the weight of the cut of `weights` (F, F)."""
    member = torch.nn.functional.one_hot(labels, num_parts).to(weights.dtype)
    sums = weights @ member  # (F, E) weight between a thing and a part, itself left out
    sums -= member * weights.diagonal()[:, None]
    least = 1e-6 * float(sums.abs().max())
    for _ in range(MOST_SWEEPS):
        pairs = [(one, other) for one in range(num_parts) for other in range(one + 1, num_parts)]
        if not sum(swap_while_better(weights, sums, labels, pair, least) for pair in pairs):
            break
    return labels


def swap_while_better(
    weights: torch.Tensor, sums: torch.Tensor, labels: torch.Tensor, pair: tuple[int, int], least: float
) -> int:
    """How many swaps between two parts lowered the cut by more than `least`; at most C."""
    one, other = pair
    for done in range(int((labels == one).sum())):
        mine, theirs = (labels == one).nonzero()[:, 0], (labels == other).nonzero()[:, 0]
        gain = sums[:, other] - sums[:, one]
        mine = mine[gain[mine].topk(min(CANDIDATES, len(mine))).indices]
        theirs = theirs[(-gain[theirs]).topk(min(CANDIDATES, len(theirs))).indices]
        gains = gain[mine, None] - gain[theirs] - 2 * weights[mine[:, None], theirs]
        best = int(gains.argmax())
        if gains.view(-1)[best] <= least:
            return done
        i, j = int(mine[best // len(theirs)]), int(theirs[best % len(theirs)])
        change = weights[j] - weights[i]
        change[i], change[j] = weights[i, j], -weights[i, j]
        sums[:, one] += change
        sums[:, other] -= change
        labels[i], labels[j] = other, one
    return int((labels == one).sum())
