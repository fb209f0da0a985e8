"""Train a classifier: any backbone, on MNIST, ASL or any folder of images, from scratch or from another run's weights.

    python scripts/train_classifier.py configs/classifier/mnist.yaml
    python scripts/train_classifier.py configs/classifier/mnist_fast.yaml --model.backbone vit
    python scripts/train_classifier.py configs/classifier/asl.yaml --init RUN                    every weight learns on
    python scripts/train_classifier.py configs/classifier/asl.yaml --init RUN --freeze           only the last layer learns
    python scripts/train_classifier.py configs/classifier/asl.yaml --init RUN --freeze --thaw-every 100
    python scripts/train_classifier.py --resume latest

RUN is a classifier's run folder; its backbone must be the same one. The run folder that the last line names holds the settings,
the metrics, the confusion matrix, the surest mistakes and the checkpoints. Go on with scripts/evaluate.py RUN and
scripts/classify.py RUN photo.jpg; `python scripts/backbones.py` lists the backbones.
"""

import sys

from lab.classifier import EXPERIMENT
from lab.launch import launch

if __name__ == "__main__":
    sys.exit(launch(EXPERIMENT, __doc__ or ""))
