"""Drafting heads on the target's last hidden state."""
