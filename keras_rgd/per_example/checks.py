"""Whether a way is exact for a model: asked of the model, not of its layers' names.

All of it runs eagerly on one batch and leaves the model as it was: weights, seed generators, moving
statistics, states and metrics.
"""

import contextlib
import dataclasses
import functools
import gc

import keras
import numpy as np
import tensorflow as tf

from keras_rgd import vectors
from keras_rgd.per_example import lanes
from keras_rgd.per_example.double_backward import DoubleBackward
from keras_rgd.per_example.interface import working_dtype
from keras_rgd.per_example.layerwise import Layerwise
from keras_rgd.per_example.loss import (
    batch_size,
    call_model,
    compiled_losses,
    example_losses,
    replaced,
    what_losses_read,
)
from keras_rgd.per_example.uses import NotVisibleError

# NumPy's finfo does not know bfloat16.
_EPSILON = {"bfloat16": 2**-7, "float16": 2**-10, "float32": 2**-23, "float64": 2**-52}

# How many examples are looked at together for a layer that mixes them.
_EXAMPLES = 32

# For how many a trial step is taken.
_FEW = 16

_ADVICE = (
    "per_example='vectorized_map' runs the model on one example at a time and would not give "
    "its per-example gradients. Write per_example='double_backward' (or 'auto') instead."
)


_LAYERWISE_ADVICE = (
    "per_example='layerwise' reads each example's gradient off one backward pass over the batch. "
    "Write per_example='double_backward' (or 'auto') instead."
)


_PIECES_ADVICE = (
    "So a batch in pieces would be another than the whole batch. Write microbatch_size=None."
)


class NotExactError(ValueError):
    """A way would not give this model's per-example gradients.

    Args:
        reason: why.
        advice: what to write instead.
    """

    def __init__(self, reason, advice):
        super().__init__(f"{reason} {advice}")
        self.reason = reason


class _NotApartError(Exception):
    """What should have one row an example has not."""


class NotVectorizableError(ValueError):
    """`tf.vectorized_map` cannot run this model."""


def trial_fails(function, *arguments):
    """The error of a trial of `tf.vectorized_map`, or None; its pages of log are not shown."""
    try:
        with lanes.quiet():
            function(*arguments)
    except (ValueError, TypeError, NotImplementedError, LookupError, tf.errors.OpError) as error:
        return error
    return None


@contextlib.contextmanager
def unchanged(model):
    """Whatever runs inside, the model's weights, states and metrics end as they began."""
    # A tensor read from a variable is no copy; an assignment gives the variable a new one.
    before = [(v, v.value.read_value()) for v in _state(model)]
    try:
        yield
    finally:
        for variable, value in before:
            variable.assign(value)


def changeable(model):
    """The variables that a forward pass and its loss may change, but the weights themselves."""
    weights = {id(v) for v in model.trainable_variables}
    return [v for v in _state(model) if id(v) not in weights]


def _state(model):
    """All that a forward pass may change.

    Seeds, moving statistics, kernels that SpectralNormalization assigns, metrics; and the states
    of recurrent layers, which Keras does not list among a model's variables.
    """
    recurrent = [layer.states for layer in model._flatten_layers() if hasattr(layer, "states")]
    states = [s for s in keras.tree.flatten(recurrent) if isinstance(s, keras.Variable)]
    return model.variables + [v for m in model.metrics for v in m.variables] + states


def first_examples(tree, n):
    """The first n examples of a nested structure of tensors."""
    return keras.tree.map_structure(
        lambda t: None if t is None else tf.convert_to_tensor(t)[:n], tree
    )


