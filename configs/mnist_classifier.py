"""The classifier of MNIST whose features and labels score the samples of configs/mnist.py: over 99 % in two minutes.

python train.py --config configs/mnist_classifier.py:data_dir=~/mnist --workdir /tmp/classifier
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from meanflow_audio_codec.configuration import parse_arg


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the config of one run; `arg` is `key=value,...` of the arguments below."""
    arg = parse_arg(
        arg,
        data_dir="",  # the folder of prepare_mnist
        runlocal=False,
    )
    config = ConfigDict()
    config.seed = 0
    config.total_steps = 20 if arg.runlocal else 2000
    config.log_steps = 10 if arg.runlocal else 100
    config.checkpoint_steps = 10 if arg.runlocal else 500
    config.resume = ""  # workdir whose run to continue here
    config.init_from = ""  # workdir whose averaged parameters to start from

    config.input = ConfigDict({"name": "mnist"})
    config.input.data_dir = arg.data_dir or placeholder(str)
    config.input.batch_size = 16 if arg.runlocal else 128

    config.model = ConfigDict()
    config.model.width = 16
    config.model.num_features = 64

    config.objective = ConfigDict({"name": "classification"})

    config.optimizer = ConfigDict()
    config.optimizer.name = "adamw"
    config.optimizer.lr = 2e-3
    config.optimizer.final_lr_share = 0.01
    config.optimizer.warmup_steps = 10 if arg.runlocal else 200
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.999
    config.optimizer.wd = 0.01
    config.optimizer.grad_clip_norm = 1.0
    config.ema = ConfigDict({"decay": 0.999})

    steps = config.total_steps
    config.evals = ConfigDict()
    config.evals.validation = dict(
        type="validation", batches=1 if arg.runlocal else 78, first_steps=steps // 4, every_steps=steps // 4
    )
    return config.lock()
