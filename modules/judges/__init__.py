"""Learned verification: trained components that decide whether drafted tokens are accepted."""