def check_exact(model, x, y, sample_weight, training):
    """Raise `NotExactError` unless one example a lane is exact on this batch.

    Raises:
        NotExactError: names the layer that draws random numbers or keeps a state, or whose output
            for one example depends on the other examples, or says that the loss does.
    """
    if any(t is None for t in keras.tree.flatten(x)):
        raise NotExactError("An input is None, which no example has a part of.", _ADVICE)
    if takes_any_size(model):
        x, y, sample_weight = first_examples((x, y, sample_weight), _EXAMPLES)
    changed = _layers_that_change_state(model, x, training)
    if changed:
        raise NotExactError(
            f"Layer {_names(changed)} draws random numbers or updates a state in each forward "
            f"pass.",
            _ADVICE,
        )
    mixing = _layer_that_mixes(model, x, training)
    if mixing is not None:
        raise NotExactError(
            _mixes(mixing),
            _ADVICE,
        )
    if _loss_mixes(model, x, y, sample_weight, training):
        raise NotExactError(
            f"The loss of one example depends on the outputs of other examples: loss={model.loss}.",
            _ADVICE,
        )


def check_layerwise(model, x, y, sample_weight, training, dynamic, precise=False):
    """Raise `NotExactError` unless "layerwise" is exact on this batch, with these weights and near.

    It is where sum_i m_i grad f_i for arbitrary m is what ordinary differentiation of sum_i m_i f_i
    gives: any example that another's loss depends on, and any use of a weight that was not seen,
    would break that. Weights that start at zero hide what lies before them, so it is asked again
    with the weights a little off.

    Args:
        model: a compiled, built model.
        x: the batch's inputs.
        y: its targets.
        sample_weight: its sample weights or `None`.
        training: whether layers behave as in training.
        dynamic: whether the step is traced for batches of any size; a few examples will then do.
        precise: as in `Layerwise`. Defaults to `False`.

    Returns:
        A `Traced`.

    Raises:
        NotExactError: names the layer that mixes examples or hides what it does with its weights.
    """
    batch = (x, y, sample_weight)
    if dynamic and takes_any_size(model):
        batch = first_examples(batch, _FEW)
    try:
        compare = functools.partial(
            _compare, model, batch, training, batch_size(x), dynamic, precise
        )
        with _forgotten():
            wrong, way = compare()
        if wrong is not None and way is not None and way.repeats:
            # An axis that is as long as the batch may have been taken for that of the examples.
            with _forgotten():
                wrong, way = compare(repeats=False)
    except NotVisibleError as error:
        variable = model.trainable_variables[error.weight]
        owner = [a for a in model._flatten_layers() if any(v is variable for v in a.variables)][-1]
        raise NotExactError(
            f"Layer {_names([owner])} uses its weight '{variable.path}' in {error}, where "
            f"per-example gradients cannot be read off.",
            _LAYERWISE_ADVICE,
        ) from error
    # Half precision hides in its rounding what shows in the outputs.
    half = _tolerance(model) > 0.01
    if wrong is None and not half:
        return way
    if takes_any_size(model):
        batch = first_examples(batch, _EXAMPLES)
    mixing = _layer_that_mixes(model, batch[0], training)
    if wrong is None and mixing is None:
        return way
    if mixing is not None:
        raise NotExactError(
            _mixes(mixing),
            _LAYERWISE_ADVICE,
        )
    raise NotExactError(
        "The loss of one example depends on the other examples of the batch, or reaches "
        f"{wrong} by another way than the model's output: loss={model.loss}.",
        _LAYERWISE_ADVICE,
    )


def check_pieces(model, x, y, sample_weight, layers_are_apart):
    """Raise `NotExactError` where a training batch in pieces is another than the whole batch.

    Args:
        model: a compiled, built model.
        x: some examples' inputs, two at least.
        y: their targets.
        sample_weight: their sample weights or `None`.
        layers_are_apart: whether it is known already that layers do not mix examples.

    Raises:
        NotExactError: names the layer that mixes examples, draws random numbers where that hides
            mixing, or changes a weight in its forward pass; or the loss.
    """
    if takes_any_size(model):
        x, y, sample_weight = first_examples((x, y, sample_weight), _EXAMPLES)
    mixing = None if layers_are_apart else _layer_that_mixes(model, x, training=True)
    if mixing is not None:
        raise NotExactError(_mixes(mixing), _PIECES_ADVICE)
    weights = {id(v) for v in model.trainable_variables}
    changed = _layers_that_change_state(model, x, True, lambda v: id(v) in weights)
    if changed:
        outer = [a for a in model.layers if any(b in a._flatten_layers() for b in changed)]
        raise NotExactError(
            f"Layer {_names(outer or changed)} changes a trainable weight in each forward pass.",
            _PIECES_ADVICE,
        )
    check_apart(model, x, y, sample_weight)


