"""Train an autoencoder, plain or denoising, on MNIST, ASL or any folder of images.

    python scripts/train_autoencoder.py configs/generative/autoencoder_mnist.yaml
    python scripts/train_autoencoder.py configs/generative/denoising_mnist.yaml --model.strength 0.5
    python scripts/train_autoencoder.py --resume latest
    torchrun --nproc-per-node 2 scripts/train_autoencoder.py configs/generative/autoencoder_mnist.yaml

The run folder that the last line names holds the settings, the metrics, the pictures and the checkpoints. Go on with
scripts/sample.py RUN and scripts/evaluate.py RUN.
"""

import sys

from generative.autoencoder import EXPERIMENT
from lab.launch import launch

if __name__ == "__main__":
    sys.exit(launch(EXPERIMENT, __doc__ or ""))
