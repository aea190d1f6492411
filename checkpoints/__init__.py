"""What a trained component looks like outside this repository: folders, formats, cards,
provenance.
"""
