"""A function of a model and a batch, compiled, with the values of its variables handed in."""

import jax
import keras


def compiled(model, function):
    """`function`, compiled; what it assigns to variables is dropped.

    Args:
        model: the model whose variables it reads and moves.
        function: of tensors, structures of them, or `None`.
    """
    variables = [*model.variables, *(v for m in model.metrics for v in m.variables)]
    variables += model.optimizer.variables
    variables = list({id(v): v for v in variables}.values())

    @jax.jit
    def traced(values, arguments):
        with keras.StatelessScope(state_mapping=zip(variables, values, strict=True)):
            return function(*arguments)

    return lambda *arguments: traced([v.value for v in variables], arguments)
