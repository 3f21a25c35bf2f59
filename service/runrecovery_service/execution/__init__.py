"""Executes runs while the service serves: queue, launch, supervision, end."""
