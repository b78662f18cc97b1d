"""Improved mean-flow codec on MDCT tokens: 24 kHz mono, 6.0 kbps, one network evaluation to decode.

    python train.py --config configs/meanflow_mdct.py --workdir /tmp/codec                     built-in synthetic music
    python train.py --config configs/meanflow_mdct.py:data_dir=~/music,variant=S --workdir ... any folder of audio
    python train.py --config configs/meanflow_mdct.py:runlocal --workdir ...                   all of it in two minutes

The rungs of the ladder are `objective=autoencoder | flow_matching | mean_flow | improved_mean_flow`; the other
arguments are those of parse_arg below. Every leaf can be set from the command line: `--config.optimizer.lr=1e-4`.
"""

from ml_collections import ConfigDict

from meanflow_audio_codec.configuration import parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the config of one run; `arg` is `key=value,...` of the arguments below."""
    arg = parse_arg(
        arg,
        data_dir="",  # a folder, or several as in PATH; empty: synthetic music
        valid_dir="",  # empty: the subfolder "valid" of data_dir, or else 5 % of its files, chosen by their names
        cache_dir="",  # a folder for decoded audio, which makes loading ten times as fast; empty: none
        objective="improved_mean_flow",
        backbone="conv",
        tokens="mdct",
        quantizer="fsq",
        variant="Ti",
        sample_rate=24_000,
        runlocal=False,
    )
    config = ConfigDict()
    config.seed = 0
    config.total_steps = 60 if arg.runlocal else 20_000
    config.log_steps = 20
    config.checkpoint_steps = 30 if arg.runlocal else 500
    config.resume = ""  # workdir whose run to continue here
    config.init_from = ""  # workdir whose averaged parameters to start from

    # Tokens: [G, N] MDCT bins a token, G = 2 short frames of N = 128 bins keep pre-echo below 11 ms: 93.75 tokens/s.
    config.tokens = tokens = ConfigDict({"name": arg.tokens})
    if arg.tokens == "mdct":
        tokens.update(hop_length=128, group=2, window="sine")
    else:
        tokens.hop_length = 256
    tokens.exponent = 0.5  # sign(x) |x|^0.5: mean-flow targets need coefficients of one size
    tokens.eps = 1e-4
    tokens.scale = "band"  # divide by the RMS of each band; none: leave as they are

    config.input = ConfigDict({"name": "audio"})
    config.input.data_dir = arg.data_dir
    config.input.valid_dir = arg.valid_dir
    config.input.cache_dir = arg.cache_dir
    config.input.weights = ()  # share of each folder of data_dir in the crops; none: by their hours
    config.input.sample_rate = arg.sample_rate
    config.input.channels = 1
    config.input.num_tokens = 32 if arg.runlocal else 128  # a segment: 1.36 s
    config.input.batch_size = 8 if arg.runlocal else 16
    config.input.gain_db = (-6.0, 6.0)
    config.input.polarity = True
    config.input.silence_db = -60.0
    config.input.min_seconds = 0.0  # shorter files are left out
    config.input.min_bandwidth = 0.0  # Hz; so are files that hold nothing above it
    config.input.short_files = "error"  # shorter than a segment: error, pad, skip
    config.input.bad_files = "error"  # not to be decoded, gone or changed: error, skip
    config.input.read_threads = 2
    config.input.read_processes = 0

    # 93.75 / 2 latents/s * 64 * log2(4) bits = 6.0 kbps; of rvq 16 * log2(256) bits, the same.
    config.model = ConfigDict()
    config.model.variant = arg.variant
    config.model.backbone = arg.backbone
    config.model.output = "x"
    config.model.conditioning = "latent"
    config.model.quantizer = arg.quantizer
    config.model.fsq_levels = 4
    config.model.num_quantizers = 16  # of rvq
    config.model.codebook_size = 256
    config.model.quantizer_dropout = 0.0  # share of the clips that train at a lower bitrate
    config.model.latent_dim = 64
    config.model.downsample = 2
    config.model.level_stages = 12  # of gain_shape, 8 bits each, for the levels of a latent
    config.model.max_bits = 1024  # of gain_shape, a latent at most, with those of the levels
    config.model.window = 32  # frames that a block of the mixer or transformer sees
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
    config.objective.hdudt_limit = 0.0  # times |u|, of h du/dt in the target; 0: none, as in comparisons of methods
    config.objective.norm_p = 1.0
    config.objective.norm_eps = 0.01
    config.objective.weighting = "feature"  # every feature counts alike; band: every band of the ear's scale
    config.objective.mel_weight = 0.0  # of the one-step sample's energy distance in mels; 0 in comparisons of methods
    config.objective.mel_fraction = 1.0  # share of the clips that it is taken of: for half it costs as much as the rest

    config.optimizer = ConfigDict()
    config.optimizer.name = "muon"  # or adamw
    config.optimizer.lr = 3e-3
    config.optimizer.final_lr_share = 0.05
    config.optimizer.warmup_steps = 10 if arg.runlocal else 300
    config.optimizer.b1 = 0.9  # these two of Adam, which takes what is no matrix
    config.optimizer.b2 = 0.95
    config.optimizer.wd = 0.0
    config.optimizer.grad_clip_norm = 1.0
    config.ema = ConfigDict({"decay": 0.999})

    # Evaluations come at step `first_steps`, for a sample to hear soon, then every `every_steps`, and at the end.
    nfe = (1,) if arg.objective == "autoencoder" else (1, 2, 4, 16)
    short = arg.runlocal
    when = dict(first_steps=20 if short else 100, every_steps=30 if short else 1000)
    seconds = 1.0 if short else 3.0
    config.evals = ConfigDict()
    config.evals.validation = dict(type="validation", batches=2 if short else 8, seconds=seconds / 2, **when)
    config.evals.reconstruction = dict(
        type="reconstruction",
        num_clips=4 if short else 24,
        seconds=seconds,
        nfe=nfe,
        autoencoder="",
        kept=(),  # to decode at lower bitrates too: codebooks, the first ones, or of gain_shape bits a latent
        **when,
    )
    config.evals.samples = dict(type="sampling", num_clips=4, seconds=seconds, nfe=nfe, **when)
    # In batches of one shape with the clips above, which share their compiled program.
    few = 4 if short else 16
    at_end = dict(first_steps=config.total_steps, every_steps=config.total_steps)
    config.evals.tones = dict(type="tones", num_tones=few, seconds=seconds, nfe=nfe, **at_end)
    config.evals.cost = dict(type="cost", num_examples=few, seconds=seconds, nfe=nfe, **at_end)
    return config.lock()
