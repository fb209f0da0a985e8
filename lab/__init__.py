"""What both tracks share: settings, runs, the trainer, checkpoints, recording and data. Knows nothing of agents or images' meaning."""
