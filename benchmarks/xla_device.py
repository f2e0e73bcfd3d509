"""Lower the whole RGD step and SGD step of the benchmark models to StableHLO, with their data.

What XLA compiles for a GPU or a TPU is this: `xla_device_run.py`, which needs JAX and numpy alone,
compiles and times the files on whatever device JAX sees, and checks them against TensorFlow's own
outputs, which are saved beside them.

    python benchmarks/xla_device.py --out xla_device
    python benchmarks/xla_device_run.py xla_device
"""

import argparse
import hashlib
import pathlib
import re

import keras
import models
import numpy as np
import tensorflow as tf
from entries import drawn

import keras_rgd
from keras_rgd import per_example

LEARNING_RATE = 1.0  # the weights after the step then show the direction


def lowered(name, n, way):
    """The step as StableHLO, its inputs and TensorFlow's outputs, numpy arrays.

    The step's inputs are the batch, then the weights and the optimizer's state; its outputs begin
    with the weights after the step.
    """
    benchmark = models.benchmark(name)
    model = benchmark.model()
    optimizer = keras_rgd.RGD(LEARNING_RATE)
    model.compile(optimizer, models.loss())
    optimizer.build(model.trainable_variables)
    batch = [tf.constant(array) for array in benchmark.data(n)]
    given = per_example.Batch(*batch)
    asked = "layerwise" if way == "rgd" else "double_backward"
    losses = per_example.ExampleLosses(model, training=True)
    wanted = per_example.Wanted(asked, compiled=True)
    chosen = per_example.choose_way(losses, wanted, given, given)

    def rgd(x, y):
        return moved(optimizer.direction(chosen(per_example.Batch(x, y))))

    def sgd(x, y):
        with tf.GradientTape() as tape:
            loss = model.compute_loss(x, y, model(x, training=True))
        weights = [w.value for w in model.trainable_variables]
        return moved([tf.convert_to_tensor(g) for g in tape.gradient(loss, weights)])

    def moved(direction):
        pairs = zip(model.trainable_variables, direction, strict=True)
        return [w.value - LEARNING_RATE * d for w, d in pairs]

    step = tf.function(sgd if way == "sgd" else rgd, jit_compile=True, autograph=False)
    captured = step.get_concrete_function(*batch).captured_inputs
    inputs = [t.numpy() for t in batch] + [_value(t, model, optimizer) for t in captured]
    representation = step.experimental_get_compiler_ir(*batch)
    check_portable(representation(stage="stablehlo"))
    module = representation(stage="stablehlo_serialized")
    outputs = [t.numpy() for t in step(*batch)]
    return module, inputs, outputs


def check_portable(text):
    """Raise `ValueError` for a StableHLO text with what not every device's XLA compiles."""
    operations = set(re.findall(r"stablehlo\.(\w+)", _without_static_sizes(text)))
    unportable = operations & {"custom_call", "infeed", "outfeed", "send", "recv"}
    unportable |= {name for name in operations if "dynamic" in name or name == "set_dimension_size"}
    unportable -= {"dynamic_slice", "dynamic_update_slice"}  # of fixed sizes, from any start
    if unportable:
        raise ValueError(f"The step calls out of XLA or has open shapes: {sorted(unportable)}")


def _without_static_sizes(text):
    """The text without what sets a dimension to the size that it has; XLA drops it as well."""
    kept = []
    # A name stands for one thing in each function.
    for function in re.split(r"(?=func\.func)", text):
        sizes = dict(
            re.findall(r"(%\w+) = stablehlo\.constant dense<(\d+)> : tensor<i32>", function)
        )

        def sets_another(match, sizes=sizes):
            size, dimension, shape = match.groups()
            static = shape.split("x")[int(dimension)] == sizes.get(size)
            return "" if static else match.group()

        pattern = (
            r"stablehlo\.set_dimension_size %\w+, (%\w+), dim = (\d+) : \(tensor<([\dx]+)x\w+>"
        )
        kept.append(re.sub(pattern, sets_another, function))
    return "".join(kept)


def _value(captured, model, optimizer):
    """The value of a captured input: a variable's, or its own."""
    if captured.dtype != tf.resource:
        return captured.numpy()
    variables = [
        *model.variables,
        *optimizer.variables,
        *(v for m in model.metrics for v in m.variables),
    ]
    for variable in variables:
        if variable.value.handle is captured:
            return keras.ops.convert_to_numpy(variable)
    raise ValueError(f"The step captures a variable that is none of the model's: {captured}")


def save(folder, name, n, way):
    """Write NAME_N_WAY.stablehlo and .npz into the folder, and the inputs that steps share.

    Of each output some entries, `drawn`, which is enough to compare with.
    """
    module, inputs, outputs = lowered(name, n, way)
    folder = pathlib.Path(folder)
    (folder / "inputs").mkdir(parents=True, exist_ok=True)
    names = []
    for array in inputs:
        kind = f"{array.dtype}{array.shape}".encode()
        names.append(hashlib.sha256(kind + array.tobytes()).hexdigest()[:16])
        np.save(folder / "inputs" / f"{names[-1]}.npy", array)
    stem = folder / f"{name}_{n}_{way}"
    stem.with_suffix(".stablehlo").write_bytes(module)
    arrays = {f"out{i}": drawn(a) for i, a in enumerate(outputs)}
    np.savez(stem.with_suffix(".npz"), inputs=names, **arrays)
    return stem


def main():
    """Write the files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, help="a folder")
    parser.add_argument("--models", nargs="+", default=["mlp", "cnn", "resnet20-gn", "transformer"])
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[128, 512])
    parser.add_argument("--ways", nargs="+", default=["sgd", "rgd"])
    args = parser.parse_args()
    for name in args.models:
        for n in args.batch_sizes:
            for way in args.ways:
                print(save(args.out, name, n, way), flush=True)


if __name__ == "__main__":
    main()
