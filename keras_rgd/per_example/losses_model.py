"""A function that returns the losses of examples, as a model that has them: for the monitor."""

import keras
from keras import ops


class LossesModel(keras.Model):
    """A model whose output is `losses(batch)`, and whose loss is their weighted mean.

    Its batch is an element of the data as it is given: x, (x, y) or (x, y, sample_weight).

    Args:
        watched: the model that trains. Its states are this model's: a measurement leaves them as
            they were.
        losses: a function of a batch that returns the loss of each example, shape (N,).
        weights: the variables that D is about, or `None` for those of `watched` that train.
    """

    def __init__(self, watched, losses, weights=None):
        super().__init__(name=f"losses_of_{watched.name}")
        self.watched = watched
        self._losses_of, self._about = losses, weights
        self.compile("sgd", jit_compile=False)

    @property
    def trainable_variables(self):
        """The variables that D is about."""
        return list(self.watched.trainable_variables if self._about is None else self._about)

    @property
    def non_trainable_variables(self):
        """All others of the model that trains."""
        about = {id(v) for v in self.trainable_variables}
        return [v for v in self.watched.variables if id(v) not in about]

    def build(self, batch_shape=None):
        """Nothing: what `losses` calls builds itself."""

    def call(self, batch):
        """The losses, shape (N,); layers inside find out by themselves whether they train."""
        losses = ops.convert_to_tensor(self._losses_of(batch))
        if len(losses.shape) != 1:
            raise ValueError(
                "`losses` must return one number for each example, shape (N,). "
                f"Received: shape {tuple(losses.shape)}"
            )
        return losses

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        """Their mean, each times its weight."""
        return ops.mean(y_pred if sample_weight is None else y_pred * sample_weight)


def as_given(x, y, sample_weight):
    """A batch as a data set gives it, from its three parts."""
    if sample_weight is not None:
        return x, y, sample_weight
    return x if y is None else (x, y)
