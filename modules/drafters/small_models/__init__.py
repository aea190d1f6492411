"""Small language models that draft: they read tokens alone, so they may serve any target with the
same vocabulary.
"""
