"""A two-layer network computed in full: D, g and its Christoffel symbols, and four trajectories.

    python examples/two_layer_network.py

The network b1 tanh(a1 x) + b2 tanh(a2 x) has four weights, so that all of the paper's objects can
be written out. SymPy derives D (Eq. 2), the metric g = I + eps D (Eq. 6) and the Christoffel
symbols (Eq. 5) from the losses f_i = (b1 tanh(a1 x_i) + b2 tanh(a2 x_i) - y_i)^2; what
keras_rgd.geometry gives for the same network in Keras is compared with them. Then gradient
descent, RGD (Eq. 10), the geodesic (Eq. 8) and SGD (Eq. 1) start from one point; a picture has them
in the plane of D's two leading eigenvectors, and what Eq. (10) neglects along the way.
"""

import argparse
import os
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import sympy
from matplotlib.figure import Figure

from keras_rgd.geometry import Geometry

X = np.array([-2.0, -1.0, -0.3, 0.5, 1.2, 2.0])
Y = np.array([-0.8, -1.1, 0.2, 0.3, 1.4, 0.6])
START = np.array([0.9, -0.5, 0.7, 0.6])  # a1, a2, b1, b2

TERMS = {
    "curvature": r"$\epsilon\,\mathrm{Cov}(f_i, H_i \dot x)$",
    "third_derivatives": "third derivatives of (9)",
    "acceleration": r"$H_i \ddot x$ of (9)",
    "total_derivative": r"$\int\epsilon D\ddot x$",
    "constants": "constants",
    "christoffel": r"$O(\epsilon^2)$ of (7)",
    "inverse": r"$O(\epsilon^2)$ of $g^{-1}$",
}


def network():
    """The network in Keras, in float64, at START."""
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    model = keras.Sequential(
        [
            keras.Input((1,)),
            keras.layers.Dense(2, activation="tanh", use_bias=False),
            keras.layers.Dense(1, use_bias=False),
        ]
    )
    model.compile("sgd", loss="mse")
    model.set_weights([START[:2].reshape(1, 2), START[2:].reshape(2, 1)])
    return model


def in_closed_form():
    """SymPy's functions of (a1, a2, b1, b2, eps): D, g and the Christoffel symbols [k, i, j]."""
    weights = a1, a2, b1, b2 = sympy.symbols("a1 a2 b1 b2")
    epsilon = sympy.Symbol("epsilon")
    losses = [
        (b1 * sympy.tanh(a1 * x) + b2 * sympy.tanh(a2 * x) - y) ** 2
        for x, y in zip(X, Y, strict=True)
    ]
    n = len(losses)
    G = sympy.Matrix([[sympy.diff(f, w) for w in weights] for f in losses])
    mean = sympy.Matrix([[sum(G[:, j]) / n for j in range(4)]])
    D = (G.T * G) / n - mean.T * mean
    g = sympy.eye(4) + epsilon * D
    lowered = [
        [
            [
                (sympy.diff(g[k, j], u) + sympy.diff(g[k, i], v) - sympy.diff(g[i, j], w)) / 2
                for j, v in enumerate(weights)
            ]
            for i, u in enumerate(weights)
        ]
        for k, w in enumerate(weights)
    ]
    arguments = (*weights, epsilon)
    D, g, lowered = (sympy.lambdify(arguments, e, "numpy", cse=True) for e in (D, g, lowered))

    def christoffel(*values):
        symbols = np.array(lowered(*values))
        return np.einsum("kl,lij->kij", np.linalg.inv(g(*values)), symbols)

    return D, g, christoffel


def compared(geometry, epsilon):
    """Print the largest difference of each object from its closed form, relative to its size."""
    D, g, christoffel = in_closed_form()
    at = (*START, epsilon)
    ours, metric = geometry.diffusion_matrix(), geometry.metric(epsilon)
    units = [split(e) for e in np.eye(4)]
    symbols = np.array(
        [[flat(geometry.christoffel(u, v, epsilon, exact=True)) for v in units] for u in units]
    )
    rows = {
        "D": (np.array([flat(ours.matvec(u)) for u in units]), D(*at)),
        "g": (np.array([flat(metric.apply(u)) for u in units]), g(*at)),
        "inverse of g": (
            np.array([flat(metric.inverse(u)) for u in units]),
            np.linalg.inv(g(*at)),
        ),
        "Christoffel symbols": (symbols.transpose(2, 0, 1), christoffel(*at)),
    }
    print("| | entries | largest | difference to the closed form |")
    print("|---|---:|---:|---:|")
    for name, (received, expected) in rows.items():
        size = np.abs(expected).max()
        difference = np.abs(received - expected).max() / size
        print(f"| {name} | {expected.size} | {size:.4g} | {difference:.1g} |")
    return np.linalg.eigh(D(*at))[1][:, ::-1]


