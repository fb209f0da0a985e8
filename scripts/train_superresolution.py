"""Train a network that enlarges pictures, on pictures and themselves made small: SRResNet, or SRGAN with its critic.

    python scripts/train_superresolution.py configs/generative/superresolution_mnist.yaml          (7 x 7 to 28 x 28 pixels)
    python scripts/train_superresolution.py configs/generative/superresolution_2x_mnist.yaml       (14 x 14 to 28 x 28)
    python scripts/train_superresolution.py configs/generative/superresolution_mnist.yaml --model.adversarial 0
    python scripts/train_superresolution.py configs/generative/superresolution_mnist.yaml --model.features CLASSIFIER_RUN
    python scripts/train_superresolution.py --resume latest

Without the critic (adversarial 0) the scores are best and edges are soft; with it they are sharper. --model.features adds a term
that compares what a classifier of scripts/train_classifier.py sees. Go on with scripts/enlarge.py RUN and scripts/evaluate.py RUN.
"""

import sys

from generative.superresolution import EXPERIMENT
from lab.launch import launch

if __name__ == "__main__":
    sys.exit(launch(EXPERIMENT, __doc__ or ""))
