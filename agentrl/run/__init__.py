"""What a run consists of on disk and in memory: configuration, folder, checkpoints, logs and policies."""
