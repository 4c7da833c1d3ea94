"""What a user would pick instead. Each peer is optional: without it a row says so, and nothing else changes."""
