"""Train a DQN agent from scratch, on any Atari game or on one of the small games.

    python scripts/train_dqn.py configs/rl/dqn_catch.yaml                    half a minute
    python scripts/train_dqn.py configs/rl/dqn_pong.yaml
    python scripts/train_dqn.py configs/rl/dqn_pong.yaml --game.name ALE/Seaquest-v5 --trainer.steps 60000
    python scripts/train_dqn.py configs/rl/rainbow_catch.yaml                a minute
    python scripts/train_dqn.py configs/rl/dqn_nature.yaml --game.name breakout
    python scripts/train_dqn.py --resume latest

The run folder that the last line names holds the settings, the metrics, videos of games and the checkpoints, with the
replay memory. Go on with scripts/watch.py RUN and scripts/evaluate.py RUN.
"""

import sys

from lab.launch import launch
from rl.dqn import EXPERIMENT

if __name__ == "__main__":
    sys.exit(launch(EXPERIMENT, __doc__ or ""))
