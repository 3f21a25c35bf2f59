"""What happens after a start: runs are taken from the queue, launched, supervised and ended."""
