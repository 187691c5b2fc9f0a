"""Where text comes from: names, files and folders to documents, pairs and rows; tokens on disk."""
