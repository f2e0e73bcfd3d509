"""Whether "layerwise" is exact for a model: asked of its graph, and of numbers where it is silent.

The model is left as it was: weights, seed generators, moving statistics, states and metrics.
"""

from keras_rgd._keras.models import layers_of
from keras_rgd.per_example.batch import takes_any_size
from keras_rgd.per_example.layer_calls import named
from keras_rgd.per_example.layerwise import trial
from keras_rgd.per_example.layerwise.uses import NotVisibleError
from keras_rgd.per_example.mixing import mixing_of
from keras_rgd.per_example.not_exact import NotExactError, layer_mixes, loss_mixes

# For how many examples a trial step is taken.
_FEW = 16

_ADVICE = (
    "per_example='layerwise' reads each example's gradient off one backward pass over the batch. "
    "Write per_example='double_backward' (or 'auto') instead."
)


def check_layerwise(losses, specs, options, batch=None, sizes=None):
    """Raise `NotExactError` unless "layerwise" is exact for a model.

    Args:
        losses: the `ExampleLosses` of a model.
        specs: a `Batch` of specs, what the step is traced for.
        options: `LayerwiseOptions`; of `repeats` the answer tells.
        batch: a `Batch` for the trial. Defaults to `None`: the graph alone is asked.
        sizes: a batch that says what open sizes in `specs` may be. Defaults to `None`, `batch`.

    Returns:
        A `trial.Traced`.

    Raises:
        NotExactError: names the layer that mixes examples or hides what it does with its weights.
    """
    model = losses.model
    mixing = mixing_of(losses, specs, batch if sizes is None else sizes)
    if mixing.outputs is not None:
        raise NotExactError(layer_mixes(mixing.outputs), _ADVICE)
    if mixing.loss is not None or mixing.beside is not None:
        raise NotExactError(loss_mixes(model, mixing), _ADVICE)
    if mixing.rows is not None:
        raise NotExactError(
            f"Layer {mixing.rows.owner} has examples along another axis than 0, or not one after "
            f"the other, where they meet a weight (in {mixing.rows.operation}).",
            _ADVICE,
        )
    wrong = None
    try:
        if batch is None:
            shown = trial.traced(losses, specs, options)
        else:
            if specs.known_size is None and takes_any_size(model):
                batch = batch.first(_FEW)
            wrong, shown = trial.tried(losses, batch, specs, options)
    except trial.NotApartError as error:
        raise NotExactError(f"For this batch {error}.", _ADVICE) from error
    except NotVisibleError as error:
        raise NotExactError(_hidden(model, error), _ADVICE) from error
    if wrong is None:
        return shown
    raise NotExactError(
        f"The gradient of {wrong} is not what the uses of the weights that can be seen give.",
        _ADVICE,
    )


def _hidden(model, error):
    variable = model.trainable_variables[error.weight]
    owner = [a for a in layers_of(model) if any(v is variable for v in a.variables)][-1]
    return (
        f"Layer {named([owner])} uses its weight '{variable.path}' in {error}, where per-example "
        "gradients cannot be read off."
    )
