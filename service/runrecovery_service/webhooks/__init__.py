"""Delivers events of runs to the webhooks that the operator has configured."""
