"""Train a generative adversarial network on MNIST, ASL or any folder of images.

    python scripts/train_gan.py configs/generative/gan_mnist.yaml
    python scripts/train_gan.py configs/generative/r3gan_mnist.yaml --model.penalty 2
    python scripts/train_gan.py configs/generative/gan_mnist.yaml --model.critic resnet_small
    python scripts/train_gan.py --resume latest

Losses of a GAN tell little: look at media/samples_*.png and at the critic's mean score of real and of drawn images, which
should stay a little apart (train/critic_real above train/critic_fake). Go on with scripts/sample.py RUN and
scripts/evaluate.py RUN.
"""

import sys

from generative.gan import EXPERIMENT
from lab.launch import launch

if __name__ == "__main__":
    sys.exit(launch(EXPERIMENT, __doc__ or ""))
