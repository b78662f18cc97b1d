"""Train a codec: python train.py --config configs/meanflow_mdct.py --workdir DIR."""

from meanflow_audio_codec.tools.train import main

if __name__ == "__main__":
    main()
