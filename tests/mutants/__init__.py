"""Faults planted in the code one at a time, to see that the tests named beside each of them notice
(`make mutants`).
"""
