"""Train a vector-quantised autoencoder, which writes an image as 7x7 tokens, on MNIST, ASL or any folder of images.

    python scripts/train_vqvae.py configs/generative/vqvae_mnist.yaml
    python scripts/train_vqvae.py configs/generative/vqvae_mnist.yaml --model.codes 256 --trainer.steps 5000
    python scripts/train_vqvae.py --resume latest

Look at the perplexity: as many codes are in use. Its own samples fall apart, since it draws every token by itself; go on with
scripts/train_tokens.py --vqvae RUN, which learns how tokens belong together. scripts/evaluate.py RUN tells how well images
come back.
"""

import sys

from generative.vqvae import EXPERIMENT
from lab.launch import launch

if __name__ == "__main__":
    sys.exit(launch(EXPERIMENT, __doc__ or ""))
