"""Serves the metrics of the service, on an address of their own."""
