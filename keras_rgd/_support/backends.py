"""Which of Keras's backends runs, and what to say where a part needs another."""

import keras

ON_TENSORFLOW = keras.backend.backend() == "tensorflow"
ON_JAX = keras.backend.backend() == "jax"


def _errors():
    """What the backend raises where tensors do not fit an operation."""
    if not ON_TENSORFLOW:
        return ValueError, TypeError
    import tensorflow as tf

    return ValueError, tf.errors.OpError


ERRORS = _errors()


def needs_tensorflow(name, on_jax=False):
    """Raise `ImportError` for a part of the package by its name, unless its backend runs Keras.

    Args:
        name: the part's.
        on_jax: whether JAX has it too. Defaults to `False`.
    """
    if ON_TENSORFLOW or (on_jax and ON_JAX):
        return
    needed = "the TensorFlow or the JAX backend" if on_jax else "the TensorFlow backend"
    raise ImportError(
        f"{name} needs {needed} of Keras, and this is {keras.backend.backend()!r}. On every "
        "backend there are keras_rgd.RGD(window=32) for any keras.Model, its diffusion_matrix() "
        "and keras_rgd.DiffusionMetric; for the rest set KERAS_BACKEND=tensorflow before Keras is "
        "imported."
    )


def check_float64(dtype, what):
    """Raise `ValueError` where JAX would round numbers of a dtype to float32.

    Args:
        dtype: a dtype's name.
        what: what has it, as the error's subject.
    """
    if dtype != "float64" or not ON_JAX:
        return
    import jax

    if not jax.config.jax_enable_x64:
        raise ValueError(
            f"{what} of dtype float64 would be rounded to float32 by JAX. Set JAX_ENABLE_X64=1 "
            "before JAX is imported, or use float32."
        )


def spec_of(tensor):
    """The shape and dtype of a tensor, as a trace is made for them."""
    if ON_TENSORFLOW:
        import tensorflow as tf

        return tf.TensorSpec(tensor.shape, tensor.dtype)
    import jax

    return jax.ShapeDtypeStruct(tensor.shape, tensor.dtype)


def traced_abstractly(function, tensors):
    """Trace a function of tensors like these, whose numbers are not computed.

    Args:
        function: of one argument for each tensor.
        tensors: a list.
    """
    if ON_TENSORFLOW:
        import tensorflow as tf

        specs = [tf.type_spec_from_value(t) for t in tensors]
        tf.function(function, autograph=False).get_concrete_function(*specs)
    else:
        import jax

        # No variable may be left with a value that is a trace.
        def stateless(*tensors):
            with keras.StatelessScope():
                return function(*tensors)

        jax.eval_shape(stateless, *tensors)
