"""How far Eq. (10) of the paper is from what it is derived from, on four networks.

    python examples/geometry_chain.py

Gradient descent, RGD (Eq. 10), the geodesics of the diffusion metric under the force of the loss
(Eq. 8; in the weak field, and of the metric itself) and SGD (Eq. 1, the mean of many runs) start
from the same weights and are followed for the same time, for several eps. It prints how far apart
they end, in parts of RGD's way, and what the derivation of Eq. (10) neglects along the geodesic, in
parts of the gradient; and draws both against eps. Eps is constant in time, the fraction given of
1 / M_x for the largest M_x that RGD's trajectory meets; a geodesic that goes where eps M_x reaches
1 ends there. All in float64.
"""

import argparse
import os
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
from keras import layers
from matplotlib.figure import Figure
from sklearn.datasets import load_digits

from keras_rgd.epsilon import Fraction
from keras_rgd.geometry import Geometry

CROSSENTROPY = keras.losses.SparseCategoricalCrossentropy
TERMS = {
    "curvature": "eps Cov(f, H x')",
    "condition_9": "(9)",
    "total_derivative": "int eps D x''",
    "constants": "constants",
    "christoffel": "eps^2 of (7)",
    "inverse": "eps^2 of g^-1",
}
COMPARED = ("GD", "geodesic", "geodesic of g", "SGD")


def digits(count):
    data = load_digits()
    chosen = np.random.default_rng(0).permutation(len(data.target))[:count]
    return data.images[chosen, ..., None] / 16, data.target[chosen]


def softmax_regression(x, y):
    return [layers.Flatten(), layers.Dense(10)], CROSSENTROPY(from_logits=True), x, y


def mlp(x, y):
    stack = [layers.Flatten(), layers.Dense(16, "tanh"), layers.Dense(10)]
    return stack, CROSSENTROPY(from_logits=True), x, y


def cnn(x, y):
    stack = [
        layers.Conv2D(4, 3, activation="gelu"),
        layers.AveragePooling2D(2),
        layers.LayerNormalization(),
        layers.Flatten(),
        layers.Dense(10),
    ]
    return stack, CROSSENTROPY(from_logits=True), x, y


def autoencoder(x, y):
    stack = [layers.Flatten(), layers.Dense(8, "tanh"), layers.Dense(64)]
    return stack, "mse", x, x.reshape(len(x), -1)


NETWORKS = {f.__name__: f for f in (softmax_regression, mlp, cnn, autoencoder)}


def build(name, args):
    """(model, x, y) with weights of `args.steps` steps of gradient descent."""
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    keras.utils.set_random_seed(args.seed)
    stack, loss, x, y = NETWORKS[name](*digits(args.examples))
    model = keras.Sequential([keras.Input(x.shape[1:]), *stack])
    model.compile(keras.optimizers.SGD(args.learning_rate), loss)
    model.fit(x, y, batch_size=len(x), epochs=args.steps, shuffle=False, verbose=0)
    return model, x, y


def row(geometry, fraction, args):
    """What is printed for one eps: distances of the ends over RGD's way, terms, the deviation."""
    options = dict(times=[0.0, args.duration], verbose=False)
    # Only the largest M_x on the way is asked of it.
    varying = geometry.rgd_flow(
        args.duration, Fraction(fraction), rtol=1e-4, atol=1e-6, verbose=False
    )
    epsilon = fraction / (fraction / varying.epsilons).max()
    flows = {
        "RGD": geometry.rgd_flow(args.duration, epsilon, **options),
        "GD": geometry.gradient_flow(args.duration, **options),
        "geodesic": geometry.geodesic_flow(args.duration, epsilon, **options),
        "geodesic of g": geometry.geodesic_flow(args.duration, epsilon, exact=True, **options),
    }
    steps = round(args.duration / args.learning_rate)
    ensemble = geometry.sgd_ensemble(
        steps,
        learning_rate=args.learning_rate,
        batch_size=args.batch_size,
        runs=args.runs,
        every=steps,
        seed=args.seed,
        verbose=False,
    )
    ends = {name: flow.positions[-1] for name, flow in flows.items()}
    ends["SGD"] = ensemble.mean[-1]
    way = np.linalg.norm(ends["RGD"] - flows["RGD"].positions[0])
    terms = geometry.neglected_terms(flows["geodesic"], verbose=False)
    distances = {name: np.linalg.norm(ends[name] - ends["RGD"]) / way for name in COMPARED}
    stopped = {name: flow.times[-1] for name, flow in flows.items() if flow.diverged}
    return {
        # What has ended early is at no comparable moment.
        "distances": distances | dict.fromkeys(stopped, np.nan),
        "stopped": stopped,
        "error": np.sqrt(ensemble.spread[-1] / args.runs) / way,
        "SGD to GD": np.linalg.norm(ends["SGD"] - ends["GD"]) / way,
        "terms": {name: terms.relative(name)[-1] for name in TERMS},
        "imbalance": terms.relative("imbalance")[-1],
    }


