"""Teach a trained diffusion model to a student that makes images in one to four steps.

    python scripts/train_distillation.py configs/generative/distillation_mnist.yaml --teacher RUN
    python scripts/train_distillation.py configs/generative/distillation_mnist.yaml --teacher RUN --model.steps 1
    python scripts/train_distillation.py configs/generative/distillation_mnist.yaml --teacher RUN --model.guidance 1.5
    python scripts/train_distillation.py --resume latest

The data settings must be those of the teacher. The run folder that the last line names holds the settings, the metrics, the
pictures and the checkpoints. Go on with scripts/sample.py RUN and scripts/evaluate.py TEACHER RUN.
"""

import sys

from generative.distillation import EXPERIMENT
from lab.launch import launch

if __name__ == "__main__":
    sys.exit(launch(EXPERIMENT, __doc__ or ""))
