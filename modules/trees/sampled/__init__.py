"""Builders that draw from the drafter's distribution."""
