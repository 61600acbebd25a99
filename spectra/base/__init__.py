"""What everything stands on: errors, vectors as pytrees, meshes, the host, files."""
