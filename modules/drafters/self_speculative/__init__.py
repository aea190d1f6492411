"""Drafters made of the layers of their target: lower or fewer layers draft, all layers verify."""
