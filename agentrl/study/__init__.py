"""Train several methods from the same starting point on the same seeds, and compare their results."""
