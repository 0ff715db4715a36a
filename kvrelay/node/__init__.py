"""What prefill, decode and mixed nodes share: the process, plans for the engine, orders of prompts."""
