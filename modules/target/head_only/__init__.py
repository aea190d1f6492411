"""A target's embedding, final norm and LM head, loaded without its layers."""
