"""Residual MLP decoder: every frame by itself. The baseline that shows what looking at neighbours is worth."""

from meanflow_audio_codec.models.conv_flow import ConvFlow


class MlpFlow(ConvFlow):
    """`ConvFlow` without its convolutions: each output sees one frame; the same parameters but for the taps."""

    kernel_size: int = 1
