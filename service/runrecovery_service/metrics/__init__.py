"""What monitoring can read: the numbers of the service, on an address of their own."""
