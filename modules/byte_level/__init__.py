"""Probabilities of bytes from a language model over tokens."""
