"""Drafters that continue the target's features one position at a time: EAGLE and related
drafters.
"""
