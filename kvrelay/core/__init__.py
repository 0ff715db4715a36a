"""What every role shares: ids, errors, requests, messages, transport and the shell. Knows no Paddle, HTTP or Redis."""
