"""Residual MLP decoder: every frame by itself. The baseline that shows what looking at neighbours is worth."""

from meanflow_audio_codec.models.conv_flow import ConvFlow


class MlpFlow(ConvFlow):
    """`ConvFlow` without its convolutions: the receptive field is one frame, the parameter count the same but for the taps."""

    kernel_size: int = 1
