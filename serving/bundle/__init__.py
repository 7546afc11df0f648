"""The bundle directory: manifest, storage, signatures."""
