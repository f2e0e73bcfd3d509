"""The networks of the paper's Table 1: how large D is, what an RGD step costs, D's top eigenvalues.

    python examples/table1.py --dataset cifar10

For each of the four: d, the bound (N - 1) / d on the share of D's eigenvalues that are not 0 (Eq. 3
of the paper) for the paper's N and for the true number of training examples; one RGD step with
BatchNormalization in training mode, against an SGD step of the same batch, with the memory that
each took; and the top of D's spectrum over a sample, in evaluation mode. The weights are random:
the networks are not trained. `--dataset svhn_cropped` is the paper's other data set.
"""

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time

import architectures
import digits
import keras
import numpy as np

import keras_rgd
from keras_rgd.datasets import DatasetError, dataset_size, load_dataset

NETWORKS = {
    "ResNet-110": architectures.resnet110,
    "WRN-16-8": architectures.wide_resnet_16_8,
    "DenseNet-40, k = 12": lambda: architectures.densenet(depth=40, growth=12),
    "DenseNet-100, k = 24": lambda: architectures.densenet(depth=100, growth=24),
}

# N as Table 1 has it, and the splits that training uses.
DATASETS = {
    "cifar10": (60_000, ("train",)),
    "svhn_cropped": (600_000, ("train", "extra")),
}

FORWARD_PASSES = 30  # until the moving statistics are those of the data

# Steps between the two medians: at first lambda_max of random weights falls several-fold from one
# to the next, and its estimate iterates.
SETTLING = 8


def main():
    args = parse_arguments()
    if args.only:
        network, part = args.only
        print(json.dumps(PARTS[part](args, network)))
        return
    paper_n, splits = DATASETS[args.dataset]
    try:
        n = dataset_size(args.dataset, splits, download=args.download)
    except DatasetError as error:
        raise SystemExit(str(error)) from error
    networks = [name for name in NETWORKS if not args.networks or name in args.networks]

    print(f"{args.dataset}: the paper's N = {paper_n:,}, training examples N = {n:,}\n")
    print("| | d | (paper's N - 1) / d | (N - 1) / d |")
    print("|---|---:|---:|---:|")
    for name in networks:
        d = weights(NETWORKS[name]())
        print(f"| {name} | {d:,} | {(paper_n - 1) / d:.3%} | {(n - 1) / d:.3%} |")

    print(
        f"\nA step on {args.batch_size} images, medians of {args.repeats} at first and of "
        f"{args.repeats} after {SETTLING} more (seconds; GiB at the peak)"
    )
    print(
        "\n| | SGD | RGD at first | over SGD's | lambda_max from, to | RGD later | over SGD's "
        "| lambda_max from, to | memory, SGD | RGD | eps lambda_max | way |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|")
    for name in networks:
        sgd, rgd = (in_a_process(args, name, part) for part in ("sgd", "rgd"))
        cells = [f"{sgd['seconds']:.2f}"]
        for part in ("first", "later"):
            seconds, (start, end) = rgd[part]["seconds"], rgd[part]["lambda_max"]
            cells += [
                f"{seconds:.2f}",
                f"{seconds / sgd['seconds']:.2f}",
                f"{start:.3g}, {end:.3g}",
            ]
        cells += [f"{sgd['memory']:.1f}", f"{rgd['memory']:.1f}"]
        cells += [f"{rgd['epsilon_lambda_max']:.2f}", rgd["way"]]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)

    print(f"\nD over {args.examples} images, evaluation mode (squared gradient; peak GiB)")
    print("\n| | five largest eigenvalues | trace | rank, of at most N - 1 | seconds | memory |")
    print("|---|---|---:|---:|---:|---:|")
    for name in networks:
        row = in_a_process(args, name, "spectrum")
        top = ", ".join(f"{value:.3g}" for value in row["eigenvalues"])
        print(
            f"| {name} | {top} | {row['trace']:.3g} | {row['rank']} of {row['rank_bound']} "
            f"| {row['seconds']:.0f} | {row['memory']:.1f} |",
            flush=True,
        )


