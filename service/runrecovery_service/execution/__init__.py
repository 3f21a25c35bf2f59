"""What happens while the service serves: runs are taken from the queue, launched and followed."""
