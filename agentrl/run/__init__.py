"""The parts of a run on disk and in memory: configuration, folder, checkpoints, logs and policies."""