def check_apart(model, x, y, sample_weight):
    """Raise `NotExactError` where the loss of an example is another in a smaller batch.

    Asked in evaluation mode, where layers mix no examples.

    Args:
        model: a compiled, built model.
        x: some examples' inputs, two at least.
        y: their targets.
        sample_weight: their sample weights or `None`.

    Raises:
        NotExactError: says which kinds of loss are so.
    """
    batch = (x, y, sample_weight)
    if takes_any_size(model):
        batch = first_examples(batch, _EXAMPLES)
    n = batch_size(batch[0])
    half = n // 2
    # Signs, as a plain sum is nearly 0 at a minimum.
    signs = np.random.default_rng(0).choice([-1.0, 1.0], n)
    whole, masked = _signed_sum(model, batch, signs, half)
    if masked or not _parts_agree(model, batch, signs, whole):
        raise NotExactError(
            "The loss of an example changes with the batch it is in: a loss with reduction='sum', "
            "a masked output, whose valid steps are counted over the batch, or an add_loss that "
            "sums over it. Its gradient over all examples cannot be had from parts.",
            "Expected a loss with the default reduction, 'sum_over_batch_size', and no mask. "
            f"Received: loss={model.loss!r}.",
        )


def _parts_agree(model, batch, signs, whole):
    """Whether the two halves of a batch give what `_signed_sum` gave for the whole."""
    n = len(signs)
    half = n // 2
    try:
        first, _ = _signed_sum(model, _examples(batch, 0, half), signs[:half], half)
        rest, _ = _signed_sum(model, _examples(batch, half, n), signs[half:], 0)
    except (ValueError, tf.errors.OpError):
        if takes_any_size(model):
            raise
        # A model for one size alone, whose batches are all of that: its losses' word must do.
        return all(getattr(loss, "reduction", None) != "sum" for loss in compiled_losses(model))
    if not all(bool(tf.math.is_finite(vectors.norm(t))) for t in (*whole, *first, *rest)):
        return True  # said by its own error, once D is formed
    means = [(half * a + (n - half) * b) / n for a, b in zip(first[1], rest[1], strict=True)]
    unequal = (_first_unequal(model, a, b) for a, b in ((whole[0], first[0]), (whole[1], means)))
    return all(name is None for name in unequal)


def _signed_sum(model, batch, signs, count):
    """(sum_i s_i g_i over the first `count`, grad L) of a batch; whether an output has a mask."""
    with unchanged(model):
        gradients = DoubleBackward(model, *batch, training=False)
        w = np.where(np.arange(len(signs)) < count, signs, 0)
        sums = gradients.combine(tf.constant(w, gradients.dtype)), gradients.gradient
    outputs = what_losses_read(gradients.y_pred)
    return sums, any(getattr(t, "_keras_mask", None) is not None for t in outputs)


def _examples(tree, start, end):
    return keras.tree.map_structure(lambda t: None if t is None else t[start:end], tree)


def seed_generators(model):
    """The generators of a model's random numbers."""
    generators = [
        value
        for layer in model._flatten_layers()
        for value in vars(layer).values()
        if isinstance(value, keras.random.SeedGenerator)
    ]
    # A shared layer is met more than once.
    return list(dict.fromkeys(generators))


def takes_any_size(model):
    """Whether a model takes batches of any size, so that a few examples will do."""
    return all(t.shape[0] is None for t in getattr(model, "inputs", None) or [])


