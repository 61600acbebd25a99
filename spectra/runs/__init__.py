"""What a run leaves on disk so that the same call goes on with it."""
