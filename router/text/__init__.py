"""Text to token ids and back. No HTTP, no nodes."""
