"""The OpenAI API: parses and checks requests, writes answers and streams. ``schemas`` has every field."""
