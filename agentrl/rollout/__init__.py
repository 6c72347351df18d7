"""Episodes out: the loop, who drives it, and who replies."""
