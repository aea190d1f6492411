"""The Lightning module, callbacks, checkpoints and strategies."""
