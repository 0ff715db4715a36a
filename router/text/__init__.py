"""From text to token ids and back. Pure: no HTTP, no nodes."""
