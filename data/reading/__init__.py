"""Rows of conversations from files of many shapes; what is left out is counted."""
