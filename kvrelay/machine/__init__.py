"""What the state machines of all roles share: their contract, heartbeats, registration, status tables. No I/O."""
