"""What Keras keeps in models, layers, losses and tensors."""

import contextlib
import inspect

import keras


def functional_class():
    """The class of `keras.Model(inputs, outputs)`, for subclasses of it.

    It has no public name. Expected: `keras.Model.__new__` says which class a model of these
    arguments is of. None is made, so that those of the user are numbered as before.
    """
    x = keras.Input((), name="x")
    return type(keras.Model.__new__(keras.Model, x, x))


def makes_functional(args, kwargs):
    """Whether `keras.Model(*args, **kwargs)` is a functional model.

    Expected: it is one where inputs and outputs are given, first or by these names; a class that
    is derived from `keras.Model` then becomes one derived from `functional_class()`.
    """
    given = [*args[:2], *(kwargs[name] for name in ("inputs", "outputs") if name in kwargs)]
    leaves = keras.tree.flatten(given)
    return len(given) == 2 and all(isinstance(t, keras.KerasTensor) for t in leaves)


def has_training_argument(model):
    """Whether `call` of a model takes `training`, so that Keras hands it on.

    Expected: Keras asks the signature of `call`, not whether a `**kwargs` would take it.
    """
    return "training" in inspect.signature(model.call).parameters


def layers_of(layer, include_self=True):
    """A model or layer and all layers inside of it, each once.

    Expected: `_flatten_layers`, outer layers before inner ones. `layers` is public for models
    alone, and holds no layers of layers: those of Bidirectional, or of a block of one's own.
    """
    return layer._flatten_layers(include_self=include_self)


def seed_generators(layer):
    """The `keras.random.SeedGenerator`s of one layer.

    Expected: they are attributes of it, as those that Keras makes, or in its `_seed_generators`,
    where Keras keeps those in lists and dictionaries too.
    """
    own = [v for v in vars(layer).values() if isinstance(v, keras.random.SeedGenerator)]
    # In this order: the states that a model was saved with are by place.
    return list(dict.fromkeys([*own, *layer._seed_generators]))


def recurrent_states(layer):
    """The variables in which a recurrent layer keeps its state from batch to batch, a list.

    Expected: `states`, a nested structure of variables once a stateful layer is built; Keras does
    not list them among a layer's `variables`.
    """
    states = keras.tree.flatten(getattr(layer, "states", None))
    return [s for s in states if isinstance(s, keras.Variable)]


@contextlib.contextmanager
def calls_replaced(objects, replacement):
    """Inside, each layer or loss is called by `replacement(object, call)`.

    Expected: Keras looks up `call` on the instance each time, and wraps it with casts, masks,
    names and reductions of its own. Where it would not, the replacement were never called.

    Args:
        objects: layers or `keras.losses.Loss`es.
        replacement: a function of one of them and its `call` as it was, which returns another.
    """
    # One loss may serve several outputs.
    objects = list({id(o): o for o in objects}.values())
    own = [(o, vars(o).get("call")) for o in objects]
    for o in objects:
        # Past `__setattr__`, by which layers would track it.
        vars(o)["call"] = replacement(o, o.call)
    try:
        yield
    finally:
        for o, call in own:
            del vars(o)["call"]
            if call is not None:
                vars(o)["call"] = call


@contextlib.contextmanager
def attribute_replaced(model, name, replacement):
    """Inside, a method of a model is `replacement(method)`.

    Expected: Keras looks it up on the instance each time. Where it would not, the replacement were
    never called.
    """
    own = vars(model).get(name)
    # Past `__setattr__`, by which models track what they are given.
    vars(model)[name] = replacement(getattr(model, name))
    try:
        yield
    finally:
        del vars(model)[name]
        if own is not None:
            vars(model)[name] = own


def losses_by_path(model):
    """The losses that a model was compiled with, as pairs of a path in its output and a loss.

    Expected: `_compile_loss`, `None` without `loss=`; built with the first `compute_loss` or by
    `build_by_symbols`; `_flat_losses` then, whose elements begin with the path and the loss.

    Returns:
        A list of pairs of a tuple and a `keras.losses.Loss`, empty without `loss=`; or `None` while
        the losses are not built.
    """
    if model._compile_loss is None:
        return []
    if not model._compile_loss.built:
        return None
    return [(tuple(path), loss) for path, loss, *_ in model._compile_loss._flat_losses]


def compiled_loss(model):
    """What `compile` made of `loss=`, or `None`; another object after each `compile`.

    Expected: `_compile_loss`.
    """
    return getattr(model, "_compile_loss", None)


def build_by_symbols(model, batch):
    """Build a compiled model, its losses and its metrics; nothing is run, and no seed goes on.

    Expected: `_symbolic_build`, which also makes the metrics of several outputs. A first call of
    `compute_loss` inside of a compiled step would make variables there.

    Args:
        model: the model.
        batch: what `train_step` gets, of `keras.KerasTensor`s.
    """
    model._symbolic_build(data_batch=batch)


def track_loss(model, loss, n_examples):
    """Put a batch's loss into the mean that `fit` shows as "loss".

    Expected: `_loss_tracker`, a `keras.metrics.Mean` that every `train_step` of Keras updates so.
    """
    model._loss_tracker.update_state(loss, sample_weight=n_examples)


def logits_of(tensor):
    """The logits from which a tensor was made by softmax or sigmoid, or `None`.

    Expected: `_keras_logits`, which Keras's activations hang on their output, and which its
    crossentropies read instead of it; so that gradients do not go through the tensor itself.
    """
    return getattr(tensor, "_keras_logits", None)


def mask_of(tensor):
    """The mask of a model's output, or `None`.

    Expected: `_keras_mask`, by which Keras's losses leave steps out and divide by the rest.
    """
    return getattr(tensor, "_keras_mask", None)


def hang_on(tensor, logits=None, mask=None):
    """Give a tensor logits and a mask, where they are not `None`, for losses to read.

    Expected: as `logits_of` and `mask_of` say.
    """
    if logits is not None:
        tensor._keras_logits = logits
    if mask is not None:
        tensor._keras_mask = mask
