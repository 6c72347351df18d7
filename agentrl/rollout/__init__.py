"""Playing episodes: the episode loop, the environments it runs in, and the players that reply."""
