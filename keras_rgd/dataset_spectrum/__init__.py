"""D over a whole data set, streamed in batches: its spectrum, its rank, its trace."""

from keras_rgd.dataset_spectrum.spectrum import METHODS, spectrum

__all__ = ["METHODS", "spectrum"]
