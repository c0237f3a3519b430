"""Packages that are not installed here, as far as a test needs them."""
