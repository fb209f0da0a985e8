"""What both tracks share: settings, runs, the trainer, checkpoints, recording and data. Knows nothing of agents or images' meaning."""

import os

# Threads of torch that wait for work turn in circles for milliseconds by default, on cores that emulators and other processes need.
# GNU's OpenMP reads this when torch loads it, so it stands before torch. 10,000 turns are some 30 microseconds, longer than most waits.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
