"""The research ladder on MNIST: every objective, backbone and tokenisation, in minutes on a CPU.

    python -m meanflow_audio_codec.tools.prepare_mnist --output-dir ~/mnist
    python train.py --config configs/mnist_classifier.py:data_dir=~/mnist --workdir /tmp/classifier
    python train.py --config configs/mnist.py:data_dir=~/mnist,classifier=/tmp/classifier --workdir /tmp/mnist

An image is the signal of its 784 pixels, row by row; the tokens are those of audio, joined to one latent of 24 bits:
few enough that many images share a code, and that what lies between their mean and the images shows. The arguments are
those of parse_arg below; every leaf can be set from the command line: `--config.objective.norm_p=0.5`.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from meanflow_audio_codec.configuration import parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the config of one run; `arg` is `key=value,...` of the arguments below."""
    arg = parse_arg(
        arg,
        data_dir="",  # the folder of prepare_mnist
        classifier="",  # workdir of configs/mnist_classifier.py, for FID, KID and accuracy; empty: without these
        objective="improved_mean_flow",
        backbone="conv",
        tokens="mdct",
        conditioning="latent",  # what the decoder knows of the image: its code; label; none
        quantizer="fsq",
        variant="N",
        runlocal=False,
    )
    config = ConfigDict()
    config.seed = 0
    config.total_steps = 20 if arg.runlocal else 4000
    config.log_steps = 10 if arg.runlocal else 100
    config.checkpoint_steps = 10 if arg.runlocal else 1000
    config.resume = ""  # workdir whose run to continue here
    config.init_from = ""  # workdir whose averaged parameters to start from

    # Four rows of pixels a token: 7 of them, or 8 MDCT frames. Pixels have no heavy tails and the size of noise, and an
    # orthonormal transform keeps distances: tokens stay as they are.
    config.tokens = ConfigDict({"name": arg.tokens, "hop_length": 112})
    if arg.tokens == "mdct":
        config.tokens.update(group=1, window="sine")
    config.tokens.exponent = 1.0
    config.tokens.eps = 1e-4
    config.tokens.scale = "none"  # band: divide by the RMS of each band

    config.input = ConfigDict({"name": "mnist"})
    config.input.data_dir = arg.data_dir or placeholder(str)
    config.input.batch_size = 16 if arg.runlocal else 64

    config.model = ConfigDict()
    config.model.variant = arg.variant
    config.model.backbone = arg.backbone
    config.model.output = "x"
    config.model.conditioning = arg.conditioning
    config.model.quantizer = arg.quantizer
    config.model.fsq_levels = 8
    config.model.num_quantizers = 3  # of rvq
    config.model.codebook_size = 256
    config.model.quantizer_dropout = 0.0  # share of the clips that train at a lower bitrate
    config.model.latent_dim = 8
    config.model.downsample = 8 if arg.tokens == "mdct" else 7
    config.model.window = 8  # an image's frames
    config.model.times = "t_h"
    config.model.time_scale = 1.0
    config.model.velocity_head = False
    config.model.dtype = "float32"

    config.objective = ConfigDict()
    config.objective.name = arg.objective
    config.objective.fm_fraction = 0.5
    config.objective.time_sampler = "mixture"
    config.objective.P_mean = -0.4
    config.objective.P_std = 1.0
    config.objective.hdudt_limit = 0.0
    config.objective.norm_p = 1.0
    config.objective.norm_eps = 0.01

    config.optimizer = ConfigDict()
    config.optimizer.name = "muon"  # or adamw
    config.optimizer.lr = 5e-3
    config.optimizer.final_lr_share = 0.05
    config.optimizer.warmup_steps = 10 if arg.runlocal else 300
    config.optimizer.b1 = 0.9  # these two of Adam, which takes what is no matrix
    config.optimizer.b2 = 0.95
    config.optimizer.wd = 0.0
    config.optimizer.grad_clip_norm = 1.0
    config.ema = ConfigDict({"decay": 0.999})

    # One evaluation along the way; at the end as many as it takes to see where each rung goes.
    steps = config.total_steps
    nfe = (1,) if arg.objective == "autoencoder" else (1, 2, 4) if arg.runlocal else (1, 2, 4, 8, 16, 50)
    images = dict(num_images=20 if arg.runlocal else 2000, classifier=arg.classifier)
    along = dict(first_steps=steps // 4, every_steps=steps // 4)
    at_end = dict(first_steps=steps, every_steps=steps)
    config.evals = ConfigDict()
    config.evals.validation = dict(type="validation", batches=1 if arg.runlocal else 8, **along)
    config.evals.images = dict(type="images", nfe=(1,), draw=False, **images, **along)
    config.evals.images_at_end = dict(type="images", nfe=nfe, draw=True, **images, **at_end)
    config.evals.cost = dict(type="cost", num_examples=16, nfe=nfe, **at_end)
    return config.lock()
