"""The contracts (Trainable, Drafter), the frozen target, its KV cache and the shared layers."""
