"""A potential that SGD minimizes on average, and a loss whose descent goes round in circles.

    python examples/limit_cycle.py

The two-dimensional toy of Chaudhari and Soatto (arXiv 1710.11029): with the potential Phi =
(x1^2 - 1)^2 / 4 + x2^2 / 2 and the current j = lambda e^Phi J, J = e^(-(x1^2 + x2^2)^2 / 4)
(-x2, x1), the loss has the gradient grad f = -j + grad Phi. The divergence of J is 0, so for unit
diffusion the steady state of dx = -grad f dt + sqrt(2) dW is e^-Phi for any lambda, and lambda only
makes it turn. Eq. (11) of Fioresi et al. supposes j = 0. For three lambda this follows descent on
f, descent on Phi and the random process, prints how they end and turn, and draws them. For lambda
= 1.5 descent on f goes round the saddle of Phi for good, ever closer, as t^(-1/2).
"""

import argparse
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from scipy.integrate import solve_ivp

LAMBDAS = (0.0, 0.5, 1.5)
STARTS = ((1.6, 1.2), (-1.6, -1.2), (0.3, 0.2), (-0.1, -0.6))
DURATION = 200.0


def potential_gradient(x):
    """Grad Phi, for x of shape (2, ...)."""
    return np.stack([x[0] * (x[0] ** 2 - 1), x[1]])


def potential(x):
    return (x[0] ** 2 - 1) ** 2 / 4 + x[1] ** 2 / 2


def current(x, strength):
    """j = lambda e^Phi J."""
    size = np.exp(potential(x) - (x[0] ** 2 + x[1] ** 2) ** 2 / 4)
    return strength * size * np.stack([-x[1], x[0]])


def loss_gradient(x, strength):
    return potential_gradient(x) - current(x, strength)


def descent(gradient, start):
    """The trajectory of dx/dt = -gradient(x), shape (2, T), and the same without its first half."""
    times = np.linspace(0, DURATION, 4001)
    solved = solve_ivp(
        lambda t, x: -gradient(x), (0, DURATION), start, "DOP853", times, rtol=1e-9, atol=1e-11
    )
    return solved.y, solved.y[:, len(times) // 2 :]


def turns(path):
    """How often a path of points (2, ..., T) goes round the origin, counter-clockwise."""
    angle = np.unwrap(np.arctan2(path[1], path[0]), axis=-1)
    return (angle[..., -1] - angle[..., 0]) / (2 * np.pi)


def state(paths):
    """Whether trajectories have come to rest, or within what distance of the origin they move."""
    if all(np.ptp(path, axis=1).max() < 1e-3 for path in paths):
        return "at rest"
    return f"moving, |x| <= {max(np.linalg.norm(path, axis=0).max() for path in paths):.2f}"


def diffusion(strength, seed, walkers=500, step=0.005, steps=8000):
    """The random process from the minima of Phi on: walkers' positions, (2, walkers, T)."""
    rng = np.random.default_rng(seed)
    x = np.stack([rng.choice([-1.0, 1.0], walkers), np.zeros(walkers)])
    kept = []
    for i in range(steps):
        noise = rng.normal(size=x.shape)
        x = x - step * loss_gradient(x, strength) + np.sqrt(2 * step) * noise
        if i >= steps // 4 and i % 4 == 0:
            kept.append(x)
    return np.stack(kept, axis=-1)


def draw(ax, strength, paths, walk):
    grid = np.linspace(-2.2, 2.2, 201)
    x = np.stack(np.meshgrid(grid, grid))
    ax.contour(*x, np.log(0.02 + potential(x)), 12, colors="0.8", linewidths=0.8)
    thin = x[:, ::4, ::4]
    ax.streamplot(*thin, *-loss_gradient(thin, strength), density=0.7, color="0.6", linewidth=0.5)
    seen = walk[:, :: max(walk.shape[1] // 60, 1), -1]
    ax.plot(*seen, ".", ms=3, color="tab:green", label="the random process, one moment")
    for i, (on_loss, on_potential) in enumerate(paths):
        ax.plot(*on_loss, color="tab:blue", lw=1.5, label="descent on f" if i == 0 else None)
        label = "descent on Phi" if i == 0 else None
        ax.plot(*on_potential, "--", color="tab:red", lw=1.5, label=label)
    ax.set(xlim=(-2.2, 2.2), ylim=(-2.2, 2.2), aspect="equal", title=f"lambda = {strength:g}")
    ax.set_xlabel("$x_1$")


def main():
    parser = argparse.ArgumentParser(
        description="SGD's limit cycles in two dimensions.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("limit_cycle_out"))
    args = parser.parse_args()
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    axes = figure.subplots(1, len(LAMBDAS), sharey=True)
    print(
        f"{len(STARTS)} starts, followed for t = {DURATION:g}; turns are those of the second half"
    )
    print("\n| lambda | descent on f | turns | descent on Phi | turns | SGD, turns in 100 t |")
    print("|---:|---|---:|---|---:|---:|")
    for ax, strength in zip(axes, LAMBDAS, strict=True):
        paths, rows = [], []
        for start in STARTS:
            on_loss, late = descent(lambda x, s=strength: loss_gradient(x, s), start)
            on_potential, calm = descent(potential_gradient, start)
            paths.append((on_loss, on_potential))
            rows.append((late, calm))
        walk = diffusion(strength, args.seed)
        elapsed = 0.005 * 4 * (walk.shape[-1] - 1)
        per_time = 100 * turns(walk).mean() / elapsed
        on_loss, on_potential = ([row[i] for row in rows] for i in (0, 1))
        print(
            f"| {strength:g} | {state(on_loss)} | {max(map(turns, on_loss)):.1f} "
            f"| {state(on_potential)} | {max(map(turns, on_potential)):.1f} | {per_time:.2f} |"
        )
        draw(ax, strength, paths, walk)
    axes[0].set_ylabel("$x_2$")
    axes[0].legend(loc="lower left", fontsize="small")
    args.out.mkdir(parents=True, exist_ok=True)
    picture = args.out / "limit_cycle.png"
    figure.savefig(picture, dpi=150)
    print(f"\npicture  {picture}")


if __name__ == "__main__":
    main()
