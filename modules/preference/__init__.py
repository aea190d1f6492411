"""Token-level preference training, of the target through adapters and of drafters."""
