"""Decoded images beside the originals: distances, the distribution's distance, and a grid to look at.

With a code this judges reconstructions of the test images; given a label or nothing it judges samples, for which only
the distances between distributions, the accuracy and the entropy mean something.
"""

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float

from meanflow_audio_codec.evaluators import image_metrics
from meanflow_audio_codec.evaluators.common import Context, batches_of, decode


class Evaluator:
    """Decode `num_images` test images at each `nfe`.

    `classifier`, unless empty, is the workdir of configs/mnist_classifier.py: its features give FID and KID against all
    test images, its labels the accuracy and the entropy of the classes. `draw` writes samples/<step>/grid.png.
    """

    def __init__(self, context: Context, num_images: int, nfe: tuple[int, ...], classifier: str, draw: bool):
        self._context, self._nfe, self._draw = context, nfe, draw
        self._examples, _ = context.examples(num_images)
        self._classify = context.load_classifier(classifier) if classifier else None
        if self._classify is not None:
            real, _ = context.examples(None)
            self._real = image_metrics.real_statistics(self._features(real["image"])[1])

    def run(self, state: Any) -> Iterator[tuple[str, float]]:
        """Yield images/<metric>_nfe<k>."""
        images = self._examples["image"]
        columns = {"original": images}
        for nfe in self._nfe:
            signals, x_mse = decode(self._context, state, self._examples, nfe)
            decoded = np.clip(signals.reshape(images.shape), -1, 1)
            columns[f"nfe {nfe}"] = decoded
            scores = {
                "x_mse": x_mse.mean(),
                "mse": np.mean((decoded - images) ** 2),
                "psnr_db": image_metrics.psnr_db(images, decoded).mean(),
                "ssim": image_metrics.ssim(images, decoded).mean(),
            }
            if self._classify is not None:
                scores |= self._distribution(decoded)
            for name, value in scores.items():
                yield f"images/{name}_nfe{nfe}", float(value)
        if self._draw:
            folder = epath.Path(self._context.workdir) / "samples" / str(int(state.step))
            folder.mkdir(parents=True, exist_ok=True)
            draw_grid(folder / "grid.png", {name: column[:24] for name, column in columns.items()})

    def _distribution(self, decoded: Float[np.ndarray, "n 28 28 1"]) -> dict[str, float]:
        predicted, features = self._features(decoded)
        return image_metrics.fid_and_kid(features, self._real) | {
            "accuracy_percent": 100 * np.mean(predicted == self._examples["label"]),
            "mode_entropy_bits": image_metrics.mode_entropy_bits(predicted, 10),
        }

    def _features(self, images: Float[np.ndarray, "n 28 28 1"]) -> tuple[np.ndarray, np.ndarray]:
        """Return the classes and the features that the classifier sees in images."""
        parts = [self._classify(rows["image"]) for _, rows in batches_of({"image": images}, 500)]
        logits, features = (np.concatenate([np.asarray(part) for part in side]) for side in zip(*parts, strict=True))
        return logits.argmax(axis=-1), features


def draw_grid(path: epath.PathLike, columns: dict[str, Float[np.ndarray, "n 28 28 1"]]) -> None:
    """Draw one row of images for each entry, titled at the left, as a PNG."""
    from matplotlib.figure import Figure  # a second to import: only when drawn; no pyplot state

    count = len(next(iter(columns.values())))
    figure = Figure(figsize=(0.4 * count + 0.9, 0.42 * len(columns)), layout="constrained")
    for panel, (title, images) in zip(figure.subplots(len(columns), squeeze=False)[:, 0], columns.items(), strict=True):
        panel.imshow(np.concatenate(images[..., 0], axis=1), cmap="gray_r", vmin=-1, vmax=1, interpolation="nearest")
        panel.set_ylabel(title, fontsize=8, rotation=0, ha="right", va="center", color="#808790")
        panel.set_xticks([])
        panel.set_yticks([])
        panel.spines[:].set_visible(False)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=100, transparent=True)
    epath.Path(path).write_bytes(png.getvalue())
