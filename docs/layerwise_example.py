"""The tables of docs/layerwise.md: one small model from its trace to its Gram matrix.

    python docs/layerwise_example.py

prints them and writes them into the page; `tests/test_layerwise_page.py` fails where they differ.
It does in small what `keras_rgd.per_example.layerwise.Layerwise` does for any model and loss.
"""

import os
import pathlib

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras  # noqa: E402
import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402
from keras import layers as L  # noqa: E402

import keras_rgd  # noqa: E402
from keras_rgd.per_example.layerwise.forms import Outer  # noqa: E402
from keras_rgd.per_example.layerwise.operations import form_of  # noqa: E402
from keras_rgd.per_example.layerwise.products import Contraction  # noqa: E402
from keras_rgd.per_example.layerwise.uses import find_uses  # noqa: E402

PAGE = pathlib.Path(__file__).with_name("layerwise.md")
N, T, WORDS, CLASSES = 4, 6, 50, 3

# Operations that only fetch a constant, a weight or a size.
_FETCH = {"Const", "Placeholder", "ReadVariableOp", "Less", "StridedSlice", "SelectV2"}


class Normalized(L.Layer):
    """A product with a kernel of columns of length g, as in weight normalization."""

    def build(self, shape):
        self.v = self.add_weight(shape=(shape[-1], 4), name="v")
        self.g = self.add_weight(shape=(4,), name="g")

    def call(self, x):
        v = tf.convert_to_tensor(self.v)
        return tf.matmul(x, self.g * v / tf.norm(v, axis=0))


class Looped(L.Layer):
    """A product with a kernel, one timestep after another."""

    def build(self, shape):
        self.kernel = self.add_weight(shape=(shape[-1], 4), name="kernel")

    def call(self, x):
        steps = tf.transpose(x, [1, 0, 2])
        steps = tf.map_fn(lambda t: tf.matmul(t, tf.convert_to_tensor(self.kernel)), steps)
        return tf.transpose(steps, [1, 0, 2])


def drawn_model():
    """The model of the page."""
    return keras.Sequential(
        [
            keras.Input((T,), dtype="int32"),
            L.Embedding(WORDS, 3, name="embedding"),
            L.Conv1D(5, 3, padding="same", activation="relu", name="conv"),
            L.LayerNormalization(name="norm"),
            L.Dense(4, name="over_time"),
            L.Flatten(name="flatten"),
            L.Dense(CLASSES, name="head"),
        ],
        name="drawn",
    )


def shared_model():
    """A kernel that is used twice, and one that is combined from two weights."""
    x = keras.Input((T,), name="x")
    shared = L.Dense(T, activation="tanh", use_bias=False, name="shared")
    return keras.Model(
        x, L.Dense(CLASSES, name="head")(Normalized(name="normalized")(shared(shared(x))))
    )


def prepared(model):
    """The model, compiled, with the same weights in every version; and a batch for it."""
    rng = np.random.default_rng(0)
    for w in model.trainable_variables:
        w.assign(0.5 * rng.normal(size=w.shape))
    model.compile("sgd", "sparse_categorical_crossentropy")
    x = rng.integers(0, WORDS, (N, T)).astype(model.inputs[0].dtype)
    return model, tf.constant(x), tf.constant(rng.integers(0, CLASSES, N))


def losses(model, x, y):
    """f_i, shape (N,)."""
    output = model(x, training=True)
    return keras.losses.sparse_categorical_crossentropy(y, output, from_logits=True)


def traced(model, x, y):
    """(operations, uses, forms, parts) of one batch: what this page is about.

    The parts are `{path of a weight: its part of the Gram matrix}`, for weights with one use.
    """
    weights = [w.value for w in model.trainable_variables]
    names = [w.path for w in model.trainable_variables]
    seen = {}

    @tf.function(autograph=False)
    def run(x, y):
        graph = tf.compat.v1.get_default_graph()
        f = losses(model, x, y)
        operations = graph.get_operations()
        uses = find_uses(operations, weights, [x], N, True)
        cotangents = tf.gradients(tf.reduce_sum(f), [use.output for use in uses])
        forms = [form_of(u, c, tf.float32, N) for u, c in zip(uses, cotangents, strict=True)]
        seen.update(
            operations=operations, uses=uses, forms=forms, examples=_examples(operations, x)
        )
        outer, parts = Outer(), {}
        for use, form in zip(uses, forms, strict=True):
            gram = form.gram(outer)
            seen.setdefault("by_rows", []).append(gram is None)
            if gram is None:
                gram = tf.add_n([tf.matmul(r, r, transpose_b=True) for r in form.rows()])
            parts[" and ".join(names[i] for i in sorted(use.path.weights))] = gram
        shared = forms[:2]
        merged = Contraction.merged(shared).gram(Outer()) if Contraction.mergeable(shared) else None
        return parts, merged

    parts, merged = run(x, y)
    return seen, parts, merged


def _examples(operations, x):
    """The names of the tensors that follow from the inputs, by values and not by shapes alone."""
    names = {x.name}
    for op in operations:
        if any(t.name in names for t in op.inputs):
            names |= {t.name for t in op.outputs}
    return names


