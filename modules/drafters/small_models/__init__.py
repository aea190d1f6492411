"""Small language models that draft: they read only tokens, so they can serve any target with the
same vocabulary.
"""
