"""What checks the project's own predictions against measurements."""
