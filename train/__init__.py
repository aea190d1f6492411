"""Training of any Trainable with Lightning."""
