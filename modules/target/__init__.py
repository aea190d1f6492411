"""The frozen large model: loading, architecture, KV cache, passes over rows."""