@dataclasses.dataclass(frozen=True)
class Traced:
    """What the trace of a step by "layerwise" shows."""

    gram_is_cheap: bool
    gram_work: float  # of the Gram matrix, in SGD steps
    repeats: bool  # whether a weight is repeated for each example


@contextlib.contextmanager
def _forgotten():
    """A graph made inside is garbage in cycles: collect it, so that the step's has its memory."""
    # What was there before need not be looked through, which takes long in a large process.
    ours = gc.get_freeze_count() == 0
    if ours:
        gc.freeze()
    try:
        yield
    finally:
        gc.collect()
        if ours:
            gc.unfreeze()


def _compare(model, batch, training, n, open_sizes, precise, repeats=True):
    """Where a step by "layerwise" on a batch is wrong, or None; and what its trace shows."""
    traced = []

    def both(batch, m):
        options = dict(training=training, n=n, repeats=repeats, precise=precise)
        way = Layerwise(model, *batch, **options)
        work = way.gram_work / max(way.step_work, 1)
        traced.append(Traced(way.gram_is_cheap, work, way.repeats))
        try:
            ours, squares = way.reweighted_and_squares(m)
            return ours, way.reweighted_ordinarily(m), squares
        except (ValueError, TypeError) as error:
            raise _NotApartError(_reason(error)) from error

    trial = _traced_for_batches(both, batch, open_sizes)
    rng = np.random.default_rng(0)
    dtype = working_dtype([w.value for w in model.trainable_variables])
    m = tf.constant(1 + rng.normal(size=batch_size(batch[0])), dtype)
    wrong = None
    try:
        for noise in (0.0, 0.1):
            with unchanged(model):
                _shake(model, noise, rng)
                ours, ordinary, squares = trial(m)
                # Weights a little off may be outside of what a layer takes.
                wrong = wrong or _first_unequal(model, ours, ordinary, finite=noise == 0)
                if not wrong and _differ(min(squares), max(squares), 10 * _tolerance(model)):
                    wrong = "a weight"
    except (_NotApartError, tf.errors.OpError) as error:
        # Sizes that do not fit: something has lost its axis of examples.
        wrong = f"a weight ({_reason(error)})"
    return wrong, traced[-1] if traced else None


def _traced_for_batches(function, batch, dynamic):
    """`function(batch, m)` as a graph function of the batch's tensors, sizes open if `dynamic`."""
    flat = keras.tree.flatten(batch)
    tensors = [tf.convert_to_tensor(t) for t in flat if t is not None]

    def packed(tensors, m):
        tensors = iter(tensors)
        given = [None if t is None else next(tensors) for t in flat]
        return function(keras.tree.pack_sequence_as(batch, given), m)

    def open_size(t):
        return tf.TensorSpec([None, *t.shape[1:]] if dynamic else t.shape, t.dtype)

    traced = tf.function(packed, autograph=False)

    def run(m):
        signature = [open_size(t) for t in tensors], open_size(m)
        return traced.get_concrete_function(*signature)(tensors, m)

    return run


def _shake(model, noise, rng):
    """Move each trainable weight by about `noise` of its size; away from 0 where it is 0."""
    for variable in model.trainable_variables if noise else []:
        value = np.array(keras.ops.convert_to_numpy(variable), "float32")
        moves = rng.standard_normal(value.shape, "float32")
        moves *= noise
        np.multiply(moves, value, out=moves, where=value != 0)
        variable.assign(np.add(value, moves, out=value))


def _first_unequal(model, ours, ordinary, finite=True):
    """The path of the first weight where two gradients differ by more than rounding, or None.

    Args:
        model: the model.
        ours: a list of tensors shaped as the weights.
        ordinary: what they should be.
        finite: whether what is not finite counts as unequal.
    """
    tolerance, whole = _tolerance(model), vectors.norm(ordinary)
    for variable, a, b in zip(model.trainable_variables, ours, ordinary, strict=True):
        size = vectors.norm([b])
        if not finite and not bool(tf.math.is_finite(size)):
            continue
        # The second term is for gradients that are 0 but for rounding.
        if not vectors.norm([a - b]) <= tolerance * size + 100 * tolerance**2 * whole:
            return f"'{variable.path}'"
    return None


