"""Records of D: on a batch (`DiffusionRecord`), and over a data set (`Spectrum`)."""

from keras_rgd.records.diffusion_record import DiffusionRecord, load_records, save_records
from keras_rgd.records.spectrum import Spectrum

__all__ = ["DiffusionRecord", "Spectrum", "load_records", "save_records"]
