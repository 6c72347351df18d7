"""The seams of the floors below, on many machines."""
