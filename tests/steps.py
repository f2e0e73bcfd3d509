"""One training step of a case, and its oracle: each computed once for the whole test session."""

import contextlib
import dataclasses
import functools

import cases
import keras
import numpy as np
import reference

import keras_rgd

MODES = ("graph", "xla")


@dataclasses.dataclass(frozen=True)
class Step:
    """What one `train_on_batch` with learning rate 1 and momentum 0 did, as numpy arrays."""

    direction: np.ndarray  # trainable weights before minus after, (d,), float64
    epsilon: float
    lambda_max: float
    weak_field_error: float
    state: list  # seeds and moving statistics after the step
    logs: dict
    refusal: str | None = None  # its words alone: a traceback would keep models in memory
    choice: str = ""  # of a way, and why


@contextlib.contextmanager
def floatx(dtype):
    """Models built inside have this dtype."""
    before = keras.config.floatx(), keras.config.dtype_policy()
    keras.config.set_floatx(dtype)
    keras.config.set_dtype_policy(dtype)
    try:
        yield
    finally:
        keras.config.set_floatx(before[0])
        keras.config.set_dtype_policy(before[1])


def build(case, dtype="float32"):
    """The case's model, with the weights of its float32 build."""
    model = case.model()
    if dtype == "float32":
        return model
    with floatx(dtype):
        twin = case.model()
        for a, b in zip(twin.variables, model.variables, strict=True):
            a.assign(b.numpy())
    return twin


@functools.cache
def step(name, way, mode, dtype="float32"):
    """The `Step` of one case."""
    case = cases.BY_NAME[name]
    model = build(case, dtype)
    with floatx(dtype):
        return take(case, model, keras_rgd.RGD(1.0, per_example=way), mode)


def take(case, model, optimizer, mode="graph"):
    """Compile, take one step, and say what it did; a refusal must leave the weights alone."""
    x, y, sample_weight = case.batch()
    if case.class_weight is not None:
        sample_weight = None
    case.compile(model, optimizer, jit_compile=mode == "xla")
    before = [w.numpy() for w in model.trainable_variables]
    refusal, logs = None, {}
    try:
        logs = model.train_on_batch(
            x, y, sample_weight, class_weight=case.class_weight, return_dict=True
        )
    except ValueError as error:
        refusal = str(error)
    after = [w.numpy() for w in model.trainable_variables]
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    values = (
        float(getattr(inner, key, np.nan))
        for key in ("chosen_epsilon", "lambda_max", "step_weak_field_error")
    )
    return Step(
        reference.flatten(before) - reference.flatten(after),
        *values,
        state=[v.numpy() for v in model.non_trainable_variables],
        logs={key: float(value) for key, value in logs.items()},
        refusal=refusal,
        choice=str(getattr(inner, "per_example_choice", None)),
    )


def moved(model, take):
    """What `take()` takes off the trainable weights: (d,), float64."""
    before = reference.flatten(model.trainable_variables)
    take()
    return before - reference.flatten(model.trainable_variables)


def restarting(model):
    """A function that sets a model and its optimizer back to where they are now.

    With it one traced step serves several questions.
    """
    if not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)
    variables = model.variables + model.optimizer.variables
    values = [v.numpy() for v in variables]

    def restart():
        for variable, value in zip(variables, values, strict=True):
            variable.assign(value)

    return restart


def fitted(case, optimizer, callbacks, epochs=2, model=None, **kwargs):
    """(model, history) of a case trained on its own batch."""
    model = build(case) if model is None else model
    x, y, weights = case.batch()
    case.compile(model, optimizer, **kwargs)
    history = model.fit(x, y, epochs=epochs, shuffle=False, verbose=0, callbacks=callbacks)
    return model, history.history


def dense_now(case, model, training=False):
    """`reference.Dense` of the case's batch at the model's weights, in float64."""
    twin = build(case, "float64")
    for a, b in zip(twin.variables, model.variables, strict=True):
        a.assign(b.numpy())
    with floatx("float64"):
        case.compile(twin, "sgd")
        arguments = cast(case.batch(), "float64")
        return reference.eager(twin, *arguments, case.loss_shape, training=training)


def oracle(name, mode="graph", dtype="float32"):
    """`reference.Dense` of the case's batch: float64, but for the random numbers of `dtype`."""
    if cases.BY_NAME[name].random:
        return _oracle(name, mode, dtype)
    return _oracle(name, "graph", "float64")


@functools.cache
def _oracle(name, mode, dtype):
    case = cases.BY_NAME[name]
    model = build(case, dtype)
    x, y, sample_weight = case.batch()
    with floatx(dtype):
        case.compile(model, "sgd")
        arguments = (model, *cast((x, y, sample_weight), dtype), case.loss_shape)
        if case.random:
            return reference.compiled(*arguments, jit_compile=mode == "xla")
        return reference.eager(*arguments)


def cast(tree, dtype):
    def cast(a):
        return a if a is None or a.dtype.kind != "f" else a.astype(dtype)

    return keras.tree.map_structure(cast, tree)
