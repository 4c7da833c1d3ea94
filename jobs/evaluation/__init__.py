"""What ``jobs.evaluate`` is made of: its settings, and the folder in which its answers lie."""
