"""Losses over long texts and large vocabularies, and what they are averaged over."""
