"""Train a Transformer that writes pictures of a wanted class as tokens of a trained VQ-VAE.

    python scripts/train_vqvae.py configs/generative/vqvae_mnist.yaml --run-dir runs/vq
    python scripts/train_tokens.py configs/generative/tokens_mnist.yaml --vqvae runs/vq        (one token after another)
    python scripts/train_tokens.py configs/generative/masked_mnist.yaml --vqvae runs/vq        (all places in a few rounds)
    python scripts/train_tokens.py --resume latest

The run holds a copy of the VQ-VAE's weights; drawing and judging need nothing else. Go on with scripts/sample.py RUN, where
--guidance, --temperature and --top-k trade variety for clarity, and with scripts/evaluate.py RUN.
"""

import sys

from generative.tokens import EXPERIMENT
from lab.launch import launch

if __name__ == "__main__":
    sys.exit(launch(EXPERIMENT, __doc__ or ""))
