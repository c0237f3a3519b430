"""Pure tensor functions of the algorithms: torch and megalign.batch only; no ranks, no collectives, no
config.
"""
