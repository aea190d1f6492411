"""Rows of conversations from files of many formats, with counts of skipped ones."""
