"""The cost model of a scaling study: seconds = fixed + tokens of the busiest rank x seconds per token + communication.

Row phases (generate, rank, logprob): rows are independent; fixed holds what does not shrink with ranks (reading weights, the collective
write, the end). Training, per optimizer step: the same, and gradients and weights that move: bytes x (n-1)/n at the node's rate, and
between N nodes a ring of 2 (N-1)/N times the bytes at the network's rate with log2(N) latencies. fixed, seconds per token and the
node's rate are fitted to the points (least squares on relative errors, no coefficient below zero); the network's are assumed
unless points on several nodes are there.
"""

import itertools
import math


def solve(matrix, right):
    """Gaussian elimination with pivots; None where it is singular."""
    size = len(right)
    rows = [list(row) + [value] for row, value in zip(matrix, right)]
    for column in range(size):
        pivot = max(range(column, size), key=lambda r: abs(rows[r][column]))
        if abs(rows[pivot][column]) < 1e-12 * max(1.0, max(abs(v) for v in rows[pivot])):
            return None
        rows[column], rows[pivot] = rows[pivot], rows[column]
        for r in range(size):
            if r != column:
                factor = rows[r][column] / rows[column][column]
                rows[r] = [a - factor * b for a, b in zip(rows[r], rows[column])]
    return [rows[i][size] / rows[i][i] for i in range(size)]


def least_squares(features, values):
    """Coefficients >= 0 that minimise the squared relative errors: the best of all subsets of features (there are few)."""
    width = len(features[0])
    scaled = [[x / value for x in row] for row, value in zip(features, values)]
    scales = [max(max(abs(row[i]) for row in scaled), 1e-300) for i in range(width)]
    scaled = [[x / scales[i] for i, x in enumerate(row)] for row in scaled]
    best, best_error = [0.0] * width, math.inf
    for size in range(1, width + 1):
        for chosen in itertools.combinations(range(width), size):
            gram = [[sum(row[i] * row[j] for row in scaled) for j in chosen] for i in chosen]
            found = solve(gram, [sum(row[i] for row in scaled) for i in chosen])
            if found is None or min(found) < 0:
                continue
            full = [0.0] * width
            for i, value in zip(chosen, found):
                full[i] = value
            error = sum((sum(c * x for c, x in zip(full, row)) - 1) ** 2 for row in scaled)
            if error < best_error * (1 - 1e-9):
                best, best_error = full, error
    return [value / scale for value, scale in zip(best, scales)]


class Network:
    """Between nodes."""

    def __init__(self, latency_us, gigabytes_per_s):
        self.latency_s, self.bytes_per_s = latency_us * 1e-6, gigabytes_per_s * 1e9

    def seconds(self, message_bytes, nodes):
        if nodes < 2:
            return 0.0
        return 2 * math.ceil(math.log2(nodes)) * self.latency_s + 2 * (nodes - 1) / nodes * message_bytes / self.bytes_per_s


def busiest_tokens(tokens, units, ranks):
    """Tokens of the rank with most work when `units` rows of equal length are dealt to the ranks."""
    return tokens / units * math.ceil(units / ranks)


def units_of(point):
    return point["batch"] if point["phase"] == "train" else point["rows"]


class PhaseModel:
    """Fitted to the points of one phase. `bytes_per_step`: gradients plus weights, training only."""

    def __init__(self, points, bytes_per_step, network):
        self.train = points[0]["phase"] == "train"
        self.bytes_per_step, self.network = bytes_per_step, network
        self.tokens_per_row = sum(p["tokens"] for p in points) / sum(units_of(p) for p in points)
        compute = [p["seconds"] - (p["comm_s"] or 0) for p in points]
        loads = [[1.0, busiest_tokens(p["tokens"], units_of(p), p["ranks"])] for p in points]
        self.fixed_s, self.token_s = least_squares(loads, compute)
        self.node_byte_s = self._fit_node(points) if self.train else 0.0

    def _fit_node(self, points):
        """Seconds per byte inside a node, from what several ranks of one node measured; waiting for the slowest is in it."""
        inside = [p for p in points if p["ranks"] > 1 and p["nodes"] == 1 and p["comm_s"]]
        if not inside:
            return 0.0
        moved = [[self.bytes_per_step * (p["ranks"] - 1) / p["ranks"]] for p in inside]
        return least_squares(moved, [p["comm_s"] for p in inside])[0]

    def parts(self, rows, ranks, nodes, tokens=None):
        """(fixed, compute, communication) seconds of `rows` rows, or of one step of `rows` rows; they have `tokens`, or the mean length."""
        compute = self.token_s * busiest_tokens(self.tokens_per_row * rows if tokens is None else tokens, rows, ranks)
        if not self.train:
            return self.fixed_s, compute, 0.0
        per_node = max(1.0, ranks / nodes)
        inside = self.node_byte_s * self.bytes_per_step * (per_node - 1) / per_node
        return self.fixed_s, compute, inside + self.network.seconds(self.bytes_per_step / 2, nodes)

    def seconds(self, rows, ranks, nodes, tokens=None):
        return sum(self.parts(rows, ranks, nodes, tokens))

    def efficiency(self, rows, ranks, nodes):
        """Against one rank with the same rows."""
        return self.seconds(rows, 1, 1) / (ranks * self.seconds(rows, ranks, nodes))
