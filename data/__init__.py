"""Where text comes from, and how it reaches the models: download, text, tokens, windows."""
