"""Executes runs while the service serves: takes runs from the queue, and supervises their turns."""
