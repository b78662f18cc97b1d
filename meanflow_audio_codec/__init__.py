"""A neural audio codec whose decoder needs one network evaluation: MDCT, quantized codes, mean flows."""

__version__ = "0.1.0"
