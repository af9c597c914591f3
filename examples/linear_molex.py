"""A deep linear MoLEx is an ensemble of linear models: when is it the more robust one?

The model. Depth t mixes its own layer with that of a guest tau(t):

    z_{t+1} = z_t + alpha U_t z_t + (1 - alpha) U_tau(t) z_t = [alpha (I + U_t) + (1 - alpha) (I + U_tau(t))] z_t.

Multiplied out over T depths, the map from z_0 to z_T is the sum over all 2^T choices c, own or guest at each depth,

    sum_c w_c prod_t (I + U_{c_t}),    w_c = alpha^(own choices) (1 - alpha)^(guest choices),    sum_c w_c = 1,

a weighted ensemble of linear networks, exactly. The guests tau are held fixed here: where a perturbation of the input
makes a router choose other guests, it meets another linear model, and nothing below speaks of that.

Robustness. With a linear head, member c prefers the right class y to a class k by the margin m_c = d_c · x, where d_c
is the difference of the two classes' rows. The smallest perturbation of x (L2) that undoes the preference is as long as
r_c = m_c / |d_c|, the robust radius (negative where the preference is wrong already). The ensemble has m = E[m_c] and
d = E[d_c], E[·] being the mean with the weights w_c.

What holds, for one class k:

(1) r >= E[|d_c| r_c] / E[|d_c|] >= min_c r_c wherever m >= 0.
    m = E[|d_c| r_c] by definition, and |E[d_c]| <= E[|d_c|] by the triangle inequality. The first is strict unless the
    d_c all point one way (or m = 0). The smallest radius over all classes k then obeys the second as well: an ensemble
    that classifies x rightly is at least as robust as its least robust member.
(2) r = g (E[r_c] + cov(|d_c|, r_c) / E[|d_c|]) with g = E[|d_c|] / |E[d_c]| >= 1, an identity.
    So r >= E[r_c], the weighted mean of the members' radii, wherever m >= 0 and cov(|d_c|, r_c) >= 0: the members with
    the longer differences must not be the less robust ones. Equal lengths are enough.

What does not hold without conditions: that the ensemble is the more robust one, as Theorem 1 of MoLEx (arXiv
2503.11144) has it under its conditions. `counterexamples` has an ensemble whose r is below the weighted mean of its
members, since the fragile member is the longer one, and one whose r is below the radius of the network without guests,
whose d_c already points along x, so that any other one turns it away. Among random networks the second is as common as
not.

Run `python examples/linear_molex.py`: it draws random networks, checks that the unrolled ensemble equals the network
and that (1), (2) and the radius itself hold, and counts how often the condition of (2) does.
"""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

ROUNDING = 1e-9  # relative; float64 over a handful of products
NETWORKS, CLASSES = "random networks", "wrong classes compared"


@dataclass(frozen=True)
class LinearMolex:
    """Layers U (T, D, D), the guest tau(t) of each depth (T,), the weight alpha of the own layer, a head (K, D)."""

    layers: Array
    guests: npt.NDArray[np.int64]
    alpha: float
    head: Array

    def logits(self, x: Array) -> Array:
        """The forward pass, depth by depth: scores (K,) of an input (D,)."""
        z = x
        for t, guest in enumerate(self.guests):
            z = z + self.alpha * self.layers[t] @ z + (1.0 - self.alpha) * self.layers[guest] @ z
        return self.head @ z

    def unrolled(self) -> tuple[Array, Array]:
        """The members' weights (2^T,) and maps (2^T, K, D); the first member is the network without guests."""
        depths = len(self.layers)
        weights, maps = [], []
        for choice in itertools.product((False, True), repeat=depths):
            member = np.eye(self.head.shape[1])
            for t, is_guest in enumerate(choice):
                member = member + self.layers[self.guests[t] if is_guest else t] @ member
            weights.append(self.alpha ** (depths - sum(choice)) * (1.0 - self.alpha) ** sum(choice))
            maps.append(self.head @ member)
        return np.array(weights), np.stack(maps)


@dataclass(frozen=True)
class Radii:
    """Robust radii at one input, a column for each of the K - 1 wrong classes.

    Attributes:
        ensemble: the ensemble's radius r (K - 1,).
        length: |d| (K - 1,).
        members: the radii r_c (members, K - 1).
        lengths: |d_c| (members, K - 1).
        weights: w_c (members, 1).
    """

    ensemble: Array
    length: Array
    members: Array
    lengths: Array
    weights: Array

    @property
    def length_weighted(self) -> Array:
        """E[|d_c| r_c] / E[|d_c|], what (1) bounds the ensemble's radius by."""
        mean: Array = (self.weights * self.lengths * self.members).sum(0) / (self.weights * self.lengths).sum(0)
        return mean

    @property
    def mean(self) -> Array:
        """E[r_c]."""
        mean: Array = (self.weights * self.members).sum(0)
        return mean

    @property
    def covariance(self) -> Array:
        """cov(|d_c|, r_c), whose sign is the condition of (2)."""
        centred = self.lengths - (self.weights * self.lengths).sum(0)
        mean: Array = (self.weights * centred * self.members).sum(0)
        return mean


