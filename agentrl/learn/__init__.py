"""Learning: tensors in, better weights out."""
