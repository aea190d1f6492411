"""The frozen large model: loading, its parts, its KV cache, one call per tree."""
