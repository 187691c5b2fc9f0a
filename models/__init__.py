"""Further networks, one file each, from model.py's parts: see docs/your-own.md."""