def check_gradient(model, x, y, sample_weight, training, received):
    """Raise `NotExactError` unless `received`, the lanes' gradient, is the batch's gradient.

    The last word on what `check_exact` cannot see, as a `compute_loss` that uses the weights or
    the inputs itself.
    """
    with unchanged(model):
        expected = DoubleBackward(model, x, y, sample_weight, training).gradient
    wrong = _first_unequal(model, received, expected)
    if wrong is not None:
        raise NotExactError(
            f"`{type(model).__name__}` has a loss that does not reach the weights through the "
            "model's output alone (a `compute_loss` of its own?): the mean of the per-example "
            f"gradients of {wrong} is not the batch's gradient.",
            _ADVICE,
        )


def not_vectorizable(model, x, training, compiled, error):
    """The error that names the first layer which `tf.vectorized_map` cannot run, or the model."""
    for layer, arguments, _ in _calls(model, x, training):
        if not _vectorizes(layer, arguments, compiled):
            culprit = f"layer {_names([layer])}"
            break
    else:
        culprit = f"model '{model.name}'"
    under = " under XLA" if compiled else ""
    return NotVectorizableError(
        f"tf.vectorized_map cannot run {culprit}{under}, so per_example='vectorized_map' does not "
        "serve this model. Write per_example='double_backward' (or 'auto') instead. "
        f"TensorFlow's reason: {_reason(error)}"
    )


