"""What bot frameworks store their conversations through; each module needs its framework installed."""
