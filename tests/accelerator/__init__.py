"""Checks on a pretend accelerator, in a process of their own: a backend of torch cannot be taken
back.
"""