def _reason(error):
    """The telling line of TensorFlow's many, cut short."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if line.startswith("ValueError: ")]
    return (told or lines or [type(error).__name__])[-1].removeprefix("ValueError: ")[:200]


def _vectorizes(layer, arguments, compiled):
    """Whether `tf.vectorized_map` runs the layer and its gradient on what it was called with."""
    weights = [w.value for w in layer.trainable_variables]
    flat = keras.tree.flatten(arguments)
    inputs = [t for t in flat if tf.is_tensor(t)]
    if not inputs:
        return True

    def lane(chunk):
        (example,) = chunk
        floating = [t for t in example if t.dtype.is_floating]
        with tf.GradientTape() as tape:
            tape.watch(floating)
            tensors = iter(example)
            called = [next(tensors)[None] if tf.is_tensor(t) else t for t in flat]
            output = layer(*keras.tree.pack_sequence_as(arguments, called))
        gradient = tape.gradient(
            output, weights + floating, unconnected_gradients=tf.UnconnectedGradients.ZERO
        )
        return [tf.convert_to_tensor(g) for g in gradient]

    rows = lanes.vectorized(lane, None, compiled)
    run = tf.function(lambda *a: rows(list(a)), jit_compile=compiled, autograph=False)
    return trial_fails(run, *inputs) is None


def _layers_that_change_state(model, x, training, concerns=lambda variable: True):
    variables = [v for v in _state(model) if concerns(v)]
    before = [v.numpy() for v in variables]
    with unchanged(model):
        call_model(model, x, training)
        after = [v.numpy() for v in variables]
    changed = {
        id(v) for v, a, b in zip(variables, before, after, strict=True) if not np.array_equal(a, b)
    }
    owners = [
        layer
        for layer in model._flatten_layers(include_self=True)
        if changed & {id(v) for v in _own_state(layer)}
    ]
    # A container holds its layers' variables too; the innermost owner is the one to name.
    return [a for a in owners if not any(b is not a and b in a._flatten_layers() for b in owners)]


def _own_state(layer):
    return layer.variables + keras.tree.flatten(getattr(layer, "states", []))


def _halves(n):
    """Sets of examples to keep while the others are replaced, as boolean arrays of shape (n,).

    By the binary digits of their indices: for any two examples one of the 2 log2 n sets has the
    one without the other, so no dependence between examples escapes.
    """
    index = np.arange(n)
    for digit in range((n - 1).bit_length()):
        kept = (index >> digit) % 2 == 0
        yield from (kept, ~kept)


def _replaced(tensor, kept, noise=0.0):
    """`tensor` with the rows that are not kept taken from the next examples, and noise added."""
    n = len(kept)
    replaced = tf.gather(tensor, np.where(kept, np.arange(n), np.arange(1, n + 1) % n))
    if not noise:
        return replaced
    size = tf.reduce_max(tf.abs(tensor))
    size = noise * tf.where(size > 0, size, tf.ones_like(size))
    draw = tf.random.stateless_normal(tf.shape(tensor), (0, 1), dtype=tensor.dtype)
    return replaced + size * draw * tf.cast(_column(~kept, tensor), tensor.dtype)


def _column(values, tensor):
    return tf.reshape(values, [-1] + [1] * (tensor.shape.rank - 1))


def _layer_that_mixes(model, x, training):
    """The innermost layer whose output for a kept example changes with the other examples."""
    together = _calls(model, x, training)
    for kept in _halves(batch_size(x)):
        apart = _calls(
            model, keras.tree.map_structure(lambda t, k=kept: _replaced(t, k), x), training
        )
        for (layer, _, a), (_, _, b) in zip(together, apart, strict=False):
            for s, t in zip(keras.tree.flatten(a), keras.tree.flatten(b), strict=True):
                if _per_example(s, x) and _differ(s[kept], t[kept], _tolerance(model)):
                    return layer
    return None


def _loss_mixes(model, x, y, sample_weight, training):
    n = batch_size(x)
    with unchanged(model):
        y_pred = call_model(model, x, training)
        u = tf.ones([n], working_dtype([w.value for w in model.trainable_variables]))
        _, ours = example_losses(model, x, y, y_pred, sample_weight, u, training)
        for kept in _halves(n):
            # The noise is for outputs that are all alike, as those of a head that starts at zero.
            changed = replaced(
                y_pred, lambda t, k=kept: _replaced(t, k, noise=0.1) if _per_example(t, x) else t
            )
            _, theirs = example_losses(model, x, y, changed, sample_weight, u, training)
            if _differ(ours[kept], theirs[kept], _tolerance(model)):
                return True
    return False


def _calls(model, x, training):
    """What each layer was called with and returned in one forward pass, innermost first."""
    record = []

    def observed(layer, call):
        def recording_call(*args, **kwargs):
            output = call(*args, **kwargs)
            record.append((layer, args, output))
            return output

        return recording_call

    layers = list(model._flatten_layers(include_self=False))
    for layer in layers:
        layer.__dict__["call"] = observed(layer, layer.call)
    try:
        with unchanged(model):
            call_model(model, x, training)
    finally:
        for layer in layers:
            layer.__dict__.pop("call", None)
    return record


def _per_example(tensor, x):
    shape = getattr(tensor, "shape", None)
    floating = shape is not None and tf.as_dtype(tensor.dtype).is_floating
    return floating and len(shape) > 0 and shape[0] == batch_size(x)


def _differ(a, b, tolerance):
    a, b = tf.cast(a, tf.float64), tf.cast(b, tf.float64)
    size = tf.reduce_max(tf.abs(tf.stack([a, b])))
    return bool(tf.reduce_max(tf.abs(a - b)) > tolerance * size)


def _tolerance(model):
    # Rounding differs with the batch; mixing shows in the leading half of the digits.
    dtypes = {
        keras.backend.standardize_dtype(layer.compute_dtype) for layer in model._flatten_layers()
    }
    return max((_EPSILON[d] for d in dtypes if d in _EPSILON), default=_EPSILON["float32"]) ** 0.5


def _mixes(layer):
    return (
        f"Layer {_names([layer])} gives an example an output that depends on the other examples of "
        "the batch, or on random numbers."
    )


def _names(layers):
    return ", ".join(f"'{layer.name}' ({type(layer).__name__})" for layer in layers)