def one_at_a_time(model, x, y):
    """G, one gradient an example, by nothing of this package: a list of (N, size of the weight)."""
    rows = []
    for i in range(N):
        with tf.GradientTape() as tape:
            f = losses(model, x[i : i + 1], y[i : i + 1])[0]
        gradients = tape.gradient(f, [w.value for w in model.trainable_variables])
        rows.append([np.ravel(tf.convert_to_tensor(g)) for g in gradients])
    return [np.stack(g).astype("float64") for g in zip(*rows, strict=True)]


def table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def shape(t):
    return "x".join(map(str, t.shape)) or "scalar"


def trace_table(seen):
    uses, rows = {use.op.name for use in seen["uses"]}, []
    for op in seen["operations"]:
        named = [t for t in op.inputs if t.op.type not in ("Const",)]
        if op.type in _FETCH or not named or "over_time" not in op.name:
            continue
        kinds = ["examples" if t.name in seen["examples"] else "weights" for t in named]
        joins = "**a use**" if op.name in uses else ""
        inputs = ", ".join(f"{shape(t)} {kind}" for t, kind in zip(named, kinds, strict=True))
        rows.append([op.type, inputs, shape(op.outputs[0]), joins])
    return table(["operation", "inputs", "output", ""], rows)


def use_table(model, seen):
    names = [w.path for w in model.trainable_variables]
    rows = []
    for use in seen["uses"]:
        steps = use.path.rearrangements
        path = "a function" if steps is None else ", ".join(kind for kind, *_ in steps) or "itself"
        weights = ", ".join(names[i] for i in sorted(use.path.weights))
        rows.append(
            [f"`{weights}`", use.op.type, use.weight_input, use.example_inputs]
            + [use.rows_per_example, "x".join(map(str, use.shape)), path]
        )
    head = ["`path.weights`", "`op`", "`weight_input`", "`example_inputs`", "`rows_per_example`"]
    return table([*head, "`shape`", "`path.rearrangements`"], rows)


def form_table(model, seen, parts):
    whole = sum(np.trace(part) for part in parts.values())
    rows = []
    for name, form, by_rows in zip(parts, seen["forms"], seen["by_rows"], strict=True):
        share = np.trace(parts[name]) / whole
        way = f"{N} rows of {form.size}" if by_rows else "without rows"
        rows.append(
            [f"`{name}`", f"`{type(form).__name__}`", way, f"{form.gram_work:,}", f"{share:.0%}"]
        )
    head = ["weight", "form", "its part of the Gram matrix", "multiply-adds", "share of the trace"]
    return table(head, rows)


def agreement(gram, rows):
    """How far a Gram matrix is from that of gradients had one at a time, in words."""
    expected = sum(g @ g.T for g in rows)
    error = np.abs(gram - expected).max() / np.abs(expected).max()
    return (
        "equal to rounding" if error < 1e-5 else f"different, by {error:.0%} of the largest entry"
    )


def refusal_table():
    """What "layerwise" says to models that it cannot read."""
    models = {
        "a kernel used in a loop": [keras.Input((T, 3)), Looped(name="looped"), L.Flatten()],
        "BatchNormalization in training": [keras.Input((T,)), L.BatchNormalization(name="norm")],
    }
    rows = []
    for what, layers in models.items():
        model = keras.Sequential([*layers, L.Dense(CLASSES, name="head")], name="refused")
        model.compile("sgd", "mse")
        x, y = (np.ones((N, *t.shape[1:]), "float32") for t in (*model.inputs, *model.outputs))
        try:
            keras_rgd.diffusion_matrix(model, x, y, training=True, per_example="layerwise")
        except ValueError as error:
            rows.append([what, " ".join(str(error).split())])
    return table(["model", 'what "layerwise" says'], rows)


def sections():
    """The page's printouts by name."""
    model, x, y = prepared(drawn_model())
    seen, parts, _ = traced(model, x, y)
    rows = one_at_a_time(model, x, y)
    found = {
        "versions": f"Keras {_minor(keras)}, TensorFlow {_minor(tf)}",
        "trace": trace_table(seen),
        "uses": use_table(model, seen),
        "forms": form_table(model, seen, parts),
        "sum": f"The sum of the parts and G G^T of gradients one at a time: "
        f"{agreement(sum(parts.values()), rows)}.",
    }
    model, x, y = prepared(shared_model())
    seen, parts, merged = traced(model, x, y)
    rows = one_at_a_time(model, x, y)
    name = next(w.path for w in model.trainable_variables)
    found["shared uses"] = use_table(model, seen)
    found["merged"] = (
        f"`{name}`, the two uses merged: {agreement(merged, rows[:1])}.\n"
        f"`{name}`, the second use alone: {agreement(parts[name], rows[:1])}."
    )
    return found | {"refusals": refusal_table()}


def _minor(module):
    return ".".join(module.__version__.split(".")[:2])


def marks(name):
    return f"<!-- {name}: python docs/layerwise_example.py -->", "<!-- end -->"


def written(name):
    """A section as the page has it."""
    begin, end = marks(name)
    return PAGE.read_text(encoding="utf-8").split(begin)[1].split(end)[0].strip()


def main():
    text = PAGE.read_text(encoding="utf-8")
    for name, printed in sections().items():
        print(f"{name}\n\n{printed}\n")
        begin, end = marks(name)
        before, rest = text.split(begin)
        text = f"{before}{begin}\n\n{printed}\n\n{end}{rest.partition(end)[2]}"
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
