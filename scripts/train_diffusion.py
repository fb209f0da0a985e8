"""Train a diffusion model (DDPM, EDM or flow matching) on MNIST, ASL or any folder of images.

    python scripts/train_diffusion.py configs/generative/diffusion_mnist.yaml
    python scripts/train_diffusion.py configs/generative/diffusion_mnist.yaml --model.process edm --trainer.steps 5000
    python scripts/train_diffusion.py configs/generative/ddpm_mnist.yaml              the U-Net of diffusers, for scripts/export.py
    python scripts/train_diffusion.py configs/generative/diffusion_mnist.yaml --latents RUN     on the codes of a VQ-VAE
    python scripts/train_diffusion.py --resume latest

The run folder that the last line names holds the settings, the metrics, the pictures and the checkpoints. Go on with
scripts/sample.py RUN (--sampler, --steps, --guidance, --kind trajectory, inpainting, variations) and scripts/evaluate.py RUN.
"""

import sys

from generative.diffusion import EXPERIMENT
from lab.launch import launch

if __name__ == "__main__":
    sys.exit(launch(EXPERIMENT, __doc__ or ""))
