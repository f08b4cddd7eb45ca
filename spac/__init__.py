"""spac: Mixture-of-Experts models larger than the GPU, fast, without changing their answers."""

__version__ = "0.1.0"
