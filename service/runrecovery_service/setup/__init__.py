"""Builds the objects of one part of the service each; app.py joins them."""
