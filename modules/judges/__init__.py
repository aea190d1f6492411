"""Learned verification: what decides, beside the target's distribution, whether a drafted token may
stay.
"""
