"""The guest's side: PID 1's source and binary, the image builder, the archive that carries the workload."""