def split(vector):
    """A vector of four numbers as the arrays of the network."""
    return [np.reshape(vector[:2], (1, 2)), np.reshape(vector[2:], (2, 1))]


def flat(arrays):
    return np.concatenate([np.ravel(a) for a in arrays])


def main():
    args = parse_arguments()
    geometry = Geometry(network(), X[:, None], Y[:, None])
    top = geometry.diffusion_matrix().top_eigenvalue()
    epsilon = args.fraction / top
    print(f"f_i = (b1 tanh(a1 x_i) + b2 tanh(a2 x_i) - y_i)^2, N = {len(X)}, d = 4")
    print(f"lambda_max = {top:.6g}, eps = {args.fraction:g} / lambda_max = {epsilon:.6g}\n")
    directions = compared(geometry, epsilon)[:, :2]

    times = np.linspace(0, args.duration, 81)
    flows = {
        "gradient descent": geometry.gradient_flow(args.duration, times=times),
        "RGD, Eq. (10)": geometry.rgd_flow(args.duration, epsilon, times=times),
        "geodesic, Eq. (8)": geometry.geodesic_flow(args.duration, epsilon, times=times),
        "geodesic of g": geometry.geodesic_flow(args.duration, epsilon, exact=True, times=times),
    }
    ensemble = geometry.sgd_ensemble(
        round(args.duration / args.learning_rate),
        learning_rate=args.learning_rate,
        batch_size=args.batch_size,
        runs=args.runs,
        seed=args.seed,
    )
    terms = geometry.neglected_terms(flows["geodesic, Eq. (8)"])
    rgd = flows["RGD, Eq. (10)"].positions[-1]
    way = np.linalg.norm(rgd - START)
    print(f"\nAt t = {args.duration:g}; distances over RGD's from the start, {way:.4g}")
    print("\n| | loss | distance to RGD |\n|---|---:|---:|")
    for name, flow in flows.items():
        apart = np.linalg.norm(flow.positions[-1] - rgd) / way
        print(f"| {name} | {flow.losses[-1]:.4g} | {apart:.3g} |")
    apart = np.linalg.norm(ensemble.mean[-1] - rgd) / way
    spread = np.sqrt(ensemble.spread[-1]) / way
    print(f"| mean of {args.runs} runs of SGD (deviation {spread:.2g}) | | {apart:.3g} |")
    print("\n| neglected by Eq. (10) along the geodesic | over the gradient's norm, at most |")
    print("|---|---:|")
    for name in TERMS:
        print(f"| {name} | {terms.relative(name).max():.3g} |")

    args.out.mkdir(parents=True, exist_ok=True)
    picture = args.out / "two_layer_network.png"
    draw(flows, ensemble, terms, directions).savefig(picture, dpi=150)
    print(f"\npicture  {picture}")


def draw(flows, ensemble, terms, directions):
    """The trajectories in the plane of two directions, and the terms against time."""
    figure = Figure(figsize=(12, 5), layout="constrained")
    plane, ax = figure.subplots(1, 2)
    for run in ensemble.positions[:40]:
        plane.plot(*((run - START) @ directions).T, color="tab:green", alpha=0.12, lw=0.7)
    mean = (ensemble.mean - START) @ directions
    plane.plot(*mean.T, color="tab:green", lw=2, label="SGD: runs, and their mean")
    styles = {"gradient descent": "k--", "RGD, Eq. (10)": "r-"}
    for name, flow in flows.items():
        style = styles.get(name, "b-" if "Eq" in name else "c:")
        plane.plot(*((flow.positions - START) @ directions).T, style, lw=1.5, label=name)
    plane.plot(0, 0, "ko", ms=4)
    plane.set_xlabel("along D's first eigenvector at the start")
    plane.set_ylabel("along its second")
    plane.legend(fontsize="small")
    for name, label in TERMS.items():
        value = terms.relative(name)
        ax.semilogy(terms.times, np.where(value > 0, value, np.nan), label=label)
    ax.semilogy(terms.times, terms.relative("departure"), "k--", label="the geodesic from Eq. (10)")
    ax.set_xlabel("time, in learning rates")
    ax.set_ylabel("neglected, over the norm of the gradient")
    ax.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def parse_arguments():
    parser = argparse.ArgumentParser(
        description="The geometry of a network of two layers and four weights.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--fraction", type=float, default=0.5, help="eps lambda_max at the start")
    parser.add_argument("--duration", type=float, default=2.0, help="in learning rates")
    parser.add_argument("--learning-rate", type=float, default=0.05, help="of SGD")
    parser.add_argument("--batch-size", type=int, default=2, help="of SGD")
    parser.add_argument("--runs", type=int, default=200, help="of SGD")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("two_layer_network_out"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
