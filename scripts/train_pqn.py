"""Train a PQN agent from scratch, on any Atari game or on one of the small games: the fastest way here to an agent that plays.

    python scripts/train_pqn.py configs/rl/pqn_catch.yaml                    seconds
    python scripts/train_pqn.py configs/rl/pqn_pong.yaml
    python scripts/train_pqn.py configs/rl/pqn_pong.yaml --game.name ALE/Seaquest-v5 --trainer.steps 10000
    python scripts/train_pqn.py --resume latest

The run folder that the last line names holds the settings, the metrics, videos of games and the checkpoints. Go on with
scripts/watch.py RUN and scripts/evaluate.py RUN.
"""

import sys

from lab.launch import launch
from rl.pqn import EXPERIMENT

if __name__ == "__main__":
    sys.exit(launch(EXPERIMENT, __doc__ or ""))
