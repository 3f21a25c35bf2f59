"""The configuration: its keys (`settings`), its sources (`reading`), and reloads (`reloading`)."""
