"""One module for each peer; each runs in the peers' virtual environment, in a process of its own."""
