"""What happens between a start and SERVING: orphans, convergence, bindings, the report."""
