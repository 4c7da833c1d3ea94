"""Other people's models, trained beside ours on the same rows."""
