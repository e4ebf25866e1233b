"""Step 4 of the boundary benchmark: one-to-one matching of predicted and true boundary pixels within a distance.

Three matchers with the same arguments:
  most_pairs                maximum cardinality, the default
  shortest_pairs            maximum cardinality with the smallest total distance, the intention of the original; differs
                            from most_pairs only where several annotators are matched with one prediction
  most_pairs_outlier_graph  the original's approximation, which misses some pairs at random
"""

from collections.abc import Callable, Iterator

import numba
import numpy as np
from scipy import sparse

from taskexpert_jax.tasks.metrics.boundary.thinning import ThinMaps

# (maps, truth, distance) -> whether each pixel of the maps is matched, (n,) bool. `truth` is (H, W) bool, `distance`
# the maximum distance of a pair in pixels, inclusive.
Matcher = Callable[[ThinMaps, np.ndarray, float], np.ndarray]

COST_SCALE = 100  # costs are integers: distances in hundredths of a pixel
OUTLIER_COST = 100  # cost of an unmatched pixel, in units of the maximum distance
OUTLIER_DEGREE = 6  # random arcs of a pixel to dummy nodes; a pixel matched with a dummy is unmatched


def most_pairs(maps: ThinMaps, truth: np.ndarray, distance: float) -> np.ndarray:
    """Maximum-cardinality matching; see `Matcher`.

    Algorithm of Hopcroft and Karp (1973), warm-started with the previous map's pairs and with the nearest free pixel
    for the others.
    """
    height, width = truth.shape
    dy, dx = _disc(distance)
    reach = int(dy.max())
    stride = width + 2 * reach  # padded, so that no bounds checks are needed
    rows, columns = np.nonzero(truth)
    inside = (rows + reach) * stride + columns + reach
    begin, neighbours = _neighbour_lists(inside, dy * stride + dx, (height + 2 * reach) * stride)
    pixels = (maps.pixels // width + reach) * stride + maps.pixels % width + reach
    return _match_in_turn(pixels, maps.starts, begin, neighbours, inside.size)


def _disc(distance: float) -> tuple[np.ndarray, np.ndarray]:
    """Offsets dy, dx of all pixels within `distance` of the origin, nearest first."""
    reach = int(distance)
    dy, dx = np.mgrid[-reach : reach + 1, -reach : reach + 1].reshape(2, -1)
    squares = dy**2 + dx**2
    order = np.argsort(squares, kind="stable")
    order = order[squares[order] <= distance * distance]
    return dy[order], dx[order]


@numba.njit(cache=True, nogil=True)
def _neighbour_lists(truth, offsets, size):
    """Adjacency lists in CSR form: the true pixels within the distance of each pixel, nearest first.

    Returns begin (size + 1,) and neighbours: pixel p has neighbours[begin[p] : begin[p + 1]], indices into `truth`.
    """
    begin = np.zeros(size + 1, np.int32)
    for offset in offsets:
        for place in truth:
            begin[place + offset + 1] += 1
    for p in range(size):
        begin[p + 1] += begin[p]
    neighbours = np.empty(begin[size], np.int32)
    end = begin[:-1].copy()
    for offset in offsets:
        for true, place in enumerate(truth):
            neighbours[end[place + offset]] = true
            end[place + offset] += 1
    return begin, neighbours


@numba.njit(cache=True, nogil=True)
def _match_in_turn(pixels, starts, begin, neighbours, true_pixels):
    size = begin.size - 1
    partner = np.full(size, -1, np.int32)  # predicted pixel -> matched true pixel
    reverse = np.full(true_pixels, -1, np.int32)  # true pixel -> matched predicted pixel
    in_map = np.zeros(size, np.bool_)
    level = np.empty(size, np.int32)
    cursor = np.empty(size, np.int32)
    matched = np.zeros(pixels.size, np.bool_)
    for m in range(starts.size - 1):
        current = pixels[starts[m] : starts[m + 1]]
        in_map[current] = True
        for true, pixel in enumerate(reverse):
            if pixel >= 0 and not in_map[pixel]:  # thinned away in this larger map
                partner[pixel] = reverse[true] = -1
        in_map[current] = False
        _pair_nearest(current, begin, neighbours, partner, reverse)
        while _find_levels(current, begin, neighbours, partner, reverse, level):
            _augment(current, begin, neighbours, partner, reverse, level, cursor)
        for i, pixel in enumerate(current):
            matched[starts[m] + i] = partner[pixel] >= 0
    return matched


@numba.njit(cache=True, nogil=True)
def _pair_nearest(current, begin, neighbours, partner, reverse):
    for pixel in current:
        if partner[pixel] >= 0:
            continue
        for true in neighbours[begin[pixel] : begin[pixel + 1]]:
            if reverse[true] < 0:
                partner[pixel], reverse[true] = true, pixel
                break


@numba.njit(cache=True, nogil=True)
def _find_levels(current, begin, neighbours, partner, reverse, level):
    """Breadth-first search for augmenting paths; returns whether there is one.

    Sets `level`: the number of pairs on a shortest alternating path from a free predicted pixel, or -1 if not reached.
    """
    queue = np.empty(current.size, np.int32)
    tail = 0
    for pixel in current:
        level[pixel] = -1
        if partner[pixel] < 0:
            level[pixel] = 0
            queue[tail] = pixel
            tail += 1
    head = 0
    shortest = current.size
    while head < tail and level[queue[head]] <= shortest:
        pixel = queue[head]
        head += 1
        for true in neighbours[begin[pixel] : begin[pixel + 1]]:
            other = reverse[true]
            if other < 0:
                shortest = level[pixel]
            elif level[other] < 0:
                level[other] = level[pixel] + 1
                queue[tail] = other
                tail += 1
    return shortest < current.size


@numba.njit(cache=True, nogil=True)
def _augment(current, begin, neighbours, partner, reverse, level, cursor):
    """Augments along a maximal set of disjoint shortest paths, found by depth-first search."""
    for pixel in current:
        cursor[pixel] = begin[pixel]
    path = np.empty(current.size, np.int32)
    for root in current:
        if partner[root] >= 0:
            continue
        path[0] = root
        depth = 0
        while depth >= 0:
            pixel = path[depth]
            if cursor[pixel] == begin[pixel + 1]:
                depth -= 1
                continue
            other = reverse[neighbours[cursor[pixel]]]
            cursor[pixel] += 1
            if other < 0:
                for step in path[: depth + 1]:
                    partner[step] = neighbours[cursor[step] - 1]
                    reverse[partner[step]] = step
                break
            if level[other] == depth + 1:
                depth += 1
                path[depth] = other


def shortest_pairs(maps: ThinMaps, truth: np.ndarray, distance: float) -> np.ndarray:
    """Maximum-cardinality matching with the smallest total distance; see `Matcher`.

    Exact, and about 70 times slower than `most_pairs`.
    """
    matched = np.zeros(maps.pixels.size, bool)
    for start, (ids, left, right, costs) in _graphs(maps, truth, distance):
        pixels, true_pixels = ids.size, int(right.max()) + 1
        own = np.arange(pixels)  # one dummy per pixel, more expensive than any alternating path
        price = np.full(pixels, (pixels + 1) * (costs.max() + 1))
        rows, columns = np.concatenate([left, own]), np.concatenate([right, true_pixels + own])
        shape = (pixels, true_pixels + pixels)
        row, column = _cheapest(shape, rows, columns, np.concatenate([costs, price]))
        matched[start + ids[row[column < true_pixels]]] = True
    return matched


def most_pairs_outlier_graph(maps: ThinMaps, truth: np.ndarray, distance: float, *, seed: int = 0) -> np.ndarray:
    """The original's randomised matching, for comparisons; see `Matcher`. About 130 times slower than `most_pairs`.

    The original solves a minimum-cost assignment in which an unmatched pixel takes one of six random dummies. Dummies
    run short, so it misses up to 0.5 % of the pairs, most where both maps have equally many pixels.

    seed: seed of the random arcs.
    """
    random = np.random.default_rng(seed)
    outlier_cost = int(np.ceil(COST_SCALE * OUTLIER_COST * distance))
    matched = np.zeros(maps.pixels.size, bool)
    for start, (ids, left, right, costs) in _graphs(maps, truth, distance):
        # Rows: n1 predicted pixels, then a dummy per true pixel. Columns: n2 true pixels, then a dummy per predicted
        # pixel. Each pixel has arcs to dummies of others, and a more expensive one to its own.
        n1, n2 = ids.size, int(right.max()) + 1
        few, many = min(n1, n2), max(n1, n2)
        of_left, of_right = _others(random, n1), _others(random, n2)
        between = [np.repeat(np.arange(many), min(OUTLIER_DEGREE, few)), _subsets(random, many, few).ravel()]
        if n1 >= n2:
            between.reverse()
        rows = [left, of_left[0], n1 + of_right[1], n1 + between[0], np.arange(n1 + n2)]
        columns = [right, n2 + of_left[1], of_right[0], n2 + between[1], np.roll(np.arange(n1 + n2), -n2)]
        prices = [np.full(part.size, outlier_cost) for part in rows[1:4]]
        prices += [np.full(n1 + n2, COST_SCALE * outlier_cost)]
        arcs = (np.concatenate(part) for part in (rows, columns, [costs, *prices]))
        row, column = _cheapest((n1 + n2, n1 + n2), *arcs)
        matched[start + ids[row[(row < n1) & (column < n2)]]] = True
    return matched


_Graph = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def _graphs(maps: ThinMaps, truth: np.ndarray, distance: float) -> Iterator[tuple[int, _Graph]]:
    """Bipartite graph of each map that has admissible pairs: (index of its first pixel, graph).

    The graph is (ids, left, right, costs): ids are the pixels with an admissible partner, relative to the map's first;
    left (index into ids), right (true pixel 0, 1, ..) and costs have one entry per pair.
    """
    dy, dx = _disc(distance)
    reach = int(dy.max())
    places = np.cumsum(truth).reshape(truth.shape) - 1
    places = np.pad(np.where(truth, places, -1), reach, constant_values=-1)
    disc_costs = np.rint(COST_SCALE * np.hypot(dy, dx)).astype(np.int64)
    for start, stop in zip(maps.starts[:-1], maps.starts[1:], strict=True):
        y, x = np.divmod(maps.pixels[start:stop], truth.shape[1])
        within = places[y[:, None] + dy + reach, x[:, None] + dx + reach]  # (pixels, disc)
        pixel, offset = np.nonzero(within >= 0)
        if pixel.size:
            ids, left = np.unique(pixel, return_inverse=True)
            right = np.unique(within[pixel, offset], return_inverse=True)[1]
            yield int(start), (ids, left, right, disc_costs[offset])


def _cheapest(
    shape: tuple[int, int], rows: np.ndarray, columns: np.ndarray, costs: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Minimum-cost assignment of every row to a distinct column, given arcs (row, column) and their costs."""
    # A sparse entry of 0 would be no arc; adding 1 to every arc does not change the optimal assignment.
    graph = sparse.csr_array((costs + 1, (rows, columns)), shape)
    return sparse.csgraph.min_weight_full_bipartite_matching(graph)


def _others(random: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Arcs from each of `count` nodes to six random others: sources and targets, (arcs,) each."""
    chosen = _subsets(random, count, count - 1)
    own = np.arange(count)[:, None]
    chosen += chosen >= own
    return np.repeat(own.ravel(), chosen.shape[1]), chosen.ravel()


def _subsets(random: np.random.Generator, rows: int, size: int) -> np.ndarray:
    """Random subsets of range(size) without repetition, (rows, min(6, size)); Floyd's algorithm, uniform."""
    count = min(OUTLIER_DEGREE, size)
    chosen = np.full((rows, count), -1)
    for i, last in enumerate(range(size - count, size)):
        drawn = random.integers(last + 1, size=rows)
        chosen[:, i] = np.where((chosen == drawn[:, None]).any(axis=1), last, drawn)
    return chosen
