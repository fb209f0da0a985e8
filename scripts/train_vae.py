"""Train a variational autoencoder on MNIST, ASL or any folder of images.

    python scripts/train_vae.py configs/generative/vae_mnist.yaml
    python scripts/train_vae.py configs/generative/vae_mnist.yaml --optimizer.lr 3e-4 --trainer.steps 5000
    python scripts/train_vae.py --resume latest
    torchrun --nproc-per-node 2 scripts/train_vae.py configs/generative/vae_mnist.yaml

The run folder that the last line names holds the settings, the metrics, the pictures and the checkpoints. Go on with
scripts/sample.py RUN and scripts/evaluate.py RUN.
"""

import sys

from generative.vae import EXPERIMENT
from lab.launch import launch

if __name__ == "__main__":
    sys.exit(launch(EXPERIMENT, __doc__ or ""))
