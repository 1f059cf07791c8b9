"""What a prepared folder holds, token by token: read (`inspect`), in the terminal and as one HTML page."""