def main():
    args = parse_arguments()
    print(
        f"digits, N = {args.examples}, after {args.steps} steps of gradient descent; followed for "
        f"t = {args.duration:g}; SGD: learning rate {args.learning_rate:g}, batches of "
        f"{args.batch_size}, {args.runs} runs\n"
    )
    head = ["network", "d", "eps M_x", *(f"RGD to {name}" for name in COMPARED), "SGD to GD"]
    print("| " + " | ".join([*head, *TERMS.values()]) + " |")
    print("|---" + "|---:" * (len(head) - 1 + len(TERMS)) + "|")
    results = {}
    for name in args.networks:
        model, x, y = build(name, args)
        geometry = Geometry(model, x, y)
        for fraction in args.fractions:
            result = row(geometry, fraction, args)
            results.setdefault(name, []).append(result)
            distances = result["distances"]
            cells = [
                f"ends at t = {result['stopped'][key]:.2f}"
                if key in result["stopped"]
                else f"{distances[key]:.3f}"
                for key in COMPARED
            ]
            cells[-1] += f" ± {result['error']:.3f}"
            cells += [f"{result['SGD to GD']:.3f}"]
            cells += [f"{value:.3f}" for value in result["terms"].values()]
            print(
                f"| {name} | {model.count_params():,} | {fraction:g} | {' | '.join(cells)} |",
                flush=True,
            )
    worst = max(r["imbalance"] for rows in results.values() for r in rows)
    print(f"\nEq. (8) with nothing dropped, over the gradient, is off by at most {worst:.1g}")
    args.out.mkdir(parents=True, exist_ok=True)
    picture = args.out / "geometry_chain.png"
    draw(results, args.fractions).savefig(picture, dpi=150)
    print(f"picture  {picture}")


def draw(results, fractions):
    """One panel for each network: distances against eps, and the terms."""
    figure = Figure(figsize=(4 * len(results), 7), layout="constrained")
    axes = figure.subplots(2, len(results), sharex=True, sharey="row", squeeze=False)
    for (name, rows), (above, below) in zip(results.items(), axes.T, strict=True):
        for key in COMPARED:
            above.loglog(fractions, [r["distances"][key] for r in rows], "o-", label=f"to {key}")
        for key, label in TERMS.items():
            below.loglog(fractions, [r["terms"][key] for r in rows], "o-", label=label)
        above.set_title(name)
        below.set_xlabel("eps M_x")
        below.set_xticks(fractions, [f"{f:g}" for f in fractions])
        below.minorticks_off()
    axes[0, 0].set_ylabel("distance of RGD's end, over its way")
    axes[1, 0].set_ylabel("neglected at the end, over the gradient")
    axes[0, 0].legend(fontsize="small")
    axes[1, 0].legend(fontsize="small")
    return figure


def parse_arguments():
    parser = argparse.ArgumentParser(
        description="How far Eq. (10) is from the geodesic and from SGD.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--fractions", nargs="+", type=float, default=[0.1, 0.5, 0.9])
    parser.add_argument("--examples", type=int, default=100)
    parser.add_argument("--steps", type=int, default=20, help="of gradient descent before")
    parser.add_argument("--duration", type=float, default=2.0, help="in learning rates")
    parser.add_argument("--learning-rate", type=float, default=0.1)
    parser.add_argument("--batch-size", type=int, default=10, help="of SGD")
    parser.add_argument("--runs", type=int, default=1000, help="of SGD")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("geometry_chain_out"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
