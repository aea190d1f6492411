"""The target with a part of its KV cache, as a drafter and without verification."""
