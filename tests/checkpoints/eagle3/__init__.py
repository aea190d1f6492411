"""Tests of the formats of EAGLE-3, EAGLE-3.1 and P-EAGLE."""