def weights(model):
    return sum(math.prod(w.shape) for w in model.trainable_weights)


def in_a_process(args, network, part):
    """What one part prints in a process of its own, whose memory is then that part's."""
    command = [sys.executable, __file__, "--only", network, part]
    for name in ("dataset", "batch_size", "repeats", "examples", "seed"):
        command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{network}, {part}: the process ended with {done.returncode}.")
    return json.loads(done.stdout.strip().splitlines()[-1])


def prepared(args, network, count):
    """The network with random weights, compiled by nobody yet, and `count` images with labels."""
    keras.utils.set_random_seed(args.seed)
    x, y = load_dataset(args.dataset, f"train[:{count}]")
    mean, std = x.mean((0, 1, 2)), x.std((0, 1, 2))
    return NETWORKS[network](), (x - mean) / std, y


def compiled(model, optimizer):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss=loss)
    return model


def median_step(count, model, x, y):
    """Median seconds of `count` steps."""
    times = []
    for _ in range(count):
        start = time.perf_counter()
        loss = model.train_on_batch(x, y, return_dict=True)["loss"]
        times.append(time.perf_counter() - start)
    if not np.all(np.isfinite([loss, *(np.sum(w) for w in model.get_weights())])):
        raise SystemExit(f"{model.name}: a step was not finite.")
    return statistics.median(times)


def sgd_part(args, network):
    model, x, y = prepared(args, network, args.batch_size)
    compiled(model, keras.optimizers.SGD(0.01))
    median_step(1, model, x, y)  # builds it
    return {"seconds": median_step(2 * args.repeats, model, x, y), "memory": peak()}


def rgd_part(args, network):
    model, x, y = prepared(args, network, args.batch_size)
    model = compiled(keras_rgd.to_rgd(model), keras_rgd.RGD(0.01))
    rgd, parts = model.optimizer, {}
    for part, before in (("first", 1), ("later", SETTLING)):  # one step builds it
        median_step(before, model, x, y)
        start = float(rgd.lambda_max)
        seconds = median_step(args.repeats, model, x, y)
        parts[part] = {"seconds": seconds, "lambda_max": [start, float(rgd.lambda_max)]}
    return {
        **parts,
        "memory": peak(),
        "epsilon_lambda_max": float(rgd.chosen_epsilon * rgd.lambda_max),
        "way": rgd.per_example_choice.name,
    }


def spectrum_part(args, network):
    model, x, y = prepared(args, network, args.examples)
    compiled(model, keras.optimizers.SGD(0.01))
    rng = np.random.default_rng(args.seed)
    for _ in range(FORWARD_PASSES):
        model(x[rng.choice(len(x), min(args.batch_size, len(x)), replace=False)], training=True)
    spectrum = keras_rgd.spectrum(model, (x, y), k=5, batch_size=8, verbose=False)
    fields = ("trace", "rank", "rank_bound", "seconds")
    return {name: getattr(spectrum, name) for name in fields} | {
        "eigenvalues": spectrum.eigenvalues.tolist(),
        "memory": peak(),
    }


PARTS = {"sgd": sgd_part, "rgd": rgd_part, "spectrum": spectrum_part}


def peak():
    """GiB that this process held at most."""
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes / 2 ** (30 if sys.platform == "darwin" else 20)


def parse_arguments():
    parser = argparse.ArgumentParser(
        description="The networks of the paper's Table 1.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--dataset", choices=list(DATASETS), default="cifar10")
    parser.add_argument("--download", action="store_true", help="download an absent data set")
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), help="not all four")
    parser.add_argument("--batch-size", type=digits.positive_int, default=16, help="of a step")
    parser.add_argument("--repeats", type=digits.positive_int, default=3)
    parser.add_argument("--examples", type=digits.positive_int, default=64, help="for D")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
