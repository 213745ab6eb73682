"""The picture: how the loss fell, and which experts got how many rows."""

from __future__ import annotations

import pathlib

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
import matplotlib.pyplot as plt


def save(path: pathlib.Path, bits: np.ndarray, counts: np.ndarray, entropy: float) -> None:
    """Writes a PNG.

    Args:
      path: of the file; its directory is made.
      bits: f32 [steps], bits per byte.
      counts: i32 [steps, layers, experts], rows of each expert.
      entropy: of single bytes, bits.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fig, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    left.plot(bits, lw=1, label="model")
    left.axhline(entropy, color="tab:red", ls="--", label="entropy of single bytes")
    left.set(
        xlabel="step", ylabel="bits per byte", ylim=(0, None), title="Loss on text not yet seen"
    )
    left.legend()

    share = counts / counts.sum(-1, keepdims=True) * counts.shape[-1]
    rows = share.reshape(len(share), -1).T
    image = right.imshow(rows, aspect="auto", vmin=0, vmax=2, cmap="RdBu_r", interpolation="none")
    right.set(xlabel="step", ylabel="expert, layer after layer", title="Load of each expert")
    fig.colorbar(image, ax=right, label="1 = an equal share")
    fig.savefig(path, dpi=110)
    plt.close(fig)
