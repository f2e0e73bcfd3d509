"""The command line: `python -m keras_rgd spectrum MODEL.keras --dataset mnist`."""

import argparse
import dataclasses
import pathlib

import keras
import numpy as np

import keras_rgd
from keras_rgd import dataset_spectrum
from keras_rgd._support.arguments import WAYS
from keras_rgd._support.backends import ERRORS
from keras_rgd.datasets import load_dataset


def main(arguments=None):
    """Run one command; `arguments` default to those of the process."""
    parser = argparse.ArgumentParser(prog="python -m keras_rgd", description=keras_rgd.__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_spectrum(commands)
    args = parser.parse_args(arguments)
    args.run(args)


def _add_spectrum(commands):
    parser = commands.add_parser(
        "spectrum",
        help="the spectrum of D of a saved model over a data set",
        description="Measure D of a compiled, saved model over an image classification data set "
        "of TensorFlow Datasets; print the record, and write it as JSON and as a picture.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("model", type=pathlib.Path, metavar="MODEL.keras")
    parser.add_argument("--dataset", required=True, help="its name, such as mnist")
    parser.add_argument("--split", default="train")
    parser.add_argument("--data-dir", help="the folder of TensorFlow Datasets")
    parser.add_argument("--download", action="store_true", help="download an absent data set")
    parser.add_argument("--scale", type=float, default=255, help="what pixels are divided by")
    parser.add_argument("--k", type=int, help="how many eigenvalues; all, or 32 by iteration")
    parser.add_argument("--examples", type=int, help="take so many, drawn at random")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--training", action="store_true", help="layers in training mode")
    parser.add_argument("--per-example", choices=WAYS, default="auto")
    parser.add_argument("--method", choices=dataset_spectrum.METHODS, default="auto")
    parser.add_argument("--memory-limit", type=float, default=6.0, help="in GiB")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        help="files to write, without .json and .png (default: MODEL_spectrum, in this folder)",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.set_defaults(run=_spectrum)


def _spectrum(args):
    out = args.out or pathlib.Path(f"{args.model.stem}_spectrum")
    if not out.parent.is_dir():
        raise SystemExit(f"There is no folder {out.parent} to write {out.name}.json to.")
    model = _load_model(args.model)
    try:
        options = dict(data_dir=args.data_dir, download=args.download, scale=args.scale)
        data = load_dataset(args.dataset, args.split, **options)
        spectrum = keras_rgd.spectrum(
            model,
            data,
            k=args.k,
            examples=args.examples,
            batch_size=args.batch_size,
            training=args.training,
            per_example=args.per_example,
            seed=args.seed,
            method=args.method,
            memory_limit=int(args.memory_limit * 2**30),
            verbose=not args.quiet,
        )
    except (*ERRORS, RuntimeError) as error:
        raise SystemExit(str(error)) from error
    json_file, picture = (out.with_name(out.name + suffix) for suffix in (".json", ".png"))
    spectrum.save(json_file)
    if spectrum.lambda_max > 0:
        keras_rgd.plot_spectrum(spectrum).figure.savefig(picture, dpi=150)
    _print(spectrum)
    print(f"\nwritten: {json_file}" + (f", {picture}" if spectrum.lambda_max > 0 else ""))


def _load_model(path):
    if not path.is_file():
        raise SystemExit(f"There is no file {path}. Expected a model saved by model.save(...).")
    try:
        return keras.models.load_model(path)
    except (OSError, TypeError, ValueError) as error:
        raise SystemExit(f"Keras cannot load {path}: {error}") from error


def _print(spectrum):
    """One line a field."""
    for field in dataclasses.fields(spectrum):
        value = getattr(spectrum, field.name)
        if isinstance(value, np.ndarray):
            shown = ", ".join(f"{v:.4g}" for v in value[:5])
            value = shown + (f", ... ({len(value)} in all)" if len(value) > 5 else "")
        elif isinstance(value, float):
            value = f"{value:.6g}"
        elif isinstance(value, int) and not isinstance(value, bool):
            value = f"{value:,}"
        print(f"{field.name:<20} {value}")
    print(f"{'rank in percent of d':<20} {spectrum.rank_percent:.3f}")


if __name__ == "__main__":
    main()
