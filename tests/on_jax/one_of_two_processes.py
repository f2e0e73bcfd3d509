"""One of two processes that train one model together; run by test_devices.py.

    python one_of_two_processes.py ADDRESS INDEX

prints its weights and the largest eigenvalues of D after the last epoch, as JSON.
"""

import itertools
import json
import sys

import keras
import numpy as np
from keras import layers as L
from steps_on_jax import X, Y, classifier

import keras_rgd


def halves(index):
    """The half that process `index` has of each batch of 16, without end."""
    for start in itertools.cycle(range(0, len(X), 16)):
        mine = slice(start + 8 * index, start + 8 * index + 8)
        yield X[mine], Y[mine]


def main():
    """Train, measure, print."""
    address, index = sys.argv[1], int(sys.argv[2])
    keras.distribution.initialize(address, 2, index)
    parallel = keras.distribution.DataParallel(auto_shard_dataset=False)
    keras.distribution.set_distribution(parallel)
    model = classifier(
        keras_rgd.RGD(0.1), lambda: [L.Dense(5), L.BatchNormalization(), L.Activation("tanh")]
    )
    model.fit(halves(index), steps_per_epoch=3, epochs=2, verbose=0)
    monitor = keras_rgd.DiffusionMonitor((X, Y))
    model.fit(halves(index), steps_per_epoch=3, verbose=0, callbacks=[monitor])
    weights = [np.asarray(v.value.addressable_data(0)).ravel() for v in model.variables]
    print(
        json.dumps(
            {
                "weights": np.concatenate(weights).tolist(),
                "eigenvalues": list(monitor.records[0].eigenvalues[:10]),
            }
        )
    )


main()
