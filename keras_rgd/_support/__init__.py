"""What could stand in any package: argument checks, batches of data, vectors, eigensolvers."""
