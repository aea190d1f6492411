"""Conversations into tokens with a loss mask, packed rows, cached target states and batches."""
