"""How often eps is 1/M_x and more, M_x of the batch's D or of the data set's.

With "double_backward" the largest eigenvalue M_x of each batch's D is estimated, and eps * M_x < 1
can be missed; so it is with "linearized" (KERAS_BACKEND=jax) and for a batch in pieces. This trains
on the 8x8 digits that scikit-learn ships, decomposes the Gram matrix of every batch besides, and
prints how often and by how much.

    python benchmarks/epsilon_misses.py
    python benchmarks/epsilon_misses.py --models mlp cnn --batch-sizes 64 1797 --microbatch-size 32

Where M_x of each batch is known, the data set's may still be larger. At four moments of a training
this compares them over batches drawn there, for the eps that a rule would choose next:

    python benchmarks/epsilon_misses.py --of-the-data-set --models mlp --batch-sizes 64
"""

import argparse

import keras
import numpy as np
import sklearn.datasets

import keras_rgd
from keras_rgd.per_example.measuring import as_batch, way_for

layers = keras.layers


def mlp():
    """A multilayer perceptron."""
    return [layers.Flatten(), layers.Dense(64, "relu"), layers.Dense(64, "relu"), layers.Dense(10)]


def cnn():
    """A convolutional network."""
    return [
        layers.Conv2D(16, 3, activation="relu"),
        layers.MaxPooling2D(),
        layers.Flatten(),
        layers.Dense(32, "relu"),
        layers.Dense(10),
    ]


def cnn_batch_normalization():
    """The same with BatchNormalization, whose examples mix."""
    conv, pool, flatten, dense, last = cnn()
    return [conv, layers.BatchNormalization(), pool, flatten, dense, last]


def lstm():
    """A recurrent network over the rows of the image."""
    return [layers.Reshape((8, 8)), layers.LSTM(32), layers.Dense(10)]


MODELS = {f.__name__: f for f in (mlp, cnn, cnn_batch_normalization, lstm)}


MOMENTS, DRAWN = (200, 500, 1000, 2000), 200


def digits():
    """The images, shape (1797, 8, 8, 1), and labels."""
    images, labels = sklearn.datasets.load_digits(return_X_y=True)
    return (images / 16).astype("float32").reshape(-1, 8, 8, 1), labels


def compiled(name, rgd):
    """One of MODELS, to be trained with an RGD."""
    model = keras_rgd.RGDSequential([keras.Input((8, 8, 1)), *MODELS[name]()])
    model.compile(rgd, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def data_set_products(name, rule, batch_size, learning_rate, seed):
    """eps * M_x of the data set's D, for DRAWN batches at each of MOMENTS, numpy (4, DRAWN)."""
    keras.utils.set_random_seed(seed)
    images, labels = digits()
    rgd = keras_rgd.RGD(learning_rate, rule)
    model, rng, result = compiled(name, rgd), np.random.default_rng(seed), []
    for step in range(1, max(MOMENTS) + 1):
        chosen = rng.choice(len(images), batch_size, replace=False)
        model.train_on_batch(images[chosen], labels[chosen])
        if step not in MOMENTS:
            continue
        D = keras_rgd.diffusion_matrix(model, images, labels)
        gram, mean = np.asarray(D.gradients.gram(), float), float(rgd.mean_lambda_max)
        row = []
        for _ in range(DRAWN):
            drawn = rng.choice(len(images), batch_size, replace=False)
            k = gram[np.ix_(drawn, drawn)]
            k = k - k.mean(0)
            bound = np.linalg.eigvalsh(k - k.mean(1, keepdims=True))[-1] / batch_size
            if isinstance(rule, keras_rgd.epsilon.FractionOfMean):
                bound = max(bound, mean)
            row.append(rule.c / bound * D.top_eigenvalue())
        result.append(row)
    return np.array(result)


def print_data_set_table(args):
    """One row for each rule."""
    print("| model | N | rule |", *(f"step {t} |" for t in MOMENTS))
    print("|---|---|---|" + "---|" * len(MOMENTS))
    rules = keras_rgd.epsilon
    for name in args.models:
        for n in args.batch_sizes:
            for make in (rules.Fraction, rules.FractionOfMean):
                for c in args.fractions:
                    p = data_set_products(name, make(c), n, args.learning_rate, args.seed)
                    cells = (f"{np.mean(r >= 1):.1%}, {np.median(r):.2f}, {r.max():.2f}" for r in p)
                    print(f"| {name} | {n} | `{make.__name__}({c})` |", " | ".join(cells), "|")


def products(name, epsilon, batch_size, learning_rate, steps, seed, microbatch_size=None):
    """eps * M_x at each step of one training run, and how many steps iterated; numpy (steps,)."""
    keras.utils.set_random_seed(seed)
    images, labels = digits()
    way = "linearized" if keras.backend.backend() == "jax" else "double_backward"
    rgd = keras_rgd.RGD(learning_rate, epsilon, per_example=way, microbatch_size=microbatch_size)
    model = compiled(name, rgd)
    rng = np.random.default_rng(seed)
    way, result = None, []
    for _ in range(steps):
        chosen = rng.choice(len(images), batch_size, replace=False)
        batch = as_batch(model, images[chosen], labels[chosen])
        way = way or way_for(model, batch, training=True)
        top = keras_rgd.DiffusionMatrix(way(batch)).top_eigenvalue()
        model.train_on_batch(batch.x, batch.y)
        result.append(float(rgd.chosen_epsilon) * top)
    return np.array(result)


def main():
    """Print one row for each training run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--fractions", nargs="+", type=float, default=[0.5, 0.9])
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[16, 64])
    parser.add_argument("--learning-rate", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--microbatch-size", type=int, help="take batches in pieces")
    parser.add_argument("--of-the-data-set", action="store_true", help="M_x of all examples' D")
    args = parser.parse_args()
    if args.of_the_data_set:
        return print_data_set_table(args)
    size = args.microbatch_size
    print("| model | N | c | steps | eps M_x >= 1 | worst | median | least |")
    print("|---|---|---|---|---|---|---|---|")
    for name in args.models:
        for n in args.batch_sizes:
            for c in args.fractions:
                p = products(name, c, n, args.learning_rate, args.steps, args.seed, size)
                print(
                    f"| {name} | {n} | {c} | {len(p)} | {np.mean(p >= 1):.1%} | {p.max():.2f} "
                    f"| {np.median(p):.2f} | {p.min():.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
