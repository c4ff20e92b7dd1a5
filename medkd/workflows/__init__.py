"""What a command does, from its arguments to files on disk."""
