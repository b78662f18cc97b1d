"""A neural audio codec whose decoder needs one network evaluation: MDCT, quantized codes, mean flows."""

from typing import Any

__version__ = "0.1.0"
__all__ = ["Codec"]


def __getattr__(name: str) -> Any:
    if name == "Codec":  # on demand: JAX takes a second to import
        from meanflow_audio_codec.codec import Codec

        return Codec
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
