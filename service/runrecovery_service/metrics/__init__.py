"""What monitoring can read: the numbers of every room, on an address of their own."""
