"""One operation of a graph on other inputs, alone."""

import inspect

import numpy as np
import tensorflow as tf

from keras_rgd.per_example.mixing.places import Place, of_examples

_DRAWS = 3

_ERRORS = (ValueError, TypeError, LookupError, NotImplementedError, tf.errors.OpError)

# They would run a program of the user's.
NEVER = {"PyFunc", "EagerPyFunc", "PyFuncStateless"}


def run(op, inputs):
    """The outputs of an operation on other inputs, a list of tensors."""
    function = getattr(tf.raw_ops, op.type)
    parameters = [name for name in inspect.signature(function).parameters if name != "name"]
    arguments, inputs = {}, list(inputs)
    for place, argument in enumerate(op.op_def.input_arg):
        # Some have another name in Python.
        name = argument.name if argument.name in parameters else parameters[place]
        if argument.number_attr:
            count = op.get_attr(argument.number_attr)
            arguments[name] = [inputs.pop(0) for _ in range(count)]
        else:
            arguments[name] = inputs.pop(0)
    for name in parameters:
        if name not in arguments:
            arguments[name] = op.get_attr(name)
    output = function(**arguments)
    return list(output) if isinstance(output, list | tuple) else [output]


def value(op, inputs, index):
    """An output of an operation on known numbers, a numpy array; `None` where it cannot run."""
    try:
        with tf.init_scope():
            return run(op, [tf.constant(v) for v in inputs])[index].numpy()
    except (*_ERRORS, AttributeError):
        return None


def places(op, found, values, n):
    """Where an operation that is not known leaves the examples, by trying it on random numbers.

    Several draws; in each the outputs, and the gradients of the inputs for random cotangents, of
    half of the examples must not change with the others.

    Args:
        op: the operation.
        found: a `following.Found` or `None` for each input.
        values: an input's value where the graph determines it, else `None`.
        n: N.

    Returns:
        A list of a `Place` for each output, or `None` where examples mix, where the
        operation has side effects, or where it cannot be run.
    """
    shapes = [t.shape for t in (*op.inputs, *op.outputs)]
    if op.type in NEVER or op.op_def.is_stateful or not all(s.is_fully_defined() for s in shapes):
        return None
    if not hasattr(tf.raw_ops, op.type):
        return None
    candidates = [_candidates(t.shape, n) for t in op.outputs]
    try:
        with tf.init_scope():
            for seed in range(_DRAWS):
                _try(op, found, values, n, np.random.default_rng(seed), candidates)
    except (*_ERRORS, AttributeError):
        return None
    if not all(candidates):
        return None
    return [left[0] for left in candidates]


def _candidates(shape, n):
    """The places that an axis of a multiple of N entries may be."""
    found = []
    for axis, length in enumerate(shape):
        if length % n == 0 and length:
            several = length // n
            found.append(Place(axis, several, 1))
            if several > 1:
                found.append(Place(axis, 1, several))
    return found


def _try(op, found, values, n, rng, candidates):
    """Strike out the candidates that one draw refutes."""
    kept = rng.permutation(n) < max(n // 2, 1)
    first, second, moving = [], [], []
    for i, (t, known, given) in enumerate(zip(op.inputs, found, values, strict=True)):
        a = _draw(t, rng) if given is None else np.asarray(given)
        b = a
        if known is not None and known.follows:
            moving.append(i)
            if known.place is not None:
                other = _draw(t, rng)
                b = np.where(of_examples(known.place, a.shape, kept), a, other)
        first.append(tf.constant(a, t.dtype))
        second.append(tf.constant(b, t.dtype))
    with tf.GradientTape(persistent=True) as tape:
        tape.watch([first[i] for i in moving] + [second[i] for i in moving])
        ours, theirs = run(op, first), run(op, second)
    for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        left = []
        for place in candidates[index]:
            mine = of_examples(place, a.shape, kept)
            if not _same(a, b, mine):
                continue
            if a.dtype.is_floating and not _gradients_apart(
                tape, (a, b), (first, second), moving, found, place, kept, rng
            ):
                continue
            left.append(place)
        candidates[index][:] = left


def _gradients_apart(tape, outputs, inputs, moving, found, place, kept, rng):
    """Whether gradients at the kept examples come from the cotangents of those alone."""
    cotangent = rng.normal(size=outputs[0].shape)
    mine = of_examples(place, outputs[0].shape, kept)
    changed = np.where(mine, cotangent, rng.normal(size=cotangent.shape))
    gradients = [
        tape.gradient(output, [given[i] for i in moving], tf.constant(c, output.dtype))
        for output, given, c in zip(outputs, inputs, (cotangent, changed), strict=True)
    ]
    for i, a, b in zip(moving, *gradients, strict=True):
        if a is None or b is None or found[i].place is None:
            continue
        at = of_examples(found[i].place, a.shape, kept)
        if not _same(tf.convert_to_tensor(a), tf.convert_to_tensor(b), at):
            return False
    return True


def _same(a, b, where):
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape:
        return False
    if a.dtype.kind not in "fc" and a.dtype != tf.bfloat16.as_numpy_dtype:
        return bool(np.all((a == b) | ~where))
    a, b = a.astype(np.complex128), b.astype(np.complex128)
    close = np.isclose(a, b, rtol=1e-4, atol=1e-4 * _size(a), equal_nan=True)
    return bool(np.all(close | ~where))


def _size(a):
    finite = np.abs(a[np.isfinite(a)])
    return finite.max() if finite.size else 0.0


def _draw(tensor, rng):
    shape, dtype = tensor.shape.as_list(), tensor.dtype
    if dtype.is_bool:
        return rng.integers(0, 2, shape).astype(bool)
    if dtype.is_integer:
        return rng.integers(0, 2, shape).astype(dtype.as_numpy_dtype)
    if not dtype.is_floating:
        raise TypeError(f"no random numbers of {dtype}")
    return rng.normal(size=shape).astype(dtype.as_numpy_dtype)
