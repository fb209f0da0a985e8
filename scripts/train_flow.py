"""Train a normalising flow, NICE, RealNVP or Glow: images to noise and back, with the exact likelihood.

    python scripts/train_flow.py configs/generative/glow_mnist.yaml
    python scripts/train_flow.py configs/generative/glow_mnist.yaml --model.conditional true     (samples by class)
    python scripts/train_flow.py configs/generative/realnvp_mnist.yaml --model.hidden 32
    python scripts/train_flow.py configs/generative/nice_mnist.yaml --trainer.steps 5000
    python scripts/train_flow.py --resume latest

The loss is in bits per dimension: 8 would be no knowledge of pixels at all, and a good flow of MNIST needs little more than 1.
The run folder that the last line names holds the settings, the metrics, the pictures and the checkpoints. Go on with
scripts/sample.py RUN (--temperature 0.9 draws likelier, less varied pictures) and scripts/evaluate.py RUN.
"""

import sys

from generative.flow import EXPERIMENT
from lab.launch import launch

if __name__ == "__main__":
    sys.exit(launch(EXPERIMENT, __doc__ or ""))
