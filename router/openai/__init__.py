"""The OpenAI API: requests read and checked, answers and streams written. See ``schemas`` for every field."""