def radii(weights: Array, maps: Array, x: Array, label: int) -> Radii:
    """The radii at x (D,) of members (M,), (M, K, D) and of their ensemble, against every class but `label`."""
    differences = maps[:, label, None] - np.delete(maps, label, axis=1)  # (M, K - 1, D)
    whole = np.einsum("c,ckd->kd", weights, differences)
    length, lengths = np.linalg.norm(whole, axis=-1), np.linalg.norm(differences, axis=-1)
    return Radii(
        ensemble=whole @ x / length,
        length=length,
        members=differences @ x / lengths,
        lengths=lengths,
        weights=weights[:, None],
    )


def random_case(seed: int, depths: int = 4, features: int = 8, classes: int = 3) -> tuple[LinearMolex, Array, int]:
    """A random network, an input, and the class that the network gives it."""
    generator = np.random.default_rng(seed)
    layers = generator.normal(size=(depths, features, features)) * 0.5 / np.sqrt(features)
    guests = generator.integers(depths, size=depths)
    head = generator.normal(size=(classes, features))
    molex = LinearMolex(layers, guests, generator.uniform(0.5, 0.95), head)
    x = generator.normal(size=features)
    return molex, x, int(molex.logits(x).argmax())


def counterexamples() -> tuple[Radii, Radii]:
    """Ensembles of two members at x = (1, 0): one below the weighted mean, one below its first member."""
    x, even = np.array([1.0, 0.0]), np.array([0.5, 0.5])
    nothing = np.zeros(2)  # the wrong class scores 0, so d_c is the right class's row

    def at(first: tuple[float, float], second: tuple[float, float]) -> Radii:
        return radii(even, np.array([[first, nothing], [second, nothing]]), x, 0)

    return at((1.0, 0.0), (1.0, 10.0)), at((1.0, 0.0), (1.0, 1.0))


def holds(smaller: Array, larger: Array) -> npt.NDArray[np.bool_]:
    """Whether an inequality holds, up to rounding."""
    result: npt.NDArray[np.bool_] = smaller <= larger + ROUNDING * np.maximum(np.abs(smaller), np.abs(larger))
    return result


def flips_at(molex: LinearMolex, x: Array, label: int, radius: float, toward: int) -> bool:
    """Whether the class stands just inside the radius and falls just outside, straight on the way to the other."""
    whole = np.stack([molex.logits(unit) for unit in np.eye(len(x))], axis=1)  # (K, D)
    way = whole[toward] - whole[label]
    way /= np.linalg.norm(way)
    inside, outside = (int(molex.logits(x + scale * radius * way).argmax()) for scale in (0.999, 1.001))
    return inside == label and outside != label


def tally(seed: int) -> dict[str, int]:
    """What one random network shows, as counts over its wrong classes or, where said, over the network."""
    molex, x, label = random_case(seed)
    weights, maps = molex.unrolled()
    found = radii(weights, maps, x, label)
    plain, ensemble = molex.logits(x), np.einsum("c,ckd->kd", weights, maps) @ x
    nearest = int(found.ensemble.argmin())
    mean_length = (found.weights * found.lengths).sum(0)
    explained = mean_length / found.length * (found.mean + found.covariance / mean_length)
    condition, below_mean = found.covariance >= 0.0, ~holds(found.mean, found.ensemble)
    counts = {
        NETWORKS: 1,
        "the unrolled ensemble is another function": np.abs(plain - ensemble).max() > 1e-12 * np.abs(plain).max(),
        "the class does not fall at the radius": not flips_at(
            molex, x, label, float(found.ensemble[nearest]), nearest + (nearest >= label)
        ),
        "r < least robust member, over all classes (1)": not holds(found.members.min(), found.ensemble.min()),
        CLASSES: len(found.ensemble),
        "r < E[|d_c| r_c] / E[|d_c|] (1)": (~holds(found.length_weighted, found.ensemble)).sum(),
        "r is not what (2) says": (~np.isclose(found.ensemble, explained, rtol=ROUNDING, atol=0.0)).sum(),
        "cov(|d_c|, r_c) >= 0, the condition of (2)": condition.sum(),
        "r < E[r_c] where it holds (2)": (below_mean & condition).sum(),
        "r < E[r_c] where it does not": (below_mean & ~condition).sum(),
        "r < radius of the network without guests": (~holds(found.members[0], found.ensemble)).sum(),
    }
    return {name: int(count) for name, count in counts.items()}


def study(draws: int = 1000) -> dict[str, int]:
    """The tallies of as many random networks, summed."""
    total: Counter[str] = Counter()
    for seed in range(draws):
        total.update(tally(seed))
    return dict(total)


def main() -> None:
    """Print the counts and the two counterexamples."""
    for name, count in study().items():
        print(f"{'' if name in (NETWORKS, CLASSES) else '  '}{name:<55}{count:>6,}")
    below_mean, below_base = counterexamples()
    print("\nCounterexamples, two members with weight 1/2 at x = (1, 0):")
    for words, found in (("d = (1, 0) and (1, 10)", below_mean), ("d = (1, 0) and (1, 1)", below_base)):
        first, second = found.members[:, 0]
        print(
            f"  {words:<24} members {first:.3f} and {second:.3f}, weighted mean {found.mean[0]:.3f}, "
            f"ensemble {found.ensemble[0]:.3f}"
        )


if __name__ == "__main__":
    main()
