"""Recovery: what happens between a start and SERVING, and at a planned stop."""
