"""Executes runs while the service serves: takes them from the queue, launches, supervises, ends."""
