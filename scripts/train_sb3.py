"""Train an agent with stable-baselines3's PPO or DQN on an Atari game, or on a small one that takes a minute.

    python scripts/train_sb3.py configs/rl/ppo_catch.yaml
    python scripts/train_sb3.py configs/rl/ppo_pong.yaml --game.name breakout --trainer.seed 1
    python scripts/train_sb3.py configs/rl/sb3_dqn_pong.yaml --replay.capacity 1_000_000
    python scripts/train_sb3.py --resume latest

The run folder that the last line names holds the settings, the metrics, the videos, the checkpoints, and in the end
export/model.zip for PPO.load or DQN.load of stable-baselines3 itself.
"""

import sys

from lab.launch import launch
from rl.sb3 import EXPERIMENT

if __name__ == "__main__":
    sys.exit(launch(EXPERIMENT, __doc__ or ""))
